"""A time limit stops work that shows its progress, and nothing else."""

from __future__ import annotations

import math
import time

import pytest

from d2llm.core.errors import OutOfTimeError
from d2llm.core.progress import progress_bar, showing_progress
from d2llm.core.time_limit import check_time, seconds_left, time_limit


def finished_items(total: int = 1_000) -> int:
    """How many items of ten milliseconds each are finished before the time is over."""
    finished = 0
    try:
        with progress_bar("working", total) as advance:
            for _ in range(total):
                time.sleep(0.01)
                finished += 1
                advance(1)
    except OutOfTimeError:
        return finished
    return total


@pytest.mark.parametrize("show", [True, False, None])
def test_work_stops_at_the_first_item_after_the_limit(show: bool | None) -> None:
    with showing_progress(show):
        with time_limit(0.1):
            assert 1 <= finished_items() <= 10
        assert finished_items(20) == 20  # outside there is none


def test_without_time_left_the_first_item_is_the_last() -> None:
    for seconds in (0.0, -5.0):
        with time_limit(seconds):
            assert finished_items() == 1


def test_the_earliest_of_nested_limits_counts() -> None:
    assert seconds_left() == math.inf
    with time_limit(60.0):
        with time_limit(5.0):
            assert seconds_left() == pytest.approx(5.0, abs=1.0)
        with time_limit(600.0):
            assert seconds_left() == pytest.approx(60.0, abs=1.0)
        with time_limit(math.inf):
            assert seconds_left() == pytest.approx(60.0, abs=1.0)
        assert seconds_left() == pytest.approx(60.0, abs=1.0)
    check_time()
    assert seconds_left() == math.inf


def test_a_limit_ends_with_its_block_after_an_error() -> None:
    with pytest.raises(OutOfTimeError, match="the time for this work is over"), time_limit(-1.0):
        check_time()
    check_time()
