"""Weights of a sum of scores, fitted to judgements: the learned counterpart of rank fusion.

    minimise over w >= 0   -mean over lists of  sum_j y_j log softmax(X w)_j

X holds the scores of a list's passages, one column for each kind of evidence, y the judgements, summing to 1. The loss
is convex in w, so what is found is the best there is, whatever the start. Source: Cao et al., "Learning to Rank: From
Pairwise Approach to Listwise Approach", ICML 2007 (ListNet, top one), for a linear scorer.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

from d2llm.core.errors import InputError


def fit_weights(
    lists: Sequence[tuple[NDArray[np.floating], NDArray[np.floating]]], *, ridge: float = 1e-4
) -> NDArray[np.float64]:
    """Non-negative weights [terms] of a sum of scores.

    Args:
        lists: of each query the scores [passages, terms] of some passages and their grades [passages], at least 0;
            lists without a grade above 0 teach nothing and are left out.
        ridge: price on the squared weights, of columns scaled to a mean square of 1: it chooses among columns that say
            the same, and keeps weights finite where the judgements are met exactly.

    Raises:
        InputError: no list has a grade above 0, or a score is not finite.
    """
    judged = [(scores, grades) for scores, grades in lists if len(grades) and grades.max() > 0]
    if not judged:
        raise InputError("no list has a relevant passage, so weights cannot be fitted; give judged queries")
    scores = np.concatenate([found for found, _ in judged]).astype(np.float64)
    if not np.isfinite(scores).all():
        raise InputError("some scores are not finite, so weights cannot be fitted; check the student")
    sizes = np.array([len(grades) for _, grades in judged])
    starts = np.cumsum(sizes) - sizes
    targets = np.concatenate([grades / grades.sum() for _, grades in judged]).astype(np.float64)
    scale = np.sqrt((scores**2).mean(axis=0))
    is_empty = scale == 0
    scale[is_empty] = 1.0
    scores /= scale
    wanted = targets @ scores

    def loss(weights: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        logits = scores @ weights
        logits -= np.repeat(np.maximum.reduceat(logits, starts), sizes)
        odds = np.exp(logits)
        sums = np.add.reduceat(odds, starts)
        probabilities = odds / np.repeat(sums, sizes)
        value = (np.log(sums).sum() - targets @ logits) / len(judged) + ridge * weights @ weights
        slope = (probabilities @ scores - wanted) / len(judged) + 2 * ridge * weights
        return float(value), slope

    start = np.full(scores.shape[1], 1.0)
    found = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=[(0, None)] * len(start))
    return np.where(is_empty, 0.0, np.asarray(found.x, np.float64) / scale)  # what is 0 everywhere is worth nothing
