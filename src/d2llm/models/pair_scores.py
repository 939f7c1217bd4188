"""Scores of (query, passage) pairs from the vectors of their texts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from d2llm.core.types import Task
from d2llm.models.protocols import VectorStudent


def score_by_query(
    student: VectorStudent,
    pairs: Sequence[tuple[str, str]],
    queries: Mapping[str, NDArray[np.float32]],
    passages: Mapping[str, NDArray[np.float32]],
    task: Task,
    advance: Callable[[int], None] | None = None,
) -> NDArray[np.float32]:
    """Logits [n] of pairs, all of a query's pairs at once, from the vector [dim] of each query and of each passage.

    ``advance`` is called with the number of pairs of each query.
    """
    rows_of_query: dict[str, list[int]] = {}
    for index, (query, _) in enumerate(pairs):
        rows_of_query.setdefault(query, []).append(index)
    scores = np.empty(len(pairs), np.float32)
    for query, positions in rows_of_query.items():
        vectors = np.stack([passages[pairs[index][1]] for index in positions])
        scores[positions] = student.score(queries[query], vectors, task)
        if advance is not None:
            advance(len(positions))
    return scores
