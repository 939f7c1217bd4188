"""What ``data check`` found, as tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterator

from rich.table import Table
from rich.text import Text

from d2llm.data.check_report import DataReport, Lengths, SplitCounts

_BAR_WIDTH = 24
_NUM_LANGUAGES = 6
_TITLE_WIDTH = 100


def data_tables(report: DataReport) -> Iterator[Table]:
    """All tables of a report, those without a row left out."""
    yield _split_table(report)
    for table in (_leak_table(report), _shared_table(report), _repeats_table(report)):
        if table.row_count:
            yield table
    yield from (_length_table(lengths) for lengths in report.lengths)
    if report.languages:
        yield _language_table(report)


def _split_table(report: DataReport) -> Table:
    items = "judgements" if report.kind == "retrieval" else "pairs"
    title = f"{report.name} ({report.kind}): {report.num_queries:,} queries, {report.num_passages:,} passages"
    values = {"retrieval": "by grade", "scores": "least / mean / greatest"}.get(report.kind, "by class")
    table = _table(title, "split", "queries", "passages", items)
    table.add_column(values)
    for split in report.splits:
        counts = (f"{number:,}" for number in (split.num_queries, split.num_passages, split.num_items))
        table.add_row(split.name, *counts, Text(_values(split)))
    return table


def _values(split: SplitCounts) -> str:
    if split.score_range:
        return " / ".join(f"{score:.3g}" for score in split.score_range)
    return ", ".join(f"{value}: {count:,}" for value, count in split.values.items())


def _leak_table(report: DataReport) -> Table:
    table = _table("Leaks between splits", "splits", "count")
    table.add_column("kind")
    table.add_column("first few", overflow="fold")
    for leak in report.leaks:
        shown = ", ".join(" = ".join(ids) for ids in leak.examples)
        table.add_row(f"{leak.first} / {leak.second}", f"{leak.count:,}", leak.kind, Text(shown))
    return table


def _shared_table(report: DataReport) -> Table:
    table = _table(
        "Relevant passages that splits share (usual where one corpus serves all)", "splits", "count", "share"
    )
    for shared in report.shared_positives:
        table.add_row(f"{shared.first} / {shared.second}", f"{shared.count:,}", f"{shared.count / shared.total:.1%}")
    return table


def _repeats_table(report: DataReport) -> Table:
    table = _table("Repeated texts (letters and digits compared)", "what", "count")
    table.add_column("first few", overflow="fold")
    for repeats in report.repeats:
        table.add_row(repeats.what, f"{repeats.count:,}", Text(", ".join(repeats.examples)))
    return table


def _length_table(lengths: Lengths) -> Table:
    of = "all" if lengths.num_texts == lengths.num_all else f"a sample of {lengths.num_texts:,} of"
    title = f"Tokens of {of} {lengths.num_all:,} {lengths.what}; {lengths.share_over:.2%} are over {lengths.limit}"
    percentiles = ", ".join(f"{p}%: {length:,}" for p, length in lengths.percentiles.items())
    table = _table(title, "tokens", "share", caption=f"percentiles: {percentiles}")
    table.add_column("")
    highest = max(share for _, share in lengths.bars)
    for bound, share in lengths.bars:
        name = f"to {bound:,}" if bound is not None else f"over {lengths.limit:,}"
        table.add_row(name, f"{share:.1%}", "█" * round(_BAR_WIDTH * share / highest))
    return table


def _language_table(report: DataReport) -> Table:
    table = _table("Languages that a sample looks like (a guess, often wrong for short texts)", "texts", "sampled")
    table.add_column("languages")
    for languages in report.languages:
        shares = [f"{name} {count / languages.num_texts:.1%}" for name, count in languages.counts.items()]
        rest = len(shares) - _NUM_LANGUAGES
        shown = shares[:_NUM_LANGUAGES] + ([f"{rest} more"] if rest > 0 else [])
        table.add_row(languages.what, f"{languages.num_texts:,}", ", ".join(shown))
    return table


def _table(title: str, *headings: str, caption: str | None = None) -> Table:
    """A table whose first column is left-aligned and whose others are numbers."""
    width = min(_TITLE_WIDTH, max(len(title), len(caption or "")))  # a title is else cut to the columns' width
    table = Table(title=Text(title), title_justify="left", caption=caption, caption_justify="left", min_width=width)
    for place, heading in enumerate(headings):
        table.add_column(heading, justify="left" if place == 0 else "right", no_wrap=place > 0)
    return table
