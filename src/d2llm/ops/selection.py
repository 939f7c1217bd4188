"""Picking the best of many scores, always in the same order. Needs no torch, so that BM25 and mining start quickly."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray


def top_rows(scores: NDArray[np.floating[Any]], top_k: int, id_of: Callable[[int], str]) -> NDArray[np.int64]:
    """Rows of the ``top_k`` highest scores, best first; equal scores in the order of their ids.

    The result is a prefix of the result for any larger ``top_k``. Cost O(n) for the selection plus O(k log k) for the
    order (ties at the border: O(ties log k)), so n may be a whole corpus.

    Args:
        scores: [n], no NaN; infinities are allowed.
        top_k: how many, at least 0; all rows when it is at least n.
        id_of: the id of a row; asked only for rows whose score is not unique among the best.

    Returns:
        [min(top_k, n)] row numbers.
    """
    top_k = min(top_k, len(scores))
    if top_k == 0:
        return np.zeros(0, np.int64)
    border = np.partition(scores, len(scores) - top_k)[len(scores) - top_k]  # the lowest score that is still chosen
    rows = np.flatnonzero(scores >= border).astype(np.int64)
    above, level = rows[scores[rows] > border], rows[scores[rows] == border]
    above = above[np.argsort(-scores[above], kind="stable")]
    ordered = scores[above]
    edges = [0, *(np.flatnonzero(ordered[1:] != ordered[:-1]) + 1).tolist(), len(above)]
    for start, end in pairwise(edges):
        if end - start > 1:
            above[start:end] = sorted(above[start:end].tolist(), key=id_of)
    if len(level) > 1:
        # Of those level with the border, which may be the whole corpus, only the smallest ids still fit.
        level = np.array(heapq.nsmallest(top_k - len(above), level.tolist(), key=id_of), np.int64)
    return np.concatenate((above, level))
