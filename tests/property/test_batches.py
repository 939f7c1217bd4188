"""Queries that are ranked together get the rankings, bit for bit, that each gets alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from d2llm.models.score_features import FeatureWeights, WordsFactor
from d2llm.retrieval import search as search_module
from d2llm.retrieval.index import Index
from d2llm.retrieval.shard import shard
from examples import examples
from fake_models import TokenStudent
from sharded_index import WORDS, BoundedScorer, BoundedStudent, random_passages

FACTOR = WordsFactor(slopes=(0.2, 0.0, -0.5, 0.0), offset=0.1, lowest=-3.0, highest=3.0, nearest_slope=-0.3)


class MappedStudent(BoundedStudent):
    """A matrix maps a query to its vector for inner products: BLAS sums it in an order that depends on the number."""

    def __init__(self):
        super().__init__()
        self.map = np.random.default_rng(0).normal(size=(self.vector_dim, self.vector_dim)).astype(np.float32)

    def _encode(self, texts, advance):
        return TokenStudent._encode(self, texts, advance)  # numbers that float32 rounds

    def query_vectors(self, query_vectors, task):
        return query_vectors @ self.map

    def prepare(self, query_vector, task):
        return BoundedScorer(self.query_vectors(query_vector[None], task)[0] / 2, self.bound)


STUDENT = MappedStudent()


@pytest.fixture(scope="module", params=["float32", "bfloat16", "binary"])
def indexes(request, tmp_path_factory):
    """The same passages in one segment and in three, in one of the formats, some of them deleted."""
    folder = tmp_path_factory.mktemp("batches")
    spec = {"vector_format": request.param, "window_vectors": "int4", "token_vectors": "int4"}
    one = Index.create(folder / "one", STUDENT, **spec)
    one.upsert(random_passages(150))
    shard(folder / "one", folder / "three", 3)
    three = Index.open(folder / "three", STUDENT)
    for index in (one, three):
        index.delete([f"p{n}" for n in range(0, 150, 11)])
    return {1: one, 3: three}


@pytest.fixture(autouse=True)
def two_cores():
    """Queries are ranked in threads, whatever the machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def of(ranking):
    """All of a ranking but its times and its query's number."""
    return replace(ranking, seconds={}, query=replace(ranking.query, id=""))


texts = st.lists(st.sampled_from([*WORDS, "nowhere"]), min_size=1, max_size=4).map(" ".join)


@settings(max_examples=examples(40))
@given(
    queries=st.lists(texts, min_size=1, max_size=45),
    at_once=st.sampled_from([1, 5, 32]),
    num_segments=st.sampled_from([1, 3]),
    top_k=st.sampled_from([1, 10, 200]),
    condition=st.sampled_from([None, "year >= 2002", "year = 1999"]),
    score_features=st.sampled_from(
        [None, {}, {"maxsim": 3.0}, FeatureWeights(terms={"bm25": 1.0, "window_bm25": 0.5}, words_factor=FACTOR)]
    ),
    how=st.sampled_from(
        [
            {},
            {"num_candidates": 20},
            {"exact": True},
            {"sources": ("bm25",)},
            {"sources": ("vectors",), "num_candidates": 30},
            {"hybrid": 0.4, "num_candidates": 20},
            {"group": "best", "document_passages": 3},
            {"group": "sum", "num_candidates": 20},
            {"mmr": 0.6},
            {"near_duplicates": 0.999},
            {"neighbours": 2},
            {"explain": True},
        ]
    ),
)
def test_together_and_alone_are_equal(indexes, queries, at_once, num_segments, top_k, condition, score_features, how):
    index = indexes[num_segments]
    options = {"top_k": top_k, "filter": condition, "score_features": score_features, **how}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search_module, "RANKED_AT_ONCE", at_once)
        together = index.search(queries, **options)
    assert [ranking.query.text for ranking in together] == queries
    alone = [index.search(query, **options) for query in queries]
    assert [of(ranking) for ranking in together] == [of(ranking) for ranking in alone]


def test_ids_of_many_queries_are_those_of_each(indexes):
    index, queries = indexes[3], [f"{one} {other}" for one in WORDS for other in WORDS[:4]]
    searcher = search_module.Searcher(index.view, STUDENT, search_module.SearchSettings(num_candidates=30))
    together = searcher.rank_ids(queries)
    alone = [searcher.rank_ids([query])[0] for query in queries]
    assert [ranking.passages for ranking in together] == [ranking.passages for ranking in alone]
    assert [ranking.query.text for ranking in together] == queries
