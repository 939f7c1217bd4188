"""Robust Active Distillation: the probabilities solve the game of the paper, and queries are drawn by them."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from scipy.optimize import linprog

from d2llm.ops.robust_sampling import draw, label_gains, robust_probabilities

GAINS = np.array([0.9, 0.05, 0.8, 0.3, 1.0, 0.75, 0.0, 0.8])


def game_value(probabilities: np.ndarray, num_wrong: int) -> float:
    return float(np.sort(probabilities * GAINS)[: len(GAINS) - num_wrong].sum())


@pytest.mark.parametrize("num_wrong", [0, 1, 2, 4, 6])
@pytest.mark.parametrize("budget", [1, 2, 3, 5, 8])
def test_no_other_probabilities_gain_more_where_the_teacher_is_wrong_at_the_worst(budget: int, num_wrong: int) -> None:
    probabilities = robust_probabilities(GAINS, budget, float(num_wrong))
    assert probabilities.sum() == pytest.approx(budget)
    assert probabilities.min() >= 0
    assert probabilities.max() <= 1
    # The game as a linear program: maximise z, which is at most the gain for each set that the teacher gets wrong.
    rows = []
    for wrong in combinations(range(len(GAINS)), num_wrong):
        right = GAINS.copy()
        right[list(wrong)] = 0
        rows.append([*-right, 1.0])
    best = linprog(
        [0.0] * len(GAINS) + [-1.0],
        A_ub=rows,
        b_ub=[0.0] * len(rows),
        A_eq=[[1.0] * len(GAINS) + [0.0]],
        b_eq=[budget],
        bounds=[(0, 1)] * len(GAINS) + [(None, None)],
    )
    assert game_value(probabilities, num_wrong) == pytest.approx(-best.fun, abs=1e-6)


@pytest.mark.parametrize("num_wrong", [1.0, 2.0, 3.5])
def test_a_single_query_is_drawn_by_the_theorem_of_the_paper(num_wrong: float) -> None:
    gains = np.sort(GAINS[GAINS > 0])[::-1]
    values = [(k - num_wrong) / (1 / gains[:k]).sum() for k in range(1, len(gains) + 1)]
    best = int(np.argmax(values)) + 1
    expected = np.zeros(len(gains))
    expected[:best] = 1 / (gains[:best] * (1 / gains[:best]).sum())
    np.testing.assert_allclose(robust_probabilities(gains, 1, num_wrong), expected, atol=1e-6)


def test_queries_are_drawn_with_their_probabilities() -> None:
    probabilities = np.array([1.0, 0.5, 0.0, 0.75, 0.25, 0.5])
    rng = np.random.default_rng(0)
    draws = [draw(probabilities, rng) for _ in range(4000)]
    assert {len(set(drawn.tolist())) for drawn in draws} == {3}
    np.testing.assert_allclose(np.bincount(np.concatenate(draws), minlength=6) / 4000, probabilities, atol=0.03)


def test_a_label_is_worth_most_where_the_two_likeliest_are_level() -> None:
    assert label_gains(np.array([0.5, 0.1, 0.4])) == pytest.approx(0.9)
    assert label_gains(np.array([1.0])) == 0
