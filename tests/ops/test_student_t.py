"""Student's t distribution: quantiles from published tables, intervals by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2llm.ops.student_t import mean_interval, student_t_quantile

# Fisher and Yates, "Statistical Tables", table III; to five decimals as in NIST's e-Handbook, 1.3.6.7.2.
TABLE = [
    (1, 0.95, 12.70620),
    (2, 0.95, 4.30265),
    (3, 0.95, 3.18245),
    (4, 0.95, 2.77645),
    (5, 0.95, 2.57058),
    (9, 0.95, 2.26216),
    (10, 0.95, 2.22814),
    (30, 0.95, 2.04227),
    (120, 0.95, 1.97993),
    (1000, 0.95, 1.96234),
    (1, 0.9, 6.31375),
    (2, 0.99, 9.92484),
    (7, 0.9, 1.89458),
]


@pytest.mark.parametrize(("degrees", "confidence", "expected"), TABLE)
def test_quantiles_match_the_published_tables(degrees: int, confidence: float, expected: float) -> None:
    assert student_t_quantile(degrees, confidence) == pytest.approx(expected, abs=6e-6)


@given(st.integers(1, 60), st.floats(0.05, 0.995))
def test_the_density_between_quantiles_integrates_to_confidence(degrees: int, confidence: float) -> None:
    """Integrates the density by Simpson's rule after substituting t = sqrt(n) tan(angle), where it is smooth."""
    angle = math.atan(student_t_quantile(degrees, confidence) / math.sqrt(degrees))
    angles = np.linspace(0, angle, 2001)
    log_scale = math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2) - math.log(math.pi) / 2
    values = np.cos(angles) ** (degrees - 1) * math.exp(log_scale)
    weights = np.where(np.arange(2001) % 2, 4.0, 2.0)
    weights[[0, -1]] = 1.0
    assert 2 * float(values @ weights) * angle / 2000 / 3 == pytest.approx(confidence, abs=1e-9)


def test_an_interval_by_hand() -> None:
    # 1, 2, 6: mean 3, s^2 = (4 + 1 + 9) / 2 = 7, so the half width is 4.30265 * sqrt(7 / 3).
    interval = mean_interval([1.0, 2.0, 6.0])
    assert interval is not None
    half = 4.30265 * math.sqrt(7 / 3)
    assert (interval.low, interval.high) == pytest.approx((3 - half, 3 + half), abs=1e-4)
    assert mean_interval([2.0, 2.0, 2.0]) == type(interval)(2.0, 2.0)


def test_one_value_has_no_interval() -> None:
    assert mean_interval([0.5]) is None
    assert mean_interval([]) is None


@pytest.mark.parametrize(("degrees", "confidence"), [(0, 0.95), (3, 0.0), (3, 1.0)])
def test_invalid_quantile_arguments_are_rejected(degrees: int, confidence: float) -> None:
    with pytest.raises(ValueError, match=r"degree of freedom|between 0 and 1"):
        student_t_quantile(degrees, confidence)
