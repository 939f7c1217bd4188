"""The audit of a plan: counts, margins and examples for a person who checks the negatives, and its Markdown page."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from d2llm.core.table import Column, Table, escape_markdown
from d2llm.core.types import Passage
from d2llm.recipe.data import NegativeCandidate
from d2llm.training.mining.choose import REASONS, Dropped, Selection

_RANKS = (0, 5, 10, 20, 50, 100)  # first ranks (from 0) of the counted ranges
_COSINE_EDGES = (-0.2, -0.1, -0.05, 0.0, 0.05, 0.1, 0.2, 0.3, 0.5)
_LOGIT_EDGES = (-8.0, -4.0, -2.0, -1.0, 0.0, 1.0, 2.0, 4.0, 8.0)
_NUM_FIRST = 5
_NUM_SHOWN = 3  # positives shown in an example; all negatives are shown


@dataclass
class MarginHistogram:
    """A histogram of margins: the mean score of a query's positives minus the score of a candidate."""

    edges: tuple[float, ...]
    kept: list[int] = field(init=False)
    dropped: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.kept, self.dropped = [0] * (len(self.edges) + 1), [0] * (len(self.edges) + 1)

    def add(self, margin: float, *, kept: bool) -> None:
        """Count one margin; a value on an edge belongs to the bin above it."""
        (self.kept if kept else self.dropped)[bisect_right(self.edges, margin)] += 1

    def to_json(self) -> dict[str, Any]:
        """Edges and counts; the first count is for values below the first edge, the last from the last edge on."""
        return {"edges": list(self.edges), "kept": self.kept, "dropped": self.dropped}


class Audit:
    """Counts the results of ``mine``, query by query; texts are kept only for the queries in ``examples``."""

    def __init__(self, passages: Mapping[str, Passage], sources: Sequence[str], examples: frozenset[str]) -> None:
        self._passages = passages
        self._examples = examples
        self.from_ranks: dict[str, Counter[str]] = {source: Counter() for source in sources}
        self.hard_from: Counter[str] = Counter()
        self.num_candidates = self.num_tried = 0
        self.num_dropped: dict[str, int] = dict.fromkeys(REASONS, 0)
        self.first_dropped: dict[str, list[dict[str, Any]]] = {reason: [] for reason in REASONS}
        self.margins: dict[str, MarginHistogram] = {}
        self.num_without_label = 0
        self.shown: list[dict[str, Any]] = []

    def add(self, item: Selection, scores: Mapping[str, Mapping[str, float]]) -> None:
        """Count a finished query; ``scores``: scorer ("cosine", "teacher", ...) -> known scores by passage id."""
        self.num_candidates += len(item.candidates)
        self.num_tried += item.num_tried
        for candidate in item.kept:
            self.hard_from[candidate.sources] += 1
            for source, rank in candidate.ranks.items():
                self.from_ranks[source][rank_range(rank)] += 1
        for drop in item.dropped:
            self.num_dropped[drop.reason] += 1
            if len(self.first_dropped[drop.reason]) < _NUM_FIRST:
                self.first_dropped[drop.reason].append({"query_id": item.query.id, **_drop_json(drop)})
        for name, values in scores.items():
            self._add_margins(name, values, item)
        if "teacher" in scores:
            self.num_without_label += sum(c.passage_id not in scores["teacher"] for c in item.kept)
        if item.query.id in self._examples:
            self.shown.append(self._example(item, scores))

    def to_json(self) -> dict[str, Any]:
        """The audit as JSON-serialisable values."""
        return {
            "candidates": {"in_range": self.num_candidates, "tried": self.num_tried},
            "kept_by_rank": {
                source: {name: counts[name] for name in range_names()} for source, counts in self.from_ranks.items()
            },
            "dropped": {
                reason: {"count": self.num_dropped[reason], "first": self.first_dropped[reason]} for reason in REASONS
            },
            "margins": {name: histogram.to_json() for name, histogram in self.margins.items()},
            "examples": self.shown,
        }

    def _add_margins(self, name: str, values: Mapping[str, float], item: Selection) -> None:
        positive_scores = [values[passage_id] for passage_id in item.positives if passage_id in values]
        if not positive_scores:
            return
        edges = _COSINE_EDGES if name == "cosine" else _LOGIT_EDGES
        histogram = self.margins.setdefault(name, MarginHistogram(edges))
        mean = sum(positive_scores) / len(positive_scores)
        for candidate, kept in [(c, True) for c in item.kept] + [(drop.candidate, False) for drop in item.dropped]:
            if candidate.passage_id in values:
                histogram.add(mean - values[candidate.passage_id], kept=kept)

    def _example(self, item: Selection, scores: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
        def shown(passage_id: str) -> dict[str, Any]:
            known_scores = {
                name: round(values[passage_id], 4) for name, values in scores.items() if passage_id in values
            }
            return {"passage_id": passage_id, "text": self._passages[passage_id].full_text, "scores": known_scores}

        return {
            "query_id": item.query.id,
            "query": item.query.text,
            "num_positives": len(item.positives),
            "positives": [shown(passage_id) for passage_id in item.positives[:_NUM_SHOWN]],
            "hard_negatives": [shown(c.passage_id) | _ranks_json(c) for c in item.kept],
            "dropped": [shown(drop.candidate.passage_id) | _drop_json(drop) for drop in item.dropped],
        }


def rank_range(rank: int) -> str:
    """The name of the range (with ranks from 1) that contains a rank (from 0)."""
    return range_names()[bisect_right(_RANKS, rank) - 1]


def range_names() -> list[str]:
    """The names of the ranges of ranks, which count from 1."""
    return [f"{first + 1}-{end}" for first, end in pairwise(_RANKS)] + [f"{_RANKS[-1] + 1}-"]


def _ranks_json(candidate: NegativeCandidate) -> dict[str, Any]:
    return {"ranks": {source: rank + 1 for source, rank in candidate.ranks.items()}}


def _drop_json(drop: Dropped) -> dict[str, Any]:
    values = {"reason": drop.reason, "value": round(drop.value, 4), "limit": round(drop.limit, 4)}
    return {"passage_id": drop.candidate.passage_id, **_ranks_json(drop.candidate), **values}


_MAX_CHARACTERS = 300
_BAR = 20  # characters of the longest bar

_HOW_TO_READ = """## Examples

Read them: a negative that answers its query (or says the same) is a false negative. If there are more than a few, use a
stricter filter or skip the first ranks (`range_min`)."""


def audit_page(report: dict[str, Any], audit: dict[str, Any]) -> str:
    """A Markdown page with the report of ``mine`` and its audit."""
    sections = [
        f"# Hard negatives of {_inline(report['dataset'])}, split {_inline(report['split'])}",
        _summary(report, audit),
        "## Where the hard negatives come from\n\n"
        "Rank in each list, without positives. A negative in two lists counts in both.\n\n" + _ranks(audit),
        "## What was dropped as a likely false negative\n\n" + _dropped(audit),
        *_margins(audit),
        _HOW_TO_READ,
        *(_example(example) for example in audit["examples"]),
    ]
    return "\n\n".join(sections) + "\n"


def _summary(report: dict[str, Any], audit: dict[str, Any]) -> str:
    table = Table("", Column("number", ","))
    for name, count in (
        ("queries", report["num_entries"]),
        ("positives", report["num_positives"]),
        ("hard negatives", report["num_hard_negatives"]),
        ("easy negatives", report["num_easy_negatives"]),
        ("queries with too few hard negatives", report["queries"]["too_few_hard"]["count"]),
        ("candidates in the range", audit["candidates"]["in_range"]),
        ("candidates tried", audit["candidates"]["tried"]),
        ("passages with the text of a positive, left out", report["num_same_text_as_positive"]),
        ("passages that are the query itself, left out", report["num_own_passages"]),
        ("positives with the query's own text, kept", report["num_own_passages_judged_relevant"]),
        ("pairs scored by the teacher", report["teacher"]["scored"]),
        ("candidates kept without a teacher label", report["teacher"]["without_label"]),
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
        table.add_row(reason, REASONS[reason], drops["count"], first)
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
            f"## Margins: {name}\n\nMean score of the query's positives minus that of the candidate; below 0 the "
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
    """The text on one line, truncated, with Markdown escaped."""
    text = " ".join(text.split())
    if len(text) > _MAX_CHARACTERS:
        text = text[: _MAX_CHARACTERS - 1] + "…"
    return escape_markdown(text)
