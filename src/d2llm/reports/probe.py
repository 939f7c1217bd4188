"""The report of ``probe`` as tables and as a document."""

from __future__ import annotations

from d2llm.core.document import Document, Note, Section
from d2llm.core.table import Cell, Column, Table
from d2llm.evaluation.probe import SHOWN_MEASURES, ProbeReport


def probe_tables(report: ProbeReport) -> list[Table]:
    """The probing tasks, if there was a corpus, and the generated sets."""
    return [*([probing_table(report)] if report.probing else []), ranking_table(report)]


def probing_table(report: ProbeReport) -> Table:
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
            "Bold: above both baselines by more than that."
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
