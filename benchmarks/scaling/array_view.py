"""Vectors in memory with the interface through which ``certified_top_k`` reads an index."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from d2llm.core.types import Certificate
from d2llm.models.protocols import VectorStudent
from d2llm.ops.selection import top_rows
from d2llm.retrieval.segments import CertifiedRows
from d2llm.store.view import PassageView

_BLOCK_ROWS = 8_192


class ArrayView:
    """Vectors [n, dim]; the id of a row is its number."""

    live = None

    def __init__(self, vectors: NDArray[np.float32]) -> None:
        self._vectors, self.capacity = vectors, len(vectors)

    def ids(self, rows: NDArray[np.int64]) -> list[str]:
        return [f"{row:09}" for row in rows.tolist()]

    def vectors(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        return self._vectors[rows]

    def block(self, start: int, end: int) -> NDArray[np.float32]:
        return self._vectors[start:end]

    def mask(self, allowed: NDArray[np.bool_] | None) -> NDArray[np.bool_] | None:
        return allowed

    def live_rows(self, allowed: NDArray[np.bool_] | None = None) -> NDArray[np.int64]:
        return np.arange(self.capacity) if allowed is None else np.flatnonzero(allowed)

    def scan(self, query: NDArray[np.float32], top_k: int, allowed: NDArray[np.bool_] | None = None) -> CertifiedRows:
        assert allowed is None
        scores = self._vectors @ query
        rows = top_rows(scores, top_k, self.ids)
        return CertifiedRows(rows, scores[rows], None, Certificate(0, 0, 0, 0, 0))


def passage_bounds(view: ArrayView | PassageView, student: VectorStudent) -> NDArray[np.float32]:
    """r_p of every row, float32 [capacity]."""
    bounds = np.empty(view.capacity, np.float32)
    for start in range(0, view.capacity, _BLOCK_ROWS):
        end = min(start + _BLOCK_ROWS, view.capacity)
        bounds[start:end] = student.passage_bound(view.block(start, end))
    return bounds
