"""Learned words (SPLADE, DSR): the weights by a loop over tokens, the regulariser, and what an index makes of them."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from d2llm.core.errors import InputError
from d2llm.core.types import Passage
from d2llm.methods.losses.flops import flops
from d2llm.methods.poolings.splade import SpladePooling, best_of_slices
from d2llm.models.document_expansion import LearnedWords
from d2llm.models.student import Student
from d2llm.recipe import InteractionConfig, Pooling, Recipe
from d2llm.retrieval.index import Index
from d2llm.store.bm25 import WordIndex
from fake_models import FakeStudent
from tiny_models import TEXTS, tiny_student_config, write_tiny_model

QUERY = "cats and dogs"


def splade(model: Path, **settings: int) -> Student:
    config = tiny_student_config(model).model_copy(
        update={"pooling": Pooling.of({"kind": "splade", **settings}), "interaction": InteractionConfig(head="product")}
    )
    student = Student.create(config, device="cpu", dtype="float32")
    student.fit_pooling(TEXTS)
    return student


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Student:
    return splade(write_tiny_model(tmp_path_factory.mktemp("model") / "bert", "bert"))


def test_a_weight_is_the_most_that_a_token_makes_of_it(student: Student) -> None:
    pooling = student.pooling
    assert isinstance(pooling, SpladePooling)
    embeddings, map_, bias = (
        weights.detach().double().numpy() for weights in (pooling.embeddings, pooling.map.weight, pooling.bias)
    )
    found = student.encode_passages(TEXTS[:2]).vectors
    for text, row in zip(TEXTS[:2], found, strict=True):
        ids, mask = student.backbone.pad(student.tokenize([text], "passage").ids)
        with torch.no_grad():
            states = student.backbone(ids, mask)[0][mask].double().numpy()
        expected = np.zeros(len(embeddings))
        for state in states:
            mapped = map_ @ state + pooling.map.bias.detach().double().numpy()
            for token, embedding in enumerate(embeddings):
                logit = float(embedding @ mapped) + bias[token]
                expected[token] = max(expected[token], math.log1p(max(0.0, logit)))
        np.testing.assert_allclose(row, expected, atol=1e-5)
        assert 0 < np.count_nonzero(row) < len(row)
    queries = student.encode_queries([QUERY]).vectors
    np.testing.assert_allclose(student.query_vectors(queries), queries, rtol=1e-5)  # the inner product as it is


def test_products_of_the_best_of_slices_are_the_gated_ones() -> None:
    one, other = torch.rand(2, 1, 10, generator=torch.Generator().manual_seed(0))
    kept = [best_of_slices(weights, 4)[0] for weights in (one, other)]
    expected = 0.0
    for start in range(0, 10, 3):  # values and places of the largest of each slice, and the gate
        (value, place), (value_, place_) = (
            max((float(value), -index) for index, value in enumerate(weights[0, start : start + 3]))
            for weights in (one, other)
        )
        expected += value * value_ * (place == place_)
    assert float(kept[0] @ kept[1]) == pytest.approx(expected)
    assert [int(weights.count_nonzero()) for weights in kept] == [4, 4]


def test_flops_are_squares_of_mean_weights() -> None:
    assert flops(torch.tensor([[1.0, 0.0, 2.0], [3.0, 0.0, 0.0]])).item() == 2**2 + 1**2
    for recipe, remedy in (
        ({"losses": {"flops": 0.1}}, 'set pooling = "splade"'),
        ({"student": {"pooling": "splade"}}, "the pooling splade and the head product need one another"),
    ):
        with pytest.raises(ValidationError, match=remedy):
            Recipe.model_validate(recipe)


def test_an_index_adds_the_product_of_the_weights_to_bm25(student: Student, tmp_path: Path) -> None:
    class Learned(FakeStudent):
        document_expansion = LearnedWords(student)

        def term_factors(self, queries):
            return Student.term_factors(self, queries)  # type: ignore[arg-type]

        term_weights = None

    owner = Learned()
    passages = [Passage(str(n), text) for n, text in enumerate(TEXTS)]
    index = Index.create(tmp_path / "i", owner, vector_format="float32")
    index.upsert(passages[:3])
    index.upsert(passages[3:])
    plain = WordIndex.from_texts(TEXTS)
    vectors = owner.encode_passages(TEXTS).vectors
    products = student.encode_passages(TEXTS).vectors @ student.encode_queries([QUERY]).vectors[0]
    assert products.min() > 0
    words = plain.scores(plain.query(QUERY)) + products
    expected = owner.score(owner.encode_queries([QUERY]).vectors[0], vectors, "asymmetric") + 3.0 * words
    for exact in (False, True):
        ranking = index.search(QUERY, top_k=len(TEXTS), score_features={"bm25": 3.0}, exact=exact)
        scores = {result.passage.id: result.score for result in ranking.passages}
        assert [scores[passage.id] for passage in passages] == pytest.approx(expected.tolist(), rel=1e-3)
    assert ranking.certificate is not None
    assert ranking.certificate.proved == len(TEXTS)


def test_it_is_kept_in_the_folder_of_the_student_that_has_the_words(student: Student, tmp_path: Path) -> None:
    model = Path(student.config.backbone.model)
    owner = Student.create(tiny_student_config(model), device="cpu", dtype="float32")
    with pytest.raises(InputError, match="come from a student with the pooling splade"):
        LearnedWords(owner)
    owner.document_expansion = LearnedWords(student)
    owner.save(tmp_path / "owner")
    loaded = Student.load(tmp_path / "owner", device="cpu", dtype="float32")
    assert loaded.term_factors([QUERY]) == owner.term_factors([QUERY])
    assert isinstance(loaded.document_expansion, LearnedWords)
    assert loaded.document_expansion.fingerprint == student.fingerprint
    words = [
        part.words(np.zeros(0, np.float32), TEXTS[:1]) for part in (loaded.document_expansion, owner.document_expansion)
    ]
    assert words[0] == words[1]
