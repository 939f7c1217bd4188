import math

import numpy as np
import pytest

from d2llm.core.errors import InputError
from d2llm.ops.calibration import (
    ReliabilityBin,
    expected_calibration_error,
    log_loss,
    reliability_bins,
    score_histogram,
)


def log_odds(probability):
    return math.log(probability / (1 - probability))


def test_bins_by_hand():
    probabilities, labels = [0.1, 0.3, 0.6, 0.9, 0.95], [False, True, True, True, False]
    bins = reliability_bins([log_odds(probability) for probability in probabilities], labels, num_bins=4)
    assert [(found.low, found.high, found.count) for found in bins] == [
        (0, 0.25, 1),
        (0.25, 0.5, 1),
        (0.5, 0.75, 1),
        (0.75, 1, 2),
    ]
    assert [found.mean_probability for found in bins] == pytest.approx([0.1, 0.3, 0.6, 0.925])
    assert [found.fraction_positive for found in bins] == [0, 1, 1, 0.5]
    assert expected_calibration_error(bins) == pytest.approx((0.1 + 0.7 + 0.4 + 2 * 0.425) / 5)


@pytest.mark.filterwarnings("error")
def test_certain_answers_and_empty_bins():
    bins = reliability_bins([float("inf"), float("-inf"), 2_000.0, 0.0], [1, 0, 1, 0], num_bins=2)
    assert bins == [ReliabilityBin(0.0, 0.5, 0.0, 0.0, 1), ReliabilityBin(0.5, 1.0, 2.5 / 3, 2 / 3, 3)]
    assert len(reliability_bins([9.0, -9.0], [1, 0], num_bins=10)) == 2


def test_error_of_a_calibrated_scorer_is_small_and_of_an_overconfident_one_is_not():
    draw = np.random.default_rng(0)
    probabilities = draw.uniform(0.02, 0.98, 20_000)
    labels = draw.random(20_000) < probabilities
    honest = np.log(probabilities / (1 - probabilities))
    assert expected_calibration_error(reliability_bins(honest, labels)) < 0.02
    assert expected_calibration_error(reliability_bins(3 * honest, labels)) > 0.1


def test_histogram_by_hand():
    found = score_histogram([0.0, 0.4, 0.5, 1.0, 1.0], [False, True, False, True, False], num_bins=2)
    assert found.edges == (0, 0.5, 1)
    assert found.positive == (1, 1)
    assert found.negative == (1, 2)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("scores", [[7.0, 7.0, 7.0], [float("inf"), 1.0, 2.0], [float("-inf"), float("inf"), np.inf]])
def test_histogram_counts_every_score(scores):
    found = score_histogram(scores, [True, False, True])
    assert sum(found.positive) == 2
    assert sum(found.negative) == 1
    assert np.isfinite(found.edges).all()
    assert len(found.edges) == 31


@pytest.mark.parametrize("measure", [reliability_bins, score_histogram])
def test_refused(measure):
    with pytest.raises(InputError, match="1 of 2 scores are NaN"):
        measure([1.0, float("nan")], [True, False])
    with pytest.raises(InputError, match="one each"):
        measure([1.0], [True, False])
    with pytest.raises(InputError, match="at least one"):
        measure([], [])
    with pytest.raises(InputError, match="0 bins"):
        measure([1.0], [True], num_bins=0)
    with pytest.raises(InputError, match="no bins"):
        expected_calibration_error([])


@pytest.mark.filterwarnings("error")
def test_log_loss_by_hand():
    assert log_loss([log_odds(0.9), log_odds(0.2)], [1, 0]) == pytest.approx(-(math.log(0.9) + math.log(0.8)) / 2)
    assert log_loss([0.0, 0.0], [1, 0]) == pytest.approx(math.log(2))
    assert log_loss([2_000.0], [False]) == pytest.approx(2_000)
    with pytest.raises(InputError, match="0 pairs"):
        log_loss([], [])
