"""The tests behind the gates: against the exact distribution of sign flips."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from d2llm.core.errors import InputError
from d2llm.ops.gating import better, never_worse

VALUES = st.lists(st.tuples(st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.sampled_from([0.0, 0.3, 0.5, 1.0])), min_size=1)


def named(values):
    return {f"q{number}": value for number, value in enumerate(values)}


def exact_p_worse(start, end):
    """The share of all sign flips whose mean difference is at most the one seen."""
    differences = np.array(end) - np.array(start)
    flips = np.array(list(itertools.product((-1, 1), repeat=len(differences))))
    return float((flips @ differences <= differences.sum() + 1e-12).mean())


@pytest.mark.parametrize("worse", [True, False])
def test_one_sided_p_is_the_exact_one(worse):
    rng = np.random.default_rng(0)
    start = rng.random(10)
    end = start + rng.normal(-0.1 if worse else 0.1, 0.2, 10)
    found = never_worse(named(start), named(end))
    assert (found.difference < 0) == worse
    assert found.p_value == pytest.approx(exact_p_worse(start, end), abs=0.01)


def test_a_clear_loss_does_not_pass_and_a_gain_does():
    start = named([0.5] * 12)
    loss = never_worse(start, named([0.4] * 12))
    assert (loss.first, loss.second, loss.difference) == pytest.approx((0.5, 0.4, -0.1))
    assert (loss.passed, loss.num_queries) == (False, 12)
    assert loss.p_value < 0.001
    assert never_worse(start, named([0.6] * 12)).passed
    assert never_worse(start, start).passed
    # Four losses of four: p = 1/16, not below 0.05, but below 0.1.
    few = named([0.5] * 4), named([0.4] * 4)
    assert never_worse(*few).p_value == pytest.approx(1 / 16, abs=0.01)
    assert never_worse(*few).passed
    assert not never_worse(*few, alpha=0.1).passed


def test_better_needs_a_higher_mean_and_a_small_p():
    start = named([0.5] * 12)
    assert better(start, named([0.6] * 12)).passed
    assert not better(start, named([0.4] * 12)).passed
    small = better(start, named([0.51, 0.48] * 6))
    assert not small.passed
    assert not better(start, start).passed
    # Five gains of five: two-sided p = 2/32.
    five = better(named([0.1] * 5), named([0.2] * 5))
    assert five.p_value == pytest.approx(1 / 16, abs=0.01)
    assert not five.passed
    assert better(named([0.1] * 5), named([0.2] * 5), alpha=0.1).passed


@settings(max_examples=25)
@given(VALUES)
def test_a_system_is_never_better_and_worse_than_another(values):
    start, end = named([first for first, _ in values]), named([second for _, second in values])
    if better(start, end, alpha=0.2).passed:
        assert never_worse(start, end, alpha=0.2).passed
        assert not never_worse(end, start, alpha=0.2).passed


@settings(max_examples=10)
@given(VALUES, st.randoms())
def test_the_order_of_queries_does_not_matter_to_the_pairing(values, random):
    start, end = named([first for first, _ in values]), named([second for _, second in values])
    assume(len(values) > 1)
    items = list(end.items())
    random.shuffle(items)
    assert never_worse(start, dict(items)) == never_worse(start, end)


@pytest.mark.parametrize(("start", "end"), [({}, {}), ({"a": 1.0}, {"b": 1.0}), ({"a": 1.0}, {"a": 1.0, "b": 0.0})])
def test_other_queries_are_refused(start, end):
    with pytest.raises(InputError, match="same queries"):
        never_worse(start, end)
    with pytest.raises(InputError, match="same queries"):
        better(start, end)
