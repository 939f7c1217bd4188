"""The audit of a plan as a page of Markdown."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import Any

from d2llm.core.table import Column, Table, escape_markdown

_MAX_CHARACTERS = 300
_BAR = 20  # characters of the longest bar

_HOW_TO_READ = """## Examples

Read them: a negative that answers its query (or says the same) is a false one. More than a few of those call for a
stricter filter or for leaving out the first ranks (`range_min`)."""

_REASONS = {
    "near_duplicate": "text nearly that of a positive (likeness above the limit)",
    "relative_margin": "the encoder scores it as high as a positive",
    "teacher_margin": "the teacher finds it as relevant as a positive",
}


def audit_page(report: dict[str, Any], audit: dict[str, Any]) -> str:
    """The page of what ``mine`` reported and its audit found."""
    parts = [
        f"# Hard negatives of {_inline(report['dataset'])}, split {_inline(report['split'])}",
        _summary(report, audit),
        "## Where the hard negatives come from\n\n"
        "Rank in each list, positives left out. One that is in two lists counts in both.\n\n" + _ranks(audit),
        "## What was dropped as a likely false negative\n\n" + _dropped(audit),
        *_margins(audit),
        _HOW_TO_READ,
        *(_example(example) for example in audit["examples"]),
    ]
    return "\n\n".join(parts) + "\n"


def _summary(report: dict[str, Any], audit: dict[str, Any]) -> str:
    table = Table("", Column("number", ","))
    for name, count in (
        ("queries", report["num_entries"]),
        ("positives", report["num_positives"]),
        ("hard negatives", report["num_hard_negatives"]),
        ("easy negatives", report["num_easy_negatives"]),
        ("queries with fewer hard negatives than wanted", report["queries"]["too_few_hard"]["count"]),
        ("candidates in the range", audit["candidates"]["in_range"]),
        ("candidates tried", audit["candidates"]["tried"]),
        ("passages with the text of a positive, left out", report["num_same_text_as_positive"]),
        ("pairs judged by the teacher", report["teacher"]["judged"]),
        ("candidates let through without a teacher label", report["teacher"]["without_label"]),
    ):
        table.add_row(name, count)
    return table.to_markdown()


def _ranks(audit: dict[str, Any]) -> str:
    kept: dict[str, dict[str, int]] = audit["kept_by_rank"]
    table = Table("list", *(Column(name, ",") for name in next(iter(kept.values()), {})))
    for source, counts in kept.items():
        table.add_row(source, *counts.values())
    return table.to_markdown()


def _dropped(audit: dict[str, Any]) -> str:
    table = Table("reason", "meaning", Column("number", ","), "first (query / passage)")
    for reason, drops in audit["dropped"].items():
        first = ", ".join(f"{drop['query_id']} / {drop['passage_id']}" for drop in drops["first"])
        table.add_row(reason, _REASONS[reason], drops["count"], first)
    return table.to_markdown()


def _margins(audit: dict[str, Any]) -> Iterable[str]:
    for name, histogram in audit["margins"].items():
        edges = [f"{edge:g}" for edge in histogram["edges"]]
        bins = [f"below {edges[0]}", *(f"{a} to {b}" for a, b in pairwise(edges))]
        most = max(histogram["kept"]) or 1
        table = Table("margin", Column("kept", ","), Column("dropped", ","), "")
        for margin, kept, dropped in zip(
            [*bins, f"{edges[-1]} and more"], histogram["kept"], histogram["dropped"], strict=True
        ):
            table.add_row(margin, kept, dropped, "█" * round(_BAR * kept / most))
        yield (
            f"## Margins: {name}\n\nMean score of the query's positives less that of the candidate; below 0 the "
            f"{name} prefers the candidate.\n\n" + table.to_markdown()
        )


def _example(example: dict[str, Any]) -> str:
    lines = [f"### {_inline(example['query_id'])}", "", f"**Query:** {_inline(example['query'])}", ""]
    lines += [f"- **positive** {_scores(shown)}: {_inline(shown['text'])}" for shown in example["positives"]]
    hidden = example["num_positives"] - len(example["positives"])
    if hidden:
        lines.append(f"- and {hidden} more positives")
    lines += [f"- hard negative {_where(shown)}: {_inline(shown['text'])}" for shown in example["hard_negatives"]]
    for drop in example["dropped"]:
        why = f"{drop['reason']} {drop['value']:g} > {drop['limit']:g}"
        lines.append(f"- dropped ({why}) {_where(drop)}: {_inline(drop['text'])}")
    return "\n".join(lines)


def _where(shown: dict[str, Any]) -> str:
    ranks = ", ".join(f"{source} {rank}" for source, rank in shown["ranks"].items())
    return f"[{ranks}] {_scores(shown)}"


def _scores(shown: dict[str, Any]) -> str:
    scores = "; ".join(f"{name} {value:g}" for name, value in shown["scores"].items())
    return f"`{_plain(shown['passage_id'])}`" + (f" ({scores})" if scores else "")


def _plain(text: str) -> str:
    return " ".join(text.replace("`", "'").split())


def _inline(text: str) -> str:
    """On one line, cut, and with nothing in it that Markdown would read as its own."""
    text = " ".join(text.split())
    if len(text) > _MAX_CHARACTERS:
        text = text[: _MAX_CHARACTERS - 1] + "…"
    return escape_markdown(text)
