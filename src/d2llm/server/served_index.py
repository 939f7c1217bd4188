"""An index on a server: the version that is served, batched searches, serialized writes.

An index and the student that made it form one ``OpenVersion``. Each request uses a single ``OpenVersion``, which is
replaced by a single assignment, so that a student's vectors are never used with an index of another student, and no
request is dropped.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from d2llm.core.errors import D2LLMError, InputError, ModelError
from d2llm.core.memory import out_of_memory
from d2llm.core.progress import showing_progress
from d2llm.core.types import ContextOrder, Passage, Ranking, Task
from d2llm.models.attribution import Attribution, attribute
from d2llm.models.student import Student
from d2llm.models.teachers.pair_teacher import RANKING_TEACHER, ranks_lists, score_passages
from d2llm.retrieval.context import AnswerContext, build_context
from d2llm.retrieval.corrections import corrected
from d2llm.retrieval.expansion import Expansion
from d2llm.retrieval.index import Index
from d2llm.retrieval.rewriting import with_rewriting
from d2llm.retrieval.search import SearchSettings
from d2llm.retrieval.settings import Turn
from d2llm.server.batching import Batcher, Slots, Stop, in_stoppable_thread
from d2llm.server.errors import NotFoundError, NotReadyError, ServingError, is_clients
from d2llm.server.logs import note_items
from d2llm.server.model_service import ModelService, Observe, StudentLane
from d2llm.server.ray_shards import ShardCluster, stats_of_remote
from d2llm.server.response_schemas import TeacherResponse
from d2llm.server.schemas import BY_STUDENT
from d2llm.server.served_version import (
    OpenVersion,
    PendingSearch,
    identity_of,
    manifest_state,
    rank_alone,
    rank_together,
)
from d2llm.server.settings import ServeSettings
from d2llm.server.slow_models import SlowModels
from d2llm.server.student_pool import StudentPool
from d2llm.store.inspection import IndexStats, stats_of_all
from d2llm.store.shards import Storage, is_sharded

_log = logging.getLogger(__name__)
_Value = TypeVar("_Value")

_SCANNED_AT_ONCE = 32
_WAITING = 32  # maximum number of pending explanations, contexts and writes each; each holds a request's texts
_UNTIL_SHARD = 30.0  # seconds after which a client may try again to change an index without a shard
_STOP_SECONDS = 1.0  # that a write may take to stop
_LONGEST_PAUSE = 30.0  # seconds between attempts to read a version that cannot be read
_RANKINGS_ON_CLUSTER = 8


class ServedIndex:
    """One index, shared by all requests.

    Attributes:
        name: its name for clients.
        folder: its folder, or a link to it.
        settings: of the server.
        slow: the teacher, reranker and writer of the server. Whoever makes them also starts and stops them.
        version: the version that new requests read: the latest that could be opened.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        students: StudentPool,
        slow: SlowModels,
        settings: ServeSettings,
        observe: Observe = lambda _stage, _seconds: None,
    ) -> None:
        """Open the latest version.

        Args:
            name: its name.
            folder: its folder, or a link to it.
            students: loads its student, and the one of another index that replaces it.
            slow: teacher, reranker and writer.
            settings: with ``allow_missing_shards``, a sharded index is served without the shards that cannot be read;
                one that can be read again is served from the next check for a new version on.
            observe: called with a stage of a search and its seconds.

        Raises:
            DataFormatError: there is no index, or it is damaged.
            IndexMismatchError: another student made it.
        """
        self.name = name
        self.folder = folder
        self.settings = settings
        self.slow = slow
        self._students = students
        self._observe = observe
        self._cluster = None if settings.runner == "local" else ShardCluster(settings)
        try:
            self.version = self._opened(*self._latest(), None)
        except BaseException:
            self.close()
            raise
        self._reloading = asyncio.Lock()
        self._tasks: set[asyncio.Task[Any]] = set()  # reloads, and students that leave
        queue = settings.queue_texts
        self._ranks: Batcher[PendingSearch, Ranking] = Batcher(
            rank_together,
            name="rank",
            max_queued=queue,
            max_batch=_SCANNED_AT_ONCE,
            num_lanes=1 if self._cluster is None else _RANKINGS_ON_CLUSTER,  # shards on a cluster do the work
        )
        self._writes = ThreadPoolExecutor(1, thread_name_prefix="write")
        self._reads = ThreadPoolExecutor(1, thread_name_prefix="read")
        self._context_builds = ThreadPoolExecutor(1, thread_name_prefix="context")  # long ones take longer than reads
        self._searching, self._explaining = Slots(queue), Slots(_WAITING)
        self._contexts = Slots(_WAITING)
        self._writing = Slots(_WAITING, retry_after=5.0)
        self._stops: set[Stop] = set()  # of writes

    def start(self) -> None:
        """Start answering requests; call it in the event loop."""
        self._ranks.start()

    async def stop(self, timeout: float | None = None) -> None:
        """Finish admitted requests, then stop; reloads in progress are cancelled."""
        for task in self._tasks:
            task.cancel()
        await self._ranks.stop(timeout)
        await self._end_writes(timeout)
        for thread in (self._reads, self._context_builds):
            thread.shutdown(wait=False, cancel_futures=True)
        await asyncio.to_thread(self.close)

    def close(self) -> None:
        """End what searches use, once there are none."""
        if self._cluster is not None:
            self._cluster.stop()

    async def _end_writes(self, timeout: float | None) -> None:
        """Finish admitted writes; after ``timeout`` seconds, stop them."""
        ended = asyncio.ensure_future(asyncio.to_thread(self._writes.shutdown, wait=True))
        await asyncio.wait([ended], timeout=timeout)
        if not ended.done():
            for stop in self._stops:
                stop.set()
            await asyncio.wait([ended], timeout=_STOP_SECONDS)

    # Searching -----------------------------------------------------------------------------------------------------

    async def search(
        self,
        query: str,
        settings: SearchSettings,
        rescore: str = "iem",
        teacher_limits: Mapping[str, Any] | None = None,
        expansion: Expansion | None = None,
        history: Sequence[Turn] = (),
    ) -> tuple[Ranking, ModelService]:
        """The ranking for one query, and the student that made it, which a swap may have replaced by now.

        ``seconds`` also holds "queue"; ``rescore`` is "none", "iem" or the kind of a reranker; ``teacher_limits`` are
        settings of a reranker that uses the server's teacher; ``expansion`` is by the server's writer, which also makes
        one query of a conversation with a ``history``.

        Raises:
            InputError: the settings contradict each other or do not fit the index, or the writer cannot read the query.
            OverloadedError: too many searches are in progress. Raised before the query is encoded: an admitted search
                is not refused later, after work has been spent on it.
        """

        async def rank(version: OpenVersion) -> tuple[Ranking, ModelService]:
            if expansion is None and rescore in BY_STUDENT:
                return await self._rank(version, query, settings, iem=rescore != "none"), version.models
            queue = self.slow.reading if expansion is None else self.slow.writing
            reranker = None if expansion else self.slow.find_reranker(rescore, **(teacher_limits or {}))
            note_items([query])
            student = StudentLane(version.models, asyncio.get_running_loop())
            work = partial(rank_alone, version, student, query, settings, iem=rescore != "none")
            ranking, queued = await queue.run(partial(work, reranker=reranker, expansion=expansion))
            return replace(ranking, seconds={"queue": queued, **ranking.seconds}), version.models

        with self._searching:
            rewriting = None
            if history:
                rewriting = await self.slow.rewrite(query, history)
                query = rewriting.text
            ranking, student = await self.work(rank)
        (ranking,) = with_rewriting([ranking], rewriting)
        for stage in ("rewriting", "expansion", "candidates", "score", "rerank"):
            if stage in ranking.seconds:
                self._observe(stage, ranking.seconds[stage])
        return ranking, student

    async def _rank(self, version: OpenVersion, query: str, settings: SearchSettings, *, iem: bool) -> Ranking:
        """The ranking by the student alone: encoded, and then ranked, in batches with other queries."""
        weights = version.weights(settings, iem=iem)
        typed, find = query, partial(version.corrections, query, settings, weights)
        corrections = await asyncio.to_thread(find) if version.view.is_remote else find()
        query = corrected(query, corrections)
        with_tokens = "token" in weights.part_kinds
        encoded = await version.models.encode(
            [query], "query", instruction=settings.instruction, with_tokens=with_tokens
        )
        if settings.instruction is not None:
            settings = settings.replace(instruction=None)  # it is in the vector
        tokens = None if encoded.tokens is None else encoded.tokens[0]
        search = PendingSearch(version, query, encoded.vectors[0], settings, iem, tokens)
        done = await self._ranks.submit([search], bounded=False)
        (ranking,) = done.results
        seconds = {"queue": encoded.queued + done.queued, **ranking.seconds}
        seconds["encode"] += encoded.worked
        asked = replace(ranking.query, text=typed)
        return replace(
            ranking, query=asked, seconds=seconds, truncated=bool(encoded.truncated), corrections=corrections
        )

    async def context(
        self, ranking: Ranking, models: ModelService, max_tokens: int, order: ContextOrder
    ) -> AnswerContext:
        """The context that a ranking gives, counted in tokens of the student that made the ranking.

        Raises:
            OverloadedError: too many contexts are being made.
        """
        overlapping, token_ends = self.version.repeats_text, models.student.backbone.token_ends
        with self._contexts:
            return await _in(
                self._context_builds,
                lambda: build_context(ranking, token_ends, max_tokens, order=order, overlapping=overlapping),
            )

    async def explain(self, query: str, passage_id: str, task: Task) -> tuple[Passage, Attribution, str | None]:
        """A passage, its words' contributions to the query's score, and why the interaction adds nothing, or None.

        Raises:
            NotFoundError: there is no such passage.
            InputError: the student's tokenizer does not give the positions of its tokens.
        """

        async def explain(version: OpenVersion) -> tuple[Passage, Attribution, str | None]:
            passage = await _in(self._reads, lambda: passage_of(version, passage_id))
            student = version.models.student
            with self._explaining:
                words = await version.models.in_lane(lambda: attribute(student, query, passage.full_text, task))
            return passage, words, student.why_no_interaction(task)

        return await self.work(explain)

    async def score_passages(
        self, query: str, ids: Sequence[str], task: Task | None
    ) -> tuple[NDArray[np.float32], bool, ModelService]:
        """The scores of passages as in a search, whether the query was truncated, and the student.

        Raises:
            InputError: there is no such passage.
        """

        async def score(version: OpenVersion) -> tuple[NDArray[np.float32], bool, ModelService]:
            corpus = version.corpus(task or version.view.task)
            read, is_cut = await version.models.read_query(query, corpus)
            scores = await _in(self._reads, lambda: corpus.score(read, version.view.rows(ids)))
            return scores, is_cut, version.models

        return await self.work(score)

    async def score_pair(self, query: str, passage: Passage, task: Task) -> TeacherResponse:
        """The teacher's score of a pair.

        Raises:
            InputError: there is no teacher, or it scores no single pair.
            ModelError: the teacher's log-odds are not finite.
            OverloadedError: too many requests wait for the teacher.
        """
        teacher = self.slow.require_teacher()
        if ranks_lists(teacher):
            raise InputError(RANKING_TEACHER)

        def work() -> TeacherResponse:
            begin = time.perf_counter()
            scored, num_truncated = score_passages(teacher, query, [passage.full_text], task)
            log_odds = float(scored[0])
            return TeacherResponse(
                log_odds=log_odds,
                probability=float(expit(log_odds)),
                seconds=time.perf_counter() - begin,
                truncated=num_truncated > 0,
            )

        verdict, _ = await self.slow.reading.run(work)
        self._observe("teacher", verdict.seconds)
        return verdict

    def ways_to_rescore(self, version: OpenVersion) -> list[str]:
        """The values of ``rescore`` that are available: the student's, and kinds of rerankers that fit the index."""
        view, student = version.view, version.student
        ways = [*BY_STUDENT] if student.has_dot else ["iem"]
        return ways + self.slow.usable_rerankers(lambda reranker: reranker.for_index(view, student, view.task))

    # Reading and changing ------------------------------------------------------------------------------------------

    async def read(self, work: Callable[[OpenVersion], _Value]) -> _Value:
        """Run ``work`` on the version that is served now, in a thread for reads."""
        return await self.work(lambda version: _in(self._reads, lambda: work(version)))

    def stats(self, version: OpenVersion) -> IndexStats:
        """Statistics of the latest version of the index that is served as ``version``; call it in ``read``."""
        if version.view.is_remote:
            return stats_of_remote(version.view)
        storage = self.open_storage()
        storage.check_student(version.models.fingerprint)
        return stats_of_all(storage)

    async def write(self, work: Callable[[Index, Student, Stop], _Value]) -> _Value:
        """Run a write on the index's folder, and serve the version that it leaves: searches see it once this returns.

        The student's work for it shares batches with clients' requests. If its client leaves, or the time is up when
        the server stops, it stops: what it has committed stays, and it can be repeated.

        Raises:
            NotReadyError: a shard is missing.
            IndexLockedError: another process is writing.
            D2LLMError: that of the write.
        """
        loop = asyncio.get_running_loop()
        for shard in self.version.view.missing:
            problem = f"the index cannot be changed while shard {shard.number} is missing"
            raise NotReadyError(problem, retry_after=_UNTIL_SHARD)

        stop = Stop()

        def write(version: OpenVersion, stop: Stop) -> _Value:
            stop.check()
            student = StudentLane(version.models, loop, stop)
            return work(Index.open(self.folder.resolve(), student), version.models.student, stop)

        async def run(version: OpenVersion) -> _Value:
            with showing_progress(False):
                return await in_stoppable_thread(self._writes, partial(write, version), stop)

        with self._writing:
            self._stops.add(stop)
            try:
                result = await self.work(run)
            finally:
                self._stops.discard(stop)
        await self.reload()
        return result

    # Versions ------------------------------------------------------------------------------------------------------

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

    async def reload(self) -> bool:
        """Switch to the latest version, or to the index that is now in the folder; returns whether it changed.

        If another student made that index, it is loaded first. Requests in progress keep the version and the student
        that they started with.

        Raises:
            D2LLMError: the index cannot be read, or its student loaded; the previous version is still served.
        """
        return await self._begin(self._renew())

    async def watch(self, on_change: Callable[[str | None], None]) -> None:
        """Check for a new version every ``reload_seconds``, until cancelled.

        ``on_change`` is called whenever the problem changes, with its message, or None once it is solved. A version
        that cannot be read is retried at growing intervals.
        """
        problem: str | None = None
        pause = seconds = self.settings.reload_seconds
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

    def open_storage(self, folder: Path | None = None) -> Storage:
        """The store that is in the folder now; of one whose shards are on a cluster, only the manifest is read."""
        folder = folder or self.folder.resolve()
        if self._cluster is not None and is_sharded(folder):
            return Storage.of_manifest(folder)
        return Storage.open(folder, allow_missing=self.settings.allow_missing_shards)

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
                after = await self._open(before)
            except D2LLMError:
                raise
            except Exception as error:
                if (ran_out := out_of_memory(error)) is not None:  # for another student
                    raise ModelError(f"it cannot be opened: {ran_out}") from error
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

    async def _open(self, before: OpenVersion) -> OpenVersion:
        """Open the index that is now in the folder."""
        folder, student = await asyncio.to_thread(self._latest)
        try:
            return await asyncio.to_thread(self._opened, folder, student, before)
        except BaseException:
            self._begin(self._students.leave(student))
            raise

    def _opened(self, folder: Path, student: ModelService, before: OpenVersion | None) -> OpenVersion:
        allow_missing = self.settings.allow_missing_shards
        return OpenVersion(folder, student, before, allow_missing=allow_missing, cluster=self._cluster)

    def _latest_identity(self) -> tuple[int, ...]:
        folder = self.folder.resolve()  # once: a link may be set to another folder meanwhile
        state, storage = manifest_state(folder), self.open_storage(folder)
        return identity_of(state, storage.version, storage)

    def _latest(self) -> tuple[Path, ModelService]:
        """The folder that ``folder`` leads to now, and the student that made the index in it."""
        folder = self.folder.resolve()
        return folder, self._students.take(self.open_storage(folder))


def passage_of(version: OpenVersion, passage_id: str) -> Passage:
    """The passage with an id.

    Raises:
        NotFoundError: there is no such passage.
    """
    for passage in version.view.get([passage_id]):
        return passage
    raise NotFoundError(f"there is no passage {passage_id!r} in the index")


async def _in(thread: ThreadPoolExecutor, work: Callable[[], _Value]) -> _Value:
    # Run in the request's context, so that the student's work for a write is part of its trace.
    with showing_progress(False):
        context = contextvars.copy_context()
    return await asyncio.get_running_loop().run_in_executor(thread, context.run, work)
