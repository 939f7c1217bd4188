"""Score features of words and windows in a score: the weighted sum, its upper bound, and its use in a search."""

from __future__ import annotations

import numpy as np
import pytest

from d2llm.core.errors import InputError
from d2llm.core.types import PART_KINDS, Passage
from d2llm.models.row_features import RowFeatures
from d2llm.models.score_features import FeatureWeights, WordsFactor
from d2llm.retrieval.index import Index
from fake_models import FakeStudent
from feature_rows import FeatureRows
from searching import search

TEXTS = [
    "a rare gem. It is blue.",
    "the common word. Another common sentence. And the gem at the end.",
    "common common common",
    "",
    "nothing of it",
]
TERMS = {"bm25": 0.5, "bm25_fraction": 3.0, "window_bm25": 0.25, "window_bm25_fraction": 1.5}
WEIGHTS = FeatureWeights(terms=TERMS)


NEAREST_SLOPE = 0.05


def all_bounds(score_features, num_rows):
    """The bounds of the first rows, all of which are of interest."""
    return score_features.bounds(np.arange(num_rows), lambda words: np.full(len(words), -np.inf, np.float32))


class NearestStudent(FakeStudent):
    """A student whose words count more, the nearer the nearest passage is."""

    def feature_weights(self, task, *, stored=PART_KINDS):
        factor = WordsFactor(slopes=(0.0,) * 4, offset=0.0, lowest=-9.0, highest=9.0, nearest_slope=NEAREST_SLOPE)
        return FeatureWeights(terms=TERMS, words_factor=factor)


class WordyStudent(FakeStudent):
    """A student whose score counts words in one task."""

    def feature_weights(self, task, *, stored=PART_KINDS):
        return WEIGHTS if task == "asymmetric" else FeatureWeights()


@pytest.fixture(scope="module")
def words() -> FeatureRows:
    return FeatureRows(TEXTS)


@pytest.mark.parametrize("query", ["rare gem", "common common gem", "zebra", "?"])
def test_score_features_is_the_weighted_sum_of_its_scores(words, query):
    score_features = RowFeatures(words, query, WEIGHTS, None)
    query_words = words.words.query(query)
    passages, windows = words.words.score(query_words, np.arange(5))
    limit = query_words.limit or 1.0
    expected = 0.5 * passages + 3 * passages / limit + 0.25 * windows + 1.5 * windows / limit
    np.testing.assert_allclose(score_features(np.arange(5)), expected, rtol=1e-5)
    np.testing.assert_array_equal(score_features(np.array([4, 0])), score_features(np.arange(5))[[4, 0]])


def test_words_factor_scales_words_but_not_windows(words):
    rows, factor = np.arange(5), WordsFactor(slopes=(0.3, -0.2, 1.0, -2.0), offset=0.4, lowest=-1.0, highest=2.0)
    terms = {**TERMS, "window_vectors": 0.5}
    vectors = np.ones((5, 4), np.float32)
    windowed = FeatureRows(TEXTS, [vectors[:0]] * 5, vectors)
    for query in ("rare gem", "common gem zebra", "gem"):
        exponent = 0.4 + words.words.query(query).statistics @ np.array([0.3, -0.2, 1.0, -2.0])
        assert -1 < exponent < 2
        plain = RowFeatures(windowed, query, FeatureWeights(terms=terms), vectors[0]).by_kind(rows)
        score_features = RowFeatures(windowed, query, FeatureWeights(terms=terms, words_factor=factor), vectors[0])
        parts = score_features.by_kind(rows)
        np.testing.assert_allclose(parts.words, np.exp(exponent) * plain.words, rtol=1e-5)
        np.testing.assert_array_equal(parts.windows, plain.windows)  # the factor applies to words only
        np.testing.assert_array_equal(score_features(rows), parts.words + parts.windows)
        assert (score_features(rows) <= all_bounds(score_features, 5)).all()


def test_words_factor_is_clipped_to_its_fitted_range():
    factor = WordsFactor(slopes=(1.0, 0.0, 0.0, 0.0), offset=0.0, lowest=-0.5, highest=2.0)
    factors = [factor(np.array([value, 9, 9, 9], np.float32)) for value in (-8, 0, 1, 8)]
    assert factors == pytest.approx([np.exp(-0.5), 1, np.e, np.exp(2)])


def test_words_count_less_where_a_passage_is_near(words):
    factor = WordsFactor(slopes=(0.0,) * 4, offset=0.4, lowest=-3.0, highest=2.0, nearest_slope=-0.1)
    weights = FeatureWeights(terms=TERMS, words_factor=factor)
    assert weights.needs_nearest
    assert not FeatureWeights(terms={"window_vectors": 1.0}, words_factor=factor).needs_nearest
    plain = RowFeatures(words, "rare gem", WEIGHTS, None)(np.arange(5))
    for nearest, exponent in ((5.0, -0.1), (-2.0, 0.6), (1000.0, -3.0), (-1000.0, 2.0)):
        score_features = RowFeatures(words, "rare gem", weights, None, nearest=nearest)
        np.testing.assert_allclose(score_features(np.arange(5)), np.exp(exponent) * plain, rtol=1e-5)


def test_the_best_window_counts_by_its_inner_product():
    vectors = np.eye(4, dtype=np.float32)
    windows = [2 * vectors[:2], vectors[2:], vectors[:0], -vectors[:3]]
    rows = FeatureRows(TEXTS[:4], windows, vectors)
    dot_query = np.array([0.5, 3.0, 1.0, -2.0], np.float32)
    score_features = RowFeatures(rows, "zebra", FeatureWeights(terms={"window_vectors": 0.5}), dot_query)
    # The third row has no windows, so its own vector counts.
    np.testing.assert_allclose(score_features(np.arange(4)), [3.0, 0.5, 0.5, -0.25])
    np.testing.assert_array_equal(score_features(np.array([3, 0])), score_features(np.arange(4))[[3, 0]])
    np.testing.assert_array_equal(all_bounds(score_features, 4), score_features(np.arange(4)))
    parts = score_features.by_kind(np.arange(4))
    assert parts.words is None
    np.testing.assert_array_equal(parts.windows, score_features(np.arange(4)))


def test_no_row_exceeds_its_bound():
    rng = np.random.default_rng(0)
    vocabulary = [f"w{n}" for n in range(12)]
    for seed in range(200):
        texts = [
            ". ".join(" ".join(rng.choice(vocabulary, rng.integers(1, 6))) for _ in range(rng.integers(1, 6))).upper()
            for _ in range(rng.integers(1, 30))
        ]
        words = FeatureRows(texts)
        names = rng.choice(list(TERMS), rng.integers(1, 5), replace=False)
        weights = {str(name): float(rng.exponential()) for name in names}
        score_features = RowFeatures(
            words, " ".join(rng.choice(vocabulary, rng.integers(1, 8))), FeatureWeights(terms=weights), None
        )
        values, bounds = score_features(np.arange(len(texts))), all_bounds(score_features, len(texts))
        assert (values <= bounds).all(), seed
        if not {"window_bm25", "window_bm25_fraction"} & weights.keys():
            np.testing.assert_array_equal(values, bounds)


class TestSearch:
    @pytest.fixture(scope="class")
    @classmethod
    def index(cls, tmp_path_factory) -> Index:
        index = Index.create(tmp_path_factory.mktemp("wordy") / "index", WordyStudent())
        index.upsert([Passage(f"p{n}", text or "of no words in the query") for n, text in enumerate(TEXTS)])
        return index

    def test_scores_are_vector_scores_plus_score_features(self, index):
        (plain,) = search(index.view, FakeStudent(), ["rare gem"], sources=("vectors", "bm25"))
        wordy = index.search("rare gem")
        score_features = RowFeatures(index.unsharded_view, "rare gem", WEIGHTS, None)
        feature_scores = {
            name: float(score_features(index.view.rows([name]))[0]) for name in ("p0", "p1", "p2", "p3", "p4")
        }
        vector_scores = {hit.passage.id: hit.score for hit in plain.passages}
        assert {hit.passage.id: hit.score for hit in wordy.passages} == pytest.approx(
            {name: vector_scores[name] + feature_scores[name] for name in vector_scores}
        )

    def test_bm25_proposes_candidates_too(self, index):
        ranking = index.search("rare gem", num_candidates=1, top_k=1, explain=True)
        explanation = ranking.passages[0].explanation
        assert explanation.source_ranks["bm25"] == 1
        assert explanation.lexical > 0
        assert explanation.dot + explanation.interaction + explanation.lexical == pytest.approx(
            ranking.passages[0].score
        )
        vectors_only = index.search("rare gem", num_candidates=1, top_k=1, sources=("vectors",), explain=True)
        assert "bm25" not in vectors_only.passages[0].explanation.source_ranks

    def test_the_other_task_counts_no_words(self, index):
        ranking = index.search("rare gem", task="symmetric", explain=True)
        assert all(hit.explanation.lexical is None for hit in ranking.passages)
        assert all("bm25" not in hit.explanation.source_ranks for hit in ranking.passages)

    @pytest.mark.parametrize("query", ["rare gem", "common", "zebra", "it is blue gem common"])
    def test_an_exact_search_proves_the_same_ranking(self, index, query):
        ranking = index.search(query, top_k=3)
        exact = index.search(query, top_k=3, exact=True)
        assert [hit.passage.id for hit in exact.passages] == [hit.passage.id for hit in ranking.passages]
        assert exact.certificate.proved == 3
        with pytest.raises(InputError, match="leave out hybrid and sources"):
            index.search(query, exact=True, sources=("vectors", "bm25"))

    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"exact": True},
            {"sources": ("bm25",)},
            {"filter": "kind = 'odd'"},
            {"filter": "kind = 'odd'", "exact": True},
            {"filter": "kind = 'odd'", "sources": ("bm25",)},
        ],
        ids=str,
    )
    def test_the_nearest_passage_is_that_of_all_that_may_be_found(self, tmp_path, options):
        index, student = Index.create(tmp_path / "index", NearestStudent()), FakeStudent()
        kinds = ["odd" if n % 2 else "even" for n in range(len(TEXTS))]
        index.upsert(
            [
                Passage(f"p{n}", text or "of no words in the query", metadata={"kind": kinds[n]})
                for n, text in enumerate(TEXTS)
            ]
        )
        admitted = [n for n, kind in enumerate(kinds) if "filter" not in options or kind == "odd"]
        rows = index.view.rows([f"p{n}" for n in admitted])
        for query in ("rare gem", "common gem"):
            vector = student.encode_queries([query]).vectors
            own = student.score(vector[0], index.view.vectors(rows), "asymmetric")
            nearest = (index.view.vectors(rows) @ student.query_vectors(vector, "asymmetric")[0]).max()
            assert abs(NEAREST_SLOPE * nearest) < 9
            score_features = RowFeatures(index.unsharded_view, query, WEIGHTS, None)(rows) * np.exp(
                NEAREST_SLOPE * nearest
            )
            expected = {f"p{n}": score for n, score in zip(admitted, own + score_features, strict=True)}
            ranking = index.search(query, explain=True, **options)
            scores = {hit.passage.id: hit.score for hit in ranking.passages}
            assert scores
            assert scores == pytest.approx({name: expected[name] for name in scores}, rel=1e-5)
            if "sources" not in options:
                assert scores.keys() == expected.keys()
            lexical = {hit.passage.id: hit.explanation.lexical for hit in ranking.passages}
            by_name = dict(zip([f"p{n}" for n in admitted], score_features, strict=True))
            assert lexical == pytest.approx({name: by_name[name] for name in lexical}, rel=1e-5)
        nothing = index.search("rare gem", **({**options, "filter": "kind = 'odd' and kind = 'even'"}))
        assert nothing.passages == ()

    def test_queries_searched_together_have_a_nearest_passage_each(self, tmp_path):
        index = Index.create(tmp_path / "index", NearestStudent())
        index.upsert([Passage(f"p{n}", text or "of no words in the query") for n, text in enumerate(TEXTS)])
        together = index.search(["rare gem", "common", "zebra"])
        for query, ranking in zip(("rare gem", "common", "zebra"), together, strict=True):
            alone = index.search(query)
            assert [hit.score for hit in alone.passages] == pytest.approx([hit.score for hit in ranking.passages])
