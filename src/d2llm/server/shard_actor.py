"""What runs on the nodes of a Ray cluster: a shard of a served index, at some versions (see ``ray_shards``)."""

# pyright: reportUnknownParameterType=false
# (Ray is optional, so its types are unknown here)

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from d2llm.core.types import Task
from d2llm.models.score_features import FeatureWeights
from d2llm.models.vector_scorer import VectorScorer
from d2llm.retrieval.cosine import DotScorer
from d2llm.retrieval.local_segment import LocalSearch, LocalSegment
from d2llm.retrieval.segments import CachedBounds
from d2llm.retrieval.settings import SearchSettings
from d2llm.runners.ray_runner import as_worker
from d2llm.store.index_store import IndexStore
from d2llm.store.inspection import IndexStats, stats
from d2llm.store.passage_table import bytes_at_rest
from d2llm.store.schema import MetadataSchema
from d2llm.store.shards import ShardRecord, open_shard
from d2llm.store.word_segment import WordStatistics

_KEPT_SEARCHES = 64  # per version: each holds the rows that its filter allows


@dataclass(frozen=True)
class ShardVersion:
    """One version of a shard, as its actors open it."""

    folder: Path
    manifest: dict[str, Any]
    record: ShardRecord
    shard_number: int
    num_shards: int

    @property
    def version(self) -> int:
        """The number of the version."""
        return self.record.version

    @property
    def label(self) -> str:
        """Which shard it is, for messages."""
        return f"shard {self.shard_number} of {self.num_shards}"


class ShardFacts(NamedTuple):
    """What the server needs to know about an open shard."""

    num_passages: int
    metadata: MetadataSchema = MetadataSchema()
    statistics: WordStatistics = WordStatistics()
    has_graph: bool = False


@dataclass(frozen=True)
class SearchSpec:
    """What a ``LocalSearch`` depends on; ``key`` stands for the rest."""

    key: str
    settings: SearchSettings
    task: Task
    weights: FeatureWeights
    is_exact: bool
    by_dot: bool


class NotOpenError(Exception):
    """This actor has not opened the version; it was started again."""


class _OpenShard:
    """One version of a shard in an actor. Call it in one thread at a time."""

    def __init__(self, shard: ShardVersion, scorer: VectorScorer, before: IndexStore | None) -> None:
        self.store = open_shard(shard.folder, shard.manifest, shard.shard_number, shard.record, shard.num_shards)
        if before is not None:
            self.store.intact = before.intact  # only new files are compared with their checksums
        self._corpus = WordStatistics()
        self.view = LocalSegment(self.store, shard.version, corpus=lambda: self._corpus)
        self._scorer = scorer
        self._cached_bounds = CachedBounds()
        self._searches: OrderedDict[str, LocalSearch] = OrderedDict()
        self.facts = ShardFacts(len(self.view), self.view.metadata, self.view.word_statistics, self.view.has_graph)

    def within(self, corpus: WordStatistics) -> _OpenShard:
        """This shard, as part of the corpus with these statistics."""
        if corpus != self._corpus:
            self._corpus = corpus
            self.view.__dict__.pop("words", None)  # a cached property
            self._searches.clear()
        return self

    def search(self, search: SearchSpec) -> LocalSearch:
        if search.key not in self._searches:
            self._searches[search.key] = self.view.begin_search(
                DotScorer(self._scorer) if search.by_dot else self._scorer,
                search.settings,
                search.task,
                search.weights,
                is_exact=search.is_exact,
                cached=self._cached_bounds,
            )
            if len(self._searches) > _KEPT_SEARCHES:
                self._searches.popitem(last=False)
        self._searches.move_to_end(search.key)
        return self._searches[search.key]


class ShardActor:
    """What runs on a node of the cluster: one shard, at the versions that it was told to open and to keep."""

    def __init__(self, versions: dict[str, str], folder: str) -> None:
        self._versions, self._folder = versions, folder
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()

    def open(self, shard: ShardVersion, scorer: VectorScorer, kept: frozenset[int]) -> ShardFacts:
        """Open a version, while searches of others go on; forget those that are not ``kept``."""
        as_worker(self._versions, self._folder)  # here, because its error reaches the server
        if shard.version not in self._open:
            before = next(reversed(self._open.values())).store if self._open else None
            opened = _OpenShard(shard, scorer, before)
            if len(opened.view):  # the first scan reads the vectors
                opened.view.scan(np.zeros(opened.view.dim, np.float32), 1)
            self._open[shard.version] = opened
            for version in self._open.keys() - kept - {shard.version}:
                del self._open[version]
        return self._open[shard.version].facts

    def search(
        self, version: int, corpus: WordStatistics, search: SearchSpec, method: str, *args: Any, **options: Any
    ) -> Any:
        """One step of a search: a method of ``LocalSearch``."""
        return getattr(self._opened(version).within(corpus).search(search), method)(*args, **options)

    def read(self, version: int, corpus: WordStatistics, method: str, *args: Any, **options: Any) -> Any:
        """A method of ``PassageView``."""
        return getattr(self._opened(version).within(corpus).view, method)(*args, **options)

    def count_words(self, version: int, hashes: NDArray[np.uint64]) -> NDArray[np.int64]:
        """The number of passages that have each of these terms [n]."""
        return self._opened(version).view.count_words(hashes)

    def stats(self, version: int) -> tuple[IndexStats, int]:
        """The shard's statistics, and its bytes."""
        store = self._opened(version).store
        return stats(store), bytes_at_rest(store.folder)

    def _opened(self, version: int) -> _OpenShard:
        if version not in self._open:
            raise NotOpenError
        return self._open[version]
