"""The index behind the server: batched searches, serialized writes, and new versions without dropped requests."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any, TypeAlias, TypeVar, cast

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from d2llm.core.errors import InputError, MismatchError
from d2llm.core.progress import showing_progress
from d2llm.core.types import (
    ContextOrder,
    Excerpt,
    ExpansionMethod,
    Passage,
    Ranking,
    Task,
)
from d2llm.models.attribution import Attribution, attribute, why_no_interaction
from d2llm.models.student import Student
from d2llm.models.teachers.judge import RANKING_TEACHER, Judge, judge_passages, ranks_lists
from d2llm.retrieval.chunking import Chunker, changed_chunking
from d2llm.retrieval.context import AnswerContext, build_context
from d2llm.retrieval.excerpts import merge_neighbours
from d2llm.retrieval.expansion import Expansion
from d2llm.retrieval.index import Index
from d2llm.retrieval.protocols import SearchStudent, SearchView
from d2llm.retrieval.reranker import OpenReranker, Reranker, TeacherReranker
from d2llm.retrieval.row_evidence import weights_for
from d2llm.retrieval.search import SearchSettings
from d2llm.retrieval.shard_search import source_names
from d2llm.retrieval.upserting import UpsertReport
from d2llm.retrieval.upserting_documents import DocumentsReport
from d2llm.server.answer_schemas import ScorePart, TeacherAnswer
from d2llm.server.batching import Batcher, Done, Places
from d2llm.server.errors import NotFoundError, NotReadyError
from d2llm.server.logs import note_items
from d2llm.server.model_service import ModelService, Observe, StudentLane
from d2llm.server.ray_shards import RemoteView
from d2llm.server.schemas import BY_STUDENT
from d2llm.server.served_version import (
    OpenVersion,
    PendingSearch,
    ServedVersion,
    rank_again,
    rank_expanded,
    rank_together,
)
from d2llm.server.stopping import Stop, in_stoppable_thread
from d2llm.server.writer_service import WriterService
from d2llm.store.inspection import IndexStats
from d2llm.store.sharded_inspection import stats_of_all

_Value = TypeVar("_Value")

_SCANNED_AT_ONCE = 32
_WAITING = 32  # maximum number of pending explanations, contexts and writes each; each holds a request's texts
_UNTIL_SHARD = 30.0  # seconds after which a client may try again to change an index without a shard
_STOP_SECONDS = 1.0  # that a write may take to stop
_SEARCHES_A_READING = 256  # the teacher's queue is this many times shorter than the student's


Readings: TypeAlias = "Batcher[Callable[[], Any], Any]"
"""The queue of a teacher, which reads for one request at a time."""


def new_readings(queue: int) -> Readings:
    """The queue of a teacher on a server whose student's queue holds ``queue`` texts."""
    return Batcher(
        lambda works: [work() for work in works],
        name="teacher",
        max_queued=max(1, queue // _SEARCHES_A_READING),
        max_batch=1,
    )


class IndexService:
    """One index, shared by all requests.

    ``judge`` is the teacher, ``teacher_name`` its name; ``reranker`` is one that needs something else; ``writer``
    expands queries. ``readings`` is the queue of the teacher and of rerankers, which all indexes share. Whoever makes
    it also starts and stops it.
    """

    def __init__(
        self,
        name: str,
        served: ServedVersion,
        readings: Readings,
        *,
        judge: Judge | None = None,
        teacher_name: str | None = None,
        reranker: OpenReranker | None = None,
        writer: WriterService | None = None,
        queue: int = 2_048,
        observe: Observe = lambda _stage, _seconds: None,
    ) -> None:
        self.name = name
        self.served = served
        self.folder = served.folder
        self.judge = judge
        self.teacher_name = teacher_name
        self.reranker = reranker
        self.writer = writer
        self._observe = observe
        self._ranks: Batcher[PendingSearch, Ranking] = Batcher(
            rank_together,
            name="rank",
            max_queued=queue,
            max_batch=_SCANNED_AT_ONCE,
            num_lanes=served.num_rankings,
        )
        self._readings = readings
        self._writes = ThreadPoolExecutor(1, thread_name_prefix="write")
        self._reads = ThreadPoolExecutor(1, thread_name_prefix="read")
        self._context_builds = ThreadPoolExecutor(1, thread_name_prefix="context")  # long ones take longer than reads
        self._searching, self._explaining = Places(queue), Places(_WAITING)
        self._contexts = Places(_WAITING)
        self._writing = Places(_WAITING, retry_after=5.0)
        self._stops: set[Stop] = set()  # of writes

    @property
    def current(self) -> OpenVersion:
        """The version that new requests read."""
        return self.served.version

    def start(self) -> None:
        """Start answering requests; call it in the event loop."""
        self._ranks.start()

    async def stop(self, timeout: float | None = None) -> None:
        """Finish admitted requests, then stop."""
        self.served.stop()
        await self._ranks.stop(timeout)
        await self._end_writes(timeout)
        for thread in (self._reads, self._context_builds):
            thread.shutdown(wait=False, cancel_futures=True)
        await asyncio.to_thread(self.served.close)

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
    ) -> tuple[Ranking, ModelService]:
        """The ranking for one query, and the student that made it, which a swap may have replaced by now.

        ``seconds`` also holds "queue"; ``rescore`` is "none", "iem" or the kind of a reranker; ``teacher_limits``
        are settings of a reranker that uses the server's teacher; ``expansion`` is one of ``expansion()``.

        Raises:
            InputError: the settings contradict each other or do not fit the index, or the writer cannot read the query.
            OverloadedError: too many searches are in progress. Raised before the query is encoded: an admitted search
                is not refused later, after work has been spent on it.
        """

        async def rank(version: OpenVersion) -> tuple[Ranking, ModelService]:
            if rescore not in BY_STUDENT:
                self._readings.require_room(1)
            iem, tokens = rescore != "none", None
            models, instruction = version.models, settings.instruction
            if version.counts_tokens(settings, iem=iem):
                encoded, tokens = await models.encode_query_with_tokens(query, instruction=instruction)
            else:
                encoded = await models.encode([query], "query", instruction=instruction)
            encoded_settings = settings.replace(instruction=None)  # it is in the vector
            search = PendingSearch(version, query, encoded.vectors[0], encoded_settings, iem, tokens)
            if rescore not in BY_STUDENT:
                reranker = self._reranker(version, rescore, settings.task, teacher_limits or {})
                done = cast("Done[Ranking]", await self._readings.submit([lambda: rank_again(search, reranker)]))
            else:
                done = await self._ranks.submit([search], bounded=False)
            (ranking,) = done.results
            seconds = {"queue": encoded.queued + done.queued, **ranking.seconds}
            seconds["encode"] += encoded.worked
            return replace(ranking, seconds=seconds, truncated=bool(encoded.truncated)), models

        async def rank_with_writer(version: OpenVersion) -> tuple[Ranking, ModelService]:
            assert self.writer is not None
            assert expansion is not None
            note_items([query])
            student = StudentLane(version.models, asyncio.get_running_loop())
            work = partial(rank_expanded, version, student, query, settings, expansion, iem=rescore != "none")
            ranking, queued = await self.writer.search(work)
            return replace(ranking, seconds={"queue": queued, **ranking.seconds}), version.models

        with self._searching:
            ranking, student = await self.served.work(rank if expansion is None else rank_with_writer)
        for stage in ("expansion", "candidates", "score", "rerank"):
            if stage in ranking.seconds:
                self._observe(stage, ranking.seconds[stage])
        return ranking, student

    def expansion(self, method: ExpansionMethod, number: int | None = None) -> Expansion:
        """An expansion by the server's writer, for ``search``.

        Raises:
            InputError: there is no writer.
        """
        if self.writer is None:
            raise InputError("this server has no writer to expand queries; start it with --writer, or leave out expand")
        return Expansion(self.writer, method, number)

    async def excerpts(self, ranking: Ranking) -> list[Excerpt]:
        """The results of a ranking with their neighbours, merged."""
        return await self._in(
            self._reads, lambda: merge_neighbours(ranking.passages, overlapping=self.current.repeats_text)
        )

    async def context(
        self, ranking: Ranking, models: ModelService, max_tokens: int, order: ContextOrder
    ) -> AnswerContext:
        """The context that a ranking gives, counted in tokens of the student that made the ranking.

        Raises:
            OverloadedError: too many contexts are being made.
        """
        token_ends = models.student.backbone.token_ends

        def build() -> AnswerContext:
            overlapping = self.current.repeats_text
            return build_context(ranking, token_ends, max_tokens, order=order, overlapping=overlapping)

        with self._contexts:
            return await self._in(self._context_builds, build)

    async def explain(self, query: str, passage_id: str, task: Task) -> tuple[Passage, Attribution, str | None]:
        """A passage, its words' contributions to the query's score, and why the interaction adds nothing, or None.

        Raises:
            NotFoundError: there is no such passage.
            InputError: the student's tokenizer does not give the positions of its tokens.
        """

        async def explain(version: OpenVersion) -> tuple[Passage, Attribution, str | None]:
            (passage,) = await self._passages(version, [passage_id])
            student = version.models.student
            with self._explaining:
                words = await version.models.in_lane(lambda: attribute(student, query, passage.full_text, task))
            return passage, words, why_no_interaction(student, task)

        return await self.served.work(explain)

    async def judge_pair(self, query: str, passage: Passage, task: Task) -> TeacherAnswer:
        """The teacher's judgement of a pair.

        Raises:
            InputError: there is no teacher, or it judges no single pair.
            ModelError: the teacher's log-odds are not finite.
            OverloadedError: too many requests wait for the teacher.
        """
        judge = self._teacher()
        if ranks_lists(judge):
            raise InputError(RANKING_TEACHER)

        def work() -> TeacherAnswer:
            begin = time.perf_counter()
            judged, num_truncated = judge_passages(judge, query, [passage.full_text], task)
            log_odds = float(judged[0])
            return TeacherAnswer(
                log_odds=log_odds,
                probability=float(expit(log_odds)),
                seconds=time.perf_counter() - begin,
                truncated=num_truncated > 0,
            )

        done = await self._readings.submit([work])
        verdict = cast("TeacherAnswer", done.results[0])
        self._observe("teacher", verdict.seconds)
        return verdict

    # Reading -------------------------------------------------------------------------------------------------------

    async def get(self, passage_id: str) -> Passage:
        """The passage with an id.

        Raises:
            NotFoundError: there is no such passage.
        """
        return (await self.served.work(lambda version: self._passages(version, [passage_id])))[0]

    async def vectors(self, version: OpenVersion, ids: Sequence[str]) -> NDArray[np.float32]:
        """The stored vectors [n, dim] of the passages with these ids, in a version.

        Raises:
            InputError: an id does not exist.
        """
        return await self._in(self._reads, lambda: version.view.vectors(version.view.rows(ids)))

    async def read(self, work: Callable[[SearchView], _Value]) -> _Value:
        """Run ``work`` on the version that is served now."""
        return await self.served.work(lambda version: self._in(self._reads, lambda: work(version.view)))

    async def snapshots(self) -> list[str]:
        """The names of all snapshots."""
        return await self._in(self._reads, lambda: self.served.open_storage().snapshots())

    async def stats(self) -> tuple[IndexStats, OpenVersion]:
        """Statistics of the latest version, and the served version of the same index."""

        def read(version: OpenVersion) -> IndexStats:
            if isinstance(version.view, RemoteView):
                return version.view.stats()
            storage = self.served.open_storage()
            storage.check_student(version.models.fingerprint)
            return stats_of_all(storage)

        async def look(version: OpenVersion) -> tuple[IndexStats, OpenVersion]:
            return await self._in(self._reads, lambda: read(version)), version

        return await self.served.work(look)

    async def _passages(self, version: OpenVersion, ids: Sequence[str]) -> list[Passage]:
        passages = await self._in(self._reads, lambda: version.view.get(ids))
        by_id = {passage.id: passage for passage in passages}
        missing = [passage_id for passage_id in ids if passage_id not in by_id]
        if missing:
            raise NotFoundError(f"there is no passage {missing[0]!r} in the index")
        return [by_id[passage_id] for passage_id in ids]

    # Changing ------------------------------------------------------------------------------------------------------

    async def upsert(self, passages: Sequence[Passage], *, lenient_metadata: bool = False) -> UpsertReport:
        """Add passages, or update those whose id exists; searches see them once it returns.

        Raises:
            DuplicateIdError: two passages share an id.
            InputError: a passage cannot be stored, or its metadata does not fit.
            IndexLockedError: another process is writing.
        """
        note_items([passage.text for passage in passages])
        return await self._write(
            lambda index, _student, stop: index.upsert(stop.between(passages), lenient_metadata=lenient_metadata)
        )

    async def upsert_documents(
        self,
        documents: Sequence[Passage],
        chunk_tokens: int | None = None,
        chunk_overlap: int | None = None,
        *,
        lenient_metadata: bool = False,
    ) -> DocumentsReport:
        """Split documents and add or update their passages; those that a document no longer has are deleted.

        Raises:
            InputError: the index has a different chunking, or as for ``upsert``.
        """
        note_items([document.text for document in documents])

        def work(index: Index, student: Student, stop: Stop) -> DocumentsReport:
            chunking = changed_chunking(index.folder, student, chunk_tokens=chunk_tokens, chunk_overlap=chunk_overlap)
            chunker = Chunker(student, chunking, check=stop.check)
            return index.upsert_documents(stop.between(documents), chunker, lenient_metadata=lenient_metadata)

        return await self._write(work)

    async def delete(self, ids: Sequence[str]) -> int:
        """Delete passages; returns the number deleted."""
        return await self._write(lambda index, _student, _stop: index.delete(ids))

    async def delete_documents(self, ids: Sequence[str]) -> int:
        """Delete all passages of documents; returns the number of passages deleted."""
        return await self._write(lambda index, _student, _stop: index.delete_documents(ids))

    async def drop_snapshot(self, name: str) -> None:
        """Delete a snapshot.

        Raises:
            NotFoundError: there is no snapshot of this name.
        """
        await self._with_snapshot(name)
        await self._write(lambda index, _student, _stop: index.store.drop_snapshot(name))

    async def restore(self, name: str) -> int:
        """Replace the index's passages by a snapshot's; returns their number.

        Raises:
            NotFoundError: there is no snapshot of this name.
        """
        await self._with_snapshot(name)
        return await self._write(lambda index, _student, _stop: index.restore(name))

    async def _with_snapshot(self, name: str) -> None:
        if name not in await self.snapshots():
            raise NotFoundError(f"there is no snapshot {name!r} of the index")

    async def snapshot(self, name: str) -> None:
        """Save the latest version under a name.

        Raises:
            InputError: the name is taken or invalid.
        """
        await self._write(lambda index, _student, _stop: index.snapshot(name))

    def ways_to_rescore(self, version: OpenVersion) -> list[str]:
        """The values of ``rescore`` that are available: the student's, and kinds of rerankers that fit the index."""
        ways = [*BY_STUDENT] if version.models.student.has_anchor else ["iem"]
        has_reranker = self.judge is not None or self.reranker is not None
        for kind in Reranker.kinds.kinds if has_reranker else ():
            with contextlib.suppress(InputError, MismatchError):
                self._reranker(version, kind, None, {})
                ways.append(kind)
        return ways

    def score_parts(self, version: OpenVersion) -> list[ScorePart]:
        """What the student's score adds up in this index, for its task."""
        student, task = version.models.student, version.view.task
        if not student.has_anchor:
            return ["interaction"]
        weights = weights_for(version.view, student, task)
        counts: dict[ScorePart, bool] = {
            "anchor": True,
            "windows": "window" in weights.part_kinds,
            "tokens": "token" in weights.part_kinds,
            "lexical": weights.counts_words,
            "interaction": why_no_interaction(student, task) is None,
        }
        return [part for part, is_counted in counts.items() if is_counted]

    def default_sources(self, version: OpenVersion) -> list[str]:
        """The sources of candidates of a search that names none."""
        student = version.models.student
        weights = weights_for(version.view, student, version.view.task)
        return source_names(SearchSettings(), weights, is_exact=not student.has_anchor)

    def _teacher(self) -> Judge:
        if self.judge is None:
            raise InputError("this server has no teacher; start it with --teacher, or rescore with 'iem' or 'none'")
        return self.judge

    def _reranker(
        self, version: OpenVersion, kind: str, task: Task | None, teacher_limits: Mapping[str, Any]
    ) -> OpenReranker:
        """The reranker of a kind for searches of a version: that of the settings, or one that only needs the teacher.

        Raises:
            InputError: there is none, or the student's error against the teacher is needed and has not been measured.
            MismatchError: it is for another student.
        """
        reranker = self.reranker
        if reranker is None or reranker.settings.kind != kind:
            try:
                cls = Reranker.kinds.find(kind)
                if not issubclass(cls, TeacherReranker):
                    raise InputError(f"this server has no reranker '{kind}'; start it with --reranker {kind}")
                settings = cls(**teacher_limits)
            except ValueError as error:
                raise InputError(f"the reranker '{kind}' cannot be used: {error}") from error
            reranker = settings.with_teacher(self._teacher())
        student = cast("SearchStudent", version.models.student)
        return reranker.for_index(version.view, student, task or version.view.task)

    async def _write(self, work: Callable[[Index, Student, Stop], _Value]) -> _Value:
        """Run a write on the index's folder, and serve the version that it leaves.

        The student's work for it shares batches with clients' requests. If its client leaves, or the time is up when
        the server stops, it stops: what it has committed stays, and it can be repeated.

        Raises:
            NotReadyError: a shard is missing.
        """
        loop = asyncio.get_running_loop()
        for shard in self.current.view.missing:
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
                result = await self.served.work(run)
            finally:
                self._stops.discard(stop)
        await self.served.reload()
        return result

    async def _in(self, thread: ThreadPoolExecutor, work: Callable[[], _Value]) -> _Value:
        # Run in the request's context, so that the student's work for a write is part of its trace.
        with showing_progress(False):
            context = contextvars.copy_context()
        return await asyncio.get_running_loop().run_in_executor(thread, context.run, work)
