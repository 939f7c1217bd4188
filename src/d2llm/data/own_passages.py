"""The passage that is the query itself, where queries and passages are the same texts (questions that ask the same).

It is no answer: a search for duplicates knows the text that it starts from. So it is neither a negative nor a result of
a measured system. BEIR and mteb leave out a passage with the query's id; but ids of other data sets coincide by chance,
as query 1 and passage 1 do, and texts may have several ids. Hence:

- a passage with the query's text (``same_text.comparable``, with or without its title) is the query's own;
- a passage with the query's id is, too, if ids are those of one set: of the queries with the id of a passage, at least
  half have a passage of theirs whose text is alike.

A passage that the data set judges relevant to the query is never one, whatever its text or id.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING

from d2llm.core.types import Passage
from d2llm.data.check_texts import hash64
from d2llm.data.same_text import comparable, comparable_shingles, jaccard

if TYPE_CHECKING:
    from d2llm.data.beir import Dataset

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
            owners = f"of {self.num_queries:,} queries"
            sentences.append(f"{self.num_left_out:,} passages, {owners}, are the query itself and were left out")
        if self.num_judged:
            sentences.append(
                f"{self.num_judged:,} passages with a query's own text are judged relevant to it and were kept"
            )
        return "; ".join(sentences)


def find_own_passages(dataset: Dataset) -> OwnPassages:
    """The own passages of all queries of a data set, by the judgements of the splits that were read."""
    relevant: dict[str, set[str]] = defaultdict(set)
    for qrels in dataset.qrels.values():
        for query_id, grades in qrels.items():
            relevant[query_id] |= _relevant(grades)
    found: dict[str, set[str]] = defaultdict(set)
    texts = {query.id: comparable(query.text) for query in dataset.queries.values()}
    by_text: dict[int, list[str]] = defaultdict(list)
    for query_id, text in texts.items():
        if text:  # a text without letters and digits equals no other
            by_text[hash64(text)].append(query_id)
    for passage in dataset.passages.values():
        for form in _forms(passage):
            for query_id in by_text.get(hash64(form), ()):
                if texts[query_id] == form:  # hashes of different texts may be equal, though very rarely
                    found[query_id].add(passage.id)
    shared = [query_id for query_id in texts if query_id in dataset.passages]
    by_id = _are_of_one_set(dataset, texts, shared)
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


def _are_of_one_set(dataset: Dataset, texts: Mapping[str, str], shared: list[str]) -> bool:
    compared = list(islice(shared, _COMPARED_IDS))
    alike = sum(
        any(_is_alike(texts[query_id], form) for form in _forms(dataset.passages[query_id])) for query_id in compared
    )
    return bool(compared) and alike >= len(compared) / 2


def _is_alike(query: str, passage: str) -> bool:
    if not query or not passage:
        return False
    shorter, longer = sorted((query, passage), key=len)
    is_part = len(shorter) >= len(longer) / 2 and shorter in longer
    return is_part or jaccard(comparable_shingles(query), comparable_shingles(passage)) >= _ALIKE
