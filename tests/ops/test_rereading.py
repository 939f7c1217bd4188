"""The student's error model and the expected gain of rereading: by hand and by simulation."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d2llm.core.errors import InputError
from d2llm.ops.rereading import StudentError, calibrate_error, expected_log_odds, on_one_scale, reading_gains
from examples import examples


def test_a_fit_by_hand():
    # Two queries of three passages: t = 2 z + offset + error; offsets 1 and -3, errors (0.5, -1, 0.5) in both.
    scores = np.array([0, 1, 2, 4, 5, 6], float)
    log_odds = 2 * scores + np.repeat([1, -3], 3) + np.tile([0.5, -1, 0.5], 2)
    error = calibrate_error(scores, log_odds, ["a", "a", "a", "b", "b", "b"])
    assert error.slope == pytest.approx(2)
    assert error.intercept == pytest.approx(-1)
    assert error.sigma == pytest.approx((2 * 1.5 / 3) ** 0.5)  # 6 pairs less 2 offsets less 1 slope
    assert error.query_sigma == pytest.approx((8 - 1 / 3) ** 0.5)  # variance of 1 and -3, less sigma^2 / 3
    assert error.num_pairs == 6


@pytest.mark.parametrize(
    ("scores", "log_odds", "queries", "message"),
    [
        ([1, 2], [1, 2], ["a"], "as many"),
        ([1, 2, np.nan], [1, 2, 3], "aaa", "finite"),
        ([1, 2], [1, 2], "aa", "too few"),
        ([1, 2, 3], [3, 2, 1], "aaa", "do not go up"),
        ([1, 1, 1], [3, 2, 1], "aaa", "do not go up"),
    ],
)
def test_unusable_data_is_rejected(scores, log_odds, queries, message):
    with pytest.raises(InputError, match=message):
        calibrate_error(scores, log_odds, list(queries))


@pytest.mark.parametrize(
    "values", [(0.0, 0.0, 1.0, 0.0), (1.0, np.inf, 1.0, 0.0), (1.0, 0.0, -1.0, 0.0), (1.0, 0.0, 1.0, -1.0)]
)
def test_invalid_error_parameters_are_rejected(values):
    with pytest.raises(InputError, match="slope above 0"):
        StudentError(*values)


def test_read_passages_shift_the_scores_of_the_query():
    error = StudentError(slope=2.0, intercept=1.0, sigma=1.0, query_sigma=1.0)
    scores, nothing = np.array([0.0, 1.0, 2.0]), np.zeros(0)
    np.testing.assert_allclose(on_one_scale(scores, nothing.astype(np.int64), nothing, error), [1, 3, 5])
    # The passage with score 1 was expected at 3 and is at 7: half of the difference is attributed to the query.
    np.testing.assert_allclose(on_one_scale(scores, np.array([1]), np.array([7.0]), error), [3, 7, 7])
    without = StudentError(slope=2.0, intercept=1.0, sigma=0.0, query_sigma=0.0)
    np.testing.assert_allclose(on_one_scale(scores, np.array([1]), np.array([7.0]), without), [1, 7, 5])


def sigmoid(values):
    return 1 / (1 + np.exp(-values))


def test_expected_log_odds_by_simulation():
    draws = 1.3 * np.random.default_rng(1).normal(size=400_000)
    means = np.array([-6.0, -1.0, 0.0, 3.0])
    log_odds = expected_log_odds(means, np.ones(4, bool), 1.3)
    np.testing.assert_allclose(sigmoid(log_odds), [sigmoid(mean + draws).mean() for mean in means], rtol=0.01)
    assert expected_log_odds(means, np.zeros(4, bool), 1.3).tolist() == means.tolist()
    far = expected_log_odds(np.array([-500.0, 500.0, 501.0]), np.ones(3, bool), 1.0)
    assert far[1] < far[2]
    assert np.isfinite(far).all()


def test_reading_gains_by_simulation():
    """Top 2 of three passages: the simulated mean of the best DCG after reading, minus the current DCG."""
    means, unread, sigma = np.array([0.0, -0.4, -1.0]), np.array([True, False, True]), 1.2
    draws = sigma * np.random.default_rng(2).normal(size=200_000)
    expected = np.array([sigmoid(means[0] + draws).mean(), sigmoid(means[1]), sigmoid(means[2] + draws).mean()])
    discounts = np.array([1, 1 / np.log2(3)])
    current = np.sort(expected)[::-1][:2] @ discounts
    expected_gains = np.zeros(3)
    for index in (0, 2):
        others = np.delete(expected, index)
        table = np.column_stack([sigmoid(means[index] + draws), np.tile(others, (len(draws), 1))])
        expected_gains[index] = (-np.sort(-table, axis=1)[:, :2] @ discounts).mean() - current
    gains = reading_gains(means, unread, sigma, 2)
    np.testing.assert_allclose(gains, expected_gains, atol=0.003)
    assert gains[1] == 0
    assert gains[2] > 0.01


def test_reading_pays_around_the_cutoff():
    # Five certain passages far above, two tied around the cutoff at six, and three far below.
    log_odds = np.array([9, 8, 7, 6, 5, 0.0, 0.0, -9, -10, -11])
    gains = reading_gains(log_odds, np.ones(10, bool), 1.0, 6)
    assert set(np.argsort(-gains)[:2]) == {5, 6}
    assert gains[[0, 7, 8, 9]].max() < 0.1 * gains[5]
    assert reading_gains(log_odds, np.ones(10, bool), 0.0, 6) == pytest.approx(0, abs=1e-12)
    assert reading_gains(np.zeros(0), np.zeros(0, bool), 1.0, 6).tolist() == []


@settings(max_examples=examples(60))
@given(
    st.lists(st.floats(-8, 8), min_size=1, max_size=9),
    st.integers(1, 12),
    st.floats(0, 3),
    st.randoms(use_true_random=False),
)
def test_gains_are_never_negative_and_follow_the_passage(values, top_k, sigma, random):
    log_odds = np.array(values)
    unread = np.array([random.random() < 0.7 for _ in values])
    gains = reading_gains(log_odds, unread, sigma, top_k)
    assert (gains >= 0).all()
    assert (gains[~unread] == 0).all()
    order = np.array(random.sample(range(len(values)), len(values)))
    np.testing.assert_allclose(reading_gains(log_odds[order], unread[order], sigma, top_k), gains[order], atol=1e-12)
