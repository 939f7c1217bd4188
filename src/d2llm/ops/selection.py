"""Deterministic selection of the best scores. Does not import torch, so that BM25 and mining start quickly."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from d2llm.core.errors import ModelError

_SAMPLED = 64  # one of so many values is in the sample that shows which are among the highest
_SAMPLE_MARGIN = 8  # values of the sample that are taken in addition: it is rarely as high as the whole
_BLOCK_NUMBERS = 1 << 23  # inner products in memory at a time: 32 MB of float32; at least those of one query


def check_scores(scores: NDArray[np.floating[Any]], query_id: str | None = None) -> NDArray[np.floating[Any]]:
    """The scores as they are.

    Raises:
        ModelError: some are NaN.
    """
    num_wrong = int(np.isnan(scores).sum())
    if num_wrong:
        of_query = "" if query_id is None else f"query {query_id!r}: "
        raise ModelError(
            f"{of_query}{num_wrong} of {len(scores)} scores are NaN and cannot be ranked; check the student"
        )
    return scores


def top_rows(
    scores: NDArray[np.floating[Any]], top_k: int, ids_of: Callable[[NDArray[np.int64]], Sequence[str]] | None
) -> NDArray[np.int64]:
    """Rows of the ``top_k`` highest scores, best first; equal scores in the order of their ids.

    The result is a prefix of the result for any larger ``top_k``. Cost O(n) for the selection plus O(k log k) for the
    sort (ties at the border: O(ties log k)), so n may be a whole corpus.

    Args:
        scores: [n], no NaN; infinities are allowed.
        top_k: how many, at least 0; all rows if it is at least n.
        ids_of: returns the ids of some rows; called at most once, for those whose score is not unique among the best.
            None leaves equal scores in row order.

    Returns:
        [min(top_k, n)] row numbers.
    """
    top_k = min(top_k, len(scores))
    if top_k == 0:
        return np.zeros(0, np.int64)
    border = nth_highest(scores, top_k)
    rows = np.flatnonzero(scores >= border).astype(np.int64)
    rows = rows[np.argsort(-scores[rows], kind="stable")]
    ordered = scores[rows]
    follows = np.concatenate(([False], ordered[1:] == ordered[:-1], [False]))
    tied = np.flatnonzero(follows[1:] | follows[:-1])
    if ids_of is not None and len(tied):
        ids, levels = ids_of(rows[tied]), (-ordered[tied]).tolist()
        # Of the rows tied at the border, which may be the whole corpus, only those with the smallest ids still fit.
        num_fitting = int(np.searchsorted(tied, top_k))
        by_id = heapq.nsmallest(num_fitting, range(len(tied)), key=lambda index: (levels[index], ids[index]))
        rows[tied[:num_fitting]] = rows[tied[by_id]]
    return rows[:top_k]


def nth_highest(values: NDArray[np.floating[Any]], n: int) -> np.floating[Any]:
    """The ``n``-th highest of the values [n], counted from 1; no NaN.

    Of many values, only those are sorted that a sample shows to be among the highest.
    """
    sample = values[::_SAMPLED]
    index = len(sample) - _SAMPLE_MARGIN - 2 * n // _SAMPLED
    if index > 0:
        highest = values[values >= np.partition(sample, index)[index]]
        values = highest if len(highest) >= n else values
    index = len(values) - n
    return np.partition(values, index)[index]


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
        order = np.argpartition(-bounds[left], size - 1)
        part = left[order[:size]]
        yield part[np.argsort(-bounds[part], kind="stable")]
        left = left[order[size:]]
        size *= 2


def nearest_rows(
    queries: NDArray[np.float32],
    passages: NDArray[np.float32],
    top_k: int,
    ids: Sequence[str] | None = None,
    *,
    advance: Callable[[int], object] | None = None,
) -> list[NDArray[np.int64]]:
    """The rows of the passages [n, d] with the largest inner products with each query [q, d], best first; exact.

    Ties are ordered by ``ids``; None leaves them in row order. ``advance`` is called with the number of finished
    queries.
    """
    num_queries = max(1, _BLOCK_NUMBERS // max(1, len(passages)))
    ids_of = None if ids is None else partial(ids_at, ids)
    rows: list[NDArray[np.int64]] = []
    for start in range(0, len(queries), num_queries):
        scores = queries[start : start + num_queries] @ passages.T
        rows += [top_rows(query_scores, top_k, ids_of) for query_scores in scores]
        if advance is not None:
            advance(len(scores))
    return rows


def ids_at(ids: Sequence[str], rows: NDArray[np.int64]) -> list[str]:
    """The ids of some rows, from ids in row order; pass ``partial(ids_at, ids)`` to ``top_rows`` as ``ids_of``."""
    listed: list[int] = rows.tolist()
    return [ids[row] for row in listed]


def ranges(starts: NDArray[np.int64], sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """The concatenation of the ranges [start, start + size)."""
    before = np.cumsum(sizes) - sizes
    return np.repeat(starts - before, sizes) + np.arange(int(sizes.sum()))
