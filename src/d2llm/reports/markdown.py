"""The report of an evaluation as Markdown, for a repository or an issue."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from d2llm.core.table import escape_markdown
from d2llm.evaluation.report import Comparison, EvaluationReport
from d2llm.reports import phrases
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
    # As JSON in a fence, which no line can end, because each starts with a quote, bracket or digit.
    settings = {"settings": report.settings, "provenance": report.provenance}
    parts = [
        f"# {escape(report.dataset)} / {escape(report.split)}",
        "\n".join(f"- {label}: {escape(value)}" for label, value in phrases.facts(report)),
        escape(phrases.verdict(report) or ""),
        "## Measures",
        measure_table(report, report.rows, title="Measures", intervals="column").to_markdown(),
        escape(phrases.legend(report)),
        _missing(report),
        *_sample(report),
        *_comparisons(report, report.comparisons, f"{report.main_measure} against {report.baseline or 'the baseline'}"),
        *_comparisons(report, report.parts, f"What each part of the score is worth: {report.main_measure} without it"),
        "## Cost",
        cost_table(report).to_markdown() if phrases.cost_columns(report.rows) else "No cost was measured.",
        *(["## Agreement with the teacher", agreement_table(report).to_markdown()] if report.agreement else []),
        *(['## Calibration of "yes"', calibration_table(report).to_markdown()] if report.calibration else []),
        *(["## Notes", "\n".join(f"- {escape(note)}" for note in report.notes)] if report.notes else []),
        "## How to read the measures",
        "\n".join(
            f"- {escape(measure)}: {text}"
            for measure in phrases.measure_names(report.rows)
            if (text := phrases.meaning(measure))
        ),
        "## Settings",
        "```json\n" + json.dumps(settings, indent=2, ensure_ascii=False, default=str) + "\n```",
    ]
    text = "\n\n".join(part for part in parts if part) + "\n"
    # Truncated JSON texts may contain lone surrogates, which are replaced.
    return text.encode("utf-8", "replace").decode("utf-8")


def escape(text: str) -> str:
    """Text on one line, escaped so that Markdown treats it as plain text even at the start of a line."""
    # What starts a list or a heading gets its first character escaped.
    return re.sub(r"^([-+=]|\d+(?=[.)]))", lambda start: f"&#{ord(start[0][0])};{start[0][1:]}", escape_markdown(text))


def _missing(report: EvaluationReport) -> str:
    if not report.missing:
        return ""
    lines = (f"- {escape(row.name)}: {escape(row.reason)}" for row in report.missing)
    return "Not measured:\n\n" + "\n".join(lines)


def _sample(report: EvaluationReport) -> list[str]:
    if not report.sample_rows:
        return []
    title = phrases.sample_title(report)
    table = measure_table(report, report.sample_rows, title=title, marks=False, intervals="column")
    return [f"## {title}", table.to_markdown()]


def _comparisons(report: EvaluationReport, comparisons: Sequence[Comparison], title: str) -> list[str]:
    """The section of the comparisons in the main measure."""
    main = [comparison for comparison in comparisons if comparison.measure == report.main_measure]
    if not main:
        return []
    return [f"## {escape(title)}", comparison_table(report, main, title=title, detailed=False).to_markdown()]
