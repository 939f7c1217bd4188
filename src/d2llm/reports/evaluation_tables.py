"""The tables of an evaluation, for a terminal and a page, and its document, for a repository or an issue."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from rich.console import RenderableType
from rich.text import Text

from d2llm.core.document import Document, Items, Note, Section, Values
from d2llm.core.table import Cell, Column, Table
from d2llm.evaluation.report import Comparison, EvaluationReport, EvaluationRow
from d2llm.reports import phrases

_SYSTEM = Column("system", align="left", max_width=40)


def evaluation_tables(report: EvaluationReport, *, has_styles: bool = True) -> list[RenderableType]:
    """A report for a terminal, or as plain text: measures, the teacher's sample, agreement, cost, and remarks."""
    data, *counts, (_, task), (_, seconds) = phrases.facts(report)
    facts = ", ".join([data[1], *(f"{count} {noun}" for noun, count in counts), task, f"took {seconds}"])
    measures = measure_table(report, report.rows, title=facts)
    for row in report.missing:
        measures.add_row(f"{row.name}: not measured, {row.reason}", *(None for _ in measures.columns[1:]))
    renderables: list[RenderableType] = [measures]
    if report.sample_rows:
        renderables.append(measure_table(report, report.sample_rows, title=phrases.sample_title(report), marks=False))
    if report.agreement:
        renderables.append(agreement_table(report))
    renderables.append(cost_table(report))
    verdict = phrases.verdict(report)
    legend = phrases.legend(report)
    remarks = [f"{phrases.BOLD} {legend}" if has_styles else legend, *([verdict] if verdict else []), *report.notes]
    return [*renderables, Text("\n".join(remarks))]


def evaluation_document(report: EvaluationReport) -> Document:
    """The whole report without its texts and plots, which ``reports.html`` has."""
    sample: list[Section] = []
    if report.sample_rows:
        title = phrases.sample_title(report)
        table = measure_table(report, report.sample_rows, title=title, marks=False, intervals="column")
        sample = [Section(title, [table])]
    meanings = {name: phrases.meaning(name) for name in phrases.measure_names(report.rows)}
    explained = [f"{name}: {text}" for name, text in meanings.items() if text]
    measure, has_costs = report.main_measure, bool(phrases.cost_columns(report.rows))
    return Document(
        f"{report.dataset} / {report.split}",
        [
            Section("", [Items([f"{label}: {value}" for label, value in phrases.facts(report)])]),
            Section("", [Note(phrases.verdict(report) or "")]),
            Section(
                "Measures",
                [
                    measure_table(report, report.rows, title="Measures", intervals="column"),
                    Note(f"{phrases.BOLD} {phrases.legend(report)}"),
                    Items([f"{row.name}: {row.reason}" for row in report.missing], "Not measured:"),
                ],
            ),
            *sample,
            *_compared(report, report.comparisons, f"{measure} against {report.baseline or 'the baseline'}"),
            *_compared(report, report.parts, f"What each part of the score is worth: {measure} without it"),
            Section("Cost", [cost_table(report) if has_costs else Note("No cost was measured.")]),
            Section("Agreement with the teacher", [agreement_table(report)] if report.agreement else []),
            Section('Calibration of "yes"', [calibration_table(report)] if report.calibration else []),
            Section("Notes", [Items(report.notes)]),
            Section("How to read the measures", [Items(explained)]),
            Section("Settings", [Values({"settings": report.settings, "provenance": report.provenance})]),
        ],
    )


def _compared(report: EvaluationReport, comparisons: Sequence[Comparison], title: str) -> list[Section]:
    """The comparisons in the main measure."""
    main = [comparison for comparison in comparisons if comparison.measure == report.main_measure]
    return [Section(title, [comparison_table(report, main, title=title, detailed=False)])] if main else []


def measure_table(
    report: EvaluationReport,
    rows: Sequence[EvaluationRow],
    *,
    title: str,
    marks: bool = True,
    intervals: Literal["none", "column", "cells"] = "none",
    tagged: bool = False,
) -> Table:
    """The measures of the ``rows`` (all, or those of the teacher's sample); the best of each column is bold.

    ``marks`` are ``*`` and ``†`` for significant differences from the baseline; ``tagged`` adds the word "baseline" to
    it. ``intervals`` of "column" adds a column for the main measure, of "cells" the interval to each cell.
    """
    measures = phrases.measure_names(rows)
    best = {measure: phrases.best_rows(rows, measure) for measure in measures}
    columns = [_SYSTEM, *(Column(measure, ".4f") for measure in measures)]
    if intervals == "column":
        columns.append(Column(f"95 % of {report.main_measure}"))
    table = Table(*columns, Column(phrases.item_noun(report, 2), ","), title=title)

    def cell(row: EvaluationRow, measure: str) -> Cell | None:
        estimate = row.measures.get(measure)
        if estimate is None:
            return None
        return Cell(
            estimate.value,
            "bold" if row.name in best[measure] else "",
            mark=phrases.mark(report, row.name, measure) if marks else "",
            note=f"{estimate.low:.3f} to {estimate.high:.3f}" if intervals == "cells" else "",
        )

    for row in rows:
        cells: list[Cell | str | None] = [cell(row, measure) for measure in measures]
        if intervals == "column":
            estimate = row.measures.get(report.main_measure)
            cells.append(None if estimate is None else f"{estimate.low:.4f} to {estimate.high:.4f}")
        table.add_row(_system(report, row.name, tagged), *cells, row.num_items, highlighted=row.name == report.subject)
    return table


def cost_table(report: EvaluationReport, *, tagged: bool = False) -> Table:
    """What each system costs; costs that were not measured for any system are left out."""
    columns = phrases.cost_columns(report.rows)
    table = Table(_SYSTEM, *(Column(heading) for heading, _ in columns), title="Cost, one at a time")
    for index, row in enumerate(report.rows):
        cells = [costs[index] for _, costs in columns]
        table.add_row(_system(report, row.name, tagged), *cells, highlighted=row.name == report.subject)
    return table


def agreement_table(report: EvaluationReport, *, tagged: bool = False) -> Table:
    """How well each system's scores agree with the teacher's."""
    table = Table(
        _SYSTEM,
        Column("label loyalty", ".4f"),
        Column("probability loyalty", ".4f"),
        Column("Kendall", ".4f"),
        Column("Pearson", ".4f"),
        Column("Pearson, all pairs", ".4f"),
        Column("top-10 overlap", ".4f"),
        Column("queries", ","),
        Column("pairs", ","),
        title="Agreement with the teacher, on what it scored",
    )
    for row in report.agreement:
        agreement = row.agreement
        table.add_row(
            _system(report, row.name, tagged),
            agreement.label_loyalty,
            agreement.probability_loyalty,
            agreement.kendall_within,
            agreement.pearson_within,
            agreement.pearson_over_all,
            row.top_10_overlap,
            agreement.num_queries,
            agreement.num_pairs,
            highlighted=row.name == report.subject,
        )
    return table


def comparison_table(
    report: EvaluationReport, comparisons: Sequence[Comparison], *, title: str, detailed: bool
) -> Table:
    """Differences with their tests; ``detailed`` adds columns with measure and test."""
    table = Table(
        _SYSTEM,
        *(["measure"] if detailed else []),
        Column("difference", "+.4f"),
        Column("95 %"),
        Column("p", ".4f"),
        Column("p, Holm", ".4f"),
        Column(phrases.item_noun(report, 2), ","),
        *(["test"] if detailed else []),
        title=title,
    )
    for comparison in comparisons:
        difference = comparison.difference
        table.add_row(
            comparison.row,
            *([comparison.measure] if detailed else []),
            difference.value,
            f"{difference.low:+.4f} to {difference.high:+.4f}",
            comparison.p_value,
            comparison.adjusted_p,
            comparison.num_items,
            *([comparison.test] if detailed else []),
            highlighted=comparison.row == report.subject,
        )
    return table


def calibration_table(report: EvaluationReport) -> Table:
    """Calibration errors of each system's probabilities."""
    table = Table(_SYSTEM, Column("expected error", ".4f"), Column("pairs", ","), title='Calibration of "yes"')
    for row in report.calibration:
        table.add_row(row.name, row.expected_error, row.num_pairs)
    return table


def _system(report: EvaluationReport, name: str, tagged: bool) -> Cell:
    return Cell(name, note="baseline" if tagged and name == report.baseline else "")
