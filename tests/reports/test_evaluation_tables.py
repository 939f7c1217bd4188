"""Evaluation tables for the terminal: figures, significance marks, missing rows, and no markup from texts."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from d2llm.evaluation.report import Comparison, Cost, Estimate, EvaluationRow, Latency, MissingRow
from d2llm.reports.evaluation_tables import evaluation_tables
from report_samples import HOSTILE, TEACHER, bare_report, hostile_report, pairs_report, retrieval_report


def rendered(report, width=400):
    """The lines of a wide terminal, without styles."""
    return [line.rstrip() for part in evaluation_tables(report) for line in printed(part, width).splitlines()]


def printed(part, width=400, **options):
    console = Console(
        file=io.StringIO(), width=width, highlight=False, **{"force_terminal": True, "color_system": None, **options}
    )
    console.print(part, markup=False)
    return console.file.getvalue()


def cells(lines):
    """The tables in order, each as name -> cells. A heading may span several lines."""
    tables, heads = [], []
    for line in lines:
        parts = [cell.strip() for cell in line.strip("│┃").replace("┃", "│").split("│")]
        if line.startswith("┏"):
            tables.append({})
            heads = []
        elif line.startswith("┃"):
            heads.append(parts)
        elif line.startswith("┡"):
            name, *rest = (" ".join(words).strip() for words in zip(*heads, strict=True))
            tables[-1][name] = rest
        elif line.startswith("│"):
            tables[-1][parts[0]] = parts[1:]
    return tables


def make_report(*, marks=True):
    def estimate(value):
        return Estimate(value, value - 0.1, value + 0.1)

    time = Latency(1.25, 2.5, 1.5)
    bm25 = EvaluationRow("BM25", "bm25", {"nDCG@10": estimate(0.5), "MRR@10": estimate(0.25)}, Cost(time), 1200)
    ours_cost = Cost(Latency(1234.5, 2000.0, 1300.0), bytes_per_passage=768, peak_memory_mib=456.7)
    ours = EvaluationRow(
        "D2LLM", "d2llm", {"nDCG@10": estimate(0.61234), "MRR@10": estimate(0.2)}, ours_cost, 1200, "abc"
    )
    comparisons = tuple(
        Comparison(measure, "D2LLM", "BM25", Estimate(gain, gain - 0.01, gain + 0.01), p, p, 1200, "a test")
        for measure, gain, p in (("nDCG@10", 0.11234, 0.0123), ("MRR@10", -0.05, 0.049))
    )
    return replace(
        bare_report(),
        dataset="zoo",
        num_items=1200,
        num_passages=5000,
        num_left_out=3,
        baseline="BM25",
        rows=(bm25, ours),
        missing=(MissingRow("teacher", "teacher", "no teacher was given"),),
        comparisons=comparisons if marks else (),
        notes=("2 odd things",),
    )


def test_every_figure_is_shown():
    lines = rendered(make_report())
    assert lines[0].startswith("zoo / test, 1,200 queries, 5,000 passages, 3 without a relevant passage in the corpus")
    measures, costs = cells(lines)
    assert measures["system"] == ["nDCG@10", "MRR@10", "queries"]
    assert measures["BM25"] == ["0.5000", "0.2500", "1,200"]
    assert measures["D2LLM"] == ["0.6123*", "0.2000†", "1,200"]
    (missing,) = (row for name, row in measures.items() if name.startswith("teacher"))
    assert missing == ["–", "–", "–"]
    assert "teacher: not measured, no" in " ".join(lines)
    assert dict(zip(costs["system"], costs["D2LLM"], strict=True)) == {
        "total ms, p50": "1,234",
        "total ms, p95": "2,000",
        "bytes per passage": "768",
        "peak MiB": "457",
    }
    assert costs["BM25"] == ["1.25", "2.50", "–", "–"]
    remarks = " ".join(lines)
    assert "* significantly better, † significantly worse than BM25" in remarks
    assert "D2LLM against BM25: nDCG@10 +0.1123 [+0.1023, +0.1223], significantly better" in remarks
    assert lines[-1] == "2 odd things"


def test_only_the_best_is_bold():
    text = printed(evaluation_tables(make_report())[0], force_terminal=True, color_system="standard")
    bold_parts = [part.split("\x1b[0m")[0] for part in text.split("\x1b[1m")[1:]]
    assert [part.strip() for part in bold_parts if part.strip()[:2] == "0."] == ["0.2500", "0.6123*"]


def test_without_comparisons_nothing_is_marked():
    lines = rendered(make_report(marks=False))
    assert cells(lines)[0]["D2LLM"] == ["0.6123", "0.2000", "1,200"]
    assert "Nothing was tested for significance." in " ".join(lines)
    assert "against" not in " ".join(lines)


def test_a_full_report_has_a_table_for_each_part():
    report = retrieval_report()
    lines = rendered(report)
    measures, sample, agreement, costs = cells(lines)
    names = [row.name for row in report.rows]
    assert [name for name in measures if name in names] == names
    for table, rows in ((measures, report.rows), (sample, report.sample_rows)):
        for row in rows:
            actual = [cell.rstrip("*†") for cell in table[row.name]]
            assert actual == [*(f"{e.value:.4f}" for e in row.measures.values()), f"{row.num_items:,}"]
    assert "The same systems on the 100 queries that the teacher scored" in " ".join(lines)
    assert not any("*" in cell or "†" in cell for row in sample.values() for cell in row)
    (d2llm,) = (row for row in report.agreement if row.name == "D2LLM")
    actual = d2llm.agreement
    expected = (
        *(actual.label_loyalty, actual.probability_loyalty),
        *(actual.kendall_within, actual.pearson_within, actual.pearson_over_all),
    )
    assert agreement["D2LLM"] == [
        *(f"{value:.4f}" for value in expected),
        f"{d2llm.top_10_overlap:.4f}",
        "100",
        "4,000",
    ]
    assert agreement["cosine, untuned"][-3] == "–"
    assert list(costs)[1:] == names
    assert TEACHER in costs
    for note in report.notes:
        assert note in lines


def test_pairs_are_counted_as_pairs():
    lines = rendered(pairs_report())
    assert "200 pairs" in lines[0]
    assert "passages" not in lines[0]
    assert cells(lines)[0]["D2LLM"][-1] == "200"


def test_a_report_without_optional_parts():
    lines = rendered(bare_report())
    assert [list(table) for table in cells(lines)] == [["system", "D2LLM"], ["system", "D2LLM"]]


def test_markup_in_names_and_notes_is_not_interpreted():
    report = hostile_report()
    report = replace(report, notes=("[bold]a note[/bold]",), missing=(MissingRow("[red]x", "external", "[/]"),))
    text = "\n".join(rendered(report))
    assert "[bold]a note[/bold]" in text
    assert "[red]x: not measured, [/]" in text
    assert HOSTILE[0][:20] in text


@pytest.mark.parametrize("width", [80, 140])
def test_a_narrow_terminal_still_shows_all_rows(width):
    text = printed(evaluation_tables(make_report())[0], width)
    assert "BM25" in text
    assert "0.5000" in text


def test_bold_is_explained_only_where_there_is_any():
    for has_styles in (True, False):
        remarks = printed(evaluation_tables(make_report(), has_styles=has_styles)[-1])
        assert ("Bold" in remarks) == has_styles
        assert "significantly better" in remarks
