from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from d2llm.core.errors import InputError
from d2llm.ops.ranking import kendall_tau, top_k

IDS = ["d", "b", "a", "c", "e"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64])
def test_tensors_are_accepted(dtype: torch.dtype) -> None:
    scores = torch.tensor([0, 3, 3, 1, 2], dtype=dtype)
    if scores.is_floating_point():
        scores.requires_grad_()
    result = top_k(scores, IDS, 3)
    assert result == [("a", 3.0), ("b", 3.0), ("e", 2.0)]
    assert all(type(score) is float for _, score in result)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.int32, np.bool_])
def test_arrays_of_other_types(dtype: type[np.generic]) -> None:
    assert top_k(np.array([0, 1, 1, 0, 1]).astype(dtype), IDS, 2) == [("a", 1.0), ("b", 1.0)]


def test_the_scores_are_not_modified() -> None:
    scores = np.array([3.0, 1.0, 2.0])
    top_k(scores, ["a", "b", "c"], 1)
    assert scores.tolist() == [3.0, 1.0, 2.0]


def test_nan_scores_are_refused_with_their_ids() -> None:
    scores = np.array([1.0, math.nan, 3.0, math.nan, 0.0])
    with pytest.raises(InputError, match=r"2 of 5 scores are NaN \(first: 'b', 'c'\)"):
        top_k(scores, IDS, 1)


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(InputError, match="4 ids are given"):
        top_k(np.zeros(5), IDS[:4], 2)
    with pytest.raises(InputError, match="k is -1"):
        top_k(np.zeros(5), IDS, -1)


def test_kendall_tau_by_hand() -> None:
    assert kendall_tau([1.0, 2.0, 3.0], [10.0, 20.0, 30.0]) == 1.0
    assert kendall_tau([1.0, 2.0, 3.0], [3.0, 2.0, 1.0]) == -1.0
    # Pairs of (3, 1, 2) against (1, 2, 3): two discordant, one concordant.
    assert kendall_tau([1.0, 2.0, 3.0], [3.0, 1.0, 2.0]) == pytest.approx(-1 / 3)
    # One pair tied in the first: 5 of 6 pairs there, 6 of 6 in the second; all 5 concordant.
    assert kendall_tau([1.0, 1.0, 2.0, 3.0], [1.0, 2.0, 3.0, 4.0]) == pytest.approx(5 / math.sqrt(30))


def test_kendall_tau_depends_only_on_the_order() -> None:
    first, second = [0.1, -2.0, 5.0, 3.0, 0.0], [1.0, 4.0, 3.0, 2.0, -1.0]
    expected = sum(
        np.sign(first[i] - first[j]) * np.sign(second[i] - second[j]) for i in range(5) for j in range(i)
    ) / math.comb(5, 2)
    assert kendall_tau(first, second) == pytest.approx(expected)
    assert kendall_tau(second, first) == pytest.approx(expected)
    assert kendall_tau([value**3 for value in first], second) == pytest.approx(expected)
    assert kendall_tau([-value for value in first], second) == pytest.approx(-expected)
    assert kendall_tau([math.inf, math.inf, 1.0], [2.0, 2.0, 1.0]) == 1.0


@pytest.mark.parametrize("first", [[], [1.0], [2.0, 2.0, 2.0]])
def test_kendall_tau_without_an_order_is_zero(first: list[float]) -> None:
    assert kendall_tau(first, [float(n) for n in range(len(first))]) == 0.0


def test_kendall_tau_rejects_invalid_input() -> None:
    with pytest.raises(InputError, match="2 numbers cannot be compared with 1"):
        kendall_tau([1.0, 2.0], [1.0])
    with pytest.raises(InputError, match="NaN"):
        kendall_tau([1.0, math.nan], [1.0, 2.0])
