"""Ridge regression over several sets, of which each counts by itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

PENALTIES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
"""Penalties to choose from (``choose_penalty``)."""
NUM_FOLDS = 5


class RidgeSet(NamedTuple):
    """Features [n, dim] and targets [n] or [n, k] of one set; rows of the same ``fold`` [n], 0 to 4, are left out
    together.
    """

    features: NDArray[np.float64]
    targets: NDArray[np.float64]
    folds: NDArray[np.int64]

    def only(self, chosen: NDArray[np.bool_]) -> RidgeSet:
        """Some of the rows."""
        return RidgeSet(self.features[chosen], self.targets[chosen], self.folds[chosen])


def ridge_weights(sets: Sequence[RidgeSet], penalty: float) -> NDArray[np.float64]:
    """The w [dim], or [dim, k], with the least mean over sets of mean (w . x - y)^2, plus penalty v |w|^2.

    x and y are less their set's means, so that what distinguishes sets does not count; v is the mean variance of a
    feature within sets, so that a penalty means the same at every scale.
    """
    return Moments.of(sets).weights(penalty)


class Moments(NamedTuple):
    """What the weights of any penalty need to know of sets: mean products [dim, dim], and those with the targets."""

    products: NDArray[np.float64]
    correlations: NDArray[np.float64]

    @classmethod
    def of(cls, sets: Sequence[RidgeSet]) -> Moments:
        """The moments of sets whose means do not count."""
        dim = sets[0].features.shape[1]
        products, correlations = np.zeros((dim, dim)), np.zeros((dim, *sets[0].targets.shape[1:]))
        for one_set in sets:
            features, targets = (
                one_set.features - one_set.features.mean(axis=0),
                one_set.targets - one_set.targets.mean(axis=0),
            )
            products += features.T @ features / len(targets) / len(sets)
            correlations += features.T @ targets / len(targets) / len(sets)
        return cls(products, correlations)

    def weights(self, penalty: float) -> NDArray[np.float64]:
        """``ridge_weights`` of these sets."""
        dim = len(self.correlations)
        shift = penalty * np.trace(self.products) / dim * np.eye(dim)
        weights = np.linalg.solve(self.products + shift, self.correlations)
        return weights.astype(np.float64, copy=False)


def choose_penalty(
    sets: Sequence[RidgeSet], measure: Callable[[NDArray[np.float64], NDArray[np.float64]], float]
) -> tuple[float, list[float]]:
    """The penalty with the best mean over sets of a measure (predictions [n], targets [n]), and its value for each set.

    Each fifth of the rows is predicted by weights that were fitted without it, less the mean of these predictions.
    """
    without = [Moments.of([one_set.only(one_set.folds != fold) for one_set in sets]) for fold in range(NUM_FOLDS)]
    by_penalty: dict[float, list[float]] = {}
    for penalty in PENALTIES:
        predictions = [np.zeros(len(one_set.targets)) for one_set in sets]
        for fold, moments in enumerate(without):
            weights = moments.weights(penalty)
            for one_set, predicted in zip(sets, predictions, strict=True):
                values = one_set.features[one_set.folds == fold] @ weights
                predicted[one_set.folds == fold] = values - values.mean()
        by_penalty[penalty] = [
            measure(predicted, one_set.targets) for predicted, one_set in zip(predictions, sets, strict=True)
        ]
    best = max(PENALTIES, key=lambda penalty: (np.mean(by_penalty[penalty]), penalty))
    return best, by_penalty[best]


def folds_of(num: int) -> NDArray[np.int64]:
    """The fold of each of ``num`` items in random order."""
    return np.arange(num) % NUM_FOLDS
