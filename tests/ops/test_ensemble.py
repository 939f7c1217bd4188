"""Ensembles: the optimum checked by the optimality conditions; folds are split by query."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from d2llm.core.errors import InputError
from d2llm.ops.calibration import expected_calibration_error, log_loss, reliability_bins
from d2llm.ops.ensemble import Ensemble, fit_ensemble, fit_logistic, out_of_fold_log_odds


def sigmoid(values):
    return 1 / (1 + np.exp(-values))


def sample(num_pairs=4000, *, seed=0):
    """Two teachers whose scores are noisy versions of the truth, and one with random scores."""
    rng = np.random.default_rng(seed)
    log_odds = rng.normal(-1, 2, num_pairs)
    labels = rng.random(num_pairs) < sigmoid(log_odds)
    first = 5 * log_odds + 10 + rng.normal(0, 5, num_pairs)
    second = 0.1 * log_odds + rng.normal(0, 0.2, num_pairs)
    useless = rng.normal(0, 3, num_pairs)
    return np.stack([first, second, useless], axis=1), labels


@example(190, 4, 1e-6)  # L-BFGS-B stopped at a gradient of 1e-5 here
@given(st.integers(0, 10_000), st.integers(1, 5), st.sampled_from([0.0, 1e-6, 1e-3, 0.1, 3.0]))
def test_the_optimality_conditions_hold(seed, num_members, l2):
    """Zero gradient for the bias and positive weights, non-negative where the weight is 0; columns may repeat."""
    rng = np.random.default_rng(seed)
    base = rng.normal(size=(30, num_members))
    scores = np.column_stack((base, base[:, :1], -base[:, -1:]))
    targets = rng.choice([0.02, 0.3, 0.98], 30)
    weights, bias = fit_logistic(scores, targets, l2=l2)
    slope = sigmoid(scores @ weights + bias) - targets
    gradient = scores.T @ slope / 30 + l2 * weights
    assert (weights >= 0).all()
    assert abs(slope.mean()) < 1e-9
    assert np.abs(gradient[weights > 0]).max(initial=0) < 1e-9
    assert (gradient[weights == 0] > -1e-9).all()


def test_an_ensemble_is_better_than_its_members_and_calibrated():
    (scores, labels), (test_scores, truth) = sample(seed=1), sample(seed=2)
    ensemble = fit_ensemble(scores, labels)
    single = [fit_ensemble(scores[:, [m]], labels) for m in range(3)]
    ensemble_loss = log_loss(ensemble.log_odds(test_scores), truth)
    assert ensemble_loss < min(log_loss(single[m].log_odds(test_scores[:, [m]]), truth) for m in range(3)) - 0.005
    assert expected_calibration_error(reliability_bins(ensemble.log_odds(test_scores), truth)) < 0.02
    assert ensemble.weights[2] < 0.05 * min(ensemble.weights[:2])


def test_the_temperature_undoes_the_regularisation():
    scores, labels = sample()
    strong, weak = fit_ensemble(scores, labels, l2=1.0), fit_ensemble(scores, labels, l2=0.0)
    assert strong.temperature < 0.5
    assert weak.temperature == pytest.approx(1, abs=1e-3)
    error = expected_calibration_error(reliability_bins(strong.log_odds(scores), labels))
    assert error < 0.02
    # The calibrated mean is the base rate (the bias is free in the last fit), up to Platt's softening.
    assert sigmoid(strong.log_odds(scores)).mean() == pytest.approx(labels.mean(), abs=1e-3)


@settings(max_examples=15)
@given(st.floats(0.01, 100), st.floats(-50, 50))
def test_units_of_a_score_do_not_matter(factor, shift):
    scores, labels = sample(200)
    moved = scores.copy()
    moved[:, 0] = factor * scores[:, 0] + shift
    plain, other = fit_ensemble(scores, labels), fit_ensemble(moved, labels)
    assert other.log_odds(moved) == pytest.approx(plain.log_odds(scores), abs=1e-5)


def test_separable_scores_give_finite_log_odds():
    ensemble = fit_ensemble([[1.0], [2.0], [3.0], [4.0]], [0, 0, 1, 1], l2=0.0)
    log_odds = ensemble.log_odds([[1.0], [2.0], [3.0], [4.0]])
    assert np.isfinite(log_odds).all()
    assert (np.diff(log_odds) > 0).all()
    # Platt's targets are 3/4 and 1/4, approximated as closely as a single slope allows.
    assert 0.5 < sigmoid(log_odds[2]) < sigmoid(log_odds[3]) < 0.9


def test_constant_and_misleading_members_are_left_out():
    scores, labels = sample(300)
    ensemble = fit_ensemble(np.column_stack((np.full(300, 7.0), -scores[:, 0], scores[:, 1])), labels)
    assert ensemble.weights[:2] == (0, 0)
    assert ensemble.weights[2] > 0
    nothing = fit_ensemble(np.full((300, 1), 0.1), labels)
    assert nothing.weights == (0,)
    assert sigmoid(nothing.bias) == pytest.approx(labels.mean(), abs=0.01)


def test_log_odds_of_all_and_of_some_members():
    ensemble = Ensemble(means=(1.0, 0.0, 5.0), scales=(2.0, 1.0, 1.0), weights=(3.0, 0.0, 0.5), bias=-1.0)
    assert ensemble.log_odds([[5, 9, 5], [1, 9, 7]]).tolist() == [5, 0]
    assert ensemble.only([0, 2]) == Ensemble((1.0, 5.0), (2.0, 1.0), (3.0, 0.5), -1.0)
    assert ensemble.only([0, 2]).log_odds([[5, 5]]).tolist() == [5]


def test_a_query_never_fits_its_own_log_odds():
    """Each query's log-odds come from a fit on the other folds, so its own labels change nothing."""
    scores, labels = sample(300)
    groups = [f"q{row % 30}" for row in range(300)]
    before = out_of_fold_log_odds(scores, labels, groups, seed=3)
    own = np.array(groups) == "q7"
    flipped = labels ^ own
    after = out_of_fold_log_odds(scores, flipped, groups, seed=3)
    assert (before[own] == after[own]).all()
    assert (before != after).mean() > 0.5
    left_out = out_of_fold_log_odds(scores, labels, groups, num_folds=30)
    assert left_out[own] == pytest.approx(fit_ensemble(scores[~own], labels[~own]).log_odds(scores[own]))


def test_folds_do_not_depend_on_the_order_of_pairs():
    scores, labels = sample(200)
    groups = [f"q{row % 20}" for row in range(200)]
    order = np.random.default_rng(1).permutation(200)
    plain = out_of_fold_log_odds(scores, labels, groups)
    shuffled = out_of_fold_log_odds(scores[order], labels[order], [groups[row] for row in order])
    assert shuffled == pytest.approx(plain[order])


@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        ([[1.0], [2.0]], [1, 1], "same label"),
        ([[1.0], [2.0]], [1], "1 labels"),
        ([1.0, 2.0], [1, 0], "shape"),
        ([[1.0], [float("nan")]], [1, 0], "1 of 2 scores"),
        ([[1.0], [float("inf")]], [1, 0], "not finite"),
    ],
)
def test_invalid_input_is_rejected(scores, labels, message):
    with pytest.raises(InputError, match=message):
        fit_ensemble(scores, labels)


def test_one_query_cannot_be_cross_validated():
    with pytest.raises(InputError, match="at least two"):
        out_of_fold_log_odds([[1.0], [2.0]], [1, 0], ["q", "q"])
