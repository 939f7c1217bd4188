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
    assert [(bin_.low, bin_.high, bin_.count) for bin_ in bins] == [
        (0, 0.25, 1),
        (0.25, 0.5, 1),
        (0.5, 0.75, 1),
        (0.75, 1, 2),
    ]
    assert [bin_.mean_probability for bin_ in bins] == pytest.approx([0.1, 0.3, 0.6, 0.925])
    assert [bin_.fraction_positive for bin_ in bins] == [0, 1, 1, 0.5]
    assert expected_calibration_error(bins) == pytest.approx((0.1 + 0.7 + 0.4 + 2 * 0.425) / 5)


@pytest.mark.filterwarnings("error")
def test_certain_probabilities_and_empty_bins():
    bins = reliability_bins([float("inf"), float("-inf"), 2_000.0, 0.0], [1, 0, 1, 0], num_bins=2)
    assert bins == [ReliabilityBin(0.0, 0.5, 0.0, 0.0, 1), ReliabilityBin(0.5, 1.0, 2.5 / 3, 2 / 3, 3)]
    assert len(reliability_bins([9.0, -9.0], [1, 0], num_bins=10)) == 2


def test_calibration_error_is_small_only_if_calibrated():
    rng = np.random.default_rng(0)
    probabilities = rng.uniform(0.02, 0.98, 20_000)
    labels = rng.random(20_000) < probabilities
    calibrated = np.log(probabilities / (1 - probabilities))
    assert expected_calibration_error(reliability_bins(calibrated, labels)) < 0.02
    assert expected_calibration_error(reliability_bins(3 * calibrated, labels)) > 0.1


def test_histogram_by_hand():
    histogram = score_histogram([0.0, 0.4, 0.5, 1.0, 1.0], [False, True, False, True, False], num_bins=2)
    assert histogram.edges == (0, 0.5, 1)
    assert histogram.positive == (1, 1)
    assert histogram.negative == (1, 2)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("scores", [[7.0, 7.0, 7.0], [float("inf"), 1.0, 2.0], [float("-inf"), float("inf"), np.inf]])
def test_histogram_counts_every_score(scores):
    histogram = score_histogram(scores, [True, False, True])
    assert sum(histogram.positive) == 2
    assert sum(histogram.negative) == 1
    assert np.isfinite(histogram.edges).all()
    assert len(histogram.edges) == 31


@pytest.mark.parametrize("measure", [reliability_bins, score_histogram])
def test_invalid_input_is_rejected(measure):
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
