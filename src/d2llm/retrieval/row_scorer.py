"""Scores of an index's rows for one query: from their vectors and, if it counts, the score features."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from d2llm.core.types import Task
from d2llm.models.plain_student import PairScorer
from d2llm.retrieval.protocols import VectorStudent
from d2llm.retrieval.row_features import RowFeatures
from d2llm.store.view import PassageView

_SCORED_AT_ONCE = 8_192  # rows: their vectors are in memory together


class RowScorer:
    """Scores rows of ``view`` for one query, and adds its ``score_features``, if any.

    ``prepared`` is the student's scorer for the query, made now unless it is given; None if its score has no bound.
    """

    def __init__(
        self,
        view: PassageView,
        student: VectorStudent,
        query_vector: NDArray[np.float32],
        task: Task,
        score_features: RowFeatures | None = None,
        prepared: PairScorer | None = None,
    ) -> None:
        self._view = view
        self._student = student
        self._query_vector = query_vector
        self._task: Task = task
        self.score_features = score_features
        self.prepared = prepared or student.prepare(query_vector, task)

    def __call__(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Final logits [n] of the query with the passages at some rows [n]."""
        if len(rows) > _SCORED_AT_ONCE:
            starts = range(0, len(rows), _SCORED_AT_ONCE)
            return np.concatenate([self(rows[start : start + _SCORED_AT_ONCE]) for start in starts])
        vectors = self._view.vectors(rows)
        if self.prepared is None:
            scores = self._student.score(self._query_vector, vectors, self._task)
        else:
            scores = self.prepared(vectors)
        return scores if self.score_features is None else scores + self.score_features(rows)

    def change(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """The interaction as a fraction of its bound, [n] in [-1, 1]; only if there is ``prepared``."""
        assert self.prepared is not None
        return self.prepared.change(self._view.vectors(rows))
