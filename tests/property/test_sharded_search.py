"""A sharded search ranks as a search of one index does, and as brute force does."""

from __future__ import annotations

from threading import Barrier

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d2llm.core.types import Passage
from d2llm.models.score_features import FeatureWeights, WordsFactor
from d2llm.retrieval import exact_search
from d2llm.retrieval.index import Index
from d2llm.retrieval.local_segment import LocalSearch, LocalSegment
from d2llm.retrieval.segments import IndexView
from d2llm.retrieval.shard import shard
from d2llm.store.bm25 import WordIndex
from examples import examples
from searching import search
from sharded_index import WORDS, BoundedStudent, random_passages, results_of

STUDENT = BoundedStudent()
FACTOR = WordsFactor(slopes=(0.2, 0.0, -0.5, 0.0), offset=0.1, lowest=-3.0, highest=3.0, nearest_slope=-0.3)
NOTHING_ADDED = {"bm25": 0.0}


@pytest.fixture(scope="module", params=[1, 4, 9])
def pair(request, tmp_path_factory):
    """An index after changes, and a sharded one after the same, of which some came before the sharding."""
    folder = tmp_path_factory.mktemp("sharded")
    one = Index.create(folder / "one", STUDENT, vector_format="float32", window_vectors="int3", token_vectors="int4")
    one.upsert(random_passages(24 if request.param == 9 else 120))
    one.delete([f"p{n}" for n in range(0, 120, 7)])
    shard(folder / "one", folder / "shards", request.param)
    several = Index.open(folder / "shards", STUDENT)
    changed = [Passage("p1", "quince. a new text", document_id="elsewhere"), Passage("p2", "pear", document_id="")]
    for index in (one, several):
        index.upsert([*changed, *random_passages(20, seed=1, start=200)])
        index.delete(["p3", "p9", "p205"])
        index.delete_documents(["d2"])
    assert len(one) == len(several)
    assert several.verify().problems == []
    sizes = [len(view) for view in several.view.segments]
    assert len(sizes) == request.param
    return one, several


@pytest.fixture(autouse=True)
def small_steps(monkeypatch):
    """Proofs before everything is scored."""
    for name, value in (("_FIRST_SCORED", 4), ("_MAX_SCORED", 8), ("_SCANS", (8, 16)), ("_SCAN_MULTIPLE", 2)):
        monkeypatch.setattr(exact_search, name, value)


queries = st.lists(st.sampled_from([*WORDS, "nowhere"]), min_size=1, max_size=4).map(" ".join)


@settings(max_examples=examples(40))
@given(
    text=queries,
    top_k=st.sampled_from([1, 3, 10, 60, 500]),
    condition=st.sampled_from([None, "year >= 2002", "year = 1999"]),
    score_features=st.sampled_from(
        [
            None,
            {},
            {"bm25": 1.0, "bm25_fraction": 2.0},
            {"window_bm25": 3.0},
            FeatureWeights(terms={"bm25": 1.0, "window_bm25": 0.5}, words_factor=FACTOR),
        ]
    ),
    how=st.sampled_from(
        [
            {},
            {"exact": True},
            {"sources": ("bm25",)},
            {"sources": ("vectors",), "num_candidates": 20},
            {"hybrid": 0.4, "num_candidates": 20},
            {"exact": True, "budget_ms": 1e6},
            {"group": "best"},
            {"group": "sum"},
            {"group": "sum", "num_candidates": 30, "sources": ("vectors",)},  # by words, candidates may tie
            {"mmr": 0.6},
            {"near_duplicates": 0.999},
            {"neighbours": 2},
        ]
    ),
)
def test_a_sharded_search_is_that_of_one_index(pair, text, top_k, condition, score_features, how):
    options = {"top_k": top_k, "filter": condition, "score_features": score_features, **how}
    if how.get("sources") == ("bm25",):
        options["num_candidates"] = 500  # of passages that tie by BM25, another one may be the last candidate
    expected, actual = (index.search(text, **options) for index in pair)
    assert [one.passage for one in actual.passages] == [one.passage for one in expected.passages]
    np.testing.assert_allclose(
        [score for _, score in results_of(actual)], [score for _, score in results_of(expected)], rtol=1e-5, atol=1e-5
    )
    for mine, other in zip(actual.passages, expected.passages, strict=True):
        assert (mine.before, mine.after) == (other.before, other.after)
        assert (mine.document is None) == (other.document is None)
    assert actual.selection == expected.selection
    assert actual.missing_shards == ()
    if expected.certificate is not None:
        proof, other = actual.certificate, expected.certificate
        assert proof.proved == other.proved == len(actual.passages) or actual.selection is not None
        assert proof.num_scored + proof.num_left == other.num_scored + other.num_left
        assert proof.kth_score == pytest.approx(other.kth_score, rel=1e-5)


@settings(max_examples=15)
@given(text=queries, top_k=st.sampled_from([1, 5, 30]), bound=st.sampled_from([0.0, 1.0, 8.0]))
def test_an_exact_search_is_brute_force(pair, text, top_k, bound):
    student = BoundedStudent()
    student.bound, student.weights = bound, {"bm25": 0.7}
    one, several = pair
    score_features = {"bm25": 0.7}
    passages = one.view.passages(one.view.live_rows())
    words = WordIndex.from_texts([passage.full_text for passage in passages])
    vector = student.encode_queries([text]).vectors[0]
    vectors = student.encode_passages([passage.full_text for passage in passages]).vectors
    scorer = student.prepare(vector, "asymmetric")
    # In the order in which an exact search adds, because single sums may be almost 0.
    added = vectors @ scorer.dot_query + np.float32(0.7) * words.scores(words.query(text))
    scores = added + np.float32(bound) * scorer.change(vectors)
    expected = sorted(zip(scores.tolist(), [p.id for p in passages], strict=True), key=lambda pair: (-pair[0], pair[1]))
    index = Index.open(several.folder, student)
    ranking = index.search(text, exact=True, top_k=top_k, score_features=score_features)
    np.testing.assert_allclose([score for _, score in results_of(ranking)], [s for s, _ in expected[:top_k]], rtol=1e-5)
    score_of = dict(zip([p.id for p in passages], scores.tolist(), strict=True))
    for passage_id, score in results_of(ranking):
        assert score == pytest.approx(score_of[passage_id], rel=1e-5)
    proof = ranking.certificate
    assert proof.proved == len(ranking.passages) == min(top_k, len(passages))
    assert proof.num_scored + proof.num_left == len(passages)
    left_out = [score for score, passage_id in expected if passage_id not in dict(results_of(ranking))]
    assert all(score <= proof.kth_score + 1e-6 * (1 + abs(proof.kth_score)) for score in left_out)


def test_several_queries_and_explanations_are_those_of_one_index(pair):
    texts = [f"{WORDS[n % 10]} {WORDS[n % 7]}" for n in range(40)]
    for options in ({"explain": True}, {"sources": ("vectors",), "score_features": {}, "explain": True}):
        for expected, actual in zip(*(index.search(texts, **options) for index in pair), strict=True):
            assert [one.passage.id for one in actual.passages] == [one.passage.id for one in expected.passages]
            for mine, other in zip(actual.passages, expected.passages, strict=True):
                assert mine.explanation.terms == other.explanation.terms
                for name in ("lexical", "tokens", "windows"):
                    value = getattr(other.explanation, name)
                    assert getattr(mine.explanation, name) == (value and pytest.approx(value, rel=1e-5))
                assert mine.explanation.source_ranks.keys() == other.explanation.source_ranks.keys()
                if "vectors" in other.explanation.source_ranks:
                    assert mine.explanation.source_ranks["vectors"] == other.explanation.source_ranks["vectors"]


class RemoteSegment(LocalSegment):
    """A shard that is searched as if it were in another process: certificates wait until all shards are asked."""

    is_remote = True
    all_asked: Barrier

    def begin_search(self, student, settings, task, weights, *, is_exact, cached):
        return WaitingSearch(self, student, settings, task, weights, is_exact=is_exact)


class WaitingSearch(LocalSearch):
    def certify(self, query, top_k, **options):
        self.view.all_asked.wait(timeout=30)
        return super().certify(query, top_k, **options)


@settings(max_examples=15)
@given(
    text=queries,
    top_k=st.sampled_from([1, 5, 30, 500]),
    bound=st.sampled_from([0.0, 1.0]),
    budget=st.none() | st.just(0),
)
def test_an_exact_search_asks_remote_shards_at_the_same_time(pair, text, top_k, bound, budget):
    student = BoundedStudent()
    student.bound = bound
    several = Index.open(pair[1].folder, student)
    remote = IndexView(
        several.storage,
        [RemoteSegment(store, corpus=lambda: remote.word_statistics) for store in several.storage.stores],
    )
    asked = Barrier(len(remote.segments))
    for view in remote.segments:
        view.all_asked = asked
    options = {"exact": True, "top_k": top_k, "score_features": {"bm25": 0.7}}
    expected = several.search(text, **options)
    (actual,) = search(remote, student, [text], budget_ms=budget, **options)
    proof, other = actual.certificate, expected.certificate
    assert proof.num_scored + proof.num_left == other.num_scored + other.num_left
    for (mine, score), (name, other_score) in zip(
        results_of(actual)[: proof.proved], results_of(expected), strict=False
    ):
        assert mine == name
        assert score == pytest.approx(other_score, rel=1e-5)
    if budget is None:
        assert len(actual.passages) == proof.proved == other.proved
        assert proof.kth_score == pytest.approx(other.kth_score, rel=1e-5)


def test_shards_after_the_first_score_less(pair):
    """What the first shards found spares the others work; on their own they would need a proof of three places each."""
    several = pair[1]
    if len(several.view.segments) != 4:
        pytest.skip("needs shards of some size")
    student = BoundedStudent()
    student.bound = 0.01
    texts = [f"{first} {second}" for first in WORDS[:5] for second in WORDS[5:]]
    joint = Index.open(several.folder, student).search(texts, exact=True, top_k=3, score_features=NOTHING_ADDED)
    alone = [
        Index.open(store.folder, student).search(texts, exact=True, top_k=3, score_features=NOTHING_ADDED)
        for store in several.storage.stores
    ]
    together = sum(ranking.certificate.num_scored for ranking in joint)
    apart = sum(ranking.certificate.num_scored for rankings in alone for ranking in rankings)
    assert together < 0.8 * apart
