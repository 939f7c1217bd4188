"""Weights of a sum of scores, fitted to judgements: a learned alternative to rank fusion.

    minimise over w >= 0   -mean over lists of  sum_j y_j log softmax(X w)_j

X holds the scores of a list's passages, one column per score feature, and y the judgements, summing to 1. The loss
is convex in w, so the solution is the global minimum for any starting point. Source: Cao et al., "Learning to Rank:
From Pairwise Approach to Listwise Approach", ICML 2007 (ListNet, top one), for a linear scorer.

The weights of some columns may depend on the query: they are then multiplied by exp(a s), where s are statistics of
the list's query, and a is fitted together with w, starting from the best w without it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from d2llm.core.errors import InputError

Lists = Sequence[tuple[NDArray[np.floating[Any]], NDArray[np.floating[Any]]]]
"""For each query, the scores [passages, terms] of some passages and their grades [passages], at least 0."""

_FACTOR_PRICE = 1.0
_MAX_EXPONENT = 30.0  # a step of the search for the minimum may try more, which would overflow


class ScaledWeights(NamedTuple):
    """Weights [terms] of a sum whose scaled columns are multiplied by exp(offset + slopes [k] * statistics [k])."""

    weights: NDArray[np.float64]
    slopes: NDArray[np.float64]
    offset: float


def fit_weights(lists: Lists, *, ridge: float = 1e-4) -> NDArray[np.float64]:
    """Non-negative weights [terms] of a sum of scores.

    Args:
        lists: those without a grade above 0 carry no information and are left out.
        ridge: penalty on the squared weights of columns scaled to a mean square of 1. It makes the solution unique
            for redundant columns and keeps the weights finite if the judgements can be fitted exactly.

    Raises:
        InputError: no list has a grade above 0, or a score is not finite.
    """
    return _Fit(lists, ridge).weights()


def fit_scaled_weights(
    lists: Lists, statistics: NDArray[np.floating[Any]], scaled: NDArray[np.bool_], *, ridge: float = 1e-4
) -> ScaledWeights:
    """Non-negative weights of a sum, and how the query scales those of some columns.

    Args:
        lists: as for ``fit_weights``.
        statistics: [lists, k] statistics of each list's query.
        scaled: [terms] true for columns whose weights depend on the query.
        ridge: as for ``fit_weights``. The slopes of the standardised statistics are penalised too, with the weight of
            one list.

    Raises:
        InputError: no list has a grade above 0, or a score or a statistic is not finite.
    """
    if not np.isfinite(statistics).all():
        raise InputError("some statistics of queries are not finite, so a factor cannot be fitted")
    return _Fit(lists, ridge).scaled(statistics.astype(np.float64), scaled)


def sum_weights(lists: Lists) -> NDArray[np.float64]:
    """``fit_weights`` scaled so that the first weight is 1: the other columns are added to the first.

    Raises:
        InputError: no list has a relevant passage.
    """
    weights = fit_weights(lists)
    if not weights.any():  # no score is informative
        return np.eye(1, len(weights))[0]
    return beside_first(weights)


def beside_first(weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """The weights scaled so that the first is 1; it is taken as at least a thousandth of the largest."""
    return weights / max(float(weights[0]), 1e-3 * float(weights.max()))


class _Fit:
    """All lists concatenated, with their columns scaled to a mean square of 1."""

    def __init__(self, lists: Lists, ridge: float) -> None:
        self.kept = [index for index, (_, grades) in enumerate(lists) if len(grades) and grades.max() > 0]
        if not self.kept:
            raise InputError("no list has a relevant passage, so weights cannot be fitted; give judged queries")
        judged = [lists[index] for index in self.kept]
        scores = np.concatenate([scores for scores, _ in judged]).astype(np.float64)
        if not np.isfinite(scores).all():
            raise InputError("some scores are not finite, so weights cannot be fitted; check the student")
        self.sizes = np.array([len(grades) for _, grades in judged])
        self.starts = np.cumsum(self.sizes) - self.sizes
        self.targets = np.concatenate([grades / grades.sum() for _, grades in judged]).astype(np.float64)
        self.scale = np.sqrt((scores**2).mean(axis=0))
        self.is_empty = self.scale == 0
        self.scale[self.is_empty] = 1.0
        self.scores = scores / self.scale
        self.ridge = ridge

    def weights(self) -> NDArray[np.float64]:
        def loss(weights: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
            value, pull = self._loss(self.scores @ weights)
            return value + self.ridge * float(weights @ weights), pull @ self.scores + 2 * self.ridge * weights

        start = np.ones(self.scores.shape[1])
        return self._in_own_units(_minimum(loss, start, num_positive=len(start)))

    def scaled(self, statistics: NDArray[np.float64], is_scaled: NDArray[np.bool_]) -> ScaledWeights:
        observed = statistics[self.kept]
        centre, spread = observed.mean(axis=0), observed.std(axis=0)
        spread[spread == 0] = np.inf  # a constant statistic carries no information
        row_statistics = np.repeat((observed - centre) / spread, self.sizes, axis=0)
        num_terms, price = self.scores.shape[1], _FACTOR_PRICE / len(self.kept)

        def loss(parameters: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
            weights, slopes = parameters[:num_terms], parameters[num_terms:]
            exponents = np.clip(row_statistics @ slopes, -_MAX_EXPONENT, _MAX_EXPONENT)
            factor = np.where(is_scaled, np.exp(exponents)[:, None], 1.0)
            columns = self.scores * factor
            value, pull = self._loss(columns @ weights)
            scaled_sum = columns[:, is_scaled] @ weights[is_scaled]
            value += self.ridge * float(weights @ weights) + price * float(slopes @ slopes)
            weight_gradient = pull @ columns + 2 * self.ridge * weights
            return value, np.concatenate([weight_gradient, (pull * scaled_sum) @ row_statistics + 2 * price * slopes])

        start = np.concatenate([self.weights() * self.scale, np.zeros(row_statistics.shape[1])])
        solution = _minimum(loss, start, num_positive=num_terms)
        slopes = solution[num_terms:] / spread
        return ScaledWeights(self._in_own_units(solution[:num_terms]), slopes, -float(slopes @ centre))

    def _loss(self, logits: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        """The mean loss of the lists and its gradient with respect to each row's logit."""
        logits = logits - np.repeat(np.maximum.reduceat(logits, self.starts), self.sizes)
        odds = np.exp(logits)
        sums = np.add.reduceat(odds, self.starts)
        num = len(self.sizes)
        value = float(np.log(sums).sum() - self.targets @ logits) / num
        return value, (odds / np.repeat(sums, self.sizes) - self.targets) / num

    def _in_own_units(self, weights: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.where(self.is_empty, 0.0, weights / self.scale)  # a column of zeros gets weight 0


def _minimum(
    loss: Callable[[NDArray[np.float64]], tuple[float, NDArray[np.float64]]],
    start: NDArray[np.float64],
    *,
    num_positive: int,
) -> NDArray[np.float64]:
    """Where a loss, given with its gradient, is least; the first ``num_positive`` parameters are at least 0."""
    from scipy.optimize import minimize  # slow to import

    bounds = [(0.0 if index < num_positive else None, None) for index in range(len(start))]
    return np.asarray(minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds).x, np.float64)
