"""The HTML report, parsed back and compared with the report it was rendered from."""

import base64
import hashlib
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d2llm.evaluation.report import Calibration, Cost, Estimate, Latency
from d2llm.ops.calibration import ReliabilityBin, ScoreHistogram
from d2llm.reports.html import charts, render_html, svg
from report_samples import HOSTILE, TEACHER, bare_report, hostile_report, pairs_report, retrieval_report

VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(HTMLParser):
    """Collects all elements with their attributes and texts; checks that all tags are closed."""

    def __init__(self, text):
        super().__init__()
        self.elements, self._open = [], []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attrs):
        element = {"tag": tag, "attributes": dict(attrs), "text": ""}
        self.elements.append(element)
        if tag not in VOID:
            self._open.append(element)

    def handle_startendtag(self, tag, attrs):
        self.elements.append({"tag": tag, "attributes": dict(attrs), "text": ""})

    def handle_endtag(self, tag):
        element = self._open.pop()
        assert element["tag"] == tag

    def handle_data(self, data):
        for element in self._open:
            element["text"] += data

    def all(self, tag):
        return [element for element in self.elements if element["tag"] == tag]


def table_rows(text, index):
    """The rows of the page's n-th table as lists of cell texts."""
    source = re.findall(r"<table>.*?</table>", text, re.DOTALL)[index]
    rows = []
    for row in re.findall(r"<tr.*?</tr>", source, re.DOTALL):
        cells = [element for element in Page(row).elements if element["tag"] in ("th", "td")]
        rows.append([" ".join(cell["text"].split()) for cell in cells])
    return rows


def svg_by_id(text, identity):
    """The SVG with this id, parsed as XML."""
    return ElementTree.fromstring(re.search(rf'<svg id="{identity}".*?</svg>', text, re.DOTALL).group())


def marks(chart, tag):
    return [element for element in chart.iter(tag) if "mark" in element.get("class", "").split()]


@pytest.mark.parametrize("make", [retrieval_report, pairs_report, bare_report, hostile_report])
def test_the_page_loads_nothing_and_runs_no_scripts(make):
    text = render_html(make())
    page = Page(text)
    assert not page.all("script") + page.all("img") + page.all("iframe") + page.all("object")
    for element in page.elements:
        assert not [name for name in element["attributes"] if name.startswith("on") or name in ("src", "style")]
        for name in ("href", "xlink:href", "action"):
            assert element["attributes"].get(name, "#").startswith(("#", "data:,"))
    style = page.all("style")[0]["text"]
    assert "url(" not in style
    assert "@import" not in style
    policy = next(meta["attributes"]["content"] for meta in page.all("meta") if "http-equiv" in meta["attributes"])
    assert policy.startswith("default-src 'none'; ")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert f"style-src 'sha256-{digest}';" in policy
    assert len(text) < 300_000


def test_hostile_texts_are_escaped_and_shown():
    report = hostile_report()
    text = render_html(report)
    page = Page(text)
    body = " ".join(page.all("body")[0]["text"].split())
    for hostile in HOSTILE:
        expected = hostile.encode("utf-8", "replace").decode()
        assert " ".join(expected.split()) in body
    harmless = Page(render_html(retrieval_report(30)))
    assert {element["tag"] for element in page.elements} == {element["tag"] for element in harmless.elements}
    assert page.all("title")[0]["text"].startswith(HOSTILE[0])


def test_tables_contain_the_values_of_the_report():
    report = retrieval_report()
    text = render_html(report)
    rows = table_rows(text, 0)
    assert rows[0] == ["system", "nDCG@10", "MRR@10", "Recall@100", "queries"]
    by_name = {cells[0].removesuffix(" baseline"): cells for cells in rows}
    for row in report.rows:
        for cell, (measure, estimate) in zip(by_name[row.name][1:], row.measures.items(), strict=False):
            sign = report.comparison(row.name, measure)
            expected = f"{estimate.value:.4f}"
            if sign is not None and sign.is_significant:
                expected += "*" if sign.difference.value > 0 else "†"
            assert cell == f"{expected} {estimate.low:.3f} to {estimate.high:.3f}"
        assert by_name[row.name][-1] == str(row.num_items)
    assert f"<strong>{report.row('D2LLM').measures['nDCG@10'].value:.4f}</strong>" in text
    assert "cosine, untuned baseline" in [cells[0] for cells in rows]
    comparison_rows = table_rows(text, 2)
    comparison = report.comparison("BM25", "MRR@10")
    assert [*comparison_rows[2][:3], comparison_rows[2][5]] == [
        "BM25",
        "MRR@10",
        f"{comparison.difference.value:+.4f}",
        f"{comparison.adjusted_p:.4f}",
    ]
    assert table_rows(text, 3)[1] == [
        *("D2LLM", "0.9100", "0.9000", "0.6100", "0.8000", "0.7700", "0.7400", "100", "4,000"),
    ]
    assert table_rows(text, 4)[1][:3] == ["BM25", "0.0988", "0.138"]
    for row in report.missing:
        assert row.reason in text
    assert "d2llm-minilm" in text
    assert report.rows[-1].fingerprint in text


def test_headers_have_a_scope_and_ids_are_unique():
    page = Page(render_html(retrieval_report()))
    assert {header["attributes"].get("scope") for header in page.all("th")} == {"col", "row"}
    ids = [element["attributes"]["id"] for element in page.elements if "id" in element["attributes"]]
    assert len(ids) == len(set(ids))
    chart_ids = {chart["attributes"]["id"] for chart in page.all("svg")}
    assert {"plot-quality-cost", "plot-differences", "plot-calibration", "plot-calibration-2"} < chart_ids
    assert {"plot-histogram-1", "plot-histogram-2"} < chart_ids
    for chart in page.all("svg"):
        assert chart["attributes"]["role"] == "img"
        assert set(chart["attributes"]["aria-labelledby"].split()) <= set(ids)
    links = {link["attributes"]["href"][1:] for link in page.all("a")}
    assert links <= set(ids)


def test_the_quality_cost_plot_shows_all_rows_to_scale():
    report = retrieval_report()
    chart = svg_by_id(render_html(report), "plot-quality-cost")
    titles = [group.find("title").text for group in chart.iter("g")]
    assert sorted(title.split(": nDCG")[0] for title in titles) == sorted(row.name for row in report.rows)
    dots = dict(zip(titles, marks(chart, "circle"), strict=True))
    bm25, ours, teacher = (
        next(dot for title, dot in dots.items() if title.startswith(name)) for name in ("BM25", "D2LLM", "teacher")
    )
    assert float(bm25.get("cy")) > float(teacher.get("cy")) > float(ours.get("cy"))
    first, second, third = (float(dot.get("cx")) for dot in (bm25, ours, teacher))
    # A logarithmic axis: equal ratios are equal distances.
    expected = math.log(11.3 / 0.0988) / math.log(1013 / 0.0988)
    assert (second - first) / (third - first) == pytest.approx(expected, abs=1e-3)
    classes = [group.get("class").split() for group in chart.iter("g")]
    assert sum("subject" in names for names in classes) == sum("baseline" in names for names in classes) == 1
    assert sum("sample" in names for names in classes) == 1


def test_rows_without_a_time_are_listed_below_the_plot():
    report = retrieval_report()
    untimed = [replace(report.rows[0], cost=Cost(None)), replace(report.rows[1], cost=Cost(Latency(0, 0, 0)))]
    text = render_html(replace(report, rows=(*untimed, *report.rows[2:])))
    assert "nDCG@10 is missing: <bdi>BM25</bdi>, <bdi>hybrid: BM25 + D2LLM</bdi>." in text
    assert len(marks(svg_by_id(text, "plot-quality-cost"), "circle")) == len(report.rows) - 2


def test_the_pareto_front_joins_undominated_rows():
    def point(name, milliseconds, value, on_sample=False):
        return charts.Point(name, milliseconds, Estimate(value, value, value), "other", on_sample)

    systems = [point("a", 1, 0.5), point("beaten", 2, 0.4), point("b", 3, 0.7), point("sample", 4, 0.9, on_sample=True)]
    chart = ElementTree.fromstring(charts.quality_cost(systems, "MAP", "query"))
    front = next(path for path in chart.iter("path") if path.get("class") == "front").get("d")
    dots = {group.find("title").text.split(":")[0]: group.find("circle").get("cx") for group in chart.iter("g")}
    stops = [float(x) for x in re.findall(r"[MH]([\d.]+)", front)]
    assert stops[:-1] == pytest.approx([float(dots["a"]), float(dots["b"])], abs=0.01)


def test_differences_are_counted_and_drawn_by_size():
    report = retrieval_report()
    ours, theirs = (report.details.values[name]["nDCG@10"] for name in ("D2LLM", "cosine, untuned"))
    changes = [mine - other for mine, other in zip(ours, theirs, strict=True)]
    chart = svg_by_id(render_html(report), "plot-differences")
    won, lost = sum(change > 0 for change in changes), sum(change < 0 for change in changes)
    texts = [element.text for element in chart.iter("text")]
    assert f"{won} won" in texts
    assert f"{lost} lost" in texts
    assert f"{300 - won - lost} equal" in texts
    bars = marks(chart, "rect")
    assert len(bars) == won + lost
    titles = [group.find("title").text for group in chart.iter("g")]
    assert len(titles) == 300
    for index, change in enumerate(changes):
        assert f"q{index}: {change:+.4f}" in titles
    heights = [float(bar.get("height")) for bar in bars]
    assert heights[0] / heights[-1] == pytest.approx(max(changes) / -min(changes), rel=0.01)


def test_many_items_are_grouped_into_bars():
    items = [charts.Difference(f"q{index}", 1.0 if index < 1000 else -0.5) for index in range(4000)]
    chart = ElementTree.fromstring(charts.differences(items, "MAP", "new", "old"))
    assert "up to 6 per bar" in [element.text for element in chart.iter("text")]
    titles = [group.find("title").text for group in chart.iter("g")]
    assert len(titles) == math.ceil(4000 / 6)
    assert titles[0] == "6 from q0 to q5, on average: +1.0000"
    assert titles[166] == "6 from q996 to q1001, on average: +0.5000"  # 4 wins by 1 and 2 losses by 0.5
    assert "1,000 won" in [element.text for element in chart.iter("text")]


def test_zero_differences_have_no_bars():
    chart = ElementTree.fromstring(charts.differences([charts.Difference("q", 0.0)] * 3, "MAP", "new", "old"))
    assert not marks(chart, "rect")
    assert "3 equal" in [element.text for element in chart.iter("text")]


def test_a_main_measure_without_item_values_is_replaced():
    text = render_html(replace(pairs_report(), main_measure="Spearman"))
    assert "accuracy of <bdi>D2LLM</bdi> minus" in text


def test_the_reliability_diagram_is_drawn_to_scale():
    bins = (ReliabilityBin(0.0, 0.1, 0.05, 0.0, 900), ReliabilityBin(0.9, 1.0, 0.95, 0.5, 100))
    chart = ElementTree.fromstring(charts.reliability(Calibration("x", bins, 0.09, 1000), "plot-calibration"))
    low, high = marks(chart, "circle")
    left, right = float(low.get("cx")), float(high.get("cx"))
    bottom, top = float(low.get("cy")), float(high.get("cy"))
    diagonal = next(line for line in chart.iter("line") if line.get("class") == "diagonal")
    span_x = float(diagonal.get("x2")) - float(diagonal.get("x1"))
    span_y = float(diagonal.get("y1")) - float(diagonal.get("y2"))
    assert right - left == pytest.approx(0.9 * span_x, abs=0.02)
    assert bottom - top == pytest.approx(0.5 * span_y, abs=0.02)
    first, second = (float(bar.get("height")) for bar in marks(chart, "rect"))
    assert first == pytest.approx(9 * second, rel=0.01)
    assert {"900", "100"} < {element.text for element in chart.iter("text")}


def test_histograms_are_shares_of_each_label():
    counts = ScoreHistogram((0.0, 1.0, 2.0), (1, 3), (300, 100))
    chart = ElementTree.fromstring(charts.histogram(counts, "plot-histogram-1", name="x", labels=("yes", "no")))
    titles = [group.find("title").text for group in chart.iter("g")]
    assert titles == ["0 to 1: yes 1 (25.0%), no 300 (75.0%)", "1 to 2: yes 3 (75.0%), no 100 (25.0%)"]
    paths = {path.get("class").split()[-1]: path.get("d") for path in marks(chart, "path")}
    heights = {side: re.findall(r"V([\d.]+)", path)[:2] for side, path in paths.items()}
    assert heights["positive"] == heights["negative"][::-1]  # 25 % and 75 %, 75 % and 25 %


def test_a_histogram_with_one_label_only_is_drawn():
    counts = ScoreHistogram((0.0, 1.0), (5,), (0,))
    chart = ElementTree.fromstring(charts.histogram(counts, "plot-histogram-1", name="x", labels=("yes", "no")))
    assert len(marks(chart, "path")) == 2


def test_missing_parts_are_explained():
    text = render_html(bare_report())
    assert not Page(text).all("svg")
    for sentence in (
        "No system has both nDCG@10 and a measured time.",
        "No values of single queries are known",
        "No system in this report gives probabilities.",
        "No scores were recorded.",
        "There was no teacher to compare with.",
        "No cost was measured.",
        "Nothing was truncated, left out or unusual.",
        "Nothing was tested for significance.",
    ):
        assert sentence in text


def test_examples_show_query_passages_and_top_results():
    report = retrieval_report()
    text = render_html(report)
    for example in (*report.details.wins, *report.details.losses):
        assert f"<bdi>{example.id}</bdi>" in text
        assert f"({example.baseline_value:.2f} → {example.value:.2f})" in text
    # The second passage of each example is relevant; it is shown under "relevant" and in the subject's top results.
    assert text.count('class="passage is-relevant"') == 2 * len((*report.details.wins, *report.details.losses))
    pairs = render_html(pairs_report())
    assert "Paired with" in pairs
    assert "✓ yes" in pairs
    assert "First in" not in pairs


@given(st.floats(-1e3, 1e3), st.floats(1e-3, 1e3))
def test_ticks_are_round_inside_and_evenly_spaced(low, span):
    ticks = svg.linear_ticks(low, low + span)
    assert 2 <= len(ticks) <= 12
    assert all(low - 1e-6 * span <= tick <= low + span * (1 + 1e-6) for tick in ticks)
    steps = [after - before for before, after in pairwise(ticks)]
    assert steps == pytest.approx([steps[0]] * len(steps), rel=1e-4)
    mantissa = steps[0] / 10 ** math.floor(math.log10(steps[0]) + 1e-6)
    assert min(abs(mantissa - good) for good in (1, 2, 5)) < 1e-3


def test_logarithmic_ticks():
    assert svg.logarithmic_ticks(0.06, 1600) == pytest.approx([0.1, 1, 10, 100, 1000])
    assert svg.logarithmic_ticks(0.9, 30) == pytest.approx([1, 2, 5, 10, 20])
    assert svg.logarithmic_ticks(2.5, 9.6) == [4, 6, 8]


@settings(max_examples=25)
@given(st.lists(st.tuples(st.floats(60, 700), st.floats(20, 380), st.integers(3, 30)), min_size=1, max_size=12))
def test_labels_stay_in_the_frame_without_overlap(labels):
    frame = svg.Box(50, 0, 750, 400)
    anchors = [(x, y) for x, y, _ in labels]
    sizes = [(7.0 * letters, 15.0) for *_, letters in labels]
    positions = svg.place_labels(anchors, sizes, [], frame)
    for index, box in enumerate(positions):
        assert frame.holds(box)
        assert all(box.overlap(other) == 0 for other in positions[:index])


def test_long_names_are_shortened():
    assert svg.shortened("teacher", 200, 12) == "teacher"
    cut = svg.shortened(TEACHER, 150, 12.5)
    assert cut.endswith("…")
    assert svg.text_width(cut, 12.5) <= 150
    assert TEACHER.startswith(cut[:-1])
    assert svg.text_width("漢字", 10) == 20
