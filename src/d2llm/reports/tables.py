"""Reports as tables for a terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.styled import Styled
from rich.table import Table
from rich.text import Text

from d2llm.core.types import Passage, Ranking
from d2llm.evaluation.report import EvaluationReport, EvaluationRow, MissingRow
from d2llm.reports import words

_SHOWN_CHARACTERS = 300


def evaluation_tables(report: EvaluationReport) -> list[RenderableType]:
    """A report for a terminal: measures, the teacher's sample, agreement, cost, and what to know of the figures."""
    facts = ", ".join(
        value if label in ("data", "task") else f"{value} {label}" for label, value in words.facts(report)
    )
    parts: list[RenderableType] = [_measures(facts, report, report.rows, report.missing, marks=True)]
    if report.sample_rows:
        count = report.sample_rows[0].num_items
        title = f"The same systems on the {count:,} {words.item_noun(report, count)} that the teacher judged"
        parts.append(_measures(title, report, report.sample_rows, (), marks=False))
    if report.agreement:
        parts.append(_agreement(report))
    parts.append(_costs(report.rows))
    verdict = words.verdict(report)
    remarks = [words.legend(report), *([verdict] if verdict else []), *report.notes]
    return [*parts, Text("\n".join(remarks))]


def _measures(
    title: str,
    report: EvaluationReport,
    rows: Sequence[EvaluationRow],
    missing: Sequence[MissingRow],
    *,
    marks: bool,
) -> Table:
    table = Table(title=Text(title), title_justify="left")
    table.add_column("", max_width=40)
    measures = words.measure_names(rows)
    for heading in (*measures, "items"):
        table.add_column(heading, justify="right")
    best = {measure: words.best_rows(rows, measure) for measure in measures}
    for row in rows:
        cells: list[Text] = []
        for measure in measures:
            estimate = row.measures.get(measure)
            text = words.ABSENT if estimate is None else f"{estimate.value:.4f}"
            sign = words.mark(report, row.name, measure) if marks else ""
            cells.append(Text(text + (sign or " "), style="bold" if row.name in best[measure] else ""))
        table.add_row(Text(row.name), *cells, f"{row.num_items:,}")
    for row in missing:
        table.add_row(
            Text(f"{row.name}: not measured, {row.reason}"), *(words.ABSENT for _ in range(len(measures) + 1))
        )
    return table


def _costs(rows: Sequence[EvaluationRow]) -> Table:
    table = Table(title=Text("Cost, one at a time"), title_justify="left")
    table.add_column("", max_width=40)
    columns = words.cost_columns(rows)
    for heading, _ in columns:
        table.add_column(heading, justify="right")
    for place, row in enumerate(rows):
        table.add_row(Text(row.name), *(cells[place] for _, cells in columns))
    return table


def _agreement(report: EvaluationReport) -> Table:
    table = Table(title=Text("Agreement with the teacher, on what it judged"), title_justify="left")
    table.add_column("", max_width=40)
    for heading in ("label loyalty", "Pearson", "Kendall", "Pearson, all pairs", "top-10 overlap", "pairs"):
        table.add_column(heading, justify="right")
    for row in report.agreement:
        found = row.agreement
        values = (found.label_loyalty, found.pearson_within, found.kendall_within, found.pearson_over_all)
        cells = [words.ratio(value) for value in (*values, row.top_10_overlap)]
        table.add_row(Text(row.name), *cells, f"{found.num_pairs:,}")
    return table


def ranking_list(ranking: Ranking) -> RenderableType:
    """One query with its passages, best first: rank, score and id, the beginning of the text below; neighbours in grey.

    An id stands on a line of its own, however long it is, so that it can be copied.
    """
    width = len(str(len(ranking.passages)))
    parts: list[RenderableType] = [_unbroken(Text(ranking.query.text, style="bold"))]
    for place in ranking.passages:
        parts += [part for passage in place.before for part in _neighbour(passage, width)]
        head = Text.assemble(f"{place.rank:{width}}  {place.score:.3f}  ", (place.passage.id, "cyan"))
        parts += [_unbroken(head), _below(place.passage.full_text, width)]
        parts += [part for passage in place.after for part in _neighbour(passage, width)]
    return Group(*parts)


def _neighbour(passage: Passage, width: int) -> list[RenderableType]:
    return [
        _unbroken(Text(" " * (width + 2) + passage.id, style="dim")),
        Styled(_below(passage.text, width), "dim"),
    ]


def _below(text: str, width: int) -> RenderableType:
    return Padding(Text(_beginning(text)), (0, 0, 0, width + 2))


def _unbroken(line: Text) -> Text:
    line.no_wrap, line.overflow = True, "ignore"
    return line


def explanation_table(ranking: Ranking) -> Table:
    """Why the passages of a ranking stand where they do."""
    table = Table(box=None, title=Text("why"), title_justify="left")
    for name in (
        "rank",
        "inner product",
        "words",
        "best window",
        "interaction",
        "ranks of sources",
        "terms of the query",
    ):
        table.add_column(name, justify="left" if name.startswith(("ranks", "terms")) else "right")
    for place in ranking.passages:
        why = place.explanation
        if why is None:
            continue
        ranks = ", ".join(f"{name} {rank} ({why.source_scores[name]:.3f})" for name, rank in why.source_ranks.items())
        terms = ", ".join(f"{term} {count}" for term, count in sorted(why.terms.items(), key=lambda item: -item[1]))
        table.add_row(
            str(place.rank),
            "-" if why.anchor is None else f"{why.anchor:.3f}",
            "-" if why.lexical is None else f"{why.lexical:+.3f}",
            "-" if why.windows is None else f"{why.windows:+.3f}",
            "-" if why.interaction is None else f"{round(why.interaction, 3) or 0.0:+.3f}",  # no -0.000
            ranks or "-",
            Text(terms or "-"),
        )
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
