"""Code shared by the adapters of all libraries."""

from __future__ import annotations

import concurrent.futures
import logging
import subprocess
import sys

import numpy as np
import pytest

from d2llm.core.errors import InputError, ModelError
from d2llm.core.types import Passage
from d2llm.integrations.texts import (
    embed_passages,
    embed_queries,
    passage_metadata,
    passage_text,
    rank_texts,
)
from d2llm.models.student import Student
from d2llm.models.text_scores import TextScorer
from d2llm.recipe import InteractionConfig
from tiny_models import TEXTS, tiny_student_config, write_tiny_model, write_trained_student


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    folder = write_trained_student(tmp_path_factory.mktemp("texts"), query_prefix="rain ", max_query_tokens=10)
    return Student.load(folder, device="cpu")


class RecordingStudent:
    """A student that records the texts it encodes."""

    def __init__(self, student):
        self._student = student
        self.read = []

    def __getattr__(self, name):
        return getattr(self._student, name)

    def encode_queries(self, texts, **options):
        self.read += [("query", text) for text in texts]
        return self._student.encode_queries(texts, **options)

    def encode_passages(self, texts, **options):
        self.read += [("passage", text) for text in texts]
        return self._student.encode_passages(texts, **options)


@pytest.mark.parametrize("task", ["symmetric", "asymmetric"])
def test_pair_scores_encode_each_text_once(student, task):
    pairs = [(TEXTS[0], TEXTS[1]), (TEXTS[2], TEXTS[1]), (TEXTS[0], TEXTS[0]), (TEXTS[0], TEXTS[1])]
    recorder = RecordingStudent(student)
    scores = TextScorer(recorder, task=task).read_pairs(pairs).scores()
    assert sorted(recorder.read) == sorted(
        [("query", TEXTS[0]), ("query", TEXTS[2]), ("passage", TEXTS[1]), ("passage", TEXTS[0])]
    )
    for score, (query, passage) in zip(scores, pairs, strict=True):
        vectors = student.encode_queries([query]).vectors[0], student.encode_passages([passage]).vectors
        np.testing.assert_allclose(score, student.score(*vectors, task)[0], rtol=1e-5, atol=1e-6)
    assert scores[0] == scores[3]


def test_rankings_are_by_score_with_stable_ties(student):
    texts = [*TEXTS[1:5], TEXTS[1]]
    ranked = rank_texts(student, TEXTS[0], texts, "asymmetric")
    query = student.encode_queries([TEXTS[0]]).vectors[0]
    scores = student.score(query, student.encode_passages(texts[:4]).vectors, "asymmetric")
    np.testing.assert_allclose([score for _, score in ranked], np.sort([*scores, scores[0]])[::-1], rtol=1e-6)
    order = [index for index, _ in ranked]
    assert order.index(4) == order.index(0) + 1
    assert rank_texts(student, TEXTS[0], texts, "asymmetric", 2) == ranked[:2]


def test_empty_input_gives_empty_output(student):
    assert rank_texts(student, "a", [], "symmetric") == []
    assert embed_passages(student, []).shape == embed_queries(student, [], "symmetric").shape == (0, 32)


def test_titles_are_encoded_as_in_an_index():
    passage = Passage("p", "the text", "A Title", document_id="d", position=3, metadata={"year": 2001})
    assert passage_text("the text", passage_metadata(passage)) == passage.full_text == "A Title\nthe text"
    assert passage_metadata(passage) == {"title": "A Title", "document_id": "d", "position": 3, "year": 2001}
    for title in (None, float("nan"), np.float32("nan"), np.datetime64("NaT"), ""):
        assert passage_text("the text", {"title": title}) == "the text"
    assert passage_text("the text", {"title": np.str_("A Title")}) == "A Title\nthe text"
    assert passage_text("the text", {"title": 1984}) == "1984\nthe text"
    with pytest.raises(InputError, match="a title must be a text, but list was given"):
        passage_text("the text", {"title": ["A", "Title"]})
    assert passage_metadata(Passage("p", "text")) == {}


def test_invalid_texts_are_rejected(student, tmp_path):
    with pytest.raises(InputError, match="a text is needed, but NoneType"):
        rank_texts(student, None, ["a"], "symmetric")
    with pytest.raises(InputError, match="put it in a list"):
        rank_texts(student, "a", "text", "symmetric")
    with pytest.raises(InputError, match="top_k is 0"):
        rank_texts(student, "a", ["b"], "symmetric", 0)
    config = tiny_student_config(write_tiny_model(tmp_path / "backbone"))
    paper = config.model_copy(update={"interaction": InteractionConfig(head="paper", hidden_dim=16, feature_dim=8)})
    with pytest.raises(InputError, match="'paper'"):
        embed_queries(Student.create(paper, device="cpu"), ["a"], "symmetric")


def test_nan_scores_are_an_error(student, monkeypatch):
    monkeypatch.setattr(
        TextScorer, "score", lambda _self, _query, _texts, rows, **_: np.full(len(rows), np.nan, np.float32)
    )
    with pytest.raises(ModelError, match="2 of 2 scores are NaN"):
        student.predict([("a", "b"), ("a", "c")])


def test_truncated_texts_are_reported(student, caplog):
    with caplog.at_level(logging.WARNING):
        rank_texts(student, " ".join(TEXTS), ["rain", " ".join(TEXTS * 3)], "asymmetric")
    assert "2 of 3 texts are longer than the student reads" in caplog.text


def test_threads_share_a_student(student):
    """Libraries call from several threads, and truncation is a setting of the shared tokenizer."""
    batches = [[" ".join(TEXTS * (1 + n % 4)), TEXTS[n % 8]] for n in range(200)]
    expected = [student.tokenize(batch, "passage").ids for batch in batches]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # so that threads are switched as often as possible
    try:
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            actual = list(pool.map(lambda batch: student.tokenize(batch, "passage").ids, batches))
    finally:
        sys.setswitchinterval(before)
    assert actual == expected


@pytest.mark.parametrize(
    ("module", "package", "extra"),
    [
        ("sentence_transformers", "sentence_transformers", "sentence-transformers"),
        ("langchain", "langchain_core", "langchain"),
        ("llama_index", "llama_index.core", "llama-index"),
        ("haystack", "haystack", "haystack"),
    ],
)
def test_a_missing_library_error_names_the_extra(module, package, extra):
    code = f"""
import sys
sys.modules[{package.partition(".")[0]!r}] = None
from d2llm.core.errors import MissingExtraError
try:
    import d2llm.integrations.{module}
except MissingExtraError as error:
    print(error)
"""
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert f"needs the package '{package}'" in output
    assert "pip install" in output
    assert f"'d2llm[{extra}]'" in output
