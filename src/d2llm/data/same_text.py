"""Detects texts that are equal or nearly equal: a passage that repeats a positive must not become its negative.

Where queries and passages are the same texts (questions that ask the same), a passage may be the query itself. It is no
answer: a search for duplicates knows the text that it starts from. So it is neither a negative nor a result of a
measured system. BEIR and mteb leave out a passage with the query's id; but ids of other data sets coincide by chance,
as query 1 and passage 1 do, and texts may have several ids. Hence:

- a passage with the query's text (``comparable``, with or without its title) is the query itself;
- a passage with the query's id is, too, if ids are those of one set: of the queries with the id of a passage, at least
  half have a passage of theirs whose text is alike.

A passage that the data set judges relevant to the query is never one, whatever its text or id.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice

import numpy as np

from d2llm.core.names import counted
from d2llm.core.types import Passage, Qrels, Query
from d2llm.ops.words import runs_of_letters

_SHINGLE = 3


def comparable(text: str) -> str:
    """Normal form for comparison: letters and digits as BM25 compares them (``ops.words.fold``), a space between words.

    Words of scripts without spaces stay together.
    """
    return " ".join(runs_of_letters(text))


def hash64(text: str) -> int:
    """A 64-bit hash, the same in every process; 10 million texts have a collision with a chance of 3 in a million."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


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

    Keeps 16 bytes and a reference per passage, but no texts: they are read again from ``passages`` on lookup.
    """

    def __init__(self, passages: Mapping[str, Passage]) -> None:
        self._passages = passages
        self._ids = list(passages)
        keys = np.fromiter((hash64(comparable(p.text)) for p in passages.values()), np.uint64, len(self._ids))
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


_ALIKE = 0.5  # Jaccard similarity of two versions of a text, such as one that was shortened or cleaned
_COMPARED_IDS = 1_000  # queries with the id of a passage whose texts are compared, at most
_NONE: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class OwnPassages:
    """Which passages are a query itself.

    Attributes:
        by_query: of each query that has any, its own passages.
        judged: of each query that has any, passages with its text or id that are judged relevant to it, and so count.
        by_id: whether the ids of queries and passages are those of one set.
    """

    by_query: Mapping[str, frozenset[str]] = field(default_factory=dict[str, frozenset[str]])
    judged: Mapping[str, frozenset[str]] = field(default_factory=dict[str, frozenset[str]])
    by_id: bool = False

    def of(self, query_id: str) -> frozenset[str]:
        """The passages that are this query itself."""
        return self.by_query.get(query_id, _NONE)

    def counts(self, query_ids: Iterable[str]) -> OwnCounts:
        """How many of these queries have passages of their own, and how many passages these are."""
        ids = set(query_ids)
        left_out = [passages for query_id, passages in self.by_query.items() if query_id in ids]
        judged = [passages for query_id, passages in self.judged.items() if query_id in ids]
        return OwnCounts(len(left_out), sum(map(len, left_out)), sum(map(len, judged)))


@dataclass(frozen=True, slots=True)
class OwnCounts:
    """Of ``num_queries`` queries, ``num_left_out`` passages are the query itself; ``num_judged`` are relevant to it."""

    num_queries: int = 0
    num_left_out: int = 0
    num_judged: int = 0

    def __str__(self) -> str:
        """For a report; empty if there is nothing to say."""
        sentences: list[str] = []
        if self.num_left_out:
            owners = counted(self.num_queries, "query")
            passages = counted(self.num_left_out, "passage was", "passages were")
            sentences.append(f"{passages} the query itself, of {owners}, and left out")
        if self.num_judged:
            passages = counted(self.num_judged, "passage")
            sentences.append(f"{passages} with a query's own text, judged relevant to it, kept")
        return "; ".join(sentences)


def find_own_passages(
    passages: Mapping[str, Passage], queries: Mapping[str, Query], qrels: Mapping[str, Qrels]
) -> OwnPassages:
    """The own passages of all queries of a data set, by the judgements of the splits that were read."""
    relevant: dict[str, set[str]] = defaultdict(set)
    for split in qrels.values():
        for query_id, grades in split.items():
            relevant[query_id] |= _relevant(grades)
    found: dict[str, set[str]] = defaultdict(set)
    texts = {query.id: comparable(query.text) for query in queries.values()}
    by_text: dict[int, list[str]] = defaultdict(list)
    for query_id, text in texts.items():
        if text:  # a text without letters and digits equals no other
            by_text[hash64(text)].append(query_id)
    for passage in passages.values():
        for form in _forms(passage):
            for query_id in by_text.get(hash64(form), ()):
                if texts[query_id] == form:  # hashes of different texts may be equal, though very rarely
                    found[query_id].add(passage.id)
    shared = [query_id for query_id in texts if query_id in passages]
    by_id = _are_of_one_set(passages, texts, shared)
    if by_id:
        for query_id in shared:
            found[query_id].add(query_id)
    unjudged = {query_id: frozenset(ids - relevant[query_id]) for query_id, ids in found.items()}
    judged = {query_id: frozenset(ids & relevant[query_id]) for query_id, ids in found.items()}
    return OwnPassages(
        {query_id: ids for query_id, ids in unjudged.items() if ids},
        {query_id: ids for query_id, ids in judged.items() if ids},
        by_id,
    )


def _relevant(grades: Mapping[str, int]) -> set[str]:
    return {passage_id for passage_id, grade in grades.items() if grade > 0}


def _forms(passage: Passage) -> set[str]:
    return {comparable(passage.text)} | ({comparable(passage.full_text)} if passage.title else set())


def _are_of_one_set(passages: Mapping[str, Passage], texts: Mapping[str, str], shared: list[str]) -> bool:
    compared = list(islice(shared, _COMPARED_IDS))
    alike = sum(any(_is_alike(texts[query_id], form) for form in _forms(passages[query_id])) for query_id in compared)
    return bool(compared) and alike >= len(compared) / 2


def _is_alike(query: str, passage: str) -> bool:
    if not query or not passage:
        return False
    shorter, longer = sorted((query, passage), key=len)
    is_part = len(shorter) >= len(longer) / 2 and shorter in longer
    return is_part or jaccard(comparable_shingles(query), comparable_shingles(passage)) >= _ALIKE
