"""An index as searches and readers see it: one version of each of its segments, of which there is at least one.

A segment is a store (``store.index_store``): the whole index, or a shard of it, in this process (``LocalSegment``) or
in another (``server.ray_shards``). A row of an index is the row of a segment, with the segment's place in the upper
bits (``joint_rows``).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from heapq import nsmallest
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from d2llm.core.types import PART_KINDS, Certificate, MissingShard, PartKind, Passage, Query, Task
from d2llm.models.protocols import PairScorer
from d2llm.ops.selection import top_rows
from d2llm.store.passage_table import PAGE_SIZE, ListedDocument
from d2llm.store.schema import MetadataSchema
from d2llm.store.shards import Storage
from d2llm.store.view import CandidateRows, rows_in_order
from d2llm.store.word_segment import CountedTerms, QueryWords, WordStatistics

if TYPE_CHECKING:
    from d2llm.models.protocols import VectorStudent
    from d2llm.models.row_features import FeatureParts
    from d2llm.models.score_features import FeatureWeights
    from d2llm.retrieval.settings import SearchSettings

_SEGMENT_SHIFT = 40
_ROW_MASK = (1 << _SEGMENT_SHIFT) - 1
_SPARE_ROWS = 16  # of a segment's first proposals beyond those expected
_NUM_THREADS = 64  # most of them wait, if the segments are in other processes
_Item = TypeVar("_Item")
_Value = TypeVar("_Value")


def joint_rows(segment: int, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """The rows of a segment as rows of the index; those of the first stay the same."""
    return rows | segment << _SEGMENT_SHIFT


def rows_by_segment(rows: NDArray[np.int64]) -> list[tuple[int, NDArray[np.int64], NDArray[np.int64]]]:
    """Rows of an index [n] by segment: its place, the places [m] of its rows in ``rows``, and its own rows [m]."""
    segments = rows >> _SEGMENT_SHIFT
    by_segment = [(segment, np.flatnonzero(segments == segment)) for segment in np.unique(segments).tolist()]
    return [(segment, at, rows[at] & _ROW_MASK) for segment, at in by_segment]


@dataclass(frozen=True, slots=True)
class SegmentQuery:
    """A query as every segment gets it.

    Attributes:
        query: text and id.
        vector: [dim].
        dot_query: [dim], for inner products; None if the head has none.
        tokens: [tokens, token_dim], the vectors of its tokens, if they have a weight.
        words: its words, weighted by the statistics of all segments; None if the search does not use words.
        nearest: the highest inner product with a passage of any segment that the filter admits; None unless the weight
            of words depends on it.
        scorer: the student's for this query, if it was prepared; it stays in this process.
    """

    query: Query
    vector: NDArray[np.float32]
    dot_query: NDArray[np.float32] | None
    tokens: NDArray[np.float32] | None
    words: QueryWords | None
    nearest: float | None = None
    scorer: PairScorer | None = field(default=None, repr=False, compare=False)

    def __reduce__(self) -> tuple[type[SegmentQuery], tuple[object, ...]]:
        return SegmentQuery, (self.query, self.vector, self.dot_query, self.tokens, self.words, self.nearest)


class CertifiedRows(NamedTuple):
    """Rows int64 [k], final scores float32 [k] best first, their inner products or None, and the certificate."""

    rows: NDArray[np.int64]
    scores: NDArray[np.float32]
    dots: NDArray[np.float32] | None
    certificate: Certificate


class CachedBounds:
    """Cache of r_p of all rows of a view, filled by the first search that needs all of them: 4 bytes per row.

    Most searches need the values of some rows only. Keep one cache with each view that answers many queries; it serves
    both tasks. ``values`` is float32 [capacity], or None until a search needs it.
    """

    def __init__(self, values: NDArray[np.float32] | None = None) -> None:
        self.values = values
        self._segments: dict[int, CachedBounds] = {}

    def of_segment(self, segment: int) -> CachedBounds:
        """The cache for one of the segments of an index; that of the first is this one."""
        return self._segments.setdefault(segment, CachedBounds()) if segment else self

    def keep(self, values: NDArray[np.float32]) -> None:
        """Keep the values of all rows; if all are 1, as without gates, they take no memory."""
        self.values = np.broadcast_to(np.float32(1), values.shape) if (values == 1).all() else values


class Segment(Protocol):
    """One version of a segment: its passages, and its part in searches. Methods are those of ``PassageView``."""

    version: int
    is_remote: bool

    def __len__(self) -> int: ...

    @property
    def away(self) -> str | None:
        """Why it does not answer now; None if it does."""
        ...

    @property
    def has_graph(self) -> bool:
        """Whether there is a usable approximate index."""
        ...

    @property
    def word_statistics(self) -> WordStatistics:
        """The statistics of the words of these passages alone; empty until it has been opened."""
        ...

    def count_words(self, hashes: NDArray[np.uint64]) -> NDArray[np.int64]:
        """Number of passages that contain each term [n]."""
        ...

    @property
    def metadata(self) -> MetadataSchema:
        """The metadata fields that a filter may name."""
        ...

    def begin_search(
        self,
        student: VectorStudent,
        settings: SearchSettings,
        task: Task,
        weights: FeatureWeights,
        *,
        is_exact: bool,
        cached: CachedBounds | None = None,
    ) -> SegmentSearch:
        """Its part in a search; arguments as for ``LocalSearch``."""
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

    def live_rows(self) -> NDArray[np.int64]:
        """The rows of all passages."""
        ...

    def ids(self, rows: NDArray[np.int64]) -> list[str]:
        """Ids of the passages in the given rows, in the same order."""
        ...

    def rows_of(self, ids: Sequence[str]) -> dict[str, int]:
        """Rows of the given ids; missing ones are left out."""
        ...

    def passages(self, rows: NDArray[np.int64]) -> list[Passage]:
        """Passages in the given rows, in the same order."""
        ...

    def documents(self, rows: NDArray[np.int64]) -> list[str]:
        """The document of each passage at some rows."""
        ...

    def vectors(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Vectors of the given rows, float32 [len(rows), dim]."""
        ...

    def get(self, ids: Sequence[str]) -> list[Passage]:
        """Passages with the given ids, in the same order; missing ids are skipped."""
        ...

    def document(self, document_id: str) -> list[Passage]:
        """The passages of a document, by position; empty if the document is missing."""
        ...

    def neighbours(self, passages: Sequence[Passage], distance: int) -> list[Passage]:
        """The passages of the same documents at most ``distance`` positions away, by document and position."""
        ...

    def count_values(self, name: str, filter: str | None) -> Mapping[Any, int]:  # noqa: A002
        """Number of passages that a filter allows, by their value of a metadata field, or None."""
        ...

    def field_values(self, rows: NDArray[np.int64], name: str) -> list[Any]:
        """The value of a metadata field in each row; None where there is none."""
        ...

    def list_passages(self, cursor: str = "", limit: int = PAGE_SIZE) -> list[str]:
        """The first ``limit`` passage ids after ``cursor``, in order."""
        ...

    def list_documents(self, cursor: str = "", limit: int = PAGE_SIZE) -> list[ListedDocument]:
        """Like ``list_passages``, for documents."""
        ...


class SegmentSearch(Protocol):
    """A segment's part in a search, wherever it is done. ``LocalSearch`` does it in this process.

    A segment that cannot answer raises a ``DataFormatError``, ``StorageError`` or ``OSError``.
    """

    def propose(
        self, query: SegmentQuery, depth: int, *, scanned: CandidateRows | None = None
    ) -> dict[str, CandidateRows]:
        """What each source proposes."""
        ...

    def scan_together(self, dot_queries: NDArray[np.float32], depth: int) -> Sequence[CandidateRows] | None:
        """The proposals of the exact scan for several queries."""
        ...

    def nearest(self, query: SegmentQuery) -> float:
        """The highest inner product."""
        ...

    def score(self, query: SegmentQuery, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """The full scores of some rows."""
        ...

    def certify(
        self, query: SegmentQuery, top_k: int, *, budget_ms: float | None = None, floor: float = -np.inf
    ) -> CertifiedRows:
        """The best rows of the exact ranking, with a proof."""
        ...

    def score_features(self, query: SegmentQuery, rows: NDArray[np.int64]) -> FeatureParts:
        """What words, windows and tokens add to the scores of some rows."""
        ...


class IndexView:
    """One version of an index. BM25 uses the statistics of all its passages.

    ``version`` is the sum of the segments' versions; ``dim`` is the width of a vector, ``task`` the default task of a
    search, ``student_fingerprint`` that of the student that made the vectors, ``token_projection`` that of the
    projection that made the token embeddings. ``part_kinds`` are the kinds of parts whose vectors are stored,
    ``metadata`` the fields that a filter may name.
    """

    def __init__(self, storage: Storage, segments: Sequence[Segment]) -> None:
        self.storage = storage
        self.segments = tuple(segments)
        manifest = storage.manifest
        self.dim: int = manifest["dim"]
        self.task: Task = manifest["task"]
        self.student_fingerprint: str = manifest["student"]
        self.token_projection: str | None = manifest["token_projection"]
        self.part_kinds: frozenset[PartKind] = frozenset(kind for kind in PART_KINDS if manifest[f"{kind}_format"])
        self.metadata = next((one for one in self.segments if one.away is None), self.segments[0]).metadata
        self.version = sum(segment.version for segment in self.segments)

    @property
    def folder(self) -> Path:
        """The folder of the index."""
        return self.storage.folder

    def __len__(self) -> int:
        return sum(map(len, self.segments))

    @property
    def is_remote(self) -> bool:
        """Whether all segments are in other processes."""
        return all(segment.is_remote for segment in self.segments)

    @property
    def missing(self) -> tuple[MissingShard, ...]:
        """Shards that could not be opened, or do not answer now, and are not searched."""
        away = [(segment_index, segment.away) for segment_index, segment in enumerate(self.segments)]
        return (
            *self.storage.missing,
            *(self.lost(segment_index, problem) for segment_index, problem in away if problem is not None),
        )

    def lost(self, segment_index: int, problem: object) -> MissingShard:
        """What a ranking says about a segment that cannot be read."""
        shard, records = self.storage.numbers[segment_index], self.storage.records
        return MissingShard(shard, str(self.folder) if records is None else records[shard].address, str(problem))

    @property
    def word_statistics(self) -> WordStatistics:
        """The statistics of the words of all passages of segments that have been opened."""
        return sum((segment.word_statistics for segment in self.segments), WordStatistics())

    def live_rows(self) -> NDArray[np.int64]:
        """The rows of all passages, segment by segment."""
        return np.concatenate([joint_rows(index, segment.live_rows()) for index, segment in enumerate(self.segments)])

    def ids(self, rows: NDArray[np.int64]) -> list[str]:
        """Ids of the passages in the given rows, in the same order."""
        return self._gather(rows, lambda segment, rows: segment.ids(rows))

    def rows(self, ids: Sequence[str]) -> NDArray[np.int64]:
        """Rows of the given ids, in the same order.

        Raises:
            InputError: a passage is missing.
        """
        row_of: dict[str, int] = {}
        for index, segment in enumerate(self.segments):
            present = segment.rows_of(ids)
            row_of |= zip(present, joint_rows(index, np.array([*present.values()], np.int64)).tolist(), strict=True)
        return rows_in_order(row_of, ids, self.folder)

    def passages(self, rows: NDArray[np.int64]) -> list[Passage]:
        """Passages in the given rows, in the same order."""
        return self._gather(rows, lambda segment, rows: segment.passages(rows))

    def documents(self, rows: NDArray[np.int64]) -> list[str]:
        """Document of the passage in each row: its document_id, or its id if it has none."""
        return self._gather(rows, lambda segment, rows: segment.documents(rows))

    def field_values(self, rows: NDArray[np.int64], name: str) -> list[Any]:
        """The value of a metadata field in each row; None where there is none."""
        return self._gather(rows, lambda segment, rows: segment.field_values(rows, name))

    def vectors(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Vectors of the given rows, float32 [len(rows), dim]."""
        vectors = np.zeros((len(rows), self.dim), np.float32)
        for segment_index, at, segment_rows in rows_by_segment(rows):
            vectors[at] = self.segments[segment_index].vectors(segment_rows)
        return vectors

    def get(self, ids: Sequence[str]) -> list[Passage]:
        """Passages with the given ids, in the same order; missing ids are skipped."""
        passages = {passage.id: passage for segment in self.segments for passage in segment.get(ids)}
        return [passages[passage_id] for passage_id in dict.fromkeys(ids) if passage_id in passages]

    def document(self, document_id: str) -> list[Passage]:
        """The passages of a document, by position; empty if the document is missing."""
        return [passage for segment in self.segments for passage in segment.document(document_id)]

    def neighbours(self, passages: Sequence[Passage], distance: int) -> list[Passage]:
        """The passages of the same documents at most ``distance`` positions away, by document and position."""
        nearby: list[Passage] = []
        numbers = [self.storage.shard_of(passage) for passage in passages]
        for shard, segment in zip(self.storage.numbers, self.segments, strict=True):
            members = [passage for passage, other in zip(passages, numbers, strict=True) if other == shard]
            nearby += segment.neighbours(members, distance) if members else []
        return sorted(nearby, key=lambda passage: (passage.document_id, passage.position, passage.id))

    def list_passages(self, cursor: str = "", limit: int = PAGE_SIZE) -> list[str]:
        """The first ``limit`` passage ids after ``cursor``, in order."""
        return nsmallest(limit, [one for segment in self.segments for one in segment.list_passages(cursor, limit)])

    def list_documents(self, cursor: str = "", limit: int = PAGE_SIZE) -> list[ListedDocument]:
        """Like ``list_passages``, for documents; a passage without a document counts as its own document."""
        documents = [one for segment in self.segments for one in segment.list_documents(cursor, limit)]
        return nsmallest(limit, documents, key=lambda document: document.id)

    def count_words(self, hashes: NDArray[np.uint64]) -> NDArray[np.int64]:
        """Number of passages that contain each term [n]."""
        return np.sum([segment.count_words(hashes) for segment in self.segments], axis=0)

    def match(self, text: str, top_k: int, filter: str | None = None) -> CandidateRows:  # noqa: A002
        """The best passages of a query text by BM25, best first, ties by id, among those that pass the filter.

        Raises:
            InputError, FilterError: as for ``PassageView.match``.
        """
        counted = CountedTerms.from_text(text)
        rows_with = self.count_words(counted.hashes)
        words = counted.weighted(rows_with, self.word_statistics.num_passages)
        found = [segment.match(text, top_k, filter, query_words=words) for segment in self.segments]
        return merge_candidates(dict(enumerate(found)), top_k, self.ids)

    def _gather(
        self, rows: NDArray[np.int64], read: Callable[[Segment, NDArray[np.int64]], list[_Value]]
    ) -> list[_Value]:
        """What the segments have at some rows [n], in their order."""
        if len(self.segments) == 1:
            return read(self.segments[0], rows)
        values: dict[int, _Value] = {}
        by_segment = rows_by_segment(rows)
        answers = map_in_threads(lambda part: read(self.segments[part[0]], part[2]), by_segment)
        for (_, positions, _), answer in zip(by_segment, answers, strict=True):
            values |= zip(positions.tolist(), answer, strict=True)
        return [values[index] for index in range(len(rows))]


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="d2llm-segment")


def map_in_threads(work: Callable[[_Item], _Value], items: Sequence[_Item]) -> Iterator[_Value]:
    """The results of ``work`` for some items, in their order: in threads, if there are several.

    Searching and reading a segment mostly wait for the disk or calculate without Python. ``work`` must not call this.
    """
    return map(work, items) if len(items) < 2 else _threads().map(work, items)


def map_queries(work: Callable[[_Item], _Value], items: Sequence[_Item]) -> Iterator[_Value]:
    """The results of ``work`` for some queries, in their order: on all cores that torch uses, if it is loaded."""
    if "torch" not in sys.modules:  # not worth importing it
        return map(work, items)
    from d2llm.models.engines.core_workers import map_on_cores

    return map_on_cores(work, items)


def first_depth(depth: int, num_segments: int) -> int:
    """How many of the best ``depth`` rows a segment is first asked for: seldom fewer than it has of them."""
    mean = depth / num_segments
    return min(depth, math.ceil(mean + 4 * math.sqrt(mean)) + _SPARE_ROWS)


def merge_candidates(
    proposals: Mapping[int, CandidateRows], top_k: int, ids_of: Callable[[NDArray[np.int64]], Sequence[str]] | None
) -> CandidateRows:
    """The best ``top_k`` of the segments' proposals, as joint rows; ``ids_of`` gives their ids, None: ties by row."""
    if list(proposals) == [0]:
        return proposals[0]
    rows = np.concatenate(
        [np.zeros(0, np.int64), *(joint_rows(segment_index, one.rows) for segment_index, one in proposals.items())]
    )
    scores = np.concatenate([np.zeros(0, np.float32), *(one.scores for one in proposals.values())])
    best = top_rows(scores, top_k, None if ids_of is None else lambda positions: ids_of(rows[positions]))
    return CandidateRows(rows[best], scores[best])
