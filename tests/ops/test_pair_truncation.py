from __future__ import annotations

import pytest

from d2llm.ops.pair_truncation import fit_pair


@pytest.mark.parametrize(
    ("num_query", "num_passage", "room", "expected"),
    [
        (3, 5, 10, (3, 5)),  # all fits
        (3, 9, 10, (3, 7)),  # the passage is cut at its end
        (9, 3, 10, (7, 3)),  # a short passage leaves the query more than half
        (9, 9, 10, (5, 5)),
        (9, 9, 11, (5, 6)),  # with an odd number of tokens the passage gets the larger half
        (3, 0, 2, (2, 0)),
        (0, 7, 4, (0, 4)),
    ],
)
def test_the_passage_is_truncated_first(num_query, num_passage, room, expected):
    assert fit_pair(num_query, num_passage, room) == expected
