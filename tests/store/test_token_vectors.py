"""Token embeddings in an index: written with the passages, kept through every change, and part of the score."""

from __future__ import annotations

import numpy as np
import pytest

from d2llm.core.errors import DataFormatError, IndexMismatchError, InputError
from d2llm.core.types import Passage
from d2llm.models.tokens import TokenVectors
from d2llm.retrieval.index import Index
from d2llm.retrieval.search import Searcher
from fake_models import FakeStudent, TokenStudent
from feature_rows import part_vectors

TEXTS = {
    "gem": "A rare gem is here.",
    "river": "It was found in the river.",
    "empty": " ",
    "same": "gem gem gem",
    "long": "The start of it. " * 30,
}


def passages(**texts):
    return [Passage(name, text) for name, text in texts.items()]


@pytest.fixture
def index(tmp_path):
    index = Index.create(tmp_path / "index", TokenStudent(), vector_format="float32", token_vectors="float32")
    index.upsert(passages(**TEXTS))
    return index


def expected_scores(index, text, names):
    """Computed from the texts: the mean, over the query's words, of the highest cosine with a word of the passage."""
    student = index.student
    query = student.words(text)
    scores = []
    for passage in index.get(names):
        words = student.words(passage.full_text)
        cosines = query @ words.T / student.token_dim
        scores.append(float(cosines.max(axis=1).mean()) if words.size else 0.0)
    return scores


def assert_tokens(index, names=tuple(TEXTS)):
    query = index.student.words("a rare gem")
    stored = index.unsharded_view.best_tokens(query / query.size, index.view.rows(names))
    np.testing.assert_allclose(stored, expected_scores(index, "a rare gem", names), rtol=1e-5, atol=1e-6)


def test_each_passage_has_the_tokens_of_its_text(index):
    counts = index.unsharded_view.tokens.counts(index.view.rows(list(TEXTS))).tolist()
    assert counts == [5, 6, 0, 3, 50]
    assert_tokens(index)
    facts = index.stats()
    assert facts.token_format == "float32"
    assert facts.token_bytes > sum(counts) * 4 * 12


def test_the_score_includes_tokens_and_the_exact_search_agrees(index):
    words = index.search("a rare gem", score_features={"bm25": 0.25})
    ranking = index.search("a rare gem", explain=True)
    names = [hit.passage.id for hit in ranking.passages]
    word_scores = {hit.passage.id: hit.score for hit in words.passages}
    tokens = dict(zip(names, expected_scores(index, "a rare gem", names), strict=True))
    for hit in ranking.passages:
        assert hit.score == pytest.approx(word_scores[hit.passage.id] + 5 * tokens[hit.passage.id], rel=1e-4)
        why = hit.explanation
        assert why.tokens == pytest.approx(5 * tokens[hit.passage.id], rel=1e-4, abs=1e-6)
        assert why.dot + why.interaction + why.lexical + why.tokens == pytest.approx(hit.score, rel=1e-4)
    exact = index.search("a rare gem", exact=True, top_k=3)
    assert [hit.passage.id for hit in exact.passages] == names[:3]
    assert exact.certificate.proved == 3


def test_damaged_tokens_are_found_and_encoded_again(index):
    path = next(index.folder.glob("token-vectors-*.bin"))
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    reopened = Index.open(index.folder, TokenStudent())
    with pytest.raises(DataFormatError, match=r"token-vectors.*encodes them again"):
        reopened.search("a rare gem")
    assert any("token-vectors" in problem for problem in reopened.verify().problems)
    assert any("encoded again" in problem for problem in reopened.verify(repair=True).problems)
    assert_tokens(reopened)
    assert reopened.verify().problems == []


def test_damage_after_the_first_search_is_found_by_verify(index):
    index.search("a rare gem")
    path = next(index.folder.glob("token-vectors-*.bin"))
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    index.refresh()
    index.search("a rare gem")  # what was intact before is not compared again
    assert any("token-vectors" in problem for problem in index.verify().problems)
    with pytest.raises(DataFormatError, match="token-vectors"):
        Index.open(index.folder, TokenStudent()).search("a rare gem")


def test_a_repair_needs_the_projection_that_made_the_tokens(index):
    next(index.folder.glob("token-places-*.bin")).unlink()
    with pytest.raises(IndexMismatchError, match="use the student that made the index"):
        Index.open(index.folder, TokenStudent("second")).verify(repair=True)
    assert Index.open(index.folder, TokenStudent()).verify(repair=True).problems
    assert_tokens(Index.open(index.folder, TokenStudent()))


def test_vectors_of_queries_may_be_given(index):
    student = index.student
    read = student.encode_with_tokens(["a rare gem", "river"], "query")
    searcher = Searcher(index.view, student)
    expected = searcher.rank(["a rare gem", "river"])
    given = searcher.rank(["a rare gem", "river"], vectors=read.vectors, tokens=read.tokens.split())
    some = searcher.rank(["a rare gem", "river"], vectors=read.vectors, tokens=[None, read.tokens.split()[1]])
    for one, two, three in zip(expected, given, some, strict=True):
        scores = [[hit.score for hit in ranking.passages] for ranking in (one, two, three)]
        assert scores[0] == scores[1] == scores[2]


def test_an_index_without_tokens_uses_other_weights(tmp_path):
    index = Index.create(tmp_path / "plain", TokenStudent(), token_vectors=None)
    index.upsert(passages(**TEXTS))
    assert index.stats().token_format is None
    ranking = index.search("a rare gem", explain=True)
    assert all(hit.explanation.tokens is None for hit in ranking.passages)
    with pytest.raises(InputError, match="stores no token embeddings"):
        index.search("gem", score_features={"maxsim": 1.0})


def test_a_new_index_stores_tokens_if_the_score_counts_them(tmp_path):
    assert Index.create(tmp_path / "auto", TokenStudent()).stats().token_format == "int4"
    assert Index.create(tmp_path / "symmetric", TokenStudent(), task="symmetric").stats().token_format is None
    assert Index.create(tmp_path / "plain", FakeStudent()).stats().token_format is None
    with pytest.raises(InputError, match="has no token embeddings"):
        Index.create(tmp_path / "refused", FakeStudent(), token_vectors="int4")


def test_tokens_of_another_projection_are_refused(index):
    other = Index.open(index.folder, TokenStudent("second"))
    with pytest.raises(IndexMismatchError, match=r"projection first, but the student has second"):
        other.search("gem")
    with pytest.raises(IndexMismatchError, match="projection"):
        other.upsert(passages(new="A text."))
    assert len(other.search("gem", score_features={}).passages) == len(TEXTS)
    plain = Index.open(index.folder, FakeStudent())
    with pytest.raises(InputError, match="this student has no token embeddings"):
        plain.search("gem", score_features={"maxsim": 1.0})


@pytest.mark.parametrize("vector_format", ["int8", "int4", "int3", "binary", "float32", "bfloat16"])
def test_sums_do_not_depend_on_the_other_rows(vector_format):
    rng = np.random.default_rng(0)
    rows = [rng.standard_normal((count, 64)).astype(np.float32) for count in rng.integers(0, 90, 200)]
    rows = [each * (8 / np.linalg.norm(each, axis=1, keepdims=True)) for each in rows]
    parts = part_vectors(rows, 64, vector_format)
    query = rng.standard_normal((9, 64)).astype(np.float32)
    together = parts.sum_of_best(query, np.arange(200))
    alone = [float(parts.sum_of_best(query, np.array([row]))[0]) for row in range(200)]
    assert together.tolist() == alone
    order = rng.permutation(200)
    assert parts.sum_of_best(query, order).tolist() == together[order].tolist()
    if vector_format != "binary":
        exact = [float((query @ each.T).max(axis=1).sum()) if len(each) else 0.0 for each in rows]
        tolerance = {"float32": 1e-5, "bfloat16": 0.01, "int8": 0.02, "int4": 0.1, "int3": 0.2}[vector_format]
        np.testing.assert_allclose(together, exact, rtol=tolerance, atol=tolerance * 60)


def test_whole_queries_keep_every_sum_below_what_float32_holds():
    """The worst case: queries and rows with all of their energy where the levels are highest."""
    rng = np.random.default_rng(1)
    query = 1e3 * np.sign(rng.standard_normal((3, 64))).astype(np.float32)
    rows = [query[:1] * (8 / np.linalg.norm(query[:1])), np.eye(64, dtype=np.float32) * 8]
    for vector_format in ("int8", "int4", "int3", "binary"):
        parts = part_vectors(rows, 64, vector_format)
        multiplier = make_multiplier(parts, query)
        whole = multiplier.multiply(parts.codes)
        assert np.array_equal(whole, np.round(whole))
        assert np.abs(whole).max() < 2**24
        assert multiplier.scale > 0
        if multiplier.whole is not None:  # whatever the rows, each of which has 64 numbers of so many bits
            assert int(np.abs(multiplier.whole).max()) * (2**multiplier.bits - 1) * 64 < 2**24
    assert parts.sum_of_best(query[:0], np.arange(2)).tolist() == [0.0, 0.0]


def make_multiplier(parts, query):
    return parts._format.multiplier(query)


def test_token_vectors_split_again():
    texts = [np.ones((2, 3), np.float32), np.zeros((0, 3), np.float32), np.full((1, 3), 2, np.float32)]
    joined = TokenVectors.join(texts, 3)
    assert [part.tolist() for part in joined.split()] == [part.tolist() for part in texts]
    assert TokenVectors.join([], 3).split() == []
