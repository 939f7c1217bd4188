"""Evidence of words and windows in a score: the weighted sum, its upper bound, and its use in a search."""

from __future__ import annotations

import numpy as np
import pytest

from d2llm.core.errors import InputError
from d2llm.core.types import PART_KINDS, Passage
from d2llm.models.evidence import EvidenceWeights, WordsFactor
from d2llm.retrieval.index import Index
from d2llm.retrieval.row_evidence import RowEvidence
from d2llm.retrieval.search import search
from evidence_rows import EvidenceRows
from fake_models import FakeStudent

TEXTS = [
    "a rare gem. It is blue.",
    "the common word. Another common sentence. And the gem at the end.",
    "common common common",
    "",
    "nothing of it",
]
TERMS = {"words": 0.5, "words_share": 3.0, "window_words": 0.25, "window_words_share": 1.5}
WEIGHTS = EvidenceWeights(terms=TERMS)


class WordyStudent(FakeStudent):
    """A student whose score counts words in one task."""

    def evidence_weights(self, task, *, stored=PART_KINDS):
        return WEIGHTS if task == "asymmetric" else EvidenceWeights()


@pytest.fixture(scope="module")
def words() -> EvidenceRows:
    return EvidenceRows(TEXTS)


@pytest.mark.parametrize("query", ["rare gem", "common common gem", "zebra", "?"])
def test_evidence_is_the_weighted_sum_of_its_scores(words, query):
    evidence = RowEvidence(words, query, WEIGHTS, None)
    query_words = words.words.query(query)
    passages, windows = words.words.score(query_words, np.arange(5))
    limit = query_words.limit or 1.0
    expected = 0.5 * passages + 3 * passages / limit + 0.25 * windows + 1.5 * windows / limit
    np.testing.assert_allclose(evidence(np.arange(5)), expected, rtol=1e-5)
    np.testing.assert_array_equal(evidence(np.array([4, 0])), evidence(np.arange(5))[[4, 0]])


def test_words_factor_scales_words_but_not_windows(words):
    rows, factor = np.arange(5), WordsFactor(slopes=(0.3, -0.2, 1.0, -2.0), offset=0.4, lowest=-1.0, highest=2.0)
    terms = {**TERMS, "window_vectors": 0.5}
    vectors = np.ones((5, 4), np.float32)
    windowed = EvidenceRows(TEXTS, [vectors[:0]] * 5, vectors)
    for query in ("rare gem", "common gem zebra", "gem"):
        exponent = 0.4 + words.words.query(query).statistics @ np.array([0.3, -0.2, 1.0, -2.0])
        assert -1 < exponent < 2
        plain = RowEvidence(windowed, query, EvidenceWeights(terms=terms), vectors[0]).parts(rows)
        evidence = RowEvidence(windowed, query, EvidenceWeights(terms=terms, words_factor=factor), vectors[0])
        parts = evidence.parts(rows)
        np.testing.assert_allclose(parts.words, np.exp(exponent) * plain.words, rtol=1e-5)
        np.testing.assert_array_equal(parts.windows, plain.windows)  # the factor applies to words only
        np.testing.assert_array_equal(evidence(rows), parts.words + parts.windows)
        assert (evidence(rows) <= evidence.bounds(5)).all()


def test_words_factor_is_clipped_to_its_fitted_range():
    factor = WordsFactor(slopes=(1.0, 0.0, 0.0, 0.0), offset=0.0, lowest=-0.5, highest=2.0)
    factors = [factor(np.array([value, 9, 9, 9], np.float32)) for value in (-8, 0, 1, 8)]
    assert factors == pytest.approx([np.exp(-0.5), 1, np.e, np.exp(2)])


def test_the_best_window_counts_by_its_inner_product():
    vectors = np.eye(4, dtype=np.float32)
    windows = [2 * vectors[:2], vectors[2:], vectors[:0], -vectors[:3]]
    rows = EvidenceRows(TEXTS[:4], windows, vectors)
    anchor = np.array([0.5, 3.0, 1.0, -2.0], np.float32)
    evidence = RowEvidence(rows, "zebra", EvidenceWeights(terms={"window_vectors": 0.5}), anchor)
    # The third row has no windows, so its own vector counts.
    np.testing.assert_allclose(evidence(np.arange(4)), [3.0, 0.5, 0.5, -0.25])
    np.testing.assert_array_equal(evidence(np.array([3, 0])), evidence(np.arange(4))[[3, 0]])
    np.testing.assert_array_equal(evidence.bounds(4), evidence(np.arange(4)))
    parts = evidence.parts(np.arange(4))
    assert parts.words is None
    np.testing.assert_array_equal(parts.windows, evidence(np.arange(4)))


def test_no_row_exceeds_its_bound():
    rng = np.random.default_rng(0)
    vocabulary = [f"w{n}" for n in range(12)]
    for seed in range(200):
        texts = [
            ". ".join(" ".join(rng.choice(vocabulary, rng.integers(1, 6))) for _ in range(rng.integers(1, 6))).upper()
            for _ in range(rng.integers(1, 30))
        ]
        words = EvidenceRows(texts)
        names = rng.choice(list(TERMS), rng.integers(1, 5), replace=False)
        weights = {str(name): float(rng.exponential()) for name in names}
        evidence = RowEvidence(
            words, " ".join(rng.choice(vocabulary, rng.integers(1, 8))), EvidenceWeights(terms=weights), None
        )
        values, bounds = evidence(np.arange(len(texts))), evidence.bounds(len(texts))
        assert (values <= bounds).all(), seed
        if not {"window_words", "window_words_share"} & weights.keys():
            np.testing.assert_array_equal(values, bounds)


class TestSearch:
    @pytest.fixture(scope="class")
    @classmethod
    def index(cls, tmp_path_factory) -> Index:
        index = Index.create(tmp_path_factory.mktemp("wordy") / "index", WordyStudent())
        index.upsert([Passage(f"p{n}", text or "of no words in the query") for n, text in enumerate(TEXTS)])
        return index

    def test_scores_are_vector_scores_plus_evidence(self, index):
        (plain,) = search(index.view, FakeStudent(), ["rare gem"], sources=("vectors", "bm25"))
        (wordy,) = index.search("rare gem")
        evidence = RowEvidence(index.view, "rare gem", WEIGHTS, None)
        evidence_scores = {name: float(evidence(index.view.rows([name]))[0]) for name in ("p0", "p1", "p2", "p3", "p4")}
        vector_scores = {hit.passage.id: hit.score for hit in plain.passages}
        assert {hit.passage.id: hit.score for hit in wordy.passages} == pytest.approx(
            {name: vector_scores[name] + evidence_scores[name] for name in vector_scores}
        )

    def test_bm25_proposes_candidates_too(self, index):
        (ranking,) = index.search("rare gem", num_candidates=1, top_k=1, explain=True)
        explanation = ranking.passages[0].explanation
        assert explanation.source_ranks["bm25"] == 1
        assert explanation.lexical > 0
        assert explanation.anchor + explanation.interaction + explanation.lexical == pytest.approx(
            ranking.passages[0].score
        )
        (vectors_only,) = index.search("rare gem", num_candidates=1, top_k=1, sources=("vectors",), explain=True)
        assert "bm25" not in vectors_only.passages[0].explanation.source_ranks

    def test_the_other_task_counts_no_words(self, index):
        (ranking,) = index.search("rare gem", task="symmetric", explain=True)
        assert all(hit.explanation.lexical is None for hit in ranking.passages)
        assert all("bm25" not in hit.explanation.source_ranks for hit in ranking.passages)

    @pytest.mark.parametrize("query", ["rare gem", "common", "zebra", "it is blue gem common"])
    def test_an_exact_search_proves_the_same_ranking(self, index, query):
        (ranking,) = index.search(query, top_k=3)
        (exact,) = index.search(query, top_k=3, exact=True)
        assert [hit.passage.id for hit in exact.passages] == [hit.passage.id for hit in ranking.passages]
        assert exact.certificate.proved == 3
        with pytest.raises(InputError, match="leave out hybrid and sources"):
            index.search(query, exact=True, sources=("vectors", "bm25"))
