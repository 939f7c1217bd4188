"""Which queries a teacher that makes mistakes should label: the sampling of Robust Active Distillation.

Source: Baykal et al., "Robust Active Distillation", ICLR 2023 (arXiv 2210.01213).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_STEPS = 100  # of a search for a number by intervals: to the precision of a float64


def label_gains(probabilities: NDArray[np.float64]) -> float:
    """What a label is worth: 1 minus the margin between the two highest of a student's probabilities [n]; n >= 1."""
    second, first = np.sort(np.append(probabilities, 0.0))[-2:]
    return float(1 - (first - second))


def robust_probabilities(gains: NDArray[np.float64], budget: int, num_wrong: float) -> NDArray[np.float64]:
    """The probability [n] with which each query is to be labelled; they sum to the budget.

    They maximise the sum of probability times gain over the queries that the teacher labels rightly, if it is wrong
    on those ``num_wrong`` where this does most harm. For a budget of 1 that is the paper's theorem: 1 / (gain * H) for
    the k highest gains, where H is the sum of their 1 / gain, and k is where (k - num_wrong) / H is highest. With more,
    none may be above 1: then it is min(1, level / gain), and the level is searched for.

    Args:
        gains: [n] at least 0.
        budget: how many are labelled, at most n.
        num_wrong: on how many of all n queries the teacher is wrong; 0 gives the highest gains.
    """
    order = np.argsort(-gains, kind="stable")
    ordered = np.maximum(gains[order], np.finfo(np.float64).tiny)

    def shares(level: float) -> NDArray[np.float64]:
        """In the order of the gains, until the budget is spent."""
        full = np.minimum(1.0, level / ordered)
        return np.clip(budget - (np.cumsum(full) - full), 0.0, full)

    def value(level: float) -> float:
        return float(shares(level) @ ordered) - num_wrong * level

    low, high = 0.0, float(ordered[0])
    for _ in range(_STEPS):  # the lowest level at which the budget is spent
        middle = (low + high) / 2
        low, high = (low, middle) if shares(middle).sum() >= budget else (middle, high)
    low, high = high, float(ordered[0])
    for _ in range(2 * _STEPS):  # the value is concave
        left, right = low + (high - low) / 3, high - (high - low) / 3
        low, high = (left, high) if value(left) < value(right) else (low, right)
    probabilities = np.empty(len(gains))
    probabilities[order] = shares(high)
    return probabilities


def draw(probabilities: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.int64]:
    """Indices, each with its probability [n], as many as these sum to (a whole number); systematic, in random order."""
    order = rng.permutation(len(probabilities))
    ends = np.cumsum(probabilities[order])
    ends[-1] = round(ends[-1])
    return order[np.diff(np.floor(ends + rng.random()), prepend=0.0) > 0]
