"""Weights of a sum of scores: the optimum by another optimiser, what they ignore, and wrong input."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from d2llm.core.errors import InputError
from d2llm.ops.fusion import fit_weights


def make_lists(num=40, weights=(2.0, 0.5, 0.0), seed=0):
    """Lists whose relevant passage is drawn by the softmax of a known sum."""
    rng = np.random.default_rng(seed)
    lists = []
    for _ in range(num):
        scores = rng.standard_normal((rng.integers(3, 12), len(weights))) * [1.0, 5.0, 30.0]
        odds = np.exp(scores @ np.array(weights))
        grades = np.zeros(len(scores))
        grades[rng.choice(len(scores), p=odds / odds.sum())] = 1
        lists.append((scores, grades))
    return lists


def loss_of(weights, lists, ridge):
    scale = torch.tensor(np.sqrt((np.concatenate([x for x, _ in lists]) ** 2).mean(0)))
    losses = [
        -(torch.tensor(y / y.sum()) * torch.log_softmax(torch.tensor(x) / scale @ weights, 0)).sum() for x, y in lists
    ]
    return torch.stack(losses).mean() + ridge * weights.square().sum(), scale


def test_is_the_optimum_that_gradient_descent_finds():
    lists = make_lists(12)
    raw = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([raw], lr=0.05)
    for _ in range(600):
        optimizer.zero_grad()
        loss, scale = loss_of(raw.clamp(min=0), lists, 1e-3)
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            raw.clamp_(min=1e-12)
    expected = (raw.detach().clamp(min=0) / scale).numpy()
    np.testing.assert_allclose(fit_weights(lists, ridge=1e-3), expected, rtol=2e-2, atol=2e-3)


def test_recovers_the_weights_that_drew_the_judgements():
    found = fit_weights(make_lists(4000))
    np.testing.assert_allclose(found, [2.0, 0.5, 0.0], atol=0.1)


def test_a_column_that_misleads_gets_nothing():
    lists = [(np.column_stack([x[:, 0], -x[:, 0]]), y) for x, y in make_lists(weights=(3.0, 0, 0))]
    weights = fit_weights(lists)
    assert weights[0] > 1
    assert weights[1] == 0


def test_the_unit_of_a_column_does_not_matter():
    lists = make_lists()
    weights = fit_weights(lists)
    rescaled = fit_weights([(x * [1e3, 1e-3, 1.0], y) for x, y in lists])
    np.testing.assert_allclose(rescaled * [1e3, 1e-3, 1.0], weights, rtol=1e-3, atol=1e-6)


def test_grades_count_and_lists_without_any_are_left_out():
    lists = make_lists(30)
    graded = [(x, y * 3) for x, y in lists]
    without = [*lists, (np.ones((2, 3)), np.zeros(2)), (np.ones((0, 3)), np.zeros(0))]
    np.testing.assert_allclose(fit_weights(graded), fit_weights(lists))
    np.testing.assert_allclose(fit_weights(without), fit_weights(lists))


def test_judgements_that_are_met_exactly_keep_weights_finite():
    lists = [(np.array([[1.0], [0.0]]), np.array([1.0, 0.0]))]
    assert np.isfinite(fit_weights(lists)).all()


@pytest.mark.parametrize(
    ("lists", "says"),
    [
        ([], "no list has a relevant passage"),
        ([(np.ones((2, 1)), np.zeros(2))], "no list has a relevant passage"),
        ([(np.array([[np.nan], [1.0]]), np.array([1.0, 0.0]))], "not finite"),
    ],
)
def test_what_cannot_be_fitted_is_refused(lists, says):
    with pytest.raises(InputError, match=says):
        fit_weights(lists)
