import pytest

from d2llm.core.errors import InputError
from d2llm.ops.agreement import agreement, label_loyalty, top_k_overlap


def test_label_loyalty_by_hand():
    # Yes by the teacher from 0 on, by the student from 10 on: the third and the fourth differ.
    assert label_loyalty([-3.0, 0.0, 2.0, -0.1], [9.0, 10.0, 9.9, 12.0], student_threshold=10.0) == 0.5


def test_top_k_overlap_by_hand():
    assert top_k_overlap(["a", "b", "c", "d"], ["c", "x", "a", "b"], k=3) == pytest.approx(2 / 3)
    assert top_k_overlap(["a", "b"], ["b", "a"], k=10) == 1
    assert top_k_overlap(["a"], ["a", "b", "c", "d"]) == 0.25
    assert top_k_overlap(["a"], []) == 0
    assert top_k_overlap([], []) == 1
    with pytest.raises(InputError, match="k is 0"):
        top_k_overlap(["a"], ["a"], k=0)


def test_agreement_by_hand():
    found = agreement(
        {
            "q1": ([-1.0, 0.0, 1.0], [10.0, 11.0, 12.0]),  # the same order, on another scale
            "q2": ([4.0, -4.0], [11.5, 12.5]),  # the reverse
            "q3": ([-9.0], [3.0]),  # one passage has no order
        }
    )
    # Yes from a threshold between 10 and 11 on is right for all but the 12.5.
    assert found.label_loyalty == pytest.approx(5 / 6)
    assert found.pearson_within == pytest.approx(0)
    assert found.kendall_within == pytest.approx(0)
    assert (found.num_queries, found.num_pairs) == (2, 6)
    teacher, student = [-1, 0, 1, 4, -4, -9], [10, 11, 12, 11.5, 12.5, 3]
    means = sum(teacher) / 6, sum(student) / 6
    left, right = [value - means[0] for value in teacher], [value - means[1] for value in student]
    product = sum(one * other for one, other in zip(left, right, strict=True))
    lengths = sum(value**2 for value in left) * sum(value**2 for value in right)
    assert found.pearson_over_all == pytest.approx(product / lengths**0.5)


def test_what_cannot_be_said_is_none():
    found = agreement({"q1": ([1.0], [5.0]), "q2": ([2.0], [6.0])})
    assert (found.label_loyalty, found.pearson_within, found.kendall_within) == (None, None, None)
    assert found.pearson_over_all == pytest.approx(1)
    assert (found.num_queries, found.num_pairs) == (0, 2)


def test_a_scoring_without_an_order_counts_as_zero():
    found = agreement({"q1": ([1.0, 2.0], [1.0, 2.0]), "q2": ([1.0, -2.0], [3.0, 3.0])})
    assert [found.pearson_within, found.kendall_within] == pytest.approx([0.5, 0.5])


def test_refused():
    with pytest.raises(InputError, match="query 'q7'"):
        agreement({"q1": ([1.0], [1.0]), "q7": ([1.0, 2.0], [1.0])})
    with pytest.raises(InputError, match="query 'q7'"):
        agreement({"q7": ([1.0, float("nan")], [1.0, 2.0])})
    for nothing in ({}, {"q1": ([], [])}):
        with pytest.raises(InputError, match="no pairs"):
            agreement(nothing)
