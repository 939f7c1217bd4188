"""A teacher reads the student's top passages, whether the student is sure of them or not, and reorders them."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from d2llm.models.teachers.pair_teacher import PairTeacher, ranks_lists, score_passages
from d2llm.ops.rereading import StudentError
from d2llm.retrieval.reranker import Candidates, OpenReranker, Reranked, TeacherReranker


class TeacherReading(TeacherReranker, kind="teacher"):
    """A teacher reads the first passages and reorders them.

    At least as many as are shown are read, if there is time: after ``max_ms`` no new batch is started. A teacher that
    ranks lists reads all of them in one batch. Passages that it did not read follow in the student's order.
    """

    needs = frozenset({"live_teacher"})
    measured = (
        "squad-sent: the first 8 read give .853, the first 20 .862, the student alone .812 ([120 dev "
        "queries](log/2026-11.md#2026-11-20-which-passages-a-teacher-should-read-again))"
    )
    gives_log_odds: ClassVar[bool] = True

    def with_teacher(self, teacher: PairTeacher, error: StudentError | None = None) -> OpenTeacherReading:
        """Give it a teacher; it needs no ``error``."""
        del error
        return OpenTeacherReading(self, teacher)


@dataclass(frozen=True)
class OpenTeacherReading(OpenReranker):
    """The first passages, read by a teacher."""

    settings: TeacherReading
    teacher: PairTeacher

    def rerank(self, query: str, candidates: Candidates) -> Reranked:
        """The teacher's log-odds of the passages that it read, and shifted scores of the others below them.

        Raises:
            ModelError: the teacher returned a log-odds value that is not finite.
        """
        begin, limit, max_ms = time.perf_counter(), self.settings.num_passages, self.settings.max_ms
        to_read = candidates.best_first[: None if limit is None else max(limit, candidates.top_k)]
        teacher_log_odds, num_truncated = np.zeros(0), 0
        size = max(1, len(to_read)) if ranks_lists(self.teacher) else self.settings.batch_passages
        for start in range(0, len(to_read), size):
            if start and max_ms is not None and time.perf_counter() - begin > max_ms / 1e3:
                break
            texts = candidates.texts(to_read[start : start + size])
            values, num_cut = score_passages(self.teacher, query, texts, candidates.task)
            teacher_log_odds, num_truncated = np.append(teacher_log_odds, values), num_truncated + num_cut
        read = to_read[: len(teacher_log_odds)]
        return Reranked(
            candidates.with_scores(read, teacher_log_odds),
            read,
            teacher_log_odds,
            num_truncated=num_truncated,
            out_of_time=len(read) < len(to_read),
        )
