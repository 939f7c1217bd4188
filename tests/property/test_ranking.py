from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from d2llm.ops.ranking import reciprocal_rank_fusion, top_k

# Few distinct values, so that ties are common
tied_scores = st.sampled_from([-1.5, -0.0, 0.0, 1.0, 1.0000001, float("inf"), float("-inf")])
items = st.dictionaries(st.text(max_size=3), tied_scores | st.floats(allow_nan=False, width=32), max_size=30)
rankings = st.lists(st.lists(st.sampled_from("abcdefgh"), unique=True), max_size=5)


@settings(max_examples=200, deadline=None)
@given(items=items, k=st.integers(0, 35))
def test_top_k_equals_the_full_sort(items: dict[str, float], k: int) -> None:
    expected = sorted(items.items(), key=lambda item: (-item[1], item[0]))[:k]
    assert top_k(np.array(list(items.values())), list(items), k) == expected


@settings(max_examples=100, deadline=None)
@given(items=items, k=st.integers(0, 35))
def test_top_k_is_a_prefix_of_top_k_plus_one(items: dict[str, float], k: int) -> None:
    scores = torch.tensor(list(items.values()), dtype=torch.bfloat16)  # rounding makes more ties
    shorter, longer = top_k(scores, list(items), k), top_k(scores, list(items), k + 1)
    assert longer[:k] == shorter
    assert len(longer) == min(k + 1, len(items))


@settings(max_examples=100, deadline=None)
@given(items=items, k=st.integers(0, 35), data=st.data())
def test_the_order_of_items_does_not_matter(items: dict[str, float], k: int, data: st.DataObject) -> None:
    shuffled = dict(data.draw(st.permutations(list(items.items()))))
    expected = top_k(np.array(list(items.values())), list(items), k)
    assert top_k(np.array(list(shuffled.values())), list(shuffled), k) == expected


def test_a_large_corpus_equals_the_full_sort() -> None:
    scores = np.random.default_rng(0).integers(0, 500, 20_000).astype(np.float32)  # about 40 items per value
    ids = [f"p{number * 7919 % 20_000}" for number in range(20_000)]
    expected = sorted(((ids[i], float(scores[i])) for i in range(20_000)), key=lambda pair: (-pair[1], pair[0]))
    for k in (1, 39, 100, 19_999):
        assert top_k(scores, ids, k) == expected[:k]


@settings(max_examples=100, deadline=None)
@given(rankings=rankings, data=st.data())
def test_fusion_does_not_depend_on_the_order_of_rankings(rankings: list[list[str]], data: st.DataObject) -> None:
    assert reciprocal_rank_fusion(data.draw(st.permutations(rankings))) == reciprocal_rank_fusion(rankings)


@settings(max_examples=100, deadline=None)
@given(rankings=rankings, k=st.integers(0, 100))
def test_fusion_matches_its_formula(rankings: list[list[str]], k: int) -> None:
    fused = reciprocal_rank_fusion(rankings, k=k)
    assert {candidate.passage_id for candidate in fused} == {name for ranking in rankings for name in ranking}
    for candidate in fused:
        name = candidate.passage_id
        expected = sum(1 / (k + ranking.index(name) + 1) for ranking in rankings if name in ranking)
        assert candidate.score == pytest.approx(expected, rel=1e-14)
    assert fused == sorted(fused, key=lambda candidate: (-candidate.score, candidate.passage_id))


@given(ranking=st.lists(st.text(max_size=3), unique=True))
def test_fusion_of_one_ranking_keeps_its_order(ranking: list[str]) -> None:
    assert [candidate.passage_id for candidate in reciprocal_rank_fusion([ranking])] == ranking
