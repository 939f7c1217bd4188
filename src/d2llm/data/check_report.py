"""Results of a data set check, as frozen dataclasses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

LeakKind = Literal["same query", "near query", "same pair"]
"""``same``: equal letters and digits. ``near``: near duplicates found by MinHash. ``same pair``: in either order."""


@dataclass(frozen=True, slots=True)
class SplitCounts:
    """One split. ``num_items`` counts judgements or pairs, ``values`` by grade or class (empty for scores).

    ``score_range`` is (minimum, mean, maximum) for a set of scores.
    """

    name: str
    num_queries: int
    num_passages: int
    num_items: int
    values: Mapping[str, int]
    score_range: tuple[float, float, float] | None = None


@dataclass(frozen=True, slots=True)
class Repeats:
    """Texts that occur more than once: ``count`` excludes the first of each; ``examples`` are ids."""

    label: str
    count: int
    examples: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Leak:
    """``count`` queries or pairs of split ``second`` are in ``first`` too; ``examples`` are (second, first) ids."""

    kind: LeakKind
    first: str
    second: str
    count: int
    examples: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class SharedPositives:
    """``count`` of the ``total`` relevant passage texts of split ``second`` are relevant in ``first`` too."""

    first: str
    second: str
    count: int
    total: int


@dataclass(frozen=True, slots=True)
class Lengths:
    """Lengths in tokens, including special tokens. ``bars`` are (upper bound, fraction); the last bar has no bound.

    ``num_texts`` of ``num_all`` were measured. ``fraction_over`` is the fraction of texts with more than ``limit``
    tokens.
    """

    label: str
    num_texts: int
    num_all: int
    percentiles: Mapping[int, int]
    limit: int
    fraction_over: float
    bars: tuple[tuple[int | None, float], ...]


@dataclass(frozen=True, slots=True)
class Languages:
    """ISO 639-1 codes with the number of texts guessed to be in them, most frequent first, of ``num_texts`` sampled."""

    label: str
    num_texts: int
    counts: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class DataReport:
    """The result of ``check_data``.

    ``leaks`` are errors unless they are allowed; everything else is for the reader to judge. ``num_passages`` and
    ``num_queries`` count everything in the files, whether or not a split uses it. ``data.check.read_through`` leaves
    lengths, languages and settings to ``check_data``.
    """

    name: str
    path: str
    kind: Literal["retrieval", "binary", "classes", "scores"]
    num_queries: int
    num_passages: int
    splits: tuple[SplitCounts, ...]
    repeats: tuple[Repeats, ...]
    leaks: tuple[Leak, ...]
    shared_positives: tuple[SharedPositives, ...]
    lengths: tuple[Lengths, ...] = ()
    languages: tuple[Languages, ...] = ()
    issues: tuple[str, ...] = ()
    settings: Mapping[str, object] = field(default_factory=dict[str, object])

    @property
    def num_leaks(self) -> int:
        """Number of queries and pairs that are in two splits, each kind counted separately."""
        return sum(leak.count for leak in self.leaks)
