import math

import pytest

from d2llm.core.errors import InputError
from d2llm.ops.agreement import agreement, label_loyalty, probability_loyalty, top_k_overlap


def test_label_loyalty_by_hand():
    # The teacher accepts from 0 on, the student from 10 on: they differ on the third and the fourth.
    assert label_loyalty([-3.0, 0.0, 2.0, -0.1], [9.0, 10.0, 9.9, 12.0], student_threshold=10.0) == 0.5


def test_top_k_overlap_by_hand():
    assert top_k_overlap(["a", "b", "c", "d"], ["c", "x", "a", "b"], k=3) == pytest.approx(2 / 3)
    assert top_k_overlap(["a", "b"], ["b", "a"], k=10) == 1
    assert top_k_overlap(["a"], ["a", "b", "c", "d"]) == 0.25
    assert top_k_overlap(["a"], []) == 0
    assert top_k_overlap([], []) == 1
    with pytest.raises(InputError, match="k is 0"):
        top_k_overlap(["a"], ["a"], k=0)


def test_probability_loyalty_by_hand():
    assert probability_loyalty([-1.0, 0.5, 2.0], [20.0, 35.0, 50.0]) == pytest.approx(1)  # on another scale
    # The student cannot tell the pairs apart: it says .5 to both, and the teacher is certain.
    entropy = -(0.75 * math.log2(0.75) + 0.25 * math.log2(0.25))
    assert probability_loyalty([-50.0, 50.0], [1.0, 1.0]) == pytest.approx(1 - math.sqrt(entropy - 0.5), abs=1e-6)
    assert probability_loyalty([-1.0, 0.0, 1.0], [3.0, 1.0, 2.0]) < 1


def test_agreement_by_hand():
    result = agreement(
        {
            "q1": ([-1.0, 0.0, 1.0], [10.0, 11.0, 12.0]),  # the same order, on another scale
            "q2": ([4.0, -4.0], [11.5, 12.5]),  # the reverse
            "q3": ([-9.0], [3.0]),  # one passage has no order
        }
    )
    # A threshold between 10 and 11 is right for all pairs except the 12.5.
    assert result.label_loyalty == pytest.approx(5 / 6)
    assert 0 < result.probability_loyalty < 1
    assert result.pearson_within == pytest.approx(0)
    assert result.kendall_within == pytest.approx(0)
    assert (result.num_queries, result.num_pairs) == (2, 6)
    teacher, student = [-1, 0, 1, 4, -4, -9], [10, 11, 12, 11.5, 12.5, 3]
    means = sum(teacher) / 6, sum(student) / 6
    left, right = [value - means[0] for value in teacher], [value - means[1] for value in student]
    product = sum(one * other for one, other in zip(left, right, strict=True))
    lengths = sum(value**2 for value in left) * sum(value**2 for value in right)
    assert result.pearson_over_all == pytest.approx(product / lengths**0.5)


def test_undefined_figures_are_none():
    result = agreement({"q1": ([1.0], [5.0]), "q2": ([2.0], [6.0])})
    assert (result.label_loyalty, result.pearson_within, result.kendall_within) == (None, None, None)
    assert result.pearson_over_all == pytest.approx(1)
    assert (result.num_queries, result.num_pairs) == (0, 2)


def test_constant_scores_count_as_zero_correlation():
    result = agreement({"q1": ([1.0, 2.0], [1.0, 2.0]), "q2": ([1.0, -2.0], [3.0, 3.0])})
    assert [result.pearson_within, result.kendall_within] == pytest.approx([0.5, 0.5])


def test_invalid_input_is_rejected():
    with pytest.raises(InputError, match="query 'q7'"):
        agreement({"q1": ([1.0], [1.0]), "q7": ([1.0, 2.0], [1.0])})
    with pytest.raises(InputError, match="query 'q7'"):
        agreement({"q7": ([1.0, float("nan")], [1.0, 2.0])})
    for nothing in ({}, {"q1": ([], [])}):
        with pytest.raises(InputError, match="no pairs"):
            agreement(nothing)
