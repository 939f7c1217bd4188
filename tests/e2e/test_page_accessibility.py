"""WCAG 2.1 A and AA on the server's pages, as far as axe-core can check: each state, in light and dark mode."""

from __future__ import annotations

import pytest

from d2llm.reports.html import render_html
from page_server import WatchedTeacher, overflow, until, write_taught_index
from report_samples import retrieval_report
from tiny_server import tiny_settings

pytest.importorskip("fastapi", reason="needs FastAPI: pip install 'd2llm[serve]'")
from d2llm.server.app import make_app
from live_server import serve, wait_until_ready

axe_playwright = pytest.importorskip(
    "axe_playwright_python.sync_playwright", reason="needs axe-core: pip install 'd2llm[dev]'"
)

SEARCH = "?q=the+cat+by+the+sea&k=3"
NARROW = 320
"""Width in pixels at which a page must not scroll horizontally (WCAG 1.4.10)."""


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(render_html(retrieval_report(12)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def served(tmp_path_factory, report):
    """The address of a server, and its teacher."""
    app = make_app(
        tiny_settings(**write_taught_index(tmp_path_factory.mktemp("accessible")), report=report, ocr="none")
    )
    with serve(app) as address:
        wait_until_ready(address)
        index = app.state.serving.indexes["index"]
        index.slow.teacher = WatchedTeacher(index.slow.teacher)
        yield address, index.slow.teacher


@pytest.fixture
def address(served):
    return served[0]


def check(page, measurable=True, sizes=(("light", 1280), ("dark", NARROW))):
    """No violations and, if ``measurable``, no contrast left unmeasured: on a wide light page and a narrow dark one."""
    axe = axe_playwright.Axe()
    for colours, width in sizes:
        page.emulate_media(color_scheme=colours, reduced_motion="reduce")
        page.set_viewport_size({"width": width, "height": 900})
        # axe is injected through the browser's debugger, past the page's content security policy, which stays in force.
        results = axe.run(page, options={"resultTypes": ["violations", "incomplete"]}).response
        unmeasured = [rule for rule in results["incomplete"] if rule["id"] == "color-contrast" and measurable]
        failures = [
            (colours, width, rule["id"], node["target"], node["failureSummary"])
            for rule in results["violations"] + unmeasured
            for node in rule["nodes"]
        ]
        assert failures == []
        assert len(results["passes"]) > 10
        assert overflow(page) == 0


def test_start_page(visit, address):
    page = visit(address)
    page.locator(".message h2", has_text="Ask a question").wait_for()
    check(page)


def test_a_document(visit, address):
    page = visit(f"{address}/{SEARCH}")
    page.locator(".open-document").first.click()
    page.wait_for_selector("#document .part.opened")
    check(page, measurable=False)  # the first line in view is partly above the text's edge
    assert page.locator("#document-close").bounding_box()["height"] < 40  # one line, also beside a long title


def test_options_and_adding_unfolded_on_a_phone(visit, address):
    page = visit(f"{address}/{SEARCH}", width=NARROW)
    for part in ("#options", "#adding", "#adding .types", "#about"):
        page.locator(f"{part} > summary").click()
    check(page, sizes=[("light", NARROW), ("dark", NARROW)])


def test_results_with_filters(visit, address):
    page = visit(f"{address}/{SEARCH}&filter=year+%3E+2000")
    page.wait_for_selector(".card")
    page.locator("#filters > summary").click()
    page.wait_for_selector("#facets button")
    page.locator(".card").first.focus()
    check(page)


def test_an_invalid_filter(visit, address):
    page = visit(f"{address}/{SEARCH}&filter=colour+%3D+1", expected=["400 (Bad Request)"])
    page.wait_for_selector(".message.error")
    check(page)


def test_rankings_side_by_side(visit, address):
    page = visit(f"{address}/{SEARCH}&beside=1")
    page.locator(".column").nth(2).locator(".card").first.wait_for()
    check(page)


def test_waiting_for_the_teacher(visit, served):
    address, teacher = served
    teacher.may_answer.clear()
    try:
        page = visit(f"{address}/{SEARCH}&beside=1")
        page.wait_for_selector(".column.waiting")
        check(page)
    finally:
        teacher.reset()


def test_an_explanation_with_the_teachers_verdict(visit, address):
    page = visit(f"{address}/{SEARCH}")
    page.locator(".toggle-why").first.click()
    page.wait_for_selector(".text mark.weight")
    page.get_by_role("button", name="Ask the teacher").click()
    page.locator(".verdict", has_text="%").wait_for()
    check(page)


def test_adding_documents(visit, address):
    page = visit(address)
    files = {"a ship.txt": b"the ship of the winter sea", "picture.png": b"no text"}
    page.locator("#files").set_input_files(
        [{"name": name, "mimeType": "", "buffer": content} for name, content in files.items()]
    )
    page.wait_for_selector("#upload-report .skipped")
    check(page)


def test_the_key_dialog(visit, address):
    page = visit(address)
    page.evaluate("document.getElementById('key-open').hidden = false")  # as on a server that requires a key
    page.locator("#key-open").click()
    page.wait_for_selector("#key-dialog[open]")
    check(page, measurable=False)  # axe mistakes the page under the dialog for its background


def test_the_api_pages(visit, address):
    page = visit(f"{address}/docs", ready=False)
    page.wait_for_selector(".operation")
    operation = page.locator(".operation", has=page.locator(".path", has_text="/v1/index")).first
    operation.locator("summary").first.click()
    operation.get_by_role("button", name="Send").click()
    operation.locator(".output").wait_for()
    # The other operations look alike: a few are enough, and much faster to check.
    page.evaluate("document.querySelectorAll('.operation:not([open])').forEach((one, n) => n > 2 && one.remove())")
    check(page)


def test_the_report_and_its_frame(visit, address, report):
    page = visit(f"{address}/page/evaluation.html", ready=False)
    page.wait_for_selector("iframe.report")
    check(page)
    # No script may run in the frame, so axe checks the report outside it; it cannot tell what is behind a plot's text.
    check(visit(report.as_uri(), ready=False), measurable=False)


def test_single_letter_shortcuts_can_be_turned_off(visit, address):
    page = visit(f"{address}/{SEARCH}")
    page.wait_for_selector(".card")
    focused = "document.activeElement.id || document.activeElement.dataset.id"
    first = page.locator(".card").first
    for turned_on in (False, True):
        page.get_by_label("Single-letter shortcuts").set_checked(turned_on)
        page.reload()
        first.focus()
        page.keyboard.press("j")
        assert (page.evaluate(focused) != first.get_attribute("data-id")) == turned_on
        page.keyboard.press("/")
        assert (page.evaluate(focused) == "query") == turned_on
    first.focus()
    page.get_by_label("Single-letter shortcuts").uncheck()
    first.focus()
    page.keyboard.press("Enter")  # other keys still work
    page.wait_for_selector(".why")


def test_the_focus_stays_in_the_results_when_they_change(visit, address):
    page = visit(f"{address}/{SEARCH}")
    page.wait_for_selector(".card")
    value = page.locator(".metadata .value").first
    expected = value.inner_text()
    value.focus()
    page.keyboard.press("Enter")  # filters by it
    page.locator("#filters-count", has_text="(on)").wait_for()
    until(page, "document.activeElement.id === 'results'")
    page.keyboard.press("Tab")
    until(page, "document.activeElement === document.querySelector('.card')")
    assert expected in page.locator(".card").first.locator(".metadata").inner_text()
