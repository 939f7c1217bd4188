"""A report as Markdown, to be put into a repository or an issue."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from d2llm.evaluation.report import Comparison, EvaluationReport, EvaluationRow
from d2llm.reports import words

_MEANS_SOMETHING = re.compile(r"([\\`*_{}\[\]<>#|~&!])")


def render_markdown(report: EvaluationReport) -> str:
    """The whole report without its texts and plots, as CommonMark with tables (as GitHub shows them).

    What comes from data and file names (data sets, systems, reasons) stands there letter by letter: nothing in it acts
    as Markdown or HTML.
    """
    parts = [
        f"# {escape(report.dataset)} / {escape(report.split)}",
        "\n".join(f"- {label}: {escape(value)}" for label, value in words.facts(report)),
        escape(words.verdict(report) or ""),
        "## Measures",
        _measures(report, report.rows),
        escape(words.legend(report)),
        _missing(report),
        *_sample(report),
        *_comparisons(report),
        *_parts(report),
        "## Cost",
        _cost(report.rows),
        *_agreement(report),
        *_calibration(report),
        *(["## Notes", "\n".join(f"- {escape(note)}" for note in report.notes)] if report.notes else []),
        "## How to read the measures",
        "\n".join(
            f"- {escape(measure)}: {text}"
            for measure in words.measure_names(report.rows)
            if (text := words.meaning(measure))
        ),
        "## Settings",
        _fenced({"settings": report.settings, "provenance": report.provenance}),
    ]
    text = "\n\n".join(part for part in parts if part) + "\n"
    return text.encode("utf-8", "replace").decode("utf-8")  # half an emoji, as a cut-off JSON text holds it


def escape(text: str) -> str:
    """Text on one line that no Markdown reader takes for anything but text."""
    line = _MEANS_SOMETHING.sub(r"\\\1", " ".join(text.split()))
    return re.sub(r"^([-+=]|\d+(?=[.)]))", lambda found: _harmless(found.group()), line)


def _harmless(start: str) -> str:
    """The beginning of a line that would be a list or a heading."""
    return f"&#{ord(start[0])};{start[1:]}"


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of finished cells; all columns but the first are figures."""
    lines = [headings, ["---", *("---:" for _ in headings[1:])], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _measures(report: EvaluationReport, rows: Sequence[EvaluationRow], *, marks: bool = True) -> str:
    measures = words.measure_names(rows)
    best = {measure: words.best_rows(rows, measure) for measure in measures}

    def cell(row: EvaluationRow, measure: str) -> str:
        if measure not in row.measures:
            return words.ABSENT
        figure = f"{row.measures[measure].value:.4f}"
        figure = f"**{figure}**" if row.name in best[measure] else figure
        mark = words.mark(report, row.name, measure) if marks else ""
        return f"{figure} {escape(mark)}" if mark else figure

    def interval(row: EvaluationRow) -> str:
        if report.main_measure not in row.measures:
            return words.ABSENT
        return "{0.low:.4f} to {0.high:.4f}".format(row.measures[report.main_measure])

    headings = ["", *map(escape, measures), f"95 % of {escape(report.main_measure)}", words.item_noun(report, 2)]
    return _table(
        headings,
        [
            [escape(row.name), *(cell(row, measure) for measure in measures), interval(row), f"{row.num_items:,}"]
            for row in rows
        ],
    )


def _missing(report: EvaluationReport) -> str:
    if not report.missing:
        return ""
    lines = (f"- {escape(row.name)}: {escape(row.reason)}" for row in report.missing)
    return "Not measured:\n\n" + "\n".join(lines)


def _sample(report: EvaluationReport) -> list[str]:
    if not report.sample_rows:
        return []
    count = report.sample_rows[0].num_items
    title = f"## The same systems on the {count:,} {words.item_noun(report, count)} that the teacher judged"
    return [title, _measures(report, report.sample_rows, marks=False)]


def _comparisons(report: EvaluationReport) -> list[str]:
    found = [comparison for comparison in report.comparisons if comparison.measure == report.main_measure]
    return _compared(report, found, f"## {escape(report.main_measure)} against {escape(report.baseline or '')}")


def _parts(report: EvaluationReport) -> list[str]:
    found = [comparison for comparison in report.parts if comparison.measure == report.main_measure]
    return _compared(
        report, found, f"## What each part of the score is worth: {escape(report.main_measure)} without it"
    )


def _compared(report: EvaluationReport, found: Sequence[Comparison], title: str) -> list[str]:
    if not found:
        return []
    rows = [
        [
            escape(one.row),
            f"{one.difference.value:+.4f}",
            f"{one.difference.low:+.4f} to {one.difference.high:+.4f}",
            f"{one.p_value:.4f}",
            f"{one.adjusted_p:.4f}",
            f"{one.num_items:,}",
        ]
        for one in found
    ]
    headings = ["", "difference", "95 %", "p", "p, Holm", words.item_noun(report, 2)]
    return [title, _table(headings, rows)]


def _cost(rows: Sequence[EvaluationRow]) -> str:
    columns = words.cost_columns(rows)
    if not columns:
        return "No cost was measured."
    lines = [[escape(row.name), *(cells[place] for _, cells in columns)] for place, row in enumerate(rows)]
    return _table(["", *(heading for heading, _ in columns)], lines)


def _agreement(report: EvaluationReport) -> list[str]:
    if not report.agreement:
        return []
    headings = ["", "label loyalty", "Kendall", "Pearson", "Pearson, all pairs", "top-10 overlap", "queries", "pairs"]
    rows = [
        [
            escape(row.name),
            words.ratio(row.agreement.label_loyalty),
            words.ratio(row.agreement.kendall_within),
            words.ratio(row.agreement.pearson_within),
            words.ratio(row.agreement.pearson_over_all),
            words.ratio(row.top_10_overlap),
            f"{row.agreement.num_queries:,}",
            f"{row.agreement.num_pairs:,}",
        ]
        for row in report.agreement
    ]
    return ["## Agreement with the teacher", _table(headings, rows)]


def _calibration(report: EvaluationReport) -> list[str]:
    if not report.calibration:
        return []
    rows = [[escape(one.name), f"{one.expected_error:.4f}", f"{one.num_pairs:,}"] for one in report.calibration]
    return ['## Calibration of "yes"', _table(["", "expected error", "pairs"], rows)]


def _fenced(values: object) -> str:
    """Plain values as JSON; no line of it can end the fence, as each begins with a quote, a bracket or a figure."""
    return "```json\n" + json.dumps(values, indent=2, ensure_ascii=False, default=str) + "\n```"
