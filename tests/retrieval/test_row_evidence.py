"""What words add to a score: the sum, its bound, and where it counts in a search."""

from __future__ import annotations

import numpy as np
import pytest

from d2llm.core.errors import InputError
from d2llm.core.types import Passage
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

    def evidence_weights(self, task, *, windows=True):
        return WEIGHTS if task == "asymmetric" else EvidenceWeights()


@pytest.fixture(scope="module")
def words() -> EvidenceRows:
    return EvidenceRows(TEXTS)


@pytest.mark.parametrize("query", ["rare gem", "common common gem", "zebra", "?"])
def test_the_sum_is_that_of_the_weighted_scores(words, query):
    evidence = RowEvidence(words, query, WEIGHTS, None)
    asked = words.words.query(query)
    passages, windows = words.words.score(asked, np.arange(5))
    limit = asked.limit or 1.0
    expected = 0.5 * passages + 3 * passages / limit + 0.25 * windows + 1.5 * windows / limit
    np.testing.assert_allclose(evidence(np.arange(5)), expected, rtol=1e-5)
    np.testing.assert_array_equal(evidence(np.array([4, 0])), evidence(np.arange(5))[[4, 0]])


def test_the_query_says_what_its_words_count_for(words):
    rows, factor = np.arange(5), WordsFactor(slopes=(0.3, -0.2, 1.0, -2.0), offset=0.4, lowest=-1.0, highest=2.0)
    terms = {**TERMS, "window_vectors": 0.5}
    own = np.ones((5, 4), np.float32)
    windowed = EvidenceRows(TEXTS, [own[:0]] * 5, own)
    for query in ("rare gem", "common gem zebra", "gem"):
        exponent = 0.4 + words.words.query(query).statistics @ np.array([0.3, -0.2, 1.0, -2.0])
        assert -1 < exponent < 2
        plain = RowEvidence(windowed, query, EvidenceWeights(terms=terms), own[0]).parts(rows)
        evidence = RowEvidence(windowed, query, EvidenceWeights(terms=terms, words_factor=factor), own[0])
        parts = evidence.parts(rows)
        np.testing.assert_allclose(parts.words, np.exp(exponent) * plain.words, rtol=1e-5)
        np.testing.assert_array_equal(parts.windows, plain.windows)  # vectors are not words
        np.testing.assert_array_equal(evidence(rows), parts.words + parts.windows)
        assert (evidence(rows) <= evidence.bounds(5)).all()


def test_a_factor_stays_within_what_its_fit_has_seen():
    factor = WordsFactor(slopes=(1.0, 0.0, 0.0, 0.0), offset=0.0, lowest=-0.5, highest=2.0)
    found = [factor(np.array([value, 9, 9, 9], np.float32)) for value in (-8, 0, 1, 8)]
    assert found == pytest.approx([np.exp(-0.5), 1, np.e, np.exp(2)])


def test_the_best_window_counts_by_its_inner_product():
    own = np.eye(4, dtype=np.float32)
    windows = [2 * own[:2], own[2:], own[:0], -own[:3]]
    rows = EvidenceRows(TEXTS[:4], windows, own)
    anchor = np.array([0.5, 3.0, 1.0, -2.0], np.float32)
    evidence = RowEvidence(rows, "zebra", EvidenceWeights(terms={"window_vectors": 0.5}), anchor)
    np.testing.assert_allclose(evidence(np.arange(4)), [3.0, 0.5, 0.5, -0.25])  # the third row has none but its own
    np.testing.assert_array_equal(evidence(np.array([3, 0])), evidence(np.arange(4))[[3, 0]])
    np.testing.assert_array_equal(evidence.bounds(4), evidence(np.arange(4)))
    parts = evidence.parts(np.arange(4))
    assert parts.words is None
    np.testing.assert_array_equal(parts.windows, evidence(np.arange(4)))


def test_no_row_is_above_its_bound():
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
    def index(self, tmp_path_factory) -> Index:
        made = Index.create(tmp_path_factory.mktemp("wordy") / "index", WordyStudent())
        made.upsert([Passage(f"p{n}", text or "of no words in the query") for n, text in enumerate(TEXTS)])
        return made

    def test_scores_are_those_of_vectors_and_words(self, index):
        (plain,) = search(index.view, FakeStudent(), ["rare gem"], sources=("vectors", "bm25"))
        (wordy,) = index.search("rare gem")
        evidence = RowEvidence(index.view, "rare gem", WEIGHTS, None)
        added = {name: float(evidence(index.view.rows([name]))[0]) for name in ("p0", "p1", "p2", "p3", "p4")}
        own = {place.passage.id: place.score for place in plain.passages}
        assert {place.passage.id: place.score for place in wordy.passages} == pytest.approx(
            {name: own[name] + added[name] for name in own}
        )

    def test_words_propose_too(self, index):
        (found,) = index.search("rare gem", num_candidates=1, top_k=1, explain=True)
        why = found.passages[0].explanation
        assert why.source_ranks["bm25"] == 1
        assert why.lexical > 0
        assert why.anchor + why.interaction + why.lexical == pytest.approx(found.passages[0].score)
        (alone,) = index.search("rare gem", num_candidates=1, top_k=1, sources=("vectors",), explain=True)
        assert "bm25" not in alone.passages[0].explanation.source_ranks

    def test_the_other_task_counts_no_words(self, index):
        (found,) = index.search("rare gem", task="symmetric", explain=True)
        assert all(place.explanation.lexical is None for place in found.passages)
        assert all("bm25" not in place.explanation.source_ranks for place in found.passages)

    @pytest.mark.parametrize("query", ["rare gem", "common", "zebra", "it is blue gem common"])
    def test_an_exact_search_proves_the_same(self, index, query):
        (found,) = index.search(query, top_k=3)
        (exact,) = index.search(query, top_k=3, exact=True)
        assert [place.passage.id for place in exact.passages] == [place.passage.id for place in found.passages]
        assert exact.certificate.proved == 3
        with pytest.raises(InputError, match="leave out hybrid and sources"):
            index.search(query, exact=True, sources=("vectors", "bm25"))
