"""The significance tests behind the gates, checked against the exact distribution of sign flips."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from d2llm.core.errors import InputError
from d2llm.ops.gating import better, non_inferior

VALUES = st.lists(st.tuples(st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.sampled_from([0.0, 0.3, 0.5, 1.0])), min_size=1)


def by_query(values):
    return {f"q{number}": value for number, value in enumerate(values)}


def exact_p_worse(start, end):
    """The fraction of all sign flips whose mean difference is at most the observed one."""
    differences = np.array(end) - np.array(start)
    flips = np.array(list(itertools.product((-1, 1), repeat=len(differences))))
    return float((flips @ differences <= differences.sum() + 1e-12).mean())


@pytest.mark.parametrize("worse", [True, False])
def test_the_one_sided_p_value_is_exact(worse):
    rng = np.random.default_rng(0)
    start = rng.random(10)
    end = start + rng.normal(-0.1 if worse else 0.1, 0.2, 10)
    result = non_inferior(by_query(start), by_query(end))
    assert (result.difference < 0) == worse
    assert result.p_value == pytest.approx(exact_p_worse(start, end), abs=0.01)


def test_never_worse_rejects_a_clear_loss():
    start = by_query([0.5] * 12)
    loss = non_inferior(start, by_query([0.4] * 12))
    assert (loss.first, loss.second, loss.difference) == pytest.approx((0.5, 0.4, -0.1))
    assert (loss.passed, loss.num_queries) == (False, 12)
    assert loss.p_value < 0.001
    assert non_inferior(start, by_query([0.6] * 12)).passed
    assert non_inferior(start, start).passed
    # Four losses of four: p = 1/16, not below 0.05, but below 0.1.
    few = by_query([0.5] * 4), by_query([0.4] * 4)
    assert non_inferior(*few).p_value == pytest.approx(1 / 16, abs=0.01)
    assert non_inferior(*few).passed
    assert not non_inferior(*few, alpha=0.1).passed


def test_queries_of_a_group_are_one_observation():
    start, end = by_query([0.5] * 12), by_query([0.6] * 9 + [0.5] * 3)
    names = [*start]
    groups = {name: f"document {index // 3}" for index, name in enumerate(names)}
    grouped = better(start, end, groups=groups)
    assert grouped.p_value == pytest.approx(2 / 2**3, abs=0.01)  # three gains of three documents, one without a change
    assert not grouped.passed
    assert better(start, end).passed
    assert (grouped.difference, grouped.num_queries) == pytest.approx((0.075, 12))
    some = {name: groups[name] for name in names[:9]}
    assert better(start, end, groups=some).p_value == pytest.approx(grouped.p_value, abs=0.01)


def test_better_needs_a_higher_mean_and_a_small_p():
    start = by_query([0.5] * 12)
    assert better(start, by_query([0.6] * 12)).passed
    assert not better(start, by_query([0.4] * 12)).passed
    small = better(start, by_query([0.51, 0.48] * 6))
    assert not small.passed
    assert not better(start, start).passed
    # Five gains of five: two-sided p = 2/32.
    five = better(by_query([0.1] * 5), by_query([0.2] * 5))
    assert five.p_value == pytest.approx(1 / 16, abs=0.01)
    assert not five.passed
    assert better(by_query([0.1] * 5), by_query([0.2] * 5), alpha=0.1).passed


@settings(max_examples=25)
@given(VALUES)
def test_a_system_is_never_better_and_worse_than_another(values):
    start, end = by_query([first for first, _ in values]), by_query([second for _, second in values])
    if better(start, end, alpha=0.2).passed:
        assert non_inferior(start, end, alpha=0.2).passed
        assert not non_inferior(end, start, alpha=0.2).passed


@settings(max_examples=10)
@given(VALUES, st.randoms())
def test_pairing_does_not_depend_on_the_order_of_queries(values, random):
    start, end = by_query([first for first, _ in values]), by_query([second for _, second in values])
    assume(len(values) > 1)
    items = list(end.items())
    random.shuffle(items)
    assert non_inferior(start, dict(items)) == non_inferior(start, end)


@pytest.mark.parametrize(("start", "end"), [({}, {}), ({"a": 1.0}, {"b": 1.0}), ({"a": 1.0}, {"a": 1.0, "b": 0.0})])
def test_different_queries_are_refused(start, end):
    with pytest.raises(InputError, match="same queries"):
        non_inferior(start, end)
    with pytest.raises(InputError, match="same queries"):
        better(start, end)
