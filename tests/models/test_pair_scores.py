"""Scores of pairs from the vectors of their texts, worked out by hand."""

from __future__ import annotations

import numpy as np

from d2llm.models.row_features import score_by_query
from d2llm.retrieval.cosine import ForwardingStudent
from fake_models import FakeStudent

VECTORS = {"a": [1.0, 2.0], "b": [0.0, 3.0], "p": [1.0, 0.0], "q": [2.0, 1.0]}


class InnerProducts(FakeStudent):
    def __init__(self):
        super().__init__()
        self.num_passages = []

    def score(self, query_vector, passage_vectors, task):
        self.num_passages.append(len(passage_vectors))
        return passage_vectors @ query_vector


def test_each_querys_pairs_are_scored_together_and_in_the_order_of_the_pairs():
    vectors = {text: np.array(vector, np.float32) for text, vector in VECTORS.items()}
    student, finished = InnerProducts(), []
    pairs = [("a", "p"), ("b", "q"), ("a", "q"), ("a", "p")]
    scores = score_by_query(student, pairs, vectors, vectors, "symmetric", finished.append)
    assert scores.tolist() == [1, 3, 4, 1]
    assert student.num_passages == finished == [3, 1]


def test_a_forwarding_student_is_the_student_that_it_wraps():
    student = FakeStudent()
    forwarding = ForwardingStudent(student)
    query = student.encode_queries(["rain on tea"]).vectors[0]
    passages = student.encode_passages(["tea", "rain in spring"]).vectors
    for task in ("asymmetric", "symmetric"):
        assert np.array_equal(forwarding.score(query, passages, task), student.score(query, passages, task))
    assert np.array_equal(forwarding.query_vectors(query[None], "symmetric"), 2 * query[None])
    assert forwarding.has_dot
    assert not ForwardingStudent(FakeStudent(head="paper")).has_dot
