"""Fitted weights of a sum of scores: checked against another optimiser, invariances and invalid input."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from d2llm.core.errors import InputError
from d2llm.ops.weighted_sum import fit_scaled_weights, fit_weights


def make_lists(num=40, weights=(2.0, 0.5, 0.0), seed=0):
    """Lists whose relevant passage is drawn from the softmax of a known weighted sum."""
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


def test_weights_match_those_of_gradient_descent():
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


def test_a_misleading_column_gets_no_weight():
    lists = [(np.column_stack([x[:, 0], -x[:, 0]]), y) for x, y in make_lists(weights=(3.0, 0, 0))]
    weights = fit_weights(lists)
    assert weights[0] > 1
    assert weights[1] == 0


def make_scaled_lists(num, weights, slopes, seed=0):
    """As ``make_lists``, but the weight of the second column is multiplied by exp(slopes @ statistics)."""
    rng = np.random.default_rng(seed)
    lists, statistics = [], rng.standard_normal((num, len(slopes))) * 2 + 1
    for query in statistics:
        scores = rng.standard_normal((rng.integers(3, 12), len(weights))) * [1.0, 5.0]
        odds = np.exp(scores @ (np.array(weights) * [1, np.exp(query @ slopes)]))
        grades = np.zeros(len(scores))
        grades[rng.choice(len(scores), p=odds / odds.sum())] = 1
        lists.append((scores, grades))
    return lists, statistics


def test_a_scaled_fit_matches_gradient_descent():
    lists, statistics = make_scaled_lists(20, [1.0, 0.2], np.array([0.5, -0.3]), seed=1)
    centre, spread = statistics.mean(0), statistics.std(0)
    scaled = torch.tensor((statistics - centre) / spread)
    unit = torch.tensor(np.sqrt((np.concatenate([x for x, _ in lists]) ** 2).mean(0)))
    weights = torch.ones(2, dtype=torch.float64, requires_grad=True)
    slopes = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([weights, slopes], lr=0.05)
    for _ in range(500):
        optimizer.zero_grad()
        parts = []
        for (x, y), query in zip(lists, scaled, strict=True):
            factors = torch.stack([torch.ones((), dtype=torch.float64), (query @ slopes).exp()])
            parts.append(-(torch.tensor(y) * torch.log_softmax(torch.tensor(x) / unit @ (weights * factors), 0)).sum())
        loss = torch.stack(parts).mean() + 1e-3 * weights.square().sum() + slopes.square().sum() / len(lists)
        loss.backward()
        optimizer.step()
    fit = fit_scaled_weights(lists, statistics, np.array([False, True]), ridge=1e-3)
    np.testing.assert_allclose(fit.weights * unit.numpy(), weights.detach().numpy(), rtol=1e-2)
    np.testing.assert_allclose(fit.slopes * spread, slopes.detach().numpy(), atol=1e-2)
    assert fit.offset == pytest.approx(-float(fit.slopes @ centre))


def test_a_constant_statistic_changes_nothing():
    lists = make_lists(40)
    fit = fit_scaled_weights(lists, np.ones((40, 2)), np.array([False, True, True]))
    np.testing.assert_allclose(fit.weights, fit_weights(lists), rtol=1e-3, atol=1e-6)
    assert fit.slopes.tolist() == [0, 0]
    assert fit.offset == 0
    with pytest.raises(InputError, match="statistics of queries are not finite"):
        fit_scaled_weights(lists, np.full((40, 2), np.nan), np.array([False, True, True]))


def test_the_unit_of_a_column_does_not_matter():
    lists = make_lists()
    weights = fit_weights(lists)
    rescaled = fit_weights([(x * [1e3, 1e-3, 1.0], y) for x, y in lists])
    np.testing.assert_allclose(rescaled * [1e3, 1e-3, 1.0], weights, rtol=1e-3, atol=1e-6)


def test_lists_without_relevant_passages_are_left_out():
    lists = make_lists(30)
    graded = [(x, y * 3) for x, y in lists]
    without = [*lists, (np.ones((2, 3)), np.zeros(2)), (np.ones((0, 3)), np.zeros(0))]
    np.testing.assert_allclose(fit_weights(graded), fit_weights(lists))
    np.testing.assert_allclose(fit_weights(without), fit_weights(lists))


def test_separable_judgements_keep_weights_finite():
    lists = [(np.array([[1.0], [0.0]]), np.array([1.0, 0.0]))]
    assert np.isfinite(fit_weights(lists)).all()


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        ([], "no list has a relevant passage"),
        ([(np.ones((2, 1)), np.zeros(2))], "no list has a relevant passage"),
        ([(np.array([[np.nan], [1.0]]), np.array([1.0, 0.0]))], "not finite"),
    ],
)
def test_unusable_lists_are_rejected(lists, message):
    with pytest.raises(InputError, match=message):
        fit_weights(lists)
