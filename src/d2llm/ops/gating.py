"""Two paired tests on per-query values: is one system better than another, and has a system become worse?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

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


def better(
    first: Mapping[str, float],
    second: Mapping[str, float],
    *,
    alpha: float = 0.05,
    groups: Mapping[str, str] | None = None,
    seed: int = 0,
) -> GateTest:
    """Whether ``second`` is better than ``first``: higher on average, with a two-sided p-value below ``alpha``.

    Args:
        first: query_id -> value, higher is better.
        second: values of the same queries.
        alpha: level of the paired randomisation test.
        groups: query_id -> group, such as the document that answers it; a query without one is a group of its own.
            The test treats groups as independent, not the queries of a group.
        seed: seed of its permutations.

    Raises:
        InputError: the queries differ, or there are none.
    """
    test = _compared(first, second, seed, groups or {})
    return replace(test, passed=test.difference > 0 and test.p_value < alpha)


def non_inferior(
    start: Mapping[str, float], end: Mapping[str, float], *, alpha: float = 0.05, seed: int = 0
) -> GateTest:
    """Test that a change does no harm: passes unless ``end`` is significantly worse than ``start``.

    p is one-sided: the probability, if both were alike, of a mean difference as low as the observed one. The
    distribution under sign flips is symmetric, so p is half the two-sided p if ``end`` is lower, else 1 minus that.

    Arguments and errors are those of ``better``.
    """
    test = _compared(start, end, seed, {})
    p_value = test.p_value / 2 if test.difference < 0 else 1 - test.p_value / 2
    return replace(test, p_value=p_value, passed=p_value >= alpha)


def _compared(
    first: Mapping[str, float], second: Mapping[str, float], seed: int, groups: Mapping[str, str]
) -> GateTest:
    """The two-sided test, without an outcome."""
    if first.keys() != second.keys() or not first:
        raise InputError(
            f"values of {len(first)} and {len(second)} queries, {len(first.keys() & second.keys())} of them in both: a "
            "paired test needs the same queries, at least one, on both sides"
        )
    before, after = np.array([*first.values()]), np.array([second[query_id] for query_id in first])
    # Flipping the sign of a whole group is flipping that of its sum.
    _, group_of = np.unique([groups.get(query_id, f"query {query_id}") for query_id in first], return_inverse=True)
    p_value = paired_randomisation(np.bincount(group_of, before), np.bincount(group_of, after), seed=seed)
    difference = float(np.mean(after - before))
    return GateTest(float(before.mean()), float(after.mean()), difference, p_value, len(before), passed=False)
