"""Confidence intervals of a mean over few repetitions, such as the seeds of a training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev

from d2llm.ops.significance import Interval

_HALVINGS = 100  # of the bracket around the quantile: more than double precision can resolve


def mean_interval(values: Sequence[float], *, confidence: float = 0.95) -> Interval | None:
    """Student's t interval of the mean of ``values``: mean +- t(n - 1) s / sqrt(n); None for fewer than two values.

    It assumes independent, roughly normal values. For a paired comparison, pass the differences.

    Args:
        values: one per repetition; s is their standard deviation with n - 1 in the denominator.
        confidence: how often, in the long run, such an interval contains the true mean, in (0, 1).
    """
    if len(values) < 2:
        return None
    half = student_t_quantile(len(values) - 1, confidence) * stdev(values) / math.sqrt(len(values))
    return Interval(fmean(values) - half, fmean(values) + half)


def student_t_quantile(degrees: int, confidence: float = 0.95) -> float:
    """The t with P(-t <= T <= t) = ``confidence`` under Student's t distribution with ``degrees`` degrees of freedom.

    Inverts the finite sums for integer degrees of freedom by bisection.

    Raises:
        ValueError: ``degrees`` is below 1, or ``confidence`` is outside (0, 1).

    Source: Abramowitz and Stegun, "Handbook of Mathematical Functions", 1964, 26.7.3 and 26.7.4.
    """
    if degrees < 1:
        raise ValueError(f"Student's t needs at least 1 degree of freedom, not {degrees}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}, but must lie between 0 and 1")
    low, high = 0.0, math.pi / 2
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if _central_share(middle, degrees) < confidence else (low, middle)
    return math.sqrt(degrees) * math.tan(low)


def _central_share(angle: float, degrees: int) -> float:
    """P(|T| <= sqrt(degrees) tan(angle)); each term of the sum is the previous one times cos^2 and a ratio."""
    square = math.cos(angle) ** 2
    is_odd = degrees % 2
    total, term = 0.0, math.cos(angle) if is_odd else 1.0
    for power in range(is_odd, degrees - 1, 2):
        total += term
        term *= square * (power + 1) / (power + 2)
    total *= math.sin(angle)
    return (angle + total) * 2 / math.pi if is_odd else total
