"""Detects texts that are equal or nearly equal: a passage that repeats a positive must not become its negative."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from d2llm.data.beir import Dataset
from d2llm.data.check_texts import hash64
from d2llm.ops.words import runs_of_letters

_SHINGLE = 3


def comparable(text: str) -> str:
    """Normal form for comparison: letters and digits as BM25 compares them (``ops.words.fold``), a space between words.

    Words of scripts without spaces stay together.
    """
    return " ".join(runs_of_letters(text))


def shingles(text: str) -> frozenset[str]:
    """The character trigrams of a text's comparable form (``comparable_shingles``)."""
    return comparable_shingles(comparable(text))


def comparable_shingles(text: str) -> frozenset[str]:
    """The character trigrams of a text in comparable form; a shorter text is one shingle, an empty one has none."""
    return frozenset(text[start : start + _SHINGLE] for start in range(max(1, len(text) - _SHINGLE + 1))) - {""}


def jaccard(first: frozenset[str], second: frozenset[str]) -> float:
    """Jaccard similarity |A and B| / |A or B| of two texts' shingles, from 0 to 1; 0 for two empty texts."""
    return len(first & second) / max(1, len(first | second))


class SameText:
    """Finds passages that repeat another passage's text, compared by ``comparable``.

    Keeps 16 bytes and a reference per passage, but no texts: they are read again from the data set on lookup.
    """

    def __init__(self, dataset: Dataset) -> None:
        self._passages = dataset.passages
        self._ids = list(dataset.passages)
        keys = np.fromiter((hash64(comparable(p.text)) for p in dataset.passages.values()), np.uint64, len(self._ids))
        self._order = np.argsort(keys, kind="stable")
        self._keys = keys[self._order]
        self._repeats_of: dict[str, frozenset[str]] = {}

    def duplicates_of(self, passage_ids: Iterable[str]) -> set[str]:
        """Other passages with the same text as one of these. A text without letters and digits equals no other."""
        ids = set(passage_ids)
        return {repeat for passage_id in ids for repeat in self._repeats(passage_id)} - ids

    def _repeats(self, passage_id: str) -> frozenset[str]:
        """Passages with the same text, including this one; cached, because training looks them up repeatedly."""
        known = self._repeats_of.get(passage_id)
        if known is None:
            text = comparable(self._passages[passage_id].text)
            key = np.uint64(hash64(text))
            start, end = (np.searchsorted(self._keys, key, side) for side in ("left", "right"))
            alike = [self._ids[row] for row in self._order[start:end].tolist()] if text else []
            # Hash collisions are possible, though very rare.
            known = frozenset(other for other in alike if comparable(self._passages[other].text) == text)
            self._repeats_of[passage_id] = known
        return known
