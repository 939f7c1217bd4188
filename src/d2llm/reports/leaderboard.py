"""A leaderboard as tables and as a document."""

from __future__ import annotations

from d2llm.core.document import Document, Items, Note, Section
from d2llm.core.table import Cell, Column, Table
from d2llm.evaluation.leaderboard import Leaderboard, LeaderboardRow
from d2llm.evaluation.probe import SHOWN_MEASURES, ProbeReport


def leaderboard_tables(board: Leaderboard) -> list[Table]:
    """The systems with their means, and every set; the best value of each is bold."""
    return [system_table(board), set_table(board)]


def system_table(board: Leaderboard) -> Table:
    """One line for each system: its means, and on how many sets it differs significantly from the baseline."""
    against = [] if board.baseline is None else [Column("above"), Column("below")]
    table = Table(
        Column("#"),
        Column("system", align="left", max_width=48),
        *(Column(f"{measure}, {num} sets" if num > 1 else measure, ".4f") for measure, num in board.set_counts.items()),
        *against,
        title=f"{len(board.rows)} systems on {len(board.sets)} data sets",
        caption=_caption(board),
    )
    for position, row in enumerate(board.rows, start=1):
        cells = [_mean_cell(board, row, measure) for measure in board.set_counts]
        ends = [f"{len(names)} of {row.num_compared}" if row.num_compared else None for names in (row.above, row.below)]
        table.add_row(str(position), row.name, *cells, *ends[: len(against)])
    return table


def _mean_cell(board: Leaderboard, row: LeaderboardRow, measure: str) -> Cell | None:
    """A mean, bold if it is the best over all sets; with the number of sets if it is not over all."""
    mean = row.means.get(measure)
    if mean is None:
        return None
    num_all = board.set_counts[measure]
    if mean.num_sets < num_all:
        return Cell(mean.value, mark=f" ({mean.num_sets})")
    means = [other.means[measure] for other in board.rows if measure in other.means]
    best = max(other.value for other in means if other.num_sets == num_all)
    return _value(mean.value, best, 4)


def _caption(board: Leaderboard) -> str:
    caption = "Means; in brackets, over how many sets if not all, so that they cannot be compared."
    if board.baseline is None:
        return caption
    return (
        f"{caption} Above, below: sets on which the system differs significantly from '{board.baseline}' "
        "(p < .05, Holm-corrected over the sets)."
    )


def set_table(board: Leaderboard) -> Table:
    """One line for each data set, in its main measure, and a column for each system, by its number."""
    numbers = range(1, len(board.rows) + 1)
    table = Table("set", "measure", *(Column(f"#{position}", ".3f") for position in numbers), title="Every set")
    for one in board.sets:
        values = [row.values.get(one.name) for row in board.rows]
        best = max((value for value in values if value is not None), default=0.0)
        table.add_row(one.name, one.measure, *(_value(value, best, 3) for value in values))
    return table


def _value(value: float | None, best: float, digits: int) -> Cell:
    return Cell(value, "bold" if value is not None and round(value, digits) == round(best, digits) else "")


def leaderboard_document(board: Leaderboard) -> Document:
    """The systems with their means, every set, and notes."""
    systems, sets = leaderboard_tables(board)
    first = Section("Systems", [systems, Note(systems.caption)])
    return Document(systems.title, [first, Section(sets.title, [sets, Items(board.notes)])])


def probe_tables(report: ProbeReport, *, has_styles: bool = True) -> list[Table]:
    """The probing tasks, if there was a corpus, and the generated sets."""
    return [*([probing_table(report, has_styles=has_styles)] if report.probing else []), ranking_table(report)]


def probing_table(report: ProbeReport, *, has_styles: bool = True) -> Table:
    """One line for each probing task; accuracies that are above both baselines by more than the margin are bold."""
    table = Table(
        "task",
        Column("classes"),
        Column("texts trained on"),
        Column("test texts"),
        Column("majority", ".3f"),
        Column("bag of words", ".3f"),
        Column("vectors", ".3f"),
        Column("±", ".3f"),
        title="Probing: accuracy of a linear classifier",
        caption=(
            "Read from the vector of a sentence: its length, which of some words it has, whether two neighbours were "
            "exchanged, and whether a word was replaced by another as frequent. ±: half of the 95 % interval. "
            f"{'Bold: above both baselines by more than that.' if has_styles else ''}"
        ),
    )
    for row in report.probing:
        is_above = row.vectors - row.margin > max(row.majority, row.bag_of_words)
        counts = (row.num_classes, row.num_train, row.num_test)
        table.add_row(
            row.task,
            *counts,
            row.majority,
            row.bag_of_words,
            Cell(row.vectors, "bold" if is_above else ""),
            row.margin,
        )
    return table


def ranking_table(report: ProbeReport) -> Table:
    """One section for each kind of query of the generated sets, one line for each system."""
    table = Table(
        "system",
        *(Column(measure, ".3f") for measure in SHOWN_MEASURES),
        title="Generated sets: all passages ranked",
        caption=(
            "LIMIT: each two of some persons like one thing, which a query names. Granularity: a query names what a "
            "passage is about, a thing in it, or the thing with its colour. R-precision: of the first R passages, the "
            "share that is relevant, if R are. The student's score is that of its vectors, without words."
        ),
    )
    section = ""
    for row in report.ranking:
        title = f"{row.set_name}, {row.kind}: {row.num_queries:,} queries, {row.num_passages:,} passages"
        if title != section:
            table.add_section(title)
            section = title
        table.add_row(row.system, *(row.measures[measure] for measure in SHOWN_MEASURES))
    return table


def probe_document(report: ProbeReport) -> Document:
    """The same tables with their captions."""
    sections = [Section(table.title, [table, Note(table.caption)]) for table in probe_tables(report)]
    return Document(f"What the vectors of {report.student} know and can rank", sections)
