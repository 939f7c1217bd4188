"""Scores of an index's rows for one query: from stored projections (W_p b) if there are any, else from vectors."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from d2llm.core.types import Task
from d2llm.retrieval.protocols import BoundedStudent, ProjectingStudent, VectorStudent
from d2llm.retrieval.row_evidence import RowEvidence
from d2llm.store.projections import StoredProjections
from d2llm.store.view import PassageView

_SCORED_AT_ONCE = 8_192  # rows: their vectors and projections are in memory together


class RowScorer:
    """Scores rows of ``view`` for one query, and adds its ``evidence``, if any.

    ``prepared`` is the student's scorer for the query, or None if the student has no ``prepare``. It makes no
    difference to a score whether a projection was stored or is computed now; without projections, scores differ by
    their rounding.
    """

    def __init__(
        self,
        view: PassageView,
        student: VectorStudent,
        query_vector: NDArray[np.float32],
        task: Task,
        evidence: RowEvidence | None = None,
    ) -> None:
        self._view = view
        self._student = student
        self._query_vector = query_vector
        self._task: Task = task
        self.evidence = evidence
        self.prepared = student.prepare(query_vector, task) if isinstance(student, BoundedStudent) else None
        self._stored: StoredProjections | None = None
        is_needed = self.prepared is not None and (self.prepared.reach > 0 or not student.has_anchor)
        if is_needed and isinstance(student, ProjectingStudent) and student.can_project:
            self._stored = view.projections

    def __call__(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Final logits [n] of the query with the passages at some rows [n]."""
        if len(rows) > _SCORED_AT_ONCE:
            starts = range(0, len(rows), _SCORED_AT_ONCE)
            return np.concatenate([self(rows[start : start + _SCORED_AT_ONCE]) for start in starts])
        scores = self._vector_scores(rows)
        return scores if self.evidence is None else scores + self.evidence(rows)

    def _vector_scores(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        if self.prepared is None:
            return self._student.score(self._query_vector, self._view.vectors(rows), self._task)
        projections = self._projections(rows)
        is_read = projections is None or self.prepared.anchor_query is not None
        return self.prepared(self._view.vectors(rows) if is_read else None, projections)

    def change(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """The interaction as a share of its reach, [n] in [-1, 1]; only if there is ``prepared``."""
        assert self.prepared is not None
        projections = self._projections(rows)
        return self.prepared.change(self._view.vectors(rows) if projections is None else None, projections)

    def _projections(self, rows: NDArray[np.int64]) -> Tensor | None:
        """Projections of some rows [n, hidden]; those not in the file are computed, with the file's rounding."""
        stored = self._stored
        if stored is None:
            return None
        is_stored = rows < stored.num_rows
        if is_stored.all():
            return stored.read(rows)
        assert isinstance(self._student, ProjectingStudent)
        projections = torch.empty(len(rows), stored.width, dtype=torch.bfloat16)
        projections[torch.from_numpy(is_stored)] = stored.read(rows[is_stored])
        later = self._student.project_passages(self._view.vectors(rows[~is_stored]))
        projections[torch.from_numpy(~is_stored)] = later
        return projections
