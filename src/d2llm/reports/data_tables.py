"""The results of ``data check`` and ``labels stats`` as tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterator

from d2llm.core.names import counted
from d2llm.core.table import Column, Table
from d2llm.data.check import DataReport, Lengths, SplitCounts
from d2llm.data.label_sets import LabelCounts

_BAR_WIDTH = 24
_NUM_LANGUAGES = 6


def data_tables(report: DataReport) -> Iterator[Table]:
    """All tables of a report; empty ones are left out."""
    yield _split_table(report)
    for table in (_leak_table(report), _shared_table(report), _repeats_table(report)):
        if table.rows:
            yield table
    yield from (_length_table(lengths) for lengths in report.lengths)
    if report.languages:
        yield _language_table(report)


def _split_table(report: DataReport) -> Table:
    items = "judgements" if report.kind == "retrieval" else "pairs"
    values = {"retrieval": "by grade", "scores": "min / mean / max"}.get(report.kind, "by class")
    counts = f"{counted(report.num_queries, 'query')}, {counted(report.num_passages, 'passage')}"
    table = Table(
        "split",
        Column("queries", ","),
        Column("passages", ","),
        Column(items, ","),
        values,
        title=f"{report.name} ({report.kind}): {counts}",
    )
    for split in report.splits:
        table.add_row(split.name, split.num_queries, split.num_passages, split.num_items, _values(split))
    return table


def _values(split: SplitCounts) -> str:
    if split.score_range:
        return " / ".join(f"{score:.3g}" for score in split.score_range)
    return ", ".join(f"{value}: {count:,}" for value, count in split.values.items())


def _leak_table(report: DataReport) -> Table:
    table = Table("splits", Column("count", ","), "kind", "first few", title="Leaks between splits")
    for leak in report.leaks:
        examples = ", ".join(" = ".join(ids) for ids in leak.examples)
        table.add_row(f"{leak.first} / {leak.second}", leak.count, leak.kind, examples)
    return table


def _shared_table(report: DataReport) -> Table:
    title = "Relevant passages that splits share (usual where one corpus serves all)"
    table = Table("splits", Column("count", ","), Column("fraction", ".1%"), title=title)
    for shared in report.shared_positives:
        table.add_row(f"{shared.first} / {shared.second}", shared.count, shared.count / shared.total)
    return table


def _repeats_table(report: DataReport) -> Table:
    table = Table("what", Column("count", ","), "first few", title="Repeated texts (letters and digits compared)")
    for repeats in report.repeats:
        table.add_row(repeats.label, repeats.count, ", ".join(repeats.examples))
    return table


def _length_table(lengths: Lengths) -> Table:
    texts = "all" if lengths.num_texts == lengths.num_all else f"a sample of {lengths.num_texts:,} of"
    table = Table(
        "tokens",
        Column("fraction", ".1%"),
        "",
        title=f"Tokens of {texts} {lengths.num_all:,} {lengths.label}; {lengths.fraction_over:.2%} are over "
        f"{lengths.limit}",
        caption="percentiles: " + ", ".join(f"{p}%: {length:,}" for p, length in lengths.percentiles.items()),
    )
    highest = max(fraction for _, fraction in lengths.bars)
    for bound, fraction in lengths.bars:
        name = f"to {bound:,}" if bound is not None else f"over {lengths.limit:,}"
        table.add_row(name, fraction, "█" * round(_BAR_WIDTH * fraction / highest))
    return table


def _language_table(report: DataReport) -> Table:
    title = "Languages detected in a sample (a guess, often wrong for short texts)"
    table = Table("texts", Column("sampled", ","), "languages", title=title)
    for languages in report.languages:
        fractions = [f"{name} {count / languages.num_texts:.1%}" for name, count in languages.counts.items()]
        rest = len(fractions) - _NUM_LANGUAGES
        first = fractions[:_NUM_LANGUAGES] + ([f"{rest} more"] if rest > 0 else [])
        table.add_row(languages.label, languages.num_texts, ", ".join(first))
    return table


def label_table(counts: LabelCounts) -> Table:
    """The label sets of a store."""
    numbers = ("queries", "pairs", "repeated", "with features")
    table = Table(
        "data set",
        "teacher",
        "prompt",
        *(Column(name, ",") for name in numbers),
        Column("yes", ".1%"),
        Column("log-odds", ".2f"),
        Column("spread", ".2f"),
        title=f"{counts.store}: {counted(counts.num_shards, 'shard')}, {counts.num_bytes / 2**20:,.1f} MiB",
        caption="repeated: pairs labelled more than once, of which the last label counts; with features: queries with "
        "cosines between the teacher's features; yes: fraction with log-odds above 0; spread: standard deviation",
    )
    for one in counts.sets:
        table.add_row(
            *(one.dataset, one.teacher, one.prompt, one.num_queries, one.num_pairs, one.num_repeated, one.num_grams),
            *(one.fraction_yes, one.mean, one.spread),
        )
    return table
