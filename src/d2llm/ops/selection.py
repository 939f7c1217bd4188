"""Picking the best of many scores, always in the same order."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray


def top_rows(scores: NDArray[np.float32], top_k: int, id_of: Callable[[int], str]) -> NDArray[np.int64]:
    """Rows of the ``top_k`` highest scores, best first; equal scores in the order of their ids.

    Args:
        scores: [n], finite.
        top_k: how many; all rows when it is at least n.
        id_of: the id of a row; asked only for rows whose score is not unique among the best.

    Returns:
        [min(top_k, n)] row numbers.
    """
    if top_k < len(scores):
        threshold = np.partition(scores, len(scores) - top_k)[len(scores) - top_k]
        rows = np.flatnonzero(scores >= threshold)
    else:
        rows = np.arange(len(scores))
    rows = rows[np.argsort(-scores[rows], kind="stable")].astype(np.int64)
    ordered = scores[rows]
    edges = [0, *(np.flatnonzero(ordered[1:] != ordered[:-1]) + 1).tolist(), len(rows)]
    for start, end in pairwise(edges):
        if end - start > 1:
            rows[start:end] = sorted(rows[start:end].tolist(), key=id_of)
    return rows[:top_k]
