"""A cascade: the student ranks, and the teacher reads only passages that the student is unsure of, on a budget."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from d2llm.core.errors import InputError
from d2llm.core.types import Task
from d2llm.models.protocols import SearchStudent
from d2llm.models.teachers.pair_teacher import RANKING_TEACHER, PairTeacher, ranks_lists, score_passages
from d2llm.ops.rereading import StudentError, expected_log_odds, on_one_scale, reading_gains
from d2llm.retrieval.calibrate import read_error
from d2llm.retrieval.feature_weights import weights_for
from d2llm.retrieval.reranker import Candidates, OpenReranker, Reranked, TeacherReranker
from d2llm.retrieval.segments import IndexView

_DECAY = 0.5  # of the running mean of seconds per pair, at each batch: texts differ, and the first call is slow


class Cascade(TeacherReranker, kind="cascade"):
    """A teacher reads the passages that the student is unsure of, on a budget.

    The student is unsure of a passage if reading it is expected to improve the DCG of the top results by at least
    ``min_gain``: its score margin to others is small compared with the student's error, and the places matter
    (``ops.rereading``). Each batch is chosen anew.

    The teacher starts no batch that would not finish within ``max_ms``, according to the measured time per pair; at
    most the last batch is late. While that time is unknown or too long, a query's first batch is a single passage.
    """

    needs = frozenset({"live_teacher"})
    costs = "`d2llm index INDEX calibrate` once"
    measured = (
        "squad-sent: 6.0 passages read on average give .847, the first 6 .841, the student alone .812 ([120 dev "
        "queries](log/2026-11.md#2026-11-20-which-passages-a-teacher-should-read-again))"
    )
    gives_log_odds: ClassVar[bool] = True
    score_name: ClassVar[str] = "expected log-odds"
    uses_error: ClassVar[bool] = True

    depth: int = Field(default=50, ge=1)
    """How many of the student's top passages may be read."""
    min_gain: float = Field(default=0.001, ge=0)
    """Minimum expected gain of reading a passage, in DCG of probabilities."""

    def with_teacher(self, teacher: PairTeacher, error: StudentError | None = None) -> OpenCascade:
        """Give it a teacher.

        Raises:
            InputError: the teacher ranks lists (``ranks_lists``): its log-odds cannot be compared with a student's, nor
                from batch to batch.
        """
        if ranks_lists(teacher):
            raise InputError(f"{RANKING_TEACHER}; or name the reranker teacher in place of {self.kind}")
        return OpenCascade(self, teacher, error)


@dataclass
class _Pace:
    """The time that the teacher takes for a pair, measured from query to query."""

    seconds: float | None = None


@dataclass(frozen=True)
class OpenCascade(OpenReranker):
    """A cascade with its teacher and the student's error against it."""

    settings: Cascade
    teacher: PairTeacher
    error: StudentError | None = None
    _pace: _Pace = field(default_factory=_Pace)

    def for_index(self, index: IndexView, student: SearchStudent, task: Task) -> OpenCascade:
        """The cascade with the error that is stored with an index.

        Raises:
            InputError: the error has not been measured.
        """
        if self.error is not None:
            return self
        return replace(self, error=read_error(index.folder, self.teacher, task, weights_for(index, student, task)))

    def rerank(self, query: str, candidates: Candidates) -> Reranked:
        """Log-odds: the teacher's of passages that it read, else those of the expected probability.

        Raises:
            InputError: the error is not known.
            ModelError: the teacher returned a log-odds value that is not finite.
        """
        if self.error is None:
            raise InputError("a cascade needs the student's error: give it, or search an index that stores it")
        begin = time.perf_counter()
        scores, limit = candidates.scores, self.settings.num_passages
        unread = np.zeros(len(scores), np.bool_)
        unread[candidates.best_first[: self.settings.depth]] = True
        read = np.zeros(0, np.int64)
        teacher_log_odds = np.zeros(0)
        num_truncated = 0
        unsure = order = self._unsure(self.error, candidates, read, teacher_log_odds, unread)
        while len(batch := order[: self._room(len(read), time.perf_counter() - begin)]):
            values, num_cut = self._read(query, candidates.texts(batch), candidates.task)
            read = np.append(read, batch)
            teacher_log_odds = np.append(teacher_log_odds, values)
            num_truncated += num_cut
            unread[batch] = False
            order = self._unsure(self.error, candidates, read, teacher_log_odds, unread)
        out_of_time = len(order) > 0 and (limit is None or len(read) < limit)
        unread[:] = True
        unread[read] = False
        now = expected_log_odds(on_one_scale(scores, read, teacher_log_odds, self.error), unread, self.error.sigma)
        return Reranked(now, read, teacher_log_odds, unsure, num_truncated, out_of_time)

    def _unsure(
        self,
        error: StudentError,
        candidates: Candidates,
        read: NDArray[np.int64],
        teacher_log_odds: NDArray[np.float64],
        unread: NDArray[np.bool_],
    ) -> NDArray[np.int64]:
        """Places of the passages that are worth reading, highest expected gain first."""
        deep = candidates.best_first[: self.settings.depth]
        log_odds = on_one_scale(candidates.scores, read, teacher_log_odds, error)
        gains = reading_gains(log_odds[deep], unread[deep], error.sigma, candidates.top_k)
        best = np.argsort(-gains, kind="stable")
        return deep[best[(gains[best] >= self.settings.min_gain) & unread[deep][best]]]

    def _room(self, num_read: int, seconds: float) -> int:
        """Maximum number of passages in the next batch."""
        room = self.settings.batch_passages
        if self.settings.num_passages is not None:
            room = min(room, self.settings.num_passages - num_read)
        if self.settings.max_ms is not None:
            left = self.settings.max_ms / 1e3 - seconds
            fitting = int(left / self._pace.seconds) if self._pace.seconds else 0
            # Read at least one passage; otherwise the time would never be measured again after one slow pair.
            room = 0 if left <= 0 else min(room, max(fitting, int(num_read == 0)))
        return room

    def _read(self, query: str, texts: Sequence[str], task: Task) -> tuple[NDArray[np.float64], int]:
        begin = time.perf_counter()
        values, num_cut = score_passages(self.teacher, query, texts, task)
        seconds, before = (time.perf_counter() - begin) / len(texts), self._pace.seconds
        self._pace.seconds = seconds if before is None else _DECAY * before + (1 - _DECAY) * seconds
        return values, num_cut
