"""Which version of an index is served, by which student, and how others take their place without a dropped request.

An index and the student that made it are one ``OpenVersion``. Whatever a request does, it does with one of them, and
another takes its place in one assignment: no vector of a student meets the index of another.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from d2llm.core.errors import D2LLMError, ModelError
from d2llm.core.files import MANIFEST_NAME
from d2llm.core.types import Query, Ranking
from d2llm.retrieval.cascade import Rereader
from d2llm.retrieval.cosine import AnchorStudent
from d2llm.retrieval.index import Index
from d2llm.retrieval.protocols import SearchStudent
from d2llm.retrieval.search import Searcher, SearchSettings
from d2llm.server.errors import NotReadyError, ServingError, is_clients
from d2llm.server.model_service import ModelService
from d2llm.store.index_store import IndexStore

_log = logging.getLogger(__name__)
_Value = TypeVar("_Value")
_LONGEST_PAUSE = 30.0  # seconds between two tries to read what cannot be read
_KEPT_SEARCHERS = 64  # of a version: each keeps what a filter allows


@dataclass(frozen=True, slots=True)
class PendingSearch:
    """An encoded query that waits to be ranked, with its settings, and whether the IEM takes part."""

    version: OpenVersion
    query: str
    vector: NDArray[np.float32]
    settings: SearchSettings
    iem: bool


class OpenVersion:
    """An index at one version, as long as a request reads it, with the searchers that its requests share."""

    def __init__(self, folder: Path, models: ModelService) -> None:
        """Open the latest version, and make it ready for quick answers.

        Raises:
            DataFormatError: there is no index, or it is damaged.
            IndexMismatchError: another student made it.
        """
        file = _manifest_state(folder)  # before it is read: what takes its place meanwhile is seen as another
        self.index = Index.open(folder, cast("SearchStudent", models.student))
        self.view = self.index.view
        self.models = models
        self.identity = (*file, self.view.version)  # of what was read: a writer may be further by now
        self._anchor: SearchStudent = AnchorStudent(cast("SearchStudent", models.student))
        self._searchers: OrderedDict[tuple[SearchSettings, bool], Searcher] = OrderedDict()
        self.view.check_student(models.fingerprint)
        if len(self.view):  # the first search of a version takes longer
            self.searcher(SearchSettings(top_k=1), iem=True).rank(
                ["warm"], vectors=np.zeros((1, models.dim), np.float32)
            )

    def searcher(self, settings: SearchSettings, *, iem: bool) -> Searcher:
        """What answers searches with these settings; called in one thread at a time."""
        key = (settings, iem)
        if key not in self._searchers:
            self._searchers[key] = self.new_searcher(settings, iem=iem)
            if len(self._searchers) > _KEPT_SEARCHERS:
                self._searchers.popitem(last=False)
        self._searchers.move_to_end(key)
        return self._searchers[key]

    def new_searcher(self, settings: SearchSettings, *, iem: bool, rereader: Rereader | None = None) -> Searcher:
        """One that is not kept."""
        student = cast("SearchStudent", self.models.student) if iem else self._anchor
        return Searcher(self.view, student, settings, cascade=rereader)


def rank_together(searches: Sequence[PendingSearch]) -> list[Ranking | Exception]:
    """Rank queries; those with the same settings, of the same version, together."""
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
        rankings = searcher.rank(queries, vectors=np.stack([searches[place].vector for place in places]))
        results |= dict(zip(places, rankings, strict=True))
    return [results[place] for place in range(len(searches))]


def rank_again(search: PendingSearch, rereader: Rereader) -> Ranking:
    """Rank one query with a teacher's help."""
    searcher = search.version.new_searcher(search.settings, iem=True, rereader=rereader)
    (ranking,) = searcher.rank([Query("1", search.query)], vectors=search.vector[None])
    return ranking


def identity_in(folder: Path) -> tuple[int, int, int]:
    """Tells whether a folder still holds the same index, at the same version: a manifest is written once."""
    return (*_manifest_state(folder), IndexStore.open(folder).version)


def _manifest_state(folder: Path) -> tuple[int, int]:
    try:
        manifest = (folder / MANIFEST_NAME).stat()
    except FileNotFoundError:
        return 0, 0  # opening it raises the error
    return manifest.st_ino, manifest.st_mtime_ns


class ServedVersion:
    """What is served of the index in ``folder``: the newest ``version`` that could be opened."""

    def __init__(
        self, folder: Path, models: ModelService, load_models: Callable[[IndexStore], ModelService] | None = None
    ) -> None:
        """Open the latest version.

        Args:
            folder: of the index, or a link to it.
            models: the student that made it.
            load_models: loads the student of an index that another one made; without it such an index is refused.

        Raises:
            DataFormatError: there is no index, or it is damaged.
            IndexMismatchError: another student made it.
        """
        self.folder = folder
        self.version = OpenVersion(folder.resolve(), models)
        self._load_models = load_models
        self._reloading = asyncio.Lock()
        self._tasks: set[asyncio.Task[Any]] = set()

    async def work(self, work: Callable[[OpenVersion], Awaitable[_Value]]) -> _Value:
        """Work on the version that is served now; where its files have just been replaced, on the one that came.

        Raises:
            NotReadyError: its files were replaced, and what came cannot be read.
        """
        version = self.version
        try:
            with version.models.in_use():
                return await work(version)
        except Exception as error:  # whatever a file that is gone leads to
            if isinstance(error, ServingError) or is_clients(error):
                raise
            try:
                await self._begin(self._renew(version))
            except D2LLMError as why:
                problem = f"the index was replaced by one that cannot be read: {why}"
                raise NotReadyError(problem, retry_after=_LONGEST_PAUSE) from error
            if self.version is version:
                raise
        version = self.version
        with version.models.in_use():
            return await work(version)

    async def reload(self) -> bool:
        """Serve the latest version from now on, or the index that now lies in the folder; whether it is another.

        Where another student made that, it is loaded first. Requests that have begun go on with the version, and the
        student, that they began with.

        Raises:
            D2LLMError: it cannot be read or its student loaded; the version before goes on answering.
        """
        return await self._begin(self._renew())

    async def watch(self, seconds: float, on_change: Callable[[str | None], None] = lambda _problem: None) -> None:
        """Look for a new version every ``seconds``, until cancelled; ``on_change`` is called with a problem, or None.

        What cannot be read is tried again less and less often.
        """
        problem: str | None = None
        pause = seconds
        while True:
            await asyncio.sleep(pause)
            try:
                await self.reload()
                found, pause = None, seconds
            except D2LLMError as error:
                found, pause = str(error), max(seconds, min(2 * pause, _LONGEST_PAUSE))
            if found != problem:
                problem = found
                on_change(problem)
                if problem is not None:
                    _log.error("the index is not taken over: %s", problem)

    def stop(self) -> None:
        """Look for nothing more."""
        for task in self._tasks:
            task.cancel()

    def _begin(self, work: Coroutine[Any, Any, _Value]) -> asyncio.Future[_Value]:
        """Run ``work`` to its end even if its caller is cancelled: threads cannot stop, and no student loads twice."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return asyncio.shield(task)

    async def _renew(self, left: OpenVersion | None = None) -> bool:
        """``reload``; where ``left`` is given, only if that is still served."""
        async with self._reloading:
            before = self.version
            if left not in (None, before):
                return True
            try:
                if await asyncio.to_thread(identity_in, self.folder) == before.identity:
                    return False
                after = await asyncio.to_thread(self._open, before.models)
            except D2LLMError:
                raise
            except Exception as error:  # no memory for another student, for one
                _log.exception("the index cannot be opened")
                raise ModelError(f"it cannot be opened ({type(error).__name__}); the log says more") from error
            if after.models is not before.models:
                after.models.start()
            self.version = after
        _log.info("index version %s, %s passages", after.view.version, len(after.view))
        if after.models is not before.models:
            _log.info("student %s, %s", after.models.name, after.models.fingerprint)
            self._begin(before.models.retire())
        return True

    def _open(self, models: ModelService) -> OpenVersion:
        """What lies in the folder now, with the student that made it: the one that is loaded, or another."""
        folder = self.folder.resolve()
        store = IndexStore.open(folder)
        if store.manifest["student"] != models.fingerprint and self._load_models is not None:
            models = self._load_models(store)
        return OpenVersion(folder, models)
