"""The HTML report, opened in headless Chromium."""

from __future__ import annotations

from pathlib import Path

import pytest

from d2llm.reports.html import render_html
from report_samples import hostile_report, pairs_report, retrieval_report

WIDE, PHONE = 1200, 360


@pytest.fixture
def open_report(tabs, tmp_path):
    """Opens a report; at teardown, fails if it made a network request or wrote to the console."""
    requests, complaints = [], []
    listeners = {
        "request": lambda request: requests.append(request.url),
        "console": lambda message: complaints.append(message.text),
        "pageerror": lambda error: complaints.append(str(error)),
        "dialog": lambda dialog: complaints.append(dialog.message),
    }

    def open_page(report, width=WIDE, colours="light"):
        path = Path(tmp_path) / "report.html"
        path.write_text(render_html(report), encoding="utf-8")
        return tabs.open(path.as_uri(), width=width, colours=colours, listeners=listeners)

    yield open_page
    tabs.clear()
    assert not complaints
    assert {url.split(":")[0] for url in requests} <= {"file", "data"}
    assert all(url.endswith("/report.html") for url in requests if url.startswith("file"))


def count_marks(page, identity):
    """Count the marks with an area in a plot, which must be visible."""
    plot = page.locator(f"svg#{identity}")
    assert plot.is_visible()
    box = plot.bounding_box()
    assert box["width"] > 200
    assert box["height"] > 150
    return plot.locator(".mark").evaluate_all(
        "marks => marks.filter(mark => { const box = mark.getBoundingClientRect();"
        " return box.width > 0 && box.height > 0; }).length"
    )


def overlapping_texts(page, identity):
    """Pairs of texts of a plot that overlap by more than the empty margins of their fonts."""
    return page.locator(f"svg#{identity} text").evaluate_all(
        """texts => {
            const boxes = texts.map(text => [text.textContent, text.getBoundingClientRect()]);
            const found = [];
            boxes.forEach(([one, a], index) => boxes.slice(index + 1).forEach(([other, b]) => {
                const width = Math.min(a.right, b.right) - Math.max(a.left, b.left);
                const height = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
                if (width > 2 && height > 4) found.push([one, other]);
            }));
            return found;
        }"""
    )


def overflow(page):
    return page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")


def test_every_plot_shows_its_data(open_report):
    report = retrieval_report()
    page = open_report(report)
    assert page.title() == "banking77 / test – d2llm evaluation"
    assert count_marks(page, "plot-quality-cost") == len(report.rows)
    ours, theirs = (report.details.values[name]["nDCG@10"] for name in ("D2LLM", "cosine, untuned"))
    unequal = sum(mine != other for mine, other in zip(ours, theirs, strict=True))
    assert count_marks(page, "plot-differences") == unequal
    assert count_marks(page, "plot-calibration") == 2 * len(report.calibration[0].bins)
    assert count_marks(page, "plot-histogram-1") == count_marks(page, "plot-histogram-2") == 2
    for identity in ("plot-quality-cost", "plot-differences", "plot-histogram-1"):
        assert overlapping_texts(page, identity) == []
    assert overflow(page) == 0


def test_a_report_on_pairs_has_its_plots(open_report):
    page = open_report(pairs_report())
    assert count_marks(page, "plot-quality-cost") == 3
    assert count_marks(page, "plot-differences") > 10
    assert count_marks(page, "plot-calibration") > 2
    assert count_marks(page, "plot-histogram-1") == 2


def test_a_phone_shows_narrow_plots_and_never_scrolls_sideways(open_report):
    page = open_report(retrieval_report(), width=PHONE)
    assert overflow(page) == 0
    page.locator("details").evaluate_all("all => all.forEach(one => { one.open = true; })")
    assert overflow(page) == 0
    assert not page.locator("svg#plot-quality-cost").is_visible()
    assert count_marks(page, "plot-quality-cost-narrow") == 8
    assert count_marks(page, "plot-differences-narrow") > 50
    assert (
        overlapping_texts(page, "plot-quality-cost-narrow") == overlapping_texts(page, "plot-differences-narrow") == []
    )
    sizes = page.locator("svg#plot-quality-cost-narrow text").evaluate_all(
        "texts => texts.map(text => text.getBoundingClientRect().height)"
    )
    assert min(sizes) > 9  # pixels: small, but legible
    assert count_marks(page, "plot-calibration") > 2


def test_the_report_follows_the_colour_scheme(open_report):
    def brightness(colours):
        page = open_report(retrieval_report(12), colours=colours)
        styles = page.evaluate(
            "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color,"
            " getComputedStyle(document.querySelector('#plot-quality-cost .subject .name')).fill]"
        )
        return [sum(int(part) for part in style.removeprefix("rgb(").removesuffix(")").split(",")) for style in styles]

    (light_background, light_text, light_ours), (dark_background, dark_text, dark_ours) = (
        brightness("light"),
        brightness("dark"),
    )
    assert light_text < 150 < 700 < light_background
    assert dark_background < 150 < 600 < dark_text
    assert light_ours < dark_ours


def test_hostile_texts_make_no_element_and_run_nothing(open_report):
    page = open_report(hostile_report(), width=PHONE)
    page.locator("details").evaluate_all("all => all.forEach(one => { one.open = true; })")
    assert page.locator("script, img, b, iframe, [onerror], [onmouseover]").count() == 0
    assert page.title().startswith("<script>document.title")
    assert page.locator("a").evaluate_all("links => links.every(link => link.getAttribute('href').startsWith('#'))")
    assert overflow(page) == 0


def test_examples_open_to_show_their_texts(open_report):
    report = retrieval_report()
    page = open_report(report)
    example = page.locator("#differences details").first
    passage = example.locator(".passage p").first
    assert not passage.is_visible()
    example.locator("summary").click()
    assert passage.is_visible()
    assert passage.inner_text().strip() == report.details.wins[0].relevant[0].text.strip()


def test_print_shows_what_is_folded_on_the_screen(open_report):
    page = open_report(retrieval_report(12), colours="dark")
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.locator("#differences details .passage p").first.is_visible()
    assert page.locator("svg#plot-quality-cost").is_visible()
