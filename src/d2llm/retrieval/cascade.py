"""A cascade: the student ranks, and the teacher rereads only passages that the student is unsure of, on a budget.

Other ways to read the top of a ranking again: the teacher reads all of it, or a language model reads its vectors.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from d2llm.core.errors import InputError, ModelError
from d2llm.core.types import DEFAULT_READER_PASSAGES, DEFAULT_TEACHER_PASSAGES, DEFAULT_TOP_K, Task
from d2llm.models.teachers.judge import Judge, ranks_lists
from d2llm.ops.rereading import StudentError, expected_log_odds, on_one_scale, reading_gains

if TYPE_CHECKING:
    from d2llm.models.listwise_reader import ListwiseReader

_DECAY = 0.5  # of the running mean of seconds per pair, at each batch: texts differ, and the first call is slow

RANKING_TEACHER = (
    "this teacher ranks the passages of a list, so its log-odds cannot be compared with the student's scores: it can "
    "reorder the top of a ranking (search --teacher, without calibration; rescore 'teacher' on a server), but neither "
    "choose what to read nor judge a single passage; for that, use kind graded"
)
_MARGIN = 1.0  # between the passages that the teacher read and the others, so that none of them tie


@dataclass(frozen=True, slots=True)
class StudentRanking:
    """A query's candidates, as a rereader gets them; it names them by their places.

    Attributes:
        scores: [n] the student's scores.
        best_first: [n] the places, best first, ties by passage id.
        texts: returns the full texts of the passages at some places; called only for passages to be read.
        vectors: returns the vectors [m, dim] of the passages at some places.
    """

    scores: NDArray[np.float32]
    best_first: NDArray[np.int64]
    texts: Callable[[NDArray[np.int64]], Sequence[str]]
    vectors: Callable[[NDArray[np.int64]], NDArray[np.float32]]


@dataclass(frozen=True, slots=True)
class Reread:
    """Scores after the teacher has reread some passages.

    Attributes:
        scores: [n] log-odds by which the passages are ordered: the teacher's for passages it read, else those of the
            expected probability.
        read: [m] places of the passages that the teacher read, in the order of reading.
        log_odds: [m] the teacher's log-odds of those passages; None from a listwise reader, which gives none.
        unsure: places of the passages that the student was unsure of, before anything was read.
        seconds: time spent on choosing and reading.
        num_truncated: number of passages that the teacher read only in part.
        out_of_time: whether the teacher stopped because its time ran out.
    """

    scores: NDArray[np.float64]
    read: NDArray[np.int64]
    log_odds: NDArray[np.float64] | None
    unsure: NDArray[np.int64]
    seconds: float
    num_truncated: int
    out_of_time: bool


class Cascade:
    """Has a teacher rerank passages where the order of the top results is in doubt (``ops.rereading``), in batches.

    The student is unsure of a passage if reading it is expected to improve the DCG of the top results by at least
    ``min_gain``: its score margin to others is small compared with the student's error, and the places matter. Each
    batch is chosen anew. The time per pair is measured and kept from query to query.
    """

    def __init__(
        self,
        judge: Judge,
        error: StudentError,
        teacher_passages: int | None = None,
        teacher_ms: float | None = None,
        *,
        depth: int = 50,
        batch_passages: int = 8,
        min_gain: float = 0.001,
    ) -> None:
        """Set the teacher and its budget.

        Args:
            judge: the teacher.
            error: the student's error against this teacher (``retrieval.calibrate``).
            teacher_passages: maximum number of passages that the teacher reads per query; None means all that the
                student is unsure of.
            teacher_ms: the teacher starts no batch that would not finish in time, according to the measured time per
                pair; at most the last batch is late. While that time is unknown or too long, a query's first batch is
                a single passage.
            depth: how many of the student's top passages may be read.
            batch_passages: passages read in one call; with smaller batches, each choice uses more of the results.
            min_gain: minimum expected gain of reading a passage, in DCG of probabilities.

        Raises:
            InputError: a number is out of range, or the teacher ranks lists (``ranks_lists``): its log-odds cannot be
                compared with a student's, nor from batch to batch.
        """
        if ranks_lists(judge):
            raise InputError(RANKING_TEACHER)
        least = {"teacher_passages": 0, "teacher_ms": 0, "depth": 1, "batch_passages": 1, "min_gain": 0}
        limits = {
            "teacher_passages": teacher_passages,
            "teacher_ms": teacher_ms,
            "depth": depth,
            "batch_passages": batch_passages,
            "min_gain": min_gain,
        }
        for name, value in limits.items():
            if value is not None and not value >= least[name]:
                raise InputError(f"{name} is {value}, but must be at least {least[name]}")
        self.judge = judge
        self.error = error
        self.teacher_passages = teacher_passages
        self.teacher_ms = teacher_ms
        self.depth = depth
        self.batch_passages = batch_passages
        self.min_gain = min_gain
        self._pair_seconds: float | None = None

    def rerank(self, query: str, ranking: StudentRanking, task: Task, top_k: int = DEFAULT_TOP_K) -> Reread:
        """Reread some of the passages that the student scored for a query.

        Args:
            query: text of the query.
            ranking: the passages.
            task: the task.
            top_k: how many places matter.

        Raises:
            ModelError: the teacher returned a log-odds value that is not finite.
        """
        begin = time.perf_counter()
        scores, deep = ranking.scores, ranking.best_first[: self.depth]
        unread = np.zeros(len(scores), np.bool_)
        unread[deep] = True
        read = np.zeros(0, np.int64)
        teacher_log_odds = np.zeros(0)
        num_truncated = 0
        unsure = order = self._unsure(scores, read, teacher_log_odds, deep, unread, top_k)
        while len(batch := order[: self._room(len(read), time.perf_counter() - begin)]):
            values, num_cut = self._read(query, ranking.texts(batch), task)
            read = np.append(read, batch)
            teacher_log_odds = np.append(teacher_log_odds, values)
            num_truncated += num_cut
            unread[batch] = False
            order = self._unsure(scores, read, teacher_log_odds, deep, unread, top_k)
        out_of_time = len(order) > 0 and (self.teacher_passages is None or len(read) < self.teacher_passages)
        unread[:] = True
        unread[read] = False
        now = expected_log_odds(on_one_scale(scores, read, teacher_log_odds, self.error), unread, self.error.sigma)
        return Reread(now, read, teacher_log_odds, unsure, time.perf_counter() - begin, num_truncated, out_of_time)

    def _unsure(
        self,
        scores: NDArray[np.float32],
        read: NDArray[np.int64],
        teacher_log_odds: NDArray[np.float64],
        deep: NDArray[np.int64],
        unread: NDArray[np.bool_],
        top_k: int,
    ) -> NDArray[np.int64]:
        """Places of the passages that are worth reading, highest expected gain first."""
        log_odds = on_one_scale(scores, read, teacher_log_odds, self.error)
        gains = reading_gains(log_odds[deep], unread[deep], self.error.sigma, top_k)
        best = np.argsort(-gains, kind="stable")
        return deep[best[(gains[best] >= self.min_gain) & unread[deep][best]]]

    def _room(self, num_read: int, seconds: float) -> int:
        """Maximum number of passages in the next batch."""
        room = self.batch_passages
        if self.teacher_passages is not None:
            room = min(room, self.teacher_passages - num_read)
        if self.teacher_ms is not None:
            left = self.teacher_ms / 1e3 - seconds
            fitting = int(left / self._pair_seconds) if self._pair_seconds else 0
            # Read at least one passage; otherwise the time would never be measured again after one slow pair.
            room = 0 if left <= 0 else min(room, max(fitting, int(num_read == 0)))
        return room

    def _read(self, query: str, texts: Sequence[str], task: Task) -> tuple[NDArray[np.float64], int]:
        begin = time.perf_counter()
        values, num_cut = judge_passages(self.judge, query, texts, task)
        seconds = (time.perf_counter() - begin) / len(texts)
        before = self._pair_seconds
        self._pair_seconds = seconds if before is None else _DECAY * before + (1 - _DECAY) * seconds
        return values, num_cut


class TeacherReading:
    """The teacher reads the student's top passages, whether the student is sure of them or not, and reorders them.

    Args: ``teacher_passages``, how many passages to read; ``teacher_ms``, after which no new batch of
    ``batch_passages`` is started; a teacher that ranks lists reads all of them in one batch. Passages that the teacher
    did not read keep the student's order, below those that it read: their scores are the student's, shifted to at least
    1 below the lowest log-odds.
    """

    def __init__(
        self,
        judge: Judge,
        teacher_passages: int = DEFAULT_TEACHER_PASSAGES,
        teacher_ms: float | None = None,
        *,
        batch_passages: int = 8,
    ) -> None:
        if teacher_passages < 1 or batch_passages < 1 or (teacher_ms is not None and teacher_ms < 0):
            raise InputError(
                f"teacher_passages is {teacher_passages}, batch_passages {batch_passages}, teacher_ms {teacher_ms}; "
                "they must be at least 1, 1 and 0"
            )
        self.judge = judge
        self.teacher_passages = teacher_passages
        self.teacher_ms = teacher_ms
        self.batch_passages = batch_passages

    def rerank(self, query: str, ranking: StudentRanking, task: Task, top_k: int = DEFAULT_TOP_K) -> Reread:
        """Like ``Cascade.rerank``; at least ``top_k`` passages are read, if there is time."""
        begin = time.perf_counter()
        order = ranking.best_first
        to_read, teacher_log_odds, num_truncated = order[: max(self.teacher_passages, top_k)], np.zeros(0), 0
        batch_passages = len(to_read) if ranks_lists(self.judge) else self.batch_passages
        for start in range(0, len(to_read), max(1, batch_passages)):
            if start and self.teacher_ms is not None and time.perf_counter() - begin > self.teacher_ms / 1e3:
                break
            values, num_cut = judge_passages(
                self.judge, query, ranking.texts(to_read[start : start + batch_passages]), task
            )
            teacher_log_odds, num_truncated = np.append(teacher_log_odds, values), num_truncated + num_cut
        read, unread = order[: len(teacher_log_odds)], order[len(teacher_log_odds) :]
        now = ranking.scores.astype(np.float64)
        now[read] = teacher_log_odds
        if len(read) and len(unread):
            now[unread] -= max(0.0, float(now[unread[0]] - teacher_log_odds.min()) + _MARGIN)
        unsure, out_of_time = np.zeros(0, np.int64), len(read) < len(to_read)
        return Reread(now, read, teacher_log_odds, unsure, time.perf_counter() - begin, num_truncated, out_of_time)


class ListwiseReading:
    """Has a language model rank the student's top passages, which it reads as vectors (``ListwiseReader``).

    Passages that it leaves out, and those below ``depth``, keep the student's order, below the others. The score of a
    passage is 1 / place.
    """

    def __init__(self, reader: ListwiseReader, depth: int = DEFAULT_READER_PASSAGES) -> None:
        if depth < 1:
            raise InputError(f"depth is {depth}, but counts the passages that the reader reads: give 1 or more")
        self.reader = reader
        self.depth = depth

    def rerank(self, query: str, ranking: StudentRanking, task: Task, top_k: int = DEFAULT_TOP_K) -> Reread:
        """Reorder the first passages; the reader knows no task, and reads as many for any ``top_k``."""
        del task, top_k
        begin = time.perf_counter()
        read, others = ranking.best_first[: self.depth], ranking.best_first[self.depth :]
        (drawn,) = self.reader.rank([query], [ranking.vectors(read)])
        scores = np.empty(len(ranking.scores))
        scores[np.concatenate([read[drawn.order], others])] = 1 / np.arange(1, len(scores) + 1)
        return Reread(scores, read, None, np.zeros(0, np.int64), time.perf_counter() - begin, 0, out_of_time=False)


Rereader = Cascade | TeacherReading | ListwiseReading
"""Reorders the student's ranking, by a teacher's scores of some of the passages or by what a reader draws."""


def judge_passages(judge: Judge, query: str, texts: Sequence[str], task: Task) -> tuple[NDArray[np.float64], int]:
    """The teacher's log-odds [n] of a query with passages, and how many passages it read only in part.

    Raises:
        ModelError: the teacher returned a log-odds value that is not finite.
    """
    judgements = judge.judge([(query, text) for text in texts], task)
    values = np.asarray(judgements.log_odds, np.float64)
    if not np.isfinite(values).all():
        raise ModelError(f"the teacher's log-odds for the query {query!r} are not all finite; check the teacher")
    return values, judgements.num_truncated
