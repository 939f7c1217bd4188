"""Significance tests and confidence intervals: is a difference more than chance, and how precise is a value?

Values are one per query; those of two systems are of the same queries in the same order. A resample draws as many items
as there are, with replacement, and ``num_resamples`` is how many resamples are made. Every function creates its own
random generator: the same ``seed`` gives the same resamples. All functions raise a ``ValueError`` for numbers out of
range, or if there is nothing to resample.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

import numpy as np
from numpy.typing import ArrayLike, NDArray

_BLOCK = 1_000  # permutations drawn at once: limits the memory to 1,000 x n signs
_BLOCK_NUMBERS = 2_000_000  # indices drawn at once by the bootstrap: limits the memory to 32 MB for any n

Indices = NDArray[np.intp]
Statistic = Callable[[Indices], float]
"""Computes a measure of the items at [n] positions; a position occurs as often as it was drawn."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A confidence interval, both ends included."""

    low: float
    high: float


def paired_randomisation(
    first: ArrayLike, second: ArrayLike, *, num_permutations: int = 10_000, seed: int = 0
) -> float:
    """Two-sided p-value of the paired randomisation (sign-flip) test on the mean difference.

    Under the null hypothesis that the systems are alike, each query's two values are exchangeable, and exchanging them
    flips the sign of their difference. p = (1 + #{permutations with |mean| >= |observed mean|}) /
    (1 + num_permutations).

    Source: Smucker, Allan, Carterette, "A comparison of statistical significance tests for information retrieval
    evaluation", CIKM 2007, section 3.1; the added one: Phipson and Smyth 2010.
    """
    differences: NDArray[np.float64] = np.asarray(first, np.float64) - np.asarray(second, np.float64)
    if len(np.asarray(first)) != len(np.asarray(second)) or len(differences) == 0:
        raise ValueError("the test needs the same queries, at least one, for both systems")
    differences = differences[differences != 0]  # flipping the sign of a zero changes nothing
    observed = abs(differences.sum())
    # Sums of the same numbers in a different order differ in the last digits; they must count as ties.
    reached = observed - 1e-12 * max(1.0, float(np.abs(differences).sum()))
    generator = np.random.default_rng(seed)
    extreme = 0
    for start in range(0, num_permutations, _BLOCK):
        shape = (min(_BLOCK, num_permutations - start), len(differences))
        signs = generator.integers(0, 2, size=shape, dtype=np.int8) * 2 - 1
        extreme += int((np.abs(signs @ differences) >= reached).sum())
    return (1 + extreme) / (1 + num_permutations)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's correction: rejecting all tests with an adjusted p < 0.05 has at most a 5 % chance of any false rejection.

    The i-th smallest of m becomes the largest of (m - j + 1) * p_j over j <= i, at most 1.

    Returns the adjusted p-values in the order of ``p_values``.

    Source: Holm, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of Statistics 6, 1979.
    """
    if not all(0 <= value <= 1 for value in p_values):
        raise ValueError(f"p-values lie in [0, 1], but these are {list(p_values)}")
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, position in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[position]))
        adjusted[position] = largest
    return adjusted


def bootstrap_interval(
    values: ArrayLike, *, confidence: float = 0.95, num_resamples: int = 2_000, seed: int = 0
) -> Interval:
    """Percentile bootstrap interval of the mean over queries; for a paired comparison, pass the differences.

    ``confidence`` is the fraction of the resampled means inside the interval, in (0, 1).

    Source: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, section 13.3.
    """
    numbers = np.asarray(values, np.float64)
    blocks = [numbers[rows].mean(axis=1) for rows in _resamples(len(numbers), num_resamples, seed)]
    return _percentiles(np.concatenate(blocks), confidence)


def bootstrap_statistic(
    statistic: Statistic, size: int, *, num_resamples: int, seed: int
) -> tuple[Interval, NDArray[np.float64]]:
    """95 % percentile bootstrap of a measure that is not a mean over items: average precision, F1, a correlation.

    ``statistic`` measures the items at the given positions, of which there are ``size``. It returns NaN if a resample
    cannot be measured (no positive drawn); such resamples are left out, and if all are, a ``ValueError`` is raised.
    Returns the interval, and the [num_resamples] values it was computed from (including NaN).
    """
    values = np.array([statistic(row) for rows in _resamples(size, num_resamples, seed) for row in rows])
    measured = values[~np.isnan(values)]
    if not len(measured):
        raise ValueError(f"not one of {num_resamples} resamples of {size} items could be measured")
    return _percentiles(measured, 0.95), values


def resampled_p_value(differences: ArrayLike) -> float:
    """Two-sided p-value for the difference of two measures that are not means, from its values on the same resamples.

    p = 2 * (1 + #{resamples whose difference is 0 or has the rarer sign}) / (1 + number of resamples), at most 1.
    Resamples that cannot be measured (NaN) are left out of both counts.

    Args:
        differences: [num_resamples] values of two ``bootstrap_statistic`` with the same seed, one minus the other.

    Raises:
        ValueError: every difference is NaN.

    Source: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, section 15.4 (the achieved significance
    level from a percentile interval); the added one: Phipson and Smyth 2010.
    """
    differences = np.asarray(differences, np.float64)
    differences = differences[~np.isnan(differences)]
    if not len(differences):
        raise ValueError("not one of the resamples could be measured")
    # Sums of the same numbers in a different order differ in the last digits; such differences count as 0.
    above, below = int((differences > 1e-12).sum()), int((differences < -1e-12).sum())
    other_side = len(differences) - max(above, below)
    return min(1.0, 2 * (1 + other_side) / (1 + len(differences)))


def mean_interval(values: Sequence[float]) -> Interval | None:
    """Student's t interval (95 %) of the mean over few repetitions, such as the seeds of a training.

    mean +- t(n - 1) s / sqrt(n); None for fewer than two values. It assumes independent, roughly normal values. For a
    paired comparison, pass the differences. s is the standard deviation with n - 1 in the denominator.
    """
    from scipy.special import stdtrit  # slow to import

    if len(values) < 2:
        return None
    half = float(stdtrit(len(values) - 1, 0.975)) * stdev(values) / math.sqrt(len(values))
    return Interval(fmean(values) - half, fmean(values) + half)


def _resamples(size: int, num_resamples: int, seed: int) -> Iterator[Indices]:
    """Blocks [b, size] of positions drawn with replacement, ``num_resamples`` rows in all."""
    if size < 1:
        raise ValueError("nothing to resample: give at least one value")
    if num_resamples < 1:
        raise ValueError(f"num_resamples is {num_resamples}, but must be at least 1")
    generator = np.random.default_rng(seed)
    rows = max(1, _BLOCK_NUMBERS // size)
    for start in range(0, num_resamples, rows):
        yield generator.integers(0, size, size=(min(rows, num_resamples - start), size), dtype=np.intp)


def _percentiles(values: NDArray[np.float64], confidence: float) -> Interval:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}, but must lie between 0 and 1")
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(low), float(high))
