"""Words added to passages: which ones, by hand, and BM25 with them."""

from __future__ import annotations

import numpy as np
import pytest
from passage_expansion import by_neighbours, by_queries, counts_of, fit_likely, with_added
from passage_term_weights import Measured, PassageWords, bm25, fractions
from scipy.sparse import csr_array

TERMS = ("cat", "mat", "dog", "pond")
COUNTS = np.array([[2, 1, 0, 0], [1, 0, 0, 0], [0, 0, 1, 1]], np.float64)  # of each passage
DIM = 3


@pytest.fixture
def measured() -> Measured:
    """The first two passages have similar vectors; train queries ask for the first with a word that it lacks."""
    rows, terms = np.nonzero(COUNTS)
    vectors = np.array([[1, 0, 0], [0.9, 0.1, 0.1], [0, 0, 1]], np.float32)
    words = PassageWords(
        {term: column for column, term in enumerate(TERMS)},
        rows,
        terms,
        COUNTS[rows, terms],
        np.zeros((len(rows), DIM), np.float16),
        np.ones(len(rows), bool),
        vectors,
    )
    times = csr_array(np.array([[0, 0, 1, 0], [0, 1, 0, 0]], np.float64))
    asked = {
        0: [frozenset({"dog", "cat"}), frozenset({"dog"})],
        1: [frozenset({"dog"})],
        2: [frozenset({"pond"}), frozenset({"pond", "cat"})],
    }
    return Measured("tiny", ["a", "b", "c"], words, {}, times, np.zeros((2, 3), np.float32), None, asked, 5)


def words_added(measured, added, row):
    rows, terms, counts = added
    return {TERMS[term]: count for term, count in zip(terms[rows == row], counts[rows == row], strict=True) if count}


def test_neighbours_share_their_words(measured, monkeypatch):
    monkeypatch.setattr("passage_expansion.NUM_NEIGHBOURS", 1)
    added = by_neighbours(measured)
    assert words_added(measured, added, 0) == {}  # its neighbour has nothing else
    assert words_added(measured, added, 1) == {"mat": 1}
    assert words_added(measured, added, 2) == {"cat": 1}


def test_queries_give_words_to_passages_with_such_vectors(measured, monkeypatch):
    monkeypatch.setattr("passage_expansion.NUM_FOLDS", 3)
    likely = fit_likely(measured)
    added = by_queries(measured, likely)
    assert [TERMS[term] for term in likely.terms] == ["cat", "dog", "pond"]  # no train query has "mat"
    first, second = (words_added(measured, added, row) for row in range(2))
    assert max(first, key=first.__getitem__) == max(second, key=second.__getitem__) == "dog"
    assert "cat" not in first  # which the passage has


def test_bm25_with_added_words(measured, monkeypatch):
    monkeypatch.setattr("passage_expansion.NUM_NEIGHBOURS", 1)
    added = by_neighbours(measured)
    words = measured.words
    plain = bm25(words, measured.times, fractions(words, words.counts))
    assert with_added(measured, added, 0, 1.0) == pytest.approx(plain)
    with_one = with_added(measured, added, 5, 1.0)
    assert plain[1].tolist() == pytest.approx([plain[1, 0], 0, 0])
    assert with_one[1, 1] > 0  # "mat" of its neighbour
    assert with_one[0] == pytest.approx([0, 0, with_one[0, 2]])
    assert counts_of(measured).toarray().tolist() == COUNTS.tolist()
