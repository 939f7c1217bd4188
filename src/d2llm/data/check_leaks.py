"""Queries that occur in two splits: with the same letters and digits, or near duplicates found by MinHash."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from itertools import combinations
from typing import Any

from d2llm.core.extras import require
from d2llm.data.check_report import Leak, LeakKind
from d2llm.data.check_texts import hash64
from d2llm.data.same_text import comparable, comparable_shingles, jaccard

_NUM_HASHES = 128
_MIN_DETECTION_RATE = 0.99
_NUM_EXAMPLES = 5

Texts = Callable[[], Iterator[tuple[str, str]]]
"""A fresh stream of (id, text)."""


def same_keys(kind: LeakKind, ids_of: Mapping[str, Mapping[int, str]]) -> list[Leak]:
    """Leaks between any two splits: keys that both have. ``ids_of``: split -> key -> the first id with that key."""
    leaks: list[Leak] = []
    for first, second in combinations(ids_of, 2):
        pairs = [(name, ids_of[first][key]) for key, name in ids_of[second].items() if key in ids_of[first]]
        if pairs:
            leaks.append(Leak(kind, first, second, len(pairs), tuple(pairs[:_NUM_EXAMPLES])))
    return leaks


def near_queries(
    texts_of: Mapping[str, Texts],
    ids_of: Mapping[str, Mapping[int, str]],
    threshold: float,
    advance: Callable[[int], None],
) -> list[Leak]:
    """Queries that are similar but not identical in two splits, by Jaccard similarity of their character trigrams.

    MinHash LSH proposes candidates and the exact similarity decides, so every reported leak is real, but a few may be
    missed (fewer than one in a hundred at the threshold itself). The largest split is only looked up, never indexed, so
    memory grows only with the other splits. ``texts_of`` is in the order in which leaks name splits; a text whose
    ``hash64`` is in ``ids_of`` of both splits is not a near leak. ``threshold`` is the minimum similarity, from 0 to 1.

    Raises:
        MissingExtraError: datasketch is not installed.
    """
    splits = [split for split in texts_of if ids_of[split]]
    if len(splits) < 2:
        return []
    largest = max(splits, key=lambda split: len(ids_of[split]))
    index = _TextSketches(threshold)
    leaks: dict[tuple[str, str], dict[str, str]] = {pair: {} for pair in combinations(splits, 2)}
    for split in [*(name for name in splits if name != largest), largest]:
        keys: set[int] = set()
        for identifier, text in texts_of[split]():
            text = comparable(text)
            key = hash64(text)
            if not text or key in keys:
                advance(1)
                continue
            keys.add(key)
            shingles = comparable_shingles(text)
            sketch = index.sketch(shingles)
            for other, other_id, other_text in index.alike(sketch, shingles):
                if other == split or key in ids_of[other] or hash64(other_text) in ids_of[split]:
                    continue
                pair, ids = ((other, split), (identifier, other_id))
                if pair not in leaks:
                    pair, ids = (split, other), (other_id, identifier)
                leaks[pair].setdefault(*ids)
            if split != largest:
                index.add(split, identifier, text, sketch)
            advance(1)
    return [
        Leak("near query", first, second, len(ids), tuple(ids.items())[:_NUM_EXAMPLES])
        for (first, second), ids in leaks.items()
        if ids
    ]


class _TextSketches:
    """A MinHash index of texts; it keeps the texts too, which are smaller than their sketches, for the exact check."""

    def __init__(self, threshold: float) -> None:
        library = require("datasketch", extra="check", purpose="finding near duplicates")
        self._empty: Any = library.MinHash(_NUM_HASHES, hashfunc=zlib.crc32)  # copied, because creating one is slow
        self._threshold = threshold
        self._lsh: Any = library.MinHashLSH(num_perm=_NUM_HASHES, params=_bands(threshold))
        self._texts: list[tuple[str, str, str]] = []

    def sketch(self, shingles: frozenset[str]) -> Any:
        sketch = self._empty.copy()
        sketch.update_batch([shingle.encode() for shingle in shingles])
        return sketch

    def alike(self, sketch: Any, shingles: frozenset[str]) -> Iterator[tuple[str, str, str]]:
        for place in sorted(self._lsh.query(sketch)):
            if jaccard(shingles, comparable_shingles(self._texts[place][2])) >= self._threshold:
                yield self._texts[place]

    def add(self, split: str, identifier: str, text: str, sketch: Any) -> None:
        self._lsh.insert(len(self._texts), sketch)
        self._texts.append((split, identifier, text))


def _bands(threshold: float) -> tuple[int, int]:
    """Number and width of the bands: the widest that miss fewer than one text in a hundred at the threshold.

    Two texts of similarity s share a band of r hashes with probability s^r (Leskovec, Rajaraman and Ullman, Mining of
    Massive Datasets, 3.4.2). The library's own choice penalises false positives, which here cost only a comparison.
    """
    for width in range(_NUM_HASHES // 2, 1, -1):
        num_bands = _NUM_HASHES // width
        if 1 - (1 - threshold**width) ** num_bands >= _MIN_DETECTION_RATE:
            return num_bands, width
    return _NUM_HASHES, 1
