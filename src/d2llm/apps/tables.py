"""Reports as tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from d2llm.pipeline.report import EvaluationReport, EvaluationRow, MissingRow


def evaluation_table(report: EvaluationReport) -> Table:
    """Every system of a report: measures, time and size; below it what was left out, and the significance."""
    title = f"{report.dataset} / {report.split}: {report.num_queries:,} queries, {report.num_passages:,} passages"
    return _table(title, report.rows, report.missing, caption="\n".join(_remarks(report)))


def sample_table(report: EvaluationReport) -> Table | None:
    """Every system on exactly the queries that the teacher judged; None where it judged all or none."""
    if not report.sample_rows:
        return None
    title = f"The same systems on the {report.sample_rows[0].num_queries:,} queries that the teacher judged"
    return _table(title, report.sample_rows, (), caption=None)


def _remarks(report: EvaluationReport) -> list[str]:
    remarks: list[str] = []
    if report.num_left_out:
        remarks.append(f"{report.num_left_out:,} queries without a relevant passage in the corpus were left out")
    if test := report.significance:
        remarks.append(
            f"{test.first} against {test.second}: {test.measure} {test.difference:+.4f}, p = {test.p_value:.4f} "
            f"(paired randomisation test, {test.num_permutations:,} permutations)"
        )
    return remarks + list(report.notes)


def _table(title: str, rows: Sequence[EvaluationRow], missing: Sequence[MissingRow], *, caption: str | None) -> Table:
    table = Table(title=title, caption=caption or None, caption_justify="left")
    table.add_column("", max_width=50)
    measures = list(rows[0].measures) if rows else []
    for heading in (*measures, "ms / query", "bytes / passage", "queries"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        size = "-" if row.bytes_per_passage is None else f"{row.bytes_per_passage:,.0f}"
        values = [f"{row.measures[measure]:.4f}" for measure in measures]
        table.add_row(row.name, *values, f"{row.milliseconds_per_query:,.1f}", size, f"{row.num_queries:,}")
    for row in missing:
        table.add_row(f"{row.name}: not measured, {row.reason}", *("-" for _ in range(len(measures) + 3)))
    return table
