"""Reports as tables for a terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from d2llm.core.types import Ranking
from d2llm.pipeline.report import EvaluationReport, EvaluationRow, MissingRow

_SHOWN_CHARACTERS = 300


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


def ranking_table(ranking: Ranking) -> Table:
    """One query with its passages, best first: rank, score, id and the beginning of the text."""
    table = Table(title=Text(ranking.query.text), title_justify="left", title_style="bold", box=None, show_header=False)
    table.add_column(justify="right")
    table.add_column(justify="right", no_wrap=True)
    table.add_column(style="cyan", overflow="fold", max_width=30)
    table.add_column(ratio=1)
    for place in ranking.passages:
        text = Text(_beginning(place.passage.full_text))
        table.add_row(str(place.rank), f"{place.score:.3f}", Text(place.passage.id), text)
    return table


def judgement_table(query: str, passages: Sequence[str], log_odds: Sequence[float]) -> Table:
    """What a teacher said of some passages, in the order given: probability of yes, log-odds, text."""
    table = Table(title=Text(query), title_justify="left", title_style="bold", box=None)
    table.add_column("P(yes)", justify="right")
    table.add_column("log-odds", justify="right")
    table.add_column("passage", ratio=1)
    for passage, value in zip(passages, log_odds, strict=True):
        table.add_row(f"{0.5 + 0.5 * math.tanh(value / 2):.4f}", f"{value:+.3f}", Text(_beginning(passage)))
    return table


def _beginning(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= _SHOWN_CHARACTERS else flat[: _SHOWN_CHARACTERS - 1] + "…"


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
    for heading in (*measures, "ms /\nquery", "bytes /\npassage", "queries"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        size = "-" if row.bytes_per_passage is None else f"{row.bytes_per_passage:,.0f}"
        values = [f"{row.measures[measure]:.4f}" for measure in measures]
        table.add_row(row.name, *values, f"{row.milliseconds_per_query:,.1f}", size, f"{row.num_queries:,}")
    for row in missing:
        table.add_row(f"{row.name}: not measured, {row.reason}", *("-" for _ in range(len(measures) + 3)))
    return table
