"""The report of an evaluation as Markdown, for a repository or an issue."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from d2llm.core.table import escape_markdown
from d2llm.evaluation.report import Comparison, EvaluationReport
from d2llm.reports import words
from d2llm.reports.evaluation_tables import (
    agreement_table,
    calibration_table,
    comparison_table,
    cost_table,
    measure_table,
)


def render_markdown(report: EvaluationReport) -> str:
    """The whole report without its texts and plots, as CommonMark with tables (as GitHub shows them).

    Text that comes from data and file names (data sets, systems, reasons) is escaped, so that it is shown verbatim.
    """
    parts = [
        f"# {escape(report.dataset)} / {escape(report.split)}",
        "\n".join(f"- {label}: {escape(value)}" for label, value in words.facts(report)),
        escape(words.verdict(report) or ""),
        "## Measures",
        measure_table(report, report.rows, title="Measures", intervals="column").to_markdown(),
        escape(words.legend(report)),
        _missing(report),
        *_sample(report),
        *_comparisons(report, report.comparisons, f"{report.main_measure} against {report.baseline or 'the baseline'}"),
        *_comparisons(report, report.parts, f"What each part of the score is worth: {report.main_measure} without it"),
        "## Cost",
        cost_table(report).to_markdown() if words.cost_columns(report.rows) else "No cost was measured.",
        *(["## Agreement with the teacher", agreement_table(report).to_markdown()] if report.agreement else []),
        *(['## Calibration of "yes"', calibration_table(report).to_markdown()] if report.calibration else []),
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
    return text.encode("utf-8", "replace").decode(
        "utf-8"
    )  # replaces lone surrogates, which truncated JSON texts may contain


def escape(text: str) -> str:
    """Text on one line, escaped so that Markdown treats it as plain text even at the start of a line."""
    return re.sub(r"^([-+=]|\d+(?=[.)]))", lambda match: _harmless(match.group()), escape_markdown(text))


def _harmless(start: str) -> str:
    """The first characters of a line, escaped so that they do not start a list or a heading."""
    return f"&#{ord(start[0])};{start[1:]}"


def _missing(report: EvaluationReport) -> str:
    if not report.missing:
        return ""
    lines = (f"- {escape(row.name)}: {escape(row.reason)}" for row in report.missing)
    return "Not measured:\n\n" + "\n".join(lines)


def _sample(report: EvaluationReport) -> list[str]:
    if not report.sample_rows:
        return []
    title = words.sample_title(report)
    table = measure_table(report, report.sample_rows, title=title, marks=False, intervals="column")
    return [f"## {title}", table.to_markdown()]


def _comparisons(report: EvaluationReport, comparisons: Sequence[Comparison], title: str) -> list[str]:
    """The section of the comparisons in the main measure."""
    main = [comparison for comparison in comparisons if comparison.measure == report.main_measure]
    if not main:
        return []
    return [f"## {escape(title)}", comparison_table(report, main, title=title, detailed=False).to_markdown()]


def _fenced(values: object) -> str:
    """Plain values as a JSON block; no line can end the fence, because each starts with a quote, bracket or digit."""
    return "```json\n" + json.dumps(values, indent=2, ensure_ascii=False, default=str) + "\n```"
