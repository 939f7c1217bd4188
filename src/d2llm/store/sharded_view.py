"""A read-only view of the shards of a sharded index, each at one version, as of one index.

A row of this view is the row of a shard, with the shard's place in the upper bits (``joint_rows``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, cached_property
from heapq import nsmallest
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from d2llm.core.types import MissingShard, PartKind, Passage, Task
from d2llm.ops.selection import top_rows
from d2llm.store.bm25 import ShardWords, query_words_of
from d2llm.store.passage_table import PAGE_SIZE, ListedDocument
from d2llm.store.schema import MetadataSchema
from d2llm.store.shards import Storage
from d2llm.store.view import CandidateRows, PassageView, rows_in_order
from d2llm.store.word_segment import QueryWords, WordStatistics

_SHARD_SHIFT = 40
_ROW_MASK = (1 << _SHARD_SHIFT) - 1
_NUM_THREADS = 64  # most of them wait, if the shards are in other processes
_Item = TypeVar("_Item")
_Value = TypeVar("_Value")


def joint_rows(shard: int, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """The rows of a shard as rows of all shards; those of shard 0 stay the same."""
    return rows | shard << _SHARD_SHIFT


def rows_by_shard(rows: NDArray[np.int64]) -> list[tuple[int, NDArray[np.int64], NDArray[np.int64]]]:
    """Joint rows [n] by shard: its place, the places [m] of its rows in ``rows``, and its own rows [m]."""
    shards = rows >> _SHARD_SHIFT
    places = [(shard, np.flatnonzero(shards == shard)) for shard in np.unique(shards).tolist()]
    return [(shard, at, rows[at] & _ROW_MASK) for shard, at in places]


class ReadableView(Protocol):
    """One version of an index, or of a shard, as readers use it.

    ``version`` numbers it; ``dim`` is the width of a vector, ``task`` the default task of a search.
    """

    dim: int
    task: Task
    student_fingerprint: str
    version: int

    def __len__(self) -> int: ...

    @property
    def part_kinds(self) -> frozenset[PartKind]:
        """The kinds of parts whose vectors the index stores."""
        ...

    @property
    def token_projection(self) -> str | None:
        """The fingerprint of the projection that made the token vectors."""
        ...

    def live_rows(self) -> NDArray[np.int64]:
        """The rows of all passages."""
        ...

    def ids(self, rows: NDArray[np.int64]) -> list[str]:
        """The ids of the passages at some rows, in their order."""
        ...

    def passages(self, rows: NDArray[np.int64]) -> list[Passage]:
        """The passages at some rows, in their order."""
        ...

    def documents(self, rows: NDArray[np.int64]) -> list[str]:
        """The document of each passage at some rows: its document_id, or its own id if it has none."""
        ...

    def vectors(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """The vectors of some rows, float32 [len(rows), dim]."""
        ...

    def get(self, ids: Sequence[str]) -> list[Passage]:
        """The passages with these ids, in their order; missing ones are left out."""
        ...

    def document(self, document_id: str) -> list[Passage]:
        """The passages of a document, by position; empty if the document is missing."""
        ...

    def neighbours(self, passages: Sequence[Passage], distance: int) -> list[Passage]:
        """The passages of the same documents at most ``distance`` positions away, by document and position."""
        ...

    def list_passages(self, cursor: str = "", limit: int = PAGE_SIZE) -> list[str]:
        """The first ``limit`` passage ids after ``cursor``, in order."""
        ...

    def list_documents(self, cursor: str = "", limit: int = PAGE_SIZE) -> list[ListedDocument]:
        """Like ``list_passages``, for documents."""
        ...


class ShardView(ReadableView, Protocol):
    """One version of one shard: a ``PassageView``, or one in another process. Members are those of ``PassageView``."""

    @property
    def own_words(self) -> ShardWords:
        """The words of these passages alone."""
        ...

    @property
    def metadata(self) -> MetadataSchema:
        """The metadata fields that a filter may name."""
        ...

    def rows_of(self, ids: Sequence[str]) -> dict[str, int]:
        """The rows of those of these ids that exist."""
        ...

    def match(
        self,
        text: str,
        top_k: int,
        filter: str | None = None,  # noqa: A002
        *,
        query_words: QueryWords | None = None,
    ) -> CandidateRows:
        """The best passages of a query text by BM25."""
        ...


class ShardedView:
    """One version of each shard. Attributes and methods are those of ``PassageView``.

    ``version`` is the sum of the shards' versions. BM25 uses the statistics of all passages.
    """

    def __init__(self, store: Storage, shards: Sequence[ShardView] | None = None) -> None:
        """``shards``: the views of the shards, if they are in other processes."""
        self.store = store
        self.shards: Sequence[ShardView] = tuple(
            [PassageView(one, corpus=lambda: self.word_statistics) for one in store.stores]
            if shards is None
            else shards
        )
        first = self.shards[0]
        self.dim: int = first.dim
        self.task: Task = first.task
        self.student_fingerprint: str = first.student_fingerprint
        self.part_kinds: frozenset[PartKind] = first.part_kinds
        self.token_projection: str | None = first.token_projection
        self.version = sum(view.version for view in self.shards)

    @property
    def folder(self) -> Path:
        """The folder of the index."""
        return self.store.folder

    def __len__(self) -> int:
        return sum(map(len, self.shards))

    @property
    def missing(self) -> Sequence[MissingShard]:
        """Shards that could not be opened, and are not searched."""
        return self.store.missing

    @property
    def num_shards(self) -> int | None:
        """Number of shards, missing ones included."""
        return self.store.num_shards

    @cached_property
    def word_statistics(self) -> WordStatistics:
        """The statistics of the words of all passages."""
        return sum((view.own_words.statistics for view in self.shards), WordStatistics())

    @property
    def metadata(self) -> MetadataSchema:
        """The metadata fields that a filter may name."""
        return self.shards[0].metadata

    def check_student(self, fingerprint: str) -> None:
        """Raise an ``IndexMismatchError`` unless the student with this fingerprint made the vectors."""
        self.store.check_student(fingerprint)

    def live_rows(self) -> NDArray[np.int64]:
        """The rows of all passages, shard by shard."""
        return np.concatenate([joint_rows(shard, view.live_rows()) for shard, view in enumerate(self.shards)])

    def ids(self, rows: NDArray[np.int64]) -> list[str]:
        """The ids of the passages at some rows, in their order."""
        return self._gather(rows, lambda view, own: view.ids(own))

    def rows(self, ids: Sequence[str]) -> NDArray[np.int64]:
        """The rows of the passages with these ids, in their order.

        Raises:
            InputError: a passage is missing.
        """
        row_of: dict[str, int] = {}
        for shard, view in enumerate(self.shards):
            present = view.rows_of(ids)
            row_of |= zip(present, joint_rows(shard, np.array([*present.values()], np.int64)).tolist(), strict=True)
        return rows_in_order(row_of, ids, self.store.folder)

    def passages(self, rows: NDArray[np.int64]) -> list[Passage]:
        """The passages at some rows, in their order."""
        return self._gather(rows, lambda view, own: view.passages(own))

    def documents(self, rows: NDArray[np.int64]) -> list[str]:
        """The document of each passage at some rows: its document_id, or its own id if it has none."""
        return self._gather(rows, lambda view, own: view.documents(own))

    def vectors(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """The vectors of some rows, float32 [len(rows), dim]."""
        vectors = np.zeros((len(rows), self.dim), np.float32)
        for shard, places, own in rows_by_shard(rows):
            vectors[places] = self.shards[shard].vectors(own)
        return vectors

    def get(self, ids: Sequence[str]) -> list[Passage]:
        """The passages with these ids, in their order; missing ones are left out."""
        passages = {passage.id: passage for view in self.shards for passage in view.get(ids)}
        return [passages[passage_id] for passage_id in dict.fromkeys(ids) if passage_id in passages]

    def document(self, document_id: str) -> list[Passage]:
        """The passages of a document, by position; empty if the document is missing."""
        return [passage for view in self.shards for passage in view.document(document_id)]

    def neighbours(self, passages: Sequence[Passage], distance: int) -> list[Passage]:
        """The passages of the same documents at most ``distance`` positions away, by document and position."""
        nearby: list[Passage] = []
        by_shard: dict[int, list[Passage]] = {}
        places = {number: place for place, number in enumerate(self.store.numbers)}
        for passage in passages:
            number = self.store.shard_of(passage)
            if number in places:
                by_shard.setdefault(places[number], []).append(passage)
        for place, own in by_shard.items():
            nearby += self.shards[place].neighbours(own, distance)
        return sorted(nearby, key=lambda passage: (passage.document_id, passage.position, passage.id))

    def list_passages(self, cursor: str = "", limit: int = PAGE_SIZE) -> list[str]:
        """The first ``limit`` passage ids after ``cursor``, in order."""
        return nsmallest(limit, [name for view in self.shards for name in view.list_passages(cursor, limit)])

    def list_documents(self, cursor: str = "", limit: int = PAGE_SIZE) -> list[ListedDocument]:
        """Like ``list_passages``, for documents; a passage without a document counts as its own document."""
        documents = [one for view in self.shards for one in view.list_documents(cursor, limit)]
        return nsmallest(limit, documents, key=lambda document: document.id)

    def match(self, text: str, top_k: int, filter: str | None = None) -> CandidateRows:  # noqa: A002
        """The best passages of a query text by BM25, best first, ties by id, among those that pass the filter.

        Raises:
            InputError, FilterError: as for ``PassageView.match``.
        """
        words = query_words_of([view.own_words for view in self.shards], text)
        proposals = {
            shard: view.match(text, top_k, filter, query_words=words) for shard, view in enumerate(self.shards)
        }
        return merge_candidates(proposals, top_k, self.ids)

    def _gather(
        self, rows: NDArray[np.int64], read: Callable[[ShardView, NDArray[np.int64]], Sequence[_Value]]
    ) -> list[_Value]:
        values: dict[int, _Value] = {}
        parts = rows_by_shard(rows)
        for (_, places, _), own in zip(
            parts, map_in_threads(lambda part: read(self.shards[part[0]], part[2]), parts), strict=True
        ):
            values |= zip(places.tolist(), own, strict=True)
        return [values[place] for place in range(len(rows))]


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="d2llm-shard")


def map_in_threads(work: Callable[[_Item], _Value], items: Sequence[_Item]) -> Iterator[_Value]:
    """The results of ``work`` for some items, in their order: in threads, if there are several.

    Searching and reading a shard mostly wait for the disk or calculate without Python. ``work`` must not call this.
    """
    return map(work, items) if len(items) < 2 else _threads().map(work, items)


def merge_candidates(
    proposals: Mapping[int, CandidateRows], top_k: int, ids_of: Callable[[NDArray[np.int64]], Sequence[str]] | None
) -> CandidateRows:
    """The best ``top_k`` of the shards' proposals, as joint rows; ``ids_of`` gives their ids, None: ties by row."""
    if list(proposals) == [0]:
        return proposals[0]
    rows = np.concatenate([np.zeros(0, np.int64), *(joint_rows(shard, one.rows) for shard, one in proposals.items())])
    scores = np.concatenate([np.zeros(0, np.float32), *(one.scores for one in proposals.values())])
    best = top_rows(scores, top_k, None if ids_of is None else lambda places: ids_of(rows[places]))
    return CandidateRows(rows[best], scores[best])


def open_view(store: Storage) -> PassageView | ShardedView:
    """The latest version of a store, sharded or not."""
    return PassageView(store.stores[0]) if store.num_shards is None else ShardedView(store)
