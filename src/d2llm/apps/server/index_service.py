"""The index behind the server: searches that share scans, writes in turn, new versions without a dropped request."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from d2llm.apps.server.batching import Batcher, Done, Places
from d2llm.apps.server.errors import NotFoundError, ServingError
from d2llm.apps.server.facts import note_items
from d2llm.apps.server.model_service import Observe
from d2llm.apps.server.open_version import Asked, OpenVersion, identity_in, rank_again, rank_together
from d2llm.apps.server.student_lane import StudentLane
from d2llm.core.errors import D2LLMError, InputError
from d2llm.core.types import Passage, Ranking, Task
from d2llm.index.inspection import IndexStats
from d2llm.models.attribution import Attribution, attribute
from d2llm.pipeline.calibrate import read_error
from d2llm.pipeline.cascade import Cascade, Rereader, TeacherReading, judge_passages
from d2llm.pipeline.chunking import Chunker, DocumentsReport, upsert_documents
from d2llm.pipeline.index import Index, UpsertReport
from d2llm.pipeline.protocols import PairJudge
from d2llm.pipeline.search import SearchSettings

_log = logging.getLogger(__name__)
_Value = TypeVar("_Value")

Rescore = Literal["none", "iem", "teacher", "cascade"]
"""Who orders the candidates: the inner product alone, the IEM, the teacher, or the teacher where the IEM is unsure."""

_SCANNED_AT_ONCE = 32
_WAITING = 32  # explanations, or writes, that wait or are worked on; each holds a request's texts
_SEARCHES_A_READING = 64  # so many times fewer searches may wait for the teacher than for the student


@dataclass(frozen=True, slots=True)
class Reading:
    """How much a teacher reads for a query: passages, and for how long it may begin to read more."""

    num_passages: int
    budget_ms: float | None


@dataclass(frozen=True, slots=True)
class PairVerdict:
    """What the teacher says of a pair, whether it read the passage in part, and the seconds that it took."""

    log_odds: float
    truncated: bool
    seconds: float


class IndexService:
    """One index, shared by all requests; ``judge`` is the teacher that may be asked, ``teacher_name`` its name."""

    def __init__(
        self,
        version: OpenVersion,
        *,
        judge: PairJudge | None = None,
        teacher_name: str | None = None,
        queue: int = 2_048,
        observe: Observe = lambda _stage, _seconds: None,
    ) -> None:
        self.current = version
        self.folder = version.index.folder
        self.judge = judge
        self.teacher_name = teacher_name
        self._observe = observe
        self._ranks: Batcher[Asked, Ranking] = Batcher(
            rank_together, name="rank", max_queued=queue, max_batch=_SCANNED_AT_ONCE
        )
        self._readings: Batcher[Callable[[], Any], Any] = Batcher(
            lambda works: [work() for work in works],
            name="teacher",
            max_queued=max(1, queue // _SEARCHES_A_READING),
            max_batch=1,
        )
        self._writes = ThreadPoolExecutor(1, thread_name_prefix="write")
        self._reads = ThreadPoolExecutor(1, thread_name_prefix="read")
        self._explaining, self._writing = Places(_WAITING), Places(_WAITING, retry_after=5.0)
        self._reloading = asyncio.Lock()

    def start(self) -> None:
        """Begin to answer; call it in the event loop."""
        self._ranks.start()
        self._readings.start()

    async def stop(self, timeout: float | None = None) -> None:
        """Finish what was admitted."""
        await asyncio.gather(self._ranks.stop(timeout), self._readings.stop(timeout))
        await asyncio.to_thread(self._writes.shutdown, wait=True)
        self._reads.shutdown(wait=False, cancel_futures=True)

    # Searching -----------------------------------------------------------------------------------------------------

    async def search(
        self, query: str, settings: SearchSettings, rescore: Rescore = "iem", reading: Reading | None = None
    ) -> Ranking:
        """The ranking for one query; ``seconds`` also holds "queue". ``reading`` is for the teacher's ways to rescore.

        Raises:
            InputError: settings that do not go together or do not fit the index.
            OverloadedError: a queue is full.
        """
        encoded = await self.current.models.encode([query], "query")
        vector = encoded.vectors[0]
        rereader: Rereader | None = None
        if rescore in ("teacher", "cascade"):
            task = settings.task or self.current.view.task
            rereader = self._rereader(rescore, task, reading or Reading(10, None))

        async def rank(version: OpenVersion) -> Done[Ranking]:
            asked = Asked(version, query, vector, settings, rescore != "none")
            if (again := rereader) is None:
                return await self._ranks.submit([asked])
            return cast("Done[Ranking]", await self._readings.submit([lambda: rank_again(asked, again)]))

        done = await self._on_current(rank)
        (ranking,) = done.results
        seconds = {"queue": encoded.queued + done.queued, **ranking.seconds}
        seconds["encode"] += encoded.worked
        for stage in ("candidates", "score", "teacher"):
            if stage in seconds:
                self._observe(stage, seconds[stage])
        return replace(ranking, seconds=seconds)

    async def explain(self, query: str, passage_id: str, task: Task | None) -> tuple[Passage, Attribution]:
        """A passage, and what each of its words adds to the query's score.

        Raises:
            NotFoundError: there is no such passage.
            InputError: the student's tokenizer cannot say.
        """
        passage, version = await self.get(passage_id), self.current
        asked: Task = task or version.view.task
        with self._explaining:
            found = await version.models.in_lane(
                lambda: attribute(version.models.student, query, passage.full_text, asked)
            )
        return passage, found

    async def judge_pair(self, query: str, passage: Passage, task: Task | None) -> PairVerdict:
        """What the teacher says of a pair.

        Raises:
            InputError: there is no teacher.
            ModelError: it said something that is no finite number.
            OverloadedError: too many wait for it.
        """
        judge, asked = self._teacher(), task or self.current.view.task

        def work() -> PairVerdict:
            begin = time.perf_counter()
            log_odds, num_truncated = judge_passages(judge, query, [passage.full_text], asked)
            return PairVerdict(float(log_odds[0]), num_truncated > 0, time.perf_counter() - begin)

        done = await self._readings.submit([work])
        verdict = cast("PairVerdict", done.results[0])
        self._observe("teacher", verdict.seconds)
        return verdict

    # Reading -------------------------------------------------------------------------------------------------------

    async def get(self, passage_id: str) -> Passage:
        """The passage with an id.

        Raises:
            NotFoundError: there is none.
        """
        return (await self.get_many([passage_id]))[0]

    async def get_many(self, ids: Sequence[str]) -> list[Passage]:
        """The passages with these ids, in their order.

        Raises:
            NotFoundError: one of them is not there.
        """
        passages = await self._on_current(lambda version: self._in(self._reads, lambda: version.view.get(ids)))
        found = {passage.id: passage for passage in passages}
        missing = [passage_id for passage_id in ids if passage_id not in found]
        if missing:
            raise NotFoundError(f"there is no passage {missing[0]!r} in the index")
        return [found[passage_id] for passage_id in ids]

    async def vectors(self, ids: Sequence[str]) -> NDArray[np.float32]:
        """The stored vectors [n, dim] of the passages with these ids.

        Raises:
            InputError: one of them is not there.
        """

        async def read(version: OpenVersion) -> NDArray[np.float32]:
            return await self._in(self._reads, lambda: version.view.vectors(version.view.rows(ids)))

        return await self._on_current(read)

    async def stats(self) -> IndexStats:
        """Facts about the latest version."""
        return await self._on_current(lambda version: self._in(self._reads, version.index.stats))

    # Changing ------------------------------------------------------------------------------------------------------

    async def upsert(self, passages: Sequence[Passage]) -> UpsertReport:
        """Add passages, and change those whose id is there; searches see them when it returns.

        Raises:
            DuplicateIdError: two passages share an id.
            InputError: a passage cannot be stored, or its metadata do not fit.
            IndexLockedError: another process is writing.
        """
        note_items([passage.text for passage in passages])
        report = await self._write(lambda index: index.upsert(passages))
        await self.reload()
        return report

    async def upsert_documents(
        self, documents: Sequence[Passage], chunk_tokens: int, overlap_tokens: int
    ) -> DocumentsReport:
        """Split documents and add their passages; those that a document no longer has go. Errors as of ``upsert``."""
        note_items([document.text for document in documents])
        student = self.current.models.student

        def work(index: Index) -> DocumentsReport:
            return upsert_documents(index, documents, Chunker(student, chunk_tokens, overlap_tokens))

        report = await self._write(work)
        await self.reload()
        return report

    async def delete(self, ids: Sequence[str]) -> int:
        """Delete passages; returns how many there were."""
        num_deleted = await self._write(lambda index: index.delete(ids))
        await self.reload()
        return num_deleted

    async def snapshot(self, name: str) -> None:
        """Keep the latest version under a name.

        Raises:
            InputError: the name is taken, or none.
        """
        await self._write(lambda index: index.snapshot(name))

    async def reload(self) -> bool:
        """Read the latest version from now on, or the index that now lies in the folder; whether it is another.

        Requests that have begun go on with the version that they began with.

        Raises:
            D2LLMError: it cannot be read; the version before goes on answering.
        """
        async with self._reloading:
            before = self.current
            if await asyncio.to_thread(identity_in, self.folder) == before.identity:
                return False
            self.current = await asyncio.to_thread(OpenVersion, self.folder, before.models)
            _log.info("index version %s, %s passages", self.current.view.version, len(self.current.view))
            return True

    async def watch(self, seconds: float, on_change: Callable[[str | None], None] = lambda _problem: None) -> None:
        """Look for a new version every so many seconds, until cancelled; ``on_change`` is told a problem, or None."""
        problem: str | None = None
        while True:
            await asyncio.sleep(seconds)
            try:
                await self.reload()
                found = None
            except D2LLMError as error:
                found = str(error)
            if found != problem:
                problem = found
                on_change(problem)

    async def _on_current(self, work: Callable[[OpenVersion], Awaitable[_Value]]) -> _Value:
        """Work on the version that is read now; where its files have just been replaced, on the one that came."""
        version = self.current
        try:
            return await work(version)
        except ServingError:
            raise
        except Exception:  # whatever a file that is gone leads to
            with contextlib.suppress(D2LLMError, OSError):
                await self.reload()
            if self.current is version:
                raise
            return await work(self.current)

    def ways_to_rescore(self) -> list[Rescore]:
        """What a search can ask for here; a cascade needs a student whose error is measured."""
        ways: list[Rescore] = ["none", "iem"] if self.current.models.student.has_anchor else ["iem"]
        if self.judge is not None:
            ways.append("teacher")
            with contextlib.suppress(InputError):
                read_error(self.folder, self.judge, self.current.view.task)
                ways.append("cascade")
        return ways

    def _teacher(self) -> PairJudge:
        if self.judge is None:
            raise InputError("this server has no teacher; start it with --teacher, or rescore with 'iem' or 'none'")
        return self.judge

    def _rereader(self, rescore: Rescore, task: Task, reading: Reading) -> Rereader:
        judge = self._teacher()
        if rescore == "teacher":
            return TeacherReading(judge, reading.num_passages, reading.budget_ms)
        return Cascade(judge, read_error(self.folder, judge, task), reading.num_passages, reading.budget_ms)

    async def _write(self, work: Callable[[Index], _Value]) -> _Value:
        lane = StudentLane(self.current.models, asyncio.get_running_loop())
        with self._writing:
            return await self._in(self._writes, lambda: work(Index.open(self.folder, lane)))

    async def _in(self, thread: ThreadPoolExecutor, work: Callable[[], _Value]) -> _Value:
        return await asyncio.get_running_loop().run_in_executor(thread, work)
