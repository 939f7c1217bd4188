"""Values from NumPy, pandas and Arrow as plain Python has them."""

from __future__ import annotations

import math
from datetime import date, datetime, timezone
from decimal import Decimal

import numpy as np
import pytest

from d2llm.core.plain_values import plain_value


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (np.int64(7), 7),
        (np.uint8(7), 7),
        (np.float64(0.5), 0.5),
        (np.float32(0.5), 0.5),
        (np.bool_(True), True),
        (np.str_("a"), "a"),
        (np.array(3), 3),
        (np.datetime64("2024-05-31T12:30:00.000001", "us"), datetime(2024, 5, 31, 12, 30, 0, 1)),
        (np.datetime64("2024-05-31T12:30:00", "ns"), datetime(2024, 5, 31, 12, 30)),
        (np.datetime64("2024-05-31"), datetime(2024, 5, 31)),
        ("text", "text"),
        (2, 2),
        (False, False),
        (1.5, 1.5),
        (math.inf, math.inf),
        (date(2024, 5, 31), date(2024, 5, 31)),
    ],
)
def test_values_have_pythons_types(value, expected):
    plain = plain_value(value)
    assert (plain, type(plain)) == (expected, type(expected))


@pytest.mark.parametrize(
    "value",
    [None, math.nan, np.float32("nan"), np.float64("nan"), np.datetime64("NaT"), np.array(math.nan), Decimal("NaN")],
    ids=repr,
)
def test_missing_values_are_none(value):
    assert plain_value(value) is None


def test_missing_values_of_pandas_are_none():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"text": ["a", None], "number": [1, None], "time": [pandas.Timestamp(0), None]})
    typed = frame.convert_dtypes()
    for name in frame.columns:
        assert plain_value(frame[name][1]) is None
        assert plain_value(typed[name][1]) is None
    assert plain_value(pandas.NA) is None
    assert plain_value(pandas.NaT) is None


def test_times_that_are_too_fine_and_other_objects_are_unchanged():
    fine = np.datetime64("2024-05-31T12:30:00.000000001", "ns")
    assert plain_value(fine) is fine
    for value in ([1], {"a": 1}, b"a", np.array([1, 2]), datetime(2024, 5, 31, tzinfo=timezone.utc)):
        assert plain_value(value) is value
