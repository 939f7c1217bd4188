"""The Markdown report, parsed with a CommonMark parser and compared with the report."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from d2llm.core.document import escape
from d2llm.evaluation.report import Estimate
from d2llm.ops.measures import MEASURES
from d2llm.reports import phrases
from d2llm.reports.evaluation_tables import evaluation_document
from report_samples import HOSTILE, TEACHER, bare_report, hostile_report, pairs_report, retrieval_report

READER = MarkdownIt("commonmark").enable("table")


def tables(text):
    """Every table as rows of plain cell texts; bold cells are marked by a leading #."""
    parsed, tokens = [], READER.parse(text)
    for index, token in enumerate(tokens):
        if token.type == "table_open":
            parsed.append([])
        elif token.type == "tr_open":
            parsed[-1].append([])
        elif token.type in ("th_open", "td_open"):
            inline = tokens[index + 1]
            bold = any(child.type == "strong_open" for child in inline.children)
            parsed[-1][-1].append(("#" if bold else "") + plain(inline))
    return parsed


def plain(inline):
    assert {child.type for child in inline.children} <= {"text", "text_special", "strong_open", "strong_close"}
    return "".join(child.content for child in inline.children)


def test_rows_contain_values_with_best_and_significance_marks():
    report = retrieval_report()
    rows = tables(evaluation_document(report).to_markdown())[0]
    assert rows[0] == ["system", "nDCG@10", "MRR@10", "Recall@100", "95 % of nDCG@10", "queries"]
    assert [row[0] for row in rows[1:]] == [row.name for row in report.rows]
    by_name = {row[0]: row for row in rows}
    ours, bm25 = report.row("D2LLM").measures["nDCG@10"], report.row("BM25").measures["nDCG@10"]
    assert by_name["D2LLM"][1] == f"#{ours.value:.4f} *"
    assert by_name["D2LLM"][4:] == [f"{ours.low:.4f} to {ours.high:.4f}", "300"]
    assert by_name["BM25"][1] == f"{bm25.value:.4f} †"
    assert not by_name["cosine, untuned"][1].endswith(("*", "†"))
    assert by_name[TEACHER][5] == "100"


def test_sampled_rows_are_not_best_among_full_rows():
    report = retrieval_report()
    teacher = replace(report.rows[-1], measures={"nDCG@10": Estimate(0.99, 0.9, 1.0)})
    report = replace(report, rows=(*report.rows[:-1], teacher))
    rows = {row[0]: row for row in tables(evaluation_document(report).to_markdown())[0]}
    assert rows[TEACHER][1:3] == ["0.9900", "–"]  # a missing measure is a dash
    assert rows["D2LLM"][1].startswith("#")
    assert phrases.best_rows([teacher], "nDCG@10") == {TEACHER}


def test_equal_values_are_all_best():
    first, second, third = retrieval_report().rows[:3]
    rows = [
        replace(row, measures={"MAP": Estimate(value, 0, 1)})
        for row, value in ((first, 0.50001), (second, 0.50004), (third, 0.4))
    ]
    assert phrases.best_rows(rows, "MAP") == {first.name, second.name}


def test_all_other_parts_of_the_report_are_rendered():
    report = retrieval_report()
    text = evaluation_document(report).to_markdown()
    assert "left out: 3 without a relevant passage in the corpus" in text
    assert "BGE reranker: no --model was given" in text
    assert "the 100 queries that the teacher scored" in text
    assert all(f"- {note}" in text for note in report.notes)
    _, sample, comparisons, cost, agreement, calibration = tables(text)
    assert sample[1][1] == f"{report.sample_rows[0].measures['nDCG@10'].value:.4f}"
    comparison = report.comparison("D2LLM", "nDCG@10")
    assert comparisons[-1][:2] == ["D2LLM", f"{comparison.difference.value:+.4f}"]
    assert comparisons[-1][3:] == [f"{comparison.p_value:.4f}", f"{comparison.adjusted_p:.4f}", "300"]
    costs = {row[0]: dict(zip(cost[0], row, strict=True)) for row in cost[1:]}
    assert costs["BM25"]["total ms, p50"] == "0.0988"
    assert costs["BM25"]["encode ms"] == costs[TEACHER]["bytes per passage"] == "–"
    assert costs[TEACHER]["total ms, p50"] == "1,013"
    assert "candidates ms" not in cost[0]  # no row has this figure
    assert agreement[2][-3:] == ["–", "100", "4,000"]
    assert calibration[1] == ["D2LLM", f"{report.calibration[0].expected_error:.4f}", "4,000"]
    fenced = next(token.content for token in READER.parse(text) if token.type == "fence")
    assert json.loads(fenced) == {"settings": report.settings, "provenance": report.provenance}


def test_reports_on_pairs_and_without_optional_parts():
    text = evaluation_document(pairs_report()).to_markdown()
    assert [row[-1] for row in tables(text)[0]] == ["pairs", "200", "200", "200"]
    text = evaluation_document(bare_report()).to_markdown()
    assert "No cost was measured." in text
    assert "Nothing was tested for significance." in text
    assert len(tables(text)) == 1


def test_hostile_texts_are_escaped():
    text = evaluation_document(hostile_report()).to_markdown()
    kinds = {child.type for token in READER.parse(text) for child in token.children or ()}
    kinds |= {token.type for token in READER.parse(text)}
    assert not kinds & {"html_inline", "html_block", "link_open", "image", "code_inline", "em_open"}
    names = [row[0] for row in tables(text)[0][1:]]
    assert names[0] == HOSTILE[0]
    assert names[4] == " ".join(HOSTILE[4].split())
    assert len({len(row) for row in tables(text)[0]}) == 1


@given(st.text(st.characters(exclude_categories=["Cs", "Cc"])))
def test_escaped_text_is_parsed_back_unchanged(text):
    expected = " ".join(text.split())
    assert tables(f"| a |\n| --- |\n| {escape(text)} |\n| end |")[0][1] == [expected]
    inlines = [token for token in READER.parse(f"- x\n- {escape(text)}") if token.type == "inline"]
    assert [plain(inline) for inline in inlines] == ["x", *([expected] if expected else [])]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, "–"),
        (0, "0"),
        (0.0988, "0.0988"),
        (0.00012, "0.0001"),
        (1.255, "1.25"),
        (11.31, "11.3"),
        (1013.2, "1,013"),
    ],
)
def test_quantities_have_about_three_digits(value, expected):
    assert phrases.quantity(value) == expected


def test_p_values_and_durations():
    assert [phrases.p_text(value) for value in (0.00009, 0.0003, 0.05, 1.0)] == [
        "p < 0.0001",
        "p = 0.0003",
        "p = 0.05",
        "p = 1",
    ]
    assert [phrases.duration(seconds) for seconds in (4.24, 200, 3599.6, 7500)] == [
        "4.2 s",
        "3 min 20 s",
        "1 h 00 min",
        "2 h 05 min",
    ]


def test_the_verdict_summarises_the_subjects_comparison():
    report = retrieval_report()
    comparison = report.comparison("D2LLM", "nDCG@10")
    assert f"nDCG@10 {comparison.difference.value:+.4f}" in phrases.verdict(report)
    assert "significantly better (adjusted p = 0.0003, 300 queries)" in phrases.verdict(report)
    losing = replace(comparison, difference=Estimate(-0.1, -0.2, -0.05))
    assert "significantly worse" in phrases.verdict(replace(report, comparisons=(losing,)))
    assert "not a significant difference" in phrases.verdict(
        replace(report, comparisons=(replace(comparison, adjusted_p=0.05),))
    )
    assert phrases.verdict(bare_report()) is None


def test_every_measure_is_explained():
    names = ["nDCG@10", "MRR@10", "MAP", "Recall@10", "accuracy (3 classes)", "F1", "AP", "AUC", "Pearson", "Spearman"]
    assert all(phrases.meaning(name) for name in names)
    assert phrases.meaning("something else") is None
    assert all(phrases.meaning(name) for name in MEASURES)
