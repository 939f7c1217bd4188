"""The served version of an index with its student, and switching to a new one without dropping requests.

An index and the student that made it form one ``OpenVersion``. Each request uses a single ``OpenVersion``, which is
replaced by a single assignment, so that a student's vectors are never used with an index of another student.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from d2llm.core.errors import D2LLMError, ModelError
from d2llm.core.files import MANIFEST_NAME
from d2llm.core.types import Query, Ranking
from d2llm.retrieval.cosine import AnchorStudent
from d2llm.retrieval.expansion import Expansion
from d2llm.retrieval.index import Index
from d2llm.retrieval.protocols import SearchStudent, SearchView
from d2llm.retrieval.reranker import OpenReranker
from d2llm.retrieval.row_evidence import weights_for
from d2llm.retrieval.search import Searcher, SearchSettings
from d2llm.server.errors import NotReadyError, ServingError, is_clients
from d2llm.server.model_service import ModelService
from d2llm.server.ray_shards import RemoteStore, RemoteView, ShardCluster
from d2llm.server.student_pool import StudentPool
from d2llm.store.index_store import IndexStore
from d2llm.store.sharded_store import ShardedStore, Storage, is_sharded, open_storage
from d2llm.store.side_files import repeats_text

_log = logging.getLogger(__name__)
_Value = TypeVar("_Value")
_LONGEST_PAUSE = 30.0  # seconds between attempts to read a version that cannot be read
_RANKINGS_ON_CLUSTER = 8
_KEPT_SEARCHERS = 64  # per version: each holds the rows that its filter allows


@dataclass(frozen=True, slots=True)
class PendingSearch:
    """An encoded query waiting to be ranked, with its settings, and whether the IEM is used."""

    version: OpenVersion
    query: str
    vector: NDArray[np.float32]
    settings: SearchSettings
    iem: bool
    tokens: NDArray[np.float32] | None = None  # of the query, [tokens, token_dim], if the score counts them


class OpenVersion:
    """One version of an index, kept as long as a request uses it, with the searchers that its requests share."""

    def __init__(
        self,
        folder: Path,
        models: ModelService,
        before: OpenVersion | None = None,
        *,
        allow_missing: bool = False,
        cluster: ShardCluster | None = None,
    ) -> None:
        """Open the latest version and warm it up. Of files that ``before`` has read, only what is new is verified.

        Args:
            folder: folder of the index.
            models: its student.
            before: the version that this one replaces.
            allow_missing: shards that cannot be read are left out, and rankings name them.
            cluster: has the shards of a sharded index; None: they are read in this process.

        Raises:
            DataFormatError: there is no index, or it is damaged.
            IndexMismatchError: another student made it.
        """
        file = _manifest_state(folder)  # read first, so that a later replacement is noticed
        self.folder = folder
        self.models = models
        self.repeats_text = repeats_text(folder)
        self._stores: Sequence[IndexStore] = ()
        if cluster is not None and is_sharded(folder):
            remote = RemoteStore(folder)
            remote.check_student(models.fingerprint)
            self.view: SearchView = cluster.open(remote, models.student)
        else:
            index = Index.open(folder, cast("SearchStudent", models.student), allow_missing=allow_missing)
            known = {} if before is None else {store.folder: store.intact for store in before._stores}
            self._stores = index.storage.stores
            for store in self._stores:
                store.intact = known.get(store.folder, store.intact)
            self.view = index.view
        # Of the version that was read: writers may have added newer ones.
        self.identity = _identity(file, self.view)
        self._allow_missing = allow_missing or isinstance(self.view, RemoteView)
        for shard in self.view.missing:
            _log.error("%s: shard %d is left out of searches: %s", folder.name, shard.number, shard.problem)
        self._anchor: SearchStudent = AnchorStudent(cast("SearchStudent", models.student))
        self._searchers: OrderedDict[tuple[SearchSettings, bool], Searcher] = OrderedDict()
        self._choosing = threading.Lock()
        # Held while a shared searcher ranks: its cache for exact searches (``CachedBounds``) is for one thread at a
        # time, while the view and the student's head are for several. Shards on a cluster have caches of their own.
        self.ranking: AbstractContextManager[object] = (
            nullcontext() if isinstance(self.view, RemoteView) else threading.Lock()
        )
        self.view.check_student(models.fingerprint)
        if len(self.view):  # warm up: the first search of a version takes longer
            self.searcher(SearchSettings(top_k=1), iem=True).rank(
                ["warm"], vectors=np.zeros((1, models.dim), np.float32)
            )

    def counts_tokens(self, settings: SearchSettings, *, iem: bool) -> bool:
        """Whether the scores of a search count the token embeddings."""
        if not iem:
            return False
        student = cast("SearchStudent", self.models.student)
        weights = weights_for(self.view, student, settings.task or self.view.task, settings.evidence)
        return "token" in weights.part_kinds

    def searcher(self, settings: SearchSettings, *, iem: bool) -> Searcher:
        """The shared searcher for these settings; use it within ``ranking``."""
        key = (settings, iem)
        with self._choosing:
            if key not in self._searchers:
                self._searchers[key] = self.new_searcher(settings, iem=iem)
                if len(self._searchers) > _KEPT_SEARCHERS:
                    self._searchers.popitem(last=False)
            self._searchers.move_to_end(key)
            return self._searchers[key]

    def new_searcher(
        self,
        settings: SearchSettings,
        *,
        iem: bool = True,
        reranker: OpenReranker | None = None,
        student: SearchStudent | None = None,
        expansion: Expansion | None = None,
    ) -> Searcher:
        """A searcher that is not shared, and can be used at the same time as others.

        ``student`` is used in place of the version's, with ``iem`` or without.
        """
        if student is None:
            student = cast("SearchStudent", self.models.student) if iem else self._anchor
        return Searcher(
            self.view, student, settings, rerank=reranker, expansion=expansion, allow_missing=self._allow_missing
        )


def rank_together(searches: Sequence[PendingSearch]) -> list[Ranking | Exception]:
    """Rank queries; those with the same version and settings are ranked together."""
    together: dict[tuple[OpenVersion, SearchSettings, bool], list[int]] = {}
    for place, search in enumerate(searches):
        together.setdefault((search.version, search.settings, search.iem), []).append(place)
    results: dict[int, Ranking | Exception] = {}
    for (version, settings, iem), places in together.items():
        try:
            searcher = version.searcher(settings, iem=iem)
        except D2LLMError as error:
            results |= dict.fromkeys(places, error)
            continue
        queries = [Query(str(place), searches[place].query) for place in places]
        chosen = [searches[place] for place in places]
        vectors, tokens = np.stack([search.vector for search in chosen]), [search.tokens for search in chosen]
        with version.ranking:
            rankings = searcher.rank(queries, vectors=vectors, tokens=tokens)
        results |= dict(zip(places, rankings, strict=True))
    return [results[place] for place in range(len(searches))]


def rank_again(search: PendingSearch, reranker: OpenReranker) -> Ranking:
    """Rank one query with a reranker's help.

    Outside ``OpenVersion.ranking``, because its searcher is not shared: others search while the reranker reads.
    """
    searcher = search.version.new_searcher(search.settings, iem=True, reranker=reranker)
    (ranking,) = searcher.rank([Query("1", search.query)], vectors=search.vector[None], tokens=[search.tokens])
    return ranking


def rank_expanded(
    version: OpenVersion,
    student: SearchStudent,
    query: str,
    settings: SearchSettings,
    expansion: Expansion,
    *,
    iem: bool,
) -> Ranking:
    """Rank one query that a writer expands; ``student`` encodes it and what the writer adds.

    Outside ``OpenVersion.ranking``, as ``rank_again``.
    """
    searcher = version.new_searcher(settings, student=student if iem else AnchorStudent(student), expansion=expansion)
    (ranking,) = searcher.rank([Query("1", query)])
    return ranking


def _identity(manifest: tuple[int, int], index: SearchView | Storage) -> tuple[int, ...]:
    """Identifies an index, its version, and the shards that are missing.

    The manifest is written once per index; that of a sharded one, with every change.
    """
    missing = () if isinstance(index, RemoteView) else index.missing  # these come back by themselves
    return (*manifest, index.version, *(shard.number for shard in missing))


def _manifest_state(folder: Path) -> tuple[int, int]:
    try:
        manifest = (folder / MANIFEST_NAME).stat()
    except FileNotFoundError:
        return 0, 0  # opening it raises the error
    return manifest.st_ino, manifest.st_mtime_ns


class ServedVersion:
    """The served ``version`` of the index in ``folder``: the latest that could be opened."""

    def __init__(
        self,
        folder: Path,
        students: StudentPool,
        *,
        allow_missing: bool = False,
        cluster: ShardCluster | None = None,
    ) -> None:
        """Open the latest version.

        Args:
            folder: folder of the index, or a link to it.
            students: loads its student, and the one of another index that replaces it.
            allow_missing: serve a sharded index without the shards that cannot be read; one that can be read again
                is served from the next check for a new version on.
            cluster: has the shards, if the index is sharded.

        Raises:
            DataFormatError: there is no index, or it is damaged.
            IndexMismatchError: another student made it.
        """
        self.folder = folder
        self._students = students
        self._allow_missing = allow_missing
        self._cluster = cluster
        self.version = OpenVersion(*self._latest(), allow_missing=allow_missing, cluster=cluster)
        self._reloading = asyncio.Lock()
        self._tasks: set[asyncio.Task[Any]] = set()

    async def work(self, work: Callable[[OpenVersion], Awaitable[_Value]]) -> _Value:
        """Run ``work`` on the served version; if its files have just been replaced, run it on the new one.

        Raises:
            NotReadyError: the files were replaced, and the new ones cannot be read.
        """
        version = self.version
        try:
            with version.models.in_use():
                return await work(version)
        except Exception as error:  # a missing file can lead to any exception
            if isinstance(error, ServingError) or is_clients(error):
                raise
            try:
                await self._begin(self._renew(version))
            except D2LLMError as cause:
                problem = f"the index was replaced by one that cannot be read: {cause}"
                raise NotReadyError(problem, retry_after=_LONGEST_PAUSE) from error
            if self.version is version:
                raise
        version = self.version
        with version.models.in_use():
            return await work(version)

    @property
    def num_rankings(self) -> int:
        """How many batches of searches may be ranked at a time: several, if shards on a cluster do the work."""
        return 1 if self._cluster is None else _RANKINGS_ON_CLUSTER

    def open_storage(self) -> IndexStore | ShardedStore:
        """The store that is in the folder now; of one whose shards are on a cluster, only the manifest is read."""
        return self._open_storage(self.folder.resolve())

    def _open_storage(self, folder: Path) -> IndexStore | ShardedStore:
        if self._cluster is not None and is_sharded(folder):
            return RemoteStore(folder)
        return open_storage(folder, allow_missing=self._allow_missing)

    async def reload(self) -> bool:
        """Switch to the latest version, or to the index that is now in the folder; returns whether it changed.

        If another student made that index, it is loaded first. Requests in progress keep the version and the student
        that they started with.

        Raises:
            D2LLMError: the index cannot be read, or its student loaded; the previous version is still served.
        """
        return await self._begin(self._renew())

    async def watch(self, seconds: float, on_change: Callable[[str | None], None] = lambda _problem: None) -> None:
        """Check for a new version every ``seconds``, until cancelled.

        ``on_change`` is called whenever the problem changes, with its message, or None once it is solved. A version
        that cannot be read is retried at growing intervals.
        """
        problem: str | None = None
        pause = seconds
        while True:
            await asyncio.sleep(pause)
            try:
                await self.reload()
                latest, pause = None, seconds
            except D2LLMError as error:
                latest, pause = str(error), max(seconds, min(2 * pause, _LONGEST_PAUSE))
            if latest != problem:
                problem = latest
                on_change(problem)
                if problem is not None:
                    _log.error("the index was not reloaded: %s", problem)

    def stop(self) -> None:
        """Cancel reloads in progress."""
        for task in self._tasks:
            task.cancel()

    def close(self) -> None:
        """End what searches use, once there are none."""
        if self._cluster is not None:
            self._cluster.stop()

    def _begin(self, work: Coroutine[Any, Any, _Value]) -> asyncio.Future[_Value]:
        """Finish ``work`` even if the caller is cancelled: threads cannot stop, and no student should load twice."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return asyncio.shield(task)

    async def _renew(self, outdated: OpenVersion | None = None) -> bool:
        """``reload``; if ``outdated`` is given, only if that version is still served."""
        async with self._reloading:
            before = self.version
            if outdated not in (None, before):
                return True
            try:
                if await asyncio.to_thread(self._latest_identity) == before.identity:
                    return False
                after = await self._open()
            except D2LLMError:
                raise
            except Exception as error:  # for example no memory for another student
                _log.exception("the index cannot be opened")
                raise ModelError(f"it cannot be opened ({type(error).__name__}); see the log") from error
            after.models.start()
            self.version = after
        name = self.folder.name
        _log.info("%s: index version %s, %s passages", name, after.view.version, len(after.view))
        if after.models is not before.models:
            _log.info("%s: student %s, %s", name, after.models.name, after.models.fingerprint)
        self._begin(self._students.leave(before.models))
        return True

    async def _open(self) -> OpenVersion:
        """Open the index that is now in the folder."""
        folder, student = await asyncio.to_thread(self._latest)
        try:
            reopen = partial(
                OpenVersion,
                folder,
                student,
                self.version,
                allow_missing=self._allow_missing,
                cluster=self._cluster,
            )
            return await asyncio.to_thread(reopen)
        except BaseException:
            self._begin(self._students.leave(student))
            raise

    def _latest_identity(self) -> tuple[int, ...]:
        folder = self.folder.resolve()  # once: a link may be set to another folder meanwhile
        return _identity(_manifest_state(folder), self._open_storage(folder))

    def _latest(self) -> tuple[Path, ModelService]:
        """The folder that ``folder`` leads to now, and the student that made the index in it."""
        folder = self.folder.resolve()
        return folder, self._students.take(self._open_storage(folder))
