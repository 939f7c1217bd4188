"""How much of a corpus must be rescored before a ranking is certain.

A passage's final score is at most its upper bound (anchor + B r_q r_p, ``models.interaction``). So passages can be
rescored from the highest bound down until the k-th best final score so far reaches the highest remaining bound: none
of the remaining passages can then be among the first k.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from d2llm.core.errors import InputError


def num_rescored(
    upper_bounds: Float[np.ndarray, " passages"], final_scores: Float[np.ndarray, " passages"], top_k: int
) -> int:
    """How many passages are rescored, from the highest bound down, before the first ``top_k`` are certain.

    Args:
        upper_bounds: upper bound of each passage's final score.
        final_scores: final score of each passage, at most its bound.
        top_k: length of the ranking, at least 1.

    Raises:
        InputError: ``top_k`` is below 1, or a final score is above its bound.
    """
    if top_k < 1:
        raise InputError(f"top_k is {top_k}, but a ranking has at least one place")
    if (final_scores > upper_bounds).any():
        raise InputError("a final score is above its upper bound, so nothing can be concluded from the bounds")
    best: list[float] = []  # a heap of the top_k best final scores so far
    order = np.argsort(-upper_bounds, kind="stable")
    for place, row in enumerate(order.tolist()):
        if len(best) == top_k and best[0] >= upper_bounds[row]:
            return place
        if len(best) < top_k:
            heapq.heappush(best, float(final_scores[row]))
        else:
            heapq.heappushpop(best, float(final_scores[row]))
    return len(order)


def from_the_highest(bounds: NDArray[np.float32], first: int) -> Iterator[NDArray[np.int64]]:
    """All rows from the highest bound to the lowest, in sorted parts: ``first`` rows, then twice as many each time.

    A caller that stops early pays for a selection in O(n) and for sorting the rows it took, not for sorting all.

    Args:
        bounds: [n], no NaN; infinities are allowed.
        first: rows of the first part, at least 1.
    """
    left = np.arange(len(bounds), dtype=np.int64)
    size = first
    while len(left):
        size = min(size, len(left))
        places = np.argpartition(-bounds[left], size - 1)
        part = left[places[:size]]
        yield part[np.argsort(-bounds[part], kind="stable")]
        left = left[places[size:]]
        size *= 2
