import itertools

import numpy as np
import pytest

from d2llm.ops import significance
from d2llm.ops.significance import (
    bootstrap_interval,
    bootstrap_statistic,
    holm,
    mean_interval,
    paired_randomisation,
    resampled_p_value,
)

FIRST = [0.9, 0.4, 0.8, 0.55, 0.3, 1.0, 0.7, 0.2]
SECOND = [0.5, 0.45, 0.5, 0.35, 0.1, 0.7, 0.75, 0.1]


def exact_p_value(first, second):
    """The exact p-value: all 2^n sign vectors."""
    differences = [a - b for a, b in zip(first, second, strict=True)]
    observed = abs(sum(differences))
    sums = [
        abs(sum(sign * difference for sign, difference in zip(signs, differences, strict=True)))
        for signs in itertools.product((-1, 1), repeat=len(differences))
    ]
    return sum(value >= observed - 1e-9 for value in sums) / len(sums)


def test_p_value_is_close_to_exact_enumeration():
    exact = exact_p_value(FIRST, SECOND)
    assert 0.005 < exact < 0.2  # the p-value is neither tiny nor close to 1
    # 50,000 draws: standard error sqrt(p (1 - p) / 50,000) < .0018
    assert paired_randomisation(FIRST, SECOND, num_permutations=50_000) == pytest.approx(exact, abs=0.006)


def test_identical_systems_have_p_value_one():
    assert paired_randomisation(FIRST, FIRST) == 1.0


def test_the_test_is_two_sided():
    assert paired_randomisation(FIRST, SECOND, seed=3) == pytest.approx(
        paired_randomisation(SECOND, FIRST, seed=3), abs=1e-12
    )


def test_smallest_p_value_if_no_permutation_is_as_extreme():
    first = np.ones(60)
    assert paired_randomisation(first, first * 0, num_permutations=999) == 1 / 1000


def test_p_values_depend_on_the_seed():
    first, second = (paired_randomisation(FIRST, SECOND, num_permutations=5_000, seed=seed) for seed in (1, 2))
    assert first == paired_randomisation(FIRST, SECOND, num_permutations=5_000, seed=1)
    assert first != second


@pytest.mark.parametrize(("first", "second"), [([], []), ([1.0], [1.0, 2.0])])
def test_needs_the_same_queries(first, second):
    with pytest.raises(ValueError, match="same queries"):
        paired_randomisation(first, second)


def test_holm_by_hand():
    # sorted: .005 * 4, .01 * 3, .03 * 2, .04 * 1 -> .02, .03, .06, and .04 lifted to .06
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.5]) == [1.0, 1.0]
    assert holm([0.02]) == [0.02]
    assert holm([]) == []


@pytest.mark.parametrize("invalid", [float("nan"), -0.1, 1.1])
def test_holm_rejects_invalid_p_values(invalid):
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        holm([0.5, invalid])


def test_interval_is_given_by_percentiles_of_resamples():
    """Three values have 27 equally likely resamples, so all means can be enumerated."""
    values = [0.0, 0.3, 0.9]
    means = sorted(sum(resample) / 3 for resample in itertools.product(values, repeat=3))
    interval = bootstrap_interval(values, confidence=0.8, num_resamples=40_000)
    # 10 % of 27 is the third smallest, 90 % the third largest; neither is a borderline case
    assert interval.low == pytest.approx(means[2])
    assert interval.high == pytest.approx(means[-3])


def test_interval_does_not_depend_on_the_block_size(monkeypatch):
    values = np.random.default_rng(1).random(50)
    whole = bootstrap_interval(values, seed=4)
    monkeypatch.setattr(significance, "_BLOCK_NUMBERS", 170)  # 3 rows at once
    assert bootstrap_interval(values, seed=4) == whole
    assert bootstrap_interval(values, seed=5) != whole


def test_bootstrap_of_any_statistic():
    values = np.asarray(FIRST)
    interval, resampled = bootstrap_statistic(lambda rows: float(values[rows].mean()), 8, num_resamples=2_000, seed=7)
    assert interval == bootstrap_interval(values, seed=7)  # the same resamples
    assert resampled.shape == (2_000,)


def test_unmeasurable_resamples_are_left_out():
    with_nan = bootstrap_statistic(lambda rows: float("nan") if 0 in rows else 1.0, 3, num_resamples=50, seed=0)
    assert (with_nan[0].low, with_nan[0].high) == (1.0, 1.0)
    assert 0 < np.isnan(with_nan[1]).sum() < 50
    with pytest.raises(ValueError, match="could be measured"):
        bootstrap_statistic(lambda _: float("nan"), 3, num_resamples=50, seed=0)
    with pytest.raises(ValueError, match="could be measured"):
        resampled_p_value([float("nan")] * 3)


def paired_bootstrap_test(first, second, size, *, num_resamples=1_000):
    ours, theirs = (bootstrap_statistic(each, size, num_resamples=num_resamples, seed=0)[1] for each in (first, second))
    return resampled_p_value(ours - theirs)


def test_p_value_by_counting():
    """Two items, differences 1 and -0.5: only the resample (second, second), 1 of 4, is below 0."""
    first, second = np.array([1.0, 0.0]), np.array([0.0, 0.5])
    p_value = paired_bootstrap_test(
        lambda rows: float(first[rows].mean()), lambda rows: float(second[rows].mean()), 2, num_resamples=20_000
    )
    assert p_value == pytest.approx(2 / 4, abs=0.02)


def test_extreme_p_values():
    values = np.asarray(FIRST)
    mean = lambda rows: float(values[rows].mean())  # noqa: E731
    assert paired_bootstrap_test(mean, mean, 8) == 1.0
    better = paired_bootstrap_test(lambda rows: mean(rows) + 1, mean, 8, num_resamples=199)
    assert better == paired_bootstrap_test(mean, lambda rows: mean(rows) + 1, 8, num_resamples=199) == 2 / 200


@pytest.mark.parametrize("settings", [{"confidence": 0.0}, {"confidence": 1.0}, {"num_resamples": 0}])
def test_settings_out_of_range_are_rejected(settings):
    with pytest.raises(ValueError, match="must"):
        bootstrap_interval([0.1, 0.2], **settings)


def test_an_empty_sample_is_rejected():
    with pytest.raises(ValueError, match="at least one"):
        bootstrap_interval([])


# Fisher and Yates, "Statistical Tables", table III; to five decimals as in NIST's e-Handbook, 1.3.6.7.2.
T_TABLE = [
    (1, 12.70620),
    (2, 4.30265),
    (3, 3.18245),
    (4, 2.77645),
    (5, 2.57058),
    (9, 2.26216),
    (10, 2.22814),
    (30, 2.04227),
    (120, 1.97993),
    (1000, 1.96234),
]


@pytest.mark.parametrize(("degrees", "quantile"), T_TABLE)
def test_intervals_of_few_values_have_the_published_quantiles(degrees, quantile):
    values = np.random.default_rng(0).normal(size=degrees + 1)
    values = (values - values.mean()) / values.std(ddof=1) * np.sqrt(degrees + 1) + 7
    interval = mean_interval(values.tolist())
    assert (interval.low, interval.high) == pytest.approx((7 - quantile, 7 + quantile), abs=6e-6)


def test_an_interval_of_few_values_by_hand():
    # 1, 2, 6: mean 3, s^2 = (4 + 1 + 9) / 2 = 7, so the half width is 4.30265 * sqrt(7 / 3).
    interval = mean_interval([1.0, 2.0, 6.0])
    half = 4.30265 * np.sqrt(7 / 3)
    assert (interval.low, interval.high) == pytest.approx((3 - half, 3 + half), abs=1e-4)
    assert mean_interval([2.0, 2.0, 2.0]) == type(interval)(2.0, 2.0)


def test_one_value_has_no_interval():
    assert mean_interval([0.5]) is None
    assert mean_interval([]) is None
