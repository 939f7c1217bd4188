"""Two paired tests on per-query values: is one system better than another, and has a system become worse?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from d2llm.core.errors import InputError
from d2llm.ops.significance import paired_randomisation


@dataclass(frozen=True, slots=True)
class GateTest:
    """Means of two systems over the same queries, their difference (second minus first), and the test's outcome."""

    first: float
    second: float
    difference: float
    p_value: float
    num_queries: int
    passed: bool


def better(first: Mapping[str, float], second: Mapping[str, float], *, alpha: float = 0.05, seed: int = 0) -> GateTest:
    """Whether ``second`` is better than ``first``: higher on average, with a two-sided p-value below ``alpha``.

    Args:
        first: query_id -> value, higher is better.
        second: values of the same queries.
        alpha: level of the paired randomisation test.
        seed: seed of its permutations.

    Raises:
        InputError: the queries differ, or there are none.
    """
    before, after = _paired(first, second)
    p_value = paired_randomisation(before, after, seed=seed)
    difference = _difference(before, after)
    return GateTest(
        float(np.mean(before)),
        float(np.mean(after)),
        difference,
        p_value,
        len(before),
        passed=difference > 0 and p_value < alpha,
    )


def never_worse(
    start: Mapping[str, float], end: Mapping[str, float], *, alpha: float = 0.05, seed: int = 0
) -> GateTest:
    """Passes unless ``end`` is significantly worse than ``start``.

    p is one-sided: the probability, if both were alike, of a mean difference as low as the observed one. The
    distribution under sign flips is symmetric, so p is half the two-sided p if ``end`` is lower, else 1 minus that.

    Args:
        start: query_id -> value before, higher is better.
        end: values of the same queries, after.
        alpha: level of the paired randomisation test.
        seed: seed of its permutations.

    Raises:
        InputError: the queries differ, or there are none.
    """
    before, after = _paired(start, end)
    difference = _difference(before, after)
    half = paired_randomisation(before, after, seed=seed) / 2
    p_value = half if difference < 0 else 1 - half
    return GateTest(
        float(np.mean(before)), float(np.mean(after)), difference, p_value, len(before), passed=p_value >= alpha
    )


def _paired(first: Mapping[str, float], second: Mapping[str, float]) -> tuple[list[float], list[float]]:
    if first.keys() != second.keys() or not first:
        raise InputError(
            f"values of {len(first)} and {len(second)} queries, {len(first.keys() & second.keys())} of them in both: a "
            "paired test needs the same queries, at least one, on both sides"
        )
    return list(first.values()), [second[query_id] for query_id in first]


def _difference(before: list[float], after: list[float]) -> float:
    return float(np.mean(np.array(after) - np.array(before)))
