"""Vectors of width 4 that solve the limit set in exact arithmetic."""

from __future__ import annotations

import numpy as np
import pytest
from limit_set import moment_curve

from d2llm.data.limit_set import all_pairs


@pytest.mark.parametrize("number", [3, 4, 17, 60])
def test_moment_curve_ranks_each_pair_first_by_its_margin(number: int) -> None:
    queries, passages = moment_curve(number)
    assert queries.shape == (number * (number - 1) // 2, 4)
    assert np.allclose(np.linalg.norm(passages, axis=1), np.sqrt(2))  # equal lengths, so it ranks like a cosine
    angles = 2 * np.pi * np.arange(number) / number
    for (first, second), scores in zip(all_pairs(number), queries @ passages.T, strict=True):
        expected = -(1 - np.cos(angles - angles[first])) * (1 - np.cos(angles - angles[second]))
        assert np.allclose(scores - scores[first], expected, atol=1e-12)
        assert set(np.argsort(-scores)[:2].tolist()) == {first, second}
