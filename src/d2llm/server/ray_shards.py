"""The shards of a served index as actors on a Ray cluster; this process merges what they find.

Each shard has one or several replicas. One that does not answer in time, or whose actor has died, is left out at once;
Ray starts the actor again, on another node if need be, and when it has opened the served version it is asked again. If
no replica of a shard answers, searches go on without the shard, and say so.

All shards are searched at the version that the manifest of the index lists. A new version is served when every shard
has opened it.
"""

# pyright: reportUnknownParameterType=false
# (Ray is optional, so its types are unknown here)

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from d2llm.core.errors import D2LLMError, ShardAwayError
from d2llm.core.types import Task
from d2llm.models.protocols import VectorStudent
from d2llm.models.score_features import FeatureWeights
from d2llm.models.student import Student
from d2llm.retrieval.cosine import DotScorer
from d2llm.retrieval.segments import CachedBounds, IndexView
from d2llm.retrieval.settings import SearchSettings
from d2llm.runners.ray_runner import import_ray, last_line, own_versions, require_room, task_error
from d2llm.server.settings import ServeSettings
from d2llm.server.shard_actor import NotOpenError, SearchSpec, ShardActor, ShardFacts, ShardVersion
from d2llm.store.filters import parse_filter
from d2llm.store.inspection import IndexStats, sum_stats
from d2llm.store.schema import MetadataSchema
from d2llm.store.shards import Storage
from d2llm.store.view import CandidateRows
from d2llm.store.word_segment import WordStatistics

_log = logging.getLogger(__name__)
_LOOK_SECONDS = 0.1  # between two looks at the replicas that are not ready
_STATS_SECONDS = 60.0
_RETRY_SECONDS = 1.0  # between two attempts to open a shard
_KEPT_SECONDS = 30.0  # for which the actors of an index stay that another has replaced
_START_SECONDS = 300.0  # for all shards to open a version


@dataclass(eq=False)
class _Replica:
    """An actor of a shard. ``ready`` are the versions that it has opened; ``opening`` is the result of the attempt."""

    actor: Any
    ready: set[int] = field(default_factory=set[int])
    opening: Any = None
    retry_at: float = 0.0
    num_calls: int = 0
    has_failed: bool = False  # to open the desired version
    is_dead: bool = False  # for good: it needs another actor

    @contextmanager
    def busy(self) -> Generator[None]:
        self.num_calls += 1
        try:
            yield
        finally:
            self.num_calls -= 1


class _Shard:
    """A shard with its replicas.

    ``desired`` is the version that they shall open. ``served`` are the one that is served until all shards have opened
    that one, if it is another, and the one before, which requests may still use.
    """

    def __init__(self, desired: ShardVersion, settings: ServeSettings) -> None:
        self.desired = desired
        self.served: tuple[ShardVersion, ...] = ()
        self.facts: dict[int, ShardFacts] = {}
        self.error: Exception | None = None
        self._settings = settings
        self.replicas = [_Replica(self.new_actor()) for _ in range(settings.shard_replicas)]

    def new_actor(self) -> Any:
        ray = import_ray()
        options: dict[str, Any] = {
            "num_cpus": self._settings.shard_cpus,
            "max_restarts": -1,
            "max_task_retries": 0,  # another replica is asked instead
            "concurrency_groups": {"control": 1},
            "scheduling_strategy": "SPREAD",
        }
        return ray.remote(**options)(ShardActor).remote(own_versions(), str(Path.cwd()))

    def is_ready(self, version: int) -> bool:
        return any(version in replica.ready for replica in self.replicas)

    def call(self, version: int, method: str, *args: Any, **options: Any) -> Any:
        """What a replica answers: the one with the fewest calls, or, if it fails, the next.

        Raises:
            ShardAwayError: none answers in time.
            D2LLMError: that of the shard.
        """
        return self._ask(version, lambda actor: getattr(actor, method).remote(version, *args, **options), is_step=True)

    def stats(self, version: int) -> tuple[IndexStats, int]:
        """Statistics, and bytes; unlike the steps of a search, they may take long, and searches go on meanwhile.

        Raises:
            ShardAwayError: no replica answers.
        """
        control = {"concurrency_group": "control"}
        return self._ask(version, lambda actor: actor.stats.options(**control).remote(version), is_step=False)

    def _ask(self, version: int, begin: Callable[[Any], Any], *, is_step: bool) -> Any:
        """``call``; a replica that does not answer a step of a search is not asked again until it is there."""
        seconds = self._settings.shard_seconds if is_step else _STATS_SECONDS
        ray = import_ray()
        ready = sorted((one for one in self.replicas if version in one.ready), key=lambda one: one.num_calls)
        end = time.monotonic() + seconds
        problem = "it is being started"
        for index, replica in enumerate(ready):
            left = max(0.0, end - time.monotonic()) / (len(ready) - index)
            try:
                with replica.busy():
                    return ray.get(begin(replica.actor), timeout=left)
            except ray.exceptions.RayTaskError as error:
                if not isinstance(error.cause, NotOpenError):
                    raise task_error(error, OSError) from None
                problem = "it was started again"
            except ray.exceptions.GetTimeoutError:
                problem = f"no answer within {seconds:g} seconds"
            except ray.exceptions.RayError as error:
                problem = last_line(error)
            _log.warning("%s (%s): %s", self.desired.label, self.desired.record.address, problem)
            if is_step:
                replica.ready.clear()  # until it has answered that the version is open
        raise ShardAwayError(f"{self.desired.label} ({self.desired.record.address}) does not answer: {problem}")

    def attend(self, replica: _Replica, scorer: Any) -> bool:
        """Let a replica open the versions that it lacks, or look whether it has; returns whether something changed."""
        try:
            return self._attend(replica, scorer)
        except Exception as error:  # noqa: BLE001 - whatever has happened, it is tried again
            cause = getattr(error, "cause", None)
            self.error = cause if isinstance(cause, D2LLMError) else ShardAwayError(f"{self.desired.label}: {error}")
            replica.opening, replica.has_failed, replica.retry_at = None, True, time.monotonic() + _RETRY_SECONDS
            replica.is_dead = replica.is_dead or isinstance(error, import_ray().exceptions.ActorDiedError)
            return True

    def _attend(self, replica: _Replica, scorer: Any) -> bool:
        ray, desired = import_ray(), self.desired
        if replica.opening is None:
            targets = (desired, *self.served[:1]) if not replica.has_failed else (*self.served[:1], desired)
            lacking = [one for one in targets if one.version not in replica.ready]
            if not lacking or time.monotonic() < replica.retry_at:
                return False
            if replica.is_dead:
                replica.actor, replica.is_dead = self.new_actor(), False
            kept = frozenset(one.version for one in (desired, *self.served))
            actor_open = replica.actor.open.options(concurrency_group="control")
            replica.opening = lacking[0], kept, actor_open.remote(lacking[0], scorer, kept)
            return False
        shard, kept, reference = replica.opening
        if not ray.wait([reference], timeout=0)[0]:
            return False
        self.facts[shard.version] = ray.get(reference)
        replica.opening = None
        if shard.version == self.desired.version:
            replica.has_failed = False
        replica.ready = (replica.ready & kept) | {shard.version}
        return True

    def serve_desired(self) -> None:
        """From now on the desired version is served."""
        if self.desired not in self.served:
            self.served = (self.desired, *self.served[:1])
        kept = {one.version for one in self.served}
        self.facts = {version: facts for version, facts in self.facts.items() if version in kept}


def _in_actor(name: str) -> Any:
    """A method of ``PassageView`` for ``RemoteSegment``, called where the shard is."""

    def call(self: RemoteSegment, *args: Any, **options: Any) -> Any:
        return self.shard.call(self.version, "read", self.corpus(), name, *args, **options)

    return call


def _step_in_actor(name: str) -> Any:
    """A method of ``LocalSearch`` for ``_RemoteSearch``, called where the shard is."""

    def call(self: _RemoteSearch, *args: Any, **options: Any) -> Any:
        view = self.view
        return view.shard.call(view.version, "search", view.corpus(), self.search, name, *args, **options)

    return call


class RemoteSegment:
    """One version of a shard that actors hold (``retrieval.segments.Segment``)."""

    is_remote = True

    def __init__(self, shard: _Shard, corpus: Callable[[], WordStatistics]) -> None:
        """``corpus`` gives the statistics of the words of all shards that have been opened."""
        self.shard = shard
        self.version = shard.desired.version
        self.corpus = corpus
        self._latest: ShardFacts | None = shard.facts.get(self.version)

    @property
    def away(self) -> str | None:
        """Why no replica answers now; None if one does."""
        return None if self.shard.is_ready(self.version) else str(self.shard.error or "it is being started")

    @property
    def facts(self) -> ShardFacts:
        """Those of the opened shard; until it has been opened, only the number of passages in the manifest."""
        self._latest = self._latest or self.shard.facts.get(self.version)
        return self._latest or ShardFacts(self.shard.desired.record.num_passages)

    @property
    def has_graph(self) -> bool:
        """Whether there is a usable approximate index."""
        return self.facts.has_graph

    @property
    def word_statistics(self) -> WordStatistics:
        """The statistics of the words of these passages alone; empty until it has been opened."""
        return self.facts.statistics

    def count_words(self, hashes: NDArray[np.uint64]) -> NDArray[np.int64]:
        """The number of passages that have each of these terms [n]."""
        return self.shard.call(self.version, "count_words", hashes)

    def __len__(self) -> int:
        return self.facts.num_passages

    @property
    def metadata(self) -> MetadataSchema:
        """The metadata fields that a filter may name."""
        return self.facts.metadata

    live_rows = _in_actor("live_rows")
    ids = _in_actor("ids")
    rows_of = _in_actor("rows_of")
    passages = _in_actor("passages")
    documents = _in_actor("documents")
    vectors = _in_actor("vectors")
    get = _in_actor("get")
    document = _in_actor("document")
    neighbours = _in_actor("neighbours")
    count_values = _in_actor("count_values")
    field_values = _in_actor("field_values")
    list_passages = _in_actor("list_passages")
    list_documents = _in_actor("list_documents")
    match = _in_actor("match")

    def begin_search(
        self,
        student: VectorStudent,
        settings: SearchSettings,
        task: Task,
        weights: FeatureWeights,
        *,
        is_exact: bool,
        cached: CachedBounds | None = None,
    ) -> _RemoteSearch:
        """The shard's part in a search; its actors have the student, and caches of their own.

        Raises:
            FilterError: the filter cannot be parsed, or does not fit the metadata.
        """
        del cached
        if settings.filter is not None:
            parse_filter(settings.filter, self.metadata)
        by_dot = isinstance(student, DotScorer)
        return _RemoteSearch(self, SearchSpec(secrets.token_hex(8), settings, task, weights, is_exact, by_dot))


@dataclass(frozen=True)
class _RemoteSearch:
    """A shard's part in a search (``retrieval.segments.SegmentSearch``)."""

    view: RemoteSegment
    search: SearchSpec

    def scan_together(self, dot_queries: NDArray[np.float32], depth: int) -> Sequence[CandidateRows] | None:
        del dot_queries, depth
        return None  # an actor has a scan of its own for each query, so that its answers are small

    propose = _step_in_actor("propose")
    nearest = _step_in_actor("nearest")
    score = _step_in_actor("score")
    certify = _step_in_actor("certify")
    score_features = _step_in_actor("score_features")


def stats_of_remote(index: IndexView) -> IndexStats:
    """Statistics of a version of an index whose shards are in actors.

    Raises:
        ShardAwayError: a shard does not answer.
    """
    segments = cast("Sequence[RemoteSegment]", index.segments)
    of_shards = [segment.shard.stats(segment.version) for segment in segments]
    return sum_stats(index.storage, [one for one, _ in of_shards], sum(num_bytes for _, num_bytes in of_shards))


class ShardCluster:
    """The actors of an index's shards. ``open`` gives its versions; ``stop`` ends the actors."""

    def __init__(self, settings: ServeSettings) -> None:
        self._settings = settings
        self._shards: list[_Shard] = []
        self._made_for = ("", "")  # name of the index that the actors belong to, and fingerprint of its student
        self._scorer: Any = None
        self._changed = threading.Condition()
        self._stopped = False
        self._watching = threading.Thread(target=self._watch, name="shards", daemon=True)

    def open(self, store: Storage, student: Student) -> IndexView:
        """Let the shards of an index open the version that its manifest lists, and wait for them.

        Raises:
            InputError: the cluster has too few CPUs.
            D2LLMError: a shard cannot be opened, unless that is allowed; or none can.
        """
        ray = import_ray()
        desired = [
            ShardVersion(store.folder.resolve(), dict(store.manifest), record, shard_number, len(store.records or ()))
            for shard_number, record in enumerate(store.records or ())
        ]
        made_for = store.manifest["index"], student.fingerprint
        if made_for != self._made_for:
            replicas = self._settings.shard_replicas
            require_room(
                "CPU",
                len(desired) * replicas * self._settings.shard_cpus,
                f"{len(desired)} shards with {replicas} actors each, of {self._settings.shard_cpus:g} CPUs,",
                "shard_cpus",
            )
            scorer, shards = ray.put(student.without_backbone()), [_Shard(one, self._settings) for one in desired]
            with self._changed:
                old, self._shards = self._shards, shards
                self._scorer, self._made_for = scorer, made_for
            if old:  # requests may still use them
                threading.Timer(_KEPT_SECONDS, _kill, (old,)).start()
        with self._changed:
            for shard, one in zip(self._shards, desired, strict=True):
                shard.desired, shard.error = one, None
                for replica in shard.replicas:
                    replica.has_failed, replica.retry_at = False, 0.0
            if not self._watching.is_alive():
                self._watching.start()
            self._changed.wait_for(self._is_settled, timeout=_START_SECONDS)
        problems = [shard.error for shard in self._shards if not shard.is_ready(shard.desired.version)]
        if problems and (len(problems) == len(self._shards) or not self._settings.allow_missing_shards):
            raise problems[0] or ShardAwayError(f"the shards have not been opened in {_START_SECONDS:.0f} seconds")
        with self._changed:
            for shard in self._shards:
                shard.serve_desired()
        view = IndexView(store, [RemoteSegment(shard, lambda: view.word_statistics) for shard in self._shards])
        return view

    def stop(self) -> None:
        """End the actors."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        if self._watching.is_alive():
            self._watching.join()
        _kill(self._shards)

    def _is_settled(self) -> bool:
        return self._stopped or all(
            replica.has_failed or shard.desired.version in replica.ready
            for shard in self._shards
            for replica in shard.replicas
        )

    def _watch(self) -> None:
        """Let replicas open the versions that they lack, until ``stop``."""
        while True:
            with self._changed:
                if self._stopped:
                    return
                changes = [shard.attend(replica, self._scorer) for shard in self._shards for replica in shard.replicas]
                if any(changes):
                    self._changed.notify_all()
            time.sleep(_LOOK_SECONDS)


def _kill(shards: Sequence[_Shard]) -> None:
    ray = import_ray()
    for replica in (replica for shard in shards for replica in shard.replicas):
        ray.kill(replica.actor)
