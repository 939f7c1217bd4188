"""Reciprocal rank fusion: values by hand, ties, weights and invalid input."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2llm.core.errors import InputError
from d2llm.ops.fusion import reciprocal_rank_fusion, reciprocal_rank_scores


def test_fusion_by_hand() -> None:
    fused = reciprocal_rank_fusion([["a", "b", "c"], ["b", "d"]])
    assert [candidate.passage_id for candidate in fused] == ["b", "a", "d", "c"]
    expected = [1 / 62 + 1 / 61, 1 / 61, 1 / 62, 1 / 63]
    assert [candidate.score for candidate in fused] == pytest.approx(expected, rel=1e-15)


def test_fusion_refuses_a_repeated_id_and_a_negative_k() -> None:
    with pytest.raises(InputError, match=r"ranking 2 holds 'b' twice .*rank 3"):
        reciprocal_rank_fusion([["b"], ["b", "a", "b"]])
    with pytest.raises(InputError, match="k is -1"):
        reciprocal_rank_fusion([["a"]], k=-1)


def test_fusion_weights() -> None:
    one, other = ["a", "b"], ["b", "a"]
    assert reciprocal_rank_scores([one, other], k=1, weights=[2.0, 1.0]) == pytest.approx(
        {"a": 1 + 1 / 3, "b": 2 / 3 + 1 / 2}
    )
    assert reciprocal_rank_scores([one, other], weights=[1.0, 1.0]) == reciprocal_rank_scores([one, other])
    assert reciprocal_rank_scores([["a"], ["b"]], weights=[0.0, 1.0])["a"] == 0
    for weights in ([1.0], [1.0, -1.0], [1.0, float("nan")]):
        with pytest.raises(InputError, match="weights"):
            reciprocal_rank_scores([one, other], weights=weights)


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
