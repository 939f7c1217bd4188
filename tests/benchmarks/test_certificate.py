"""How many passages must be rescored before a ranking is certain."""

from __future__ import annotations

import numpy as np
import pytest
from certificate import num_rescored
from hypothesis import given
from hypothesis import strategies as st

from d2llm.core.errors import InputError


def test_number_of_rescored_passages_by_hand() -> None:
    bounds = np.array([9.0, 8.0, 7.0, 6.0, 5.0])
    assert num_rescored(bounds, bounds, 1) == 1  # tight bounds: the first alone is certain
    assert num_rescored(bounds, bounds, 3) == 3
    assert num_rescored(bounds, bounds - 1.5, 1) == 2  # 7.5 is below the bound 8, but above the bound 7
    assert num_rescored(bounds, bounds - 99, 1) == 5
    assert num_rescored(bounds[::-1], bounds[::-1] - 1.5, 1) == 2  # independent of the order of the passages
    assert num_rescored(bounds, bounds, 9) == 5


def test_invalid_arguments_are_rejected() -> None:
    with pytest.raises(InputError, match="top_k is 0"):
        num_rescored(np.ones(2), np.ones(2), 0)
    with pytest.raises(InputError, match="above its upper bound"):
        num_rescored(np.ones(2), np.array([1.0, 1.1]), 1)


@given(st.lists(st.tuples(st.floats(-9, 9), st.floats(0, 5)), min_size=1, max_size=40), st.integers(1, 12))
def test_unrescored_passages_cannot_be_in_the_top_k(pairs: list[tuple[float, float]], top_k: int) -> None:
    final = np.array([score for score, _ in pairs])
    bounds = final + np.array([slack for _, slack in pairs])
    count = num_rescored(bounds, final, top_k)
    order = np.argsort(-bounds, kind="stable")
    inside, outside = final[order[:count]], final[order[count:]]
    if len(outside):
        assert np.sort(inside)[::-1][top_k - 1] >= outside.max()
    if count > top_k:  # one fewer would not have been enough
        assert np.sort(final[order[: count - 1]])[::-1][top_k - 1] < bounds[order[count - 1]]
