"""Selecting diverse results from a ranking: near duplicates left out, then maximal marginal relevance (MMR)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

_SAME = 1e-6  # rounding of the cosine of a vector with itself


SaysTheSame = Callable[[int, int], bool]
"""Whether a result (its index) says nothing that a better one does not; asked if their vectors are alike."""


class DiverseResults(NamedTuple):
    """Indices int64 [k] of the selected results in the ranking, in their new order, and how many were near duplicates.

    ``num_near_duplicates`` counts those that would have been considered otherwise: the results before the last one
    that was selected or, with MMR, all of them.
    """

    indices: NDArray[np.int64]
    num_near_duplicates: int


def select_diverse(
    scores: NDArray[np.floating[Any]],
    vectors: NDArray[np.floating[Any]],
    top_k: int,
    *,
    mmr: float | None = None,
    near_duplicates: float | None = None,
    says_the_same: SaysTheSame | None = None,
) -> DiverseResults:
    """Select ``top_k`` results of a ranking: near duplicates of better ones are left out, then MMR chooses and orders.

    Args:
        scores: [n] finite scores of the ranking, best first.
        vectors: [n, dim] vectors of the results; their lengths do not matter.
        top_k: how many results to select, at least 0; fewer are selected if fewer are left.
        mmr: weight of the score in MMR, 0 to 1; None keeps the order of the ranking.
        near_duplicates: a result is left out if the cosine of its vector with that of a better result that is kept is
            at least this; None leaves out none.
        says_the_same: also required of a near duplicate and that better result; None: vectors alone decide.
    """
    directions = _unit(vectors)
    indices = np.arange(len(scores), dtype=np.int64)
    num_left_out = 0
    if near_duplicates is not None:
        limit = top_k if mmr is None else len(scores)
        indices, num_left_out = _distinct(directions, near_duplicates, limit, says_the_same)
    if mmr is not None:
        indices = indices[maximal_marginal_relevance(scores[indices], directions[indices], mmr, top_k)]
    return DiverseResults(indices[:top_k], num_left_out)


def maximal_marginal_relevance(
    scores: NDArray[np.floating[Any]], directions: NDArray[np.floating[Any]], weight: float, top_k: int
) -> NDArray[np.int64]:
    """The indices [min(top_k, n)] of the results that MMR chooses, in the order of its choice; ties by index.

    The next result is always the one with the highest weight * s - (1 - weight) * c. s is its score, scaled so that the
    best of all scores is 1 and the lowest 0. c is its highest cosine with a result that is already chosen, 0 for the
    first.

    With weight 1, this is the order of the scores; the best result is always the first.

    Source: Carbonell and Goldstein, "The Use of MMR, Diversity-Based Reranking for Reordering Documents and Producing
    Summaries", SIGIR 1998. The scaling is ours: the score of a student has no natural range, unlike the paper's cosine.

    Args:
        scores: [n] finite scores, best first.
        directions: [n, dim] vectors of length 1 (or 0).
        weight: 0 to 1.
        top_k: how many results to choose, at least 0.
    """
    values = scores.astype(np.float64)
    spread = np.ptp(values) if len(values) else 0.0
    relevance = (values - values.min()) / spread if spread > 0 else np.zeros(len(values))
    nearest = np.zeros(len(values))
    is_left = np.ones(len(values), np.bool_)
    chosen: list[int] = []
    while len(chosen) < min(top_k, len(values)):
        index = int(np.argmax(np.where(is_left, weight * relevance - (1 - weight) * nearest, -np.inf)))
        cosines = directions @ directions[index]
        nearest = np.maximum(nearest, cosines) if chosen else cosines
        is_left[index] = False
        chosen.append(index)
    return np.array(chosen, np.int64)


def _distinct(
    directions: NDArray[np.float64], threshold: float, limit: int, says_the_same: SaysTheSame | None
) -> tuple[NDArray[np.int64], int]:
    """The indices of the first ``limit`` results that are like none kept before, and how many were passed over."""
    kept = np.zeros((min(limit, len(directions)), directions.shape[1]))
    indices: list[int] = []
    num_left_out = 0
    for index, direction in enumerate(directions):
        if len(indices) == len(kept):
            break
        near = np.flatnonzero(kept[: len(indices)] @ direction >= threshold - _SAME).tolist()
        if any(says_the_same is None or says_the_same(index, indices[place]) for place in near):
            num_left_out += 1
            continue
        kept[len(indices)] = direction
        indices.append(index)
    return np.array(indices, np.int64), num_left_out


def _unit(vectors: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """Vectors of length one; a zero vector stays zero, so it is like nothing else."""
    wide = vectors.astype(np.float64)
    lengths = np.linalg.norm(wide, axis=1, keepdims=True)
    return np.divide(wide, np.where(lengths > 0, lengths, 1.0))
