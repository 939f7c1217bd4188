"""Reciprocal rank fusion equals its formula and does not depend on the order of the rankings."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2llm.ops.fusion import reciprocal_rank_fusion

rankings = st.lists(st.lists(st.sampled_from("abcdefgh"), unique=True), max_size=5)


@given(rankings=rankings, data=st.data())
def test_fusion_does_not_depend_on_the_order_of_rankings(rankings: list[list[str]], data: st.DataObject) -> None:
    assert reciprocal_rank_fusion(data.draw(st.permutations(rankings))) == reciprocal_rank_fusion(rankings)


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
