"""``Student.encode_query``, ``encode_document`` and ``rank``, for texts without an index."""

from __future__ import annotations

import logging

import jaxtyping
import numpy as np
import pytest

from d2llm import Passage, Query, Student
from d2llm.core.errors import InputError, ModelError
from d2llm.models.text_scores import TextScorer
from tiny_models import TEXTS, write_trained_student

QUERY = TEXTS[0]


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Student:
    folder = write_trained_student(tmp_path_factory.mktemp("student"), query_prefix="rain ")
    return Student.load(folder, device="cpu", dtype="float32")


def test_a_text_is_a_vector_and_a_list_a_matrix(student: Student):
    for encode, reference in (
        (student.encode_query, student.encode_queries),
        (student.encode_document, student.encode_passages),
    ):
        expected = reference(TEXTS[:3]).vectors
        np.testing.assert_array_equal(encode(TEXTS[:3]), expected)
        np.testing.assert_array_equal(encode(TEXTS[:1]), reference(TEXTS[:1]).vectors)
        one = encode(TEXTS[0])
        assert one.shape == (student.vector_dim,)
        np.testing.assert_array_equal(one, reference(TEXTS[:1]).vectors[0])
        assert encode([]).shape == (0, student.vector_dim)
    assert not np.allclose(student.encode_query(QUERY), student.encode_document(QUERY))  # the prefix
    instructed = student.encode_query(QUERY, instruction="snow ")
    np.testing.assert_array_equal(instructed, student.encode_queries([QUERY], instruction="snow ").vectors[0])


def test_texts_that_are_cut_are_reported(student: Student, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        student.encode_document(["short", " ".join(TEXTS * 40)])
        student.rank("short", [" ".join(TEXTS * 40)])
    assert [record.getMessage()[:14] for record in caplog.records] == ["1 of 2 texts a", "1 of 1 texts a"]


def test_texts_get_their_numbers_as_ids(student: Student):
    texts = student.rank({"id": "q", "text": QUERY}, TEXTS[:3])
    assert texts.query == Query("q", QUERY)
    assert {each.passage.id: each.passage.text for each in texts} == dict(zip("123", TEXTS[:3], strict=True))
    by_id = student.rank(QUERY, {"a": TEXTS[0], "b": Passage("b", TEXTS[1])})
    assert {each.passage.id: each.passage.text for each in by_id} == {"a": TEXTS[0], "b": TEXTS[1]}
    assert [each.passage.text for each in student.rank(QUERY, "one text")] == ["one text"]
    assert len(student.rank(QUERY, [])) == 0


def test_equal_scores_are_ranked_by_id(student: Student):
    ranking = student.rank(QUERY, [Passage(name, TEXTS[2]) for name in ("b", "a", "c")])
    assert [each.passage.id for each in ranking] == ["a", "b", "c"]


def test_wrong_arguments_are_named(student: Student, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as for a user
    with pytest.raises(InputError, match="there are 2"):
        student.rank([QUERY, QUERY], TEXTS)  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match=r"passages\[1\] is 7 \(int\)"):
        student.rank(QUERY, ["a", 7])  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match="texts is 7"):
        student.encode_query(7)  # pyright: ignore[reportArgumentType]
    monkeypatch.setattr(TextScorer, "score", lambda *_: np.full(1, np.nan, np.float32))
    with pytest.raises(ModelError, match="NaN"):
        student.rank(QUERY, ["a"])
