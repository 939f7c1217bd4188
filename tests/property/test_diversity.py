"""Selections from a ranking keep the best result, hold none twice, and with weight 1 are the ranking itself."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from d2llm.ops.diversity import DiverseResults, select_diverse
from examples import examples

rankings = st.lists(
    st.tuples(st.floats(-50, 50, width=32), st.lists(st.integers(-3, 3), min_size=3, max_size=3)),
    min_size=1,
    max_size=25,
).map(lambda entries: sorted(entries, key=lambda entry: -entry[0]))
weights = st.floats(0, 1)
thresholds = st.floats(0.1, 1)


def select(ranking: list[tuple[float, list[int]]], top_k: int, **options: float | None) -> DiverseResults:
    scores, vectors = zip(*ranking, strict=True)
    return select_diverse(np.array(scores, np.float32), np.array(vectors, np.float32), top_k, **options)


def cosines(ranking: list[tuple[float, list[int]]]) -> np.ndarray:
    vectors = np.array([vector for _, vector in ranking], np.float64)
    lengths = np.linalg.norm(vectors, axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.nan_to_num(vectors @ vectors.T / np.outer(lengths, lengths))


@settings(max_examples=examples(40))
@given(rankings, st.integers(1, 30))
def test_weight_one_is_the_ranking(ranking, top_k):
    assert select(ranking, top_k, mmr=1.0).indices.tolist() == list(range(min(top_k, len(ranking))))


@settings(max_examples=examples(40))
@given(rankings, st.integers(1, 30), st.none() | weights, st.none() | thresholds)
def test_the_best_stays_first_and_nothing_comes_twice(ranking, top_k, mmr, near_duplicates):
    indices, num_left_out = select(ranking, top_k, mmr=mmr, near_duplicates=near_duplicates)
    assert indices[0] == 0
    assert len(set(indices.tolist())) == len(indices) <= top_k
    assert set(indices.tolist()) <= set(range(len(ranking)))
    if near_duplicates is None:
        assert (len(indices), num_left_out) == (min(top_k, len(ranking)), 0)
    if mmr is None:
        assert np.all(np.diff(indices) > 0)


@settings(max_examples=examples(40))
@given(rankings, thresholds)
def test_whatever_is_left_out_is_like_a_better_result(ranking, threshold):
    indices, num_left_out = select(ranking, len(ranking), near_duplicates=threshold)
    alike = cosines(ranking)
    left_out = sorted(set(range(len(ranking))) - set(indices.tolist()))
    assert len(left_out) == num_left_out
    for index in left_out:
        assert alike[index, [kept for kept in indices if kept < index]].max() >= threshold - 1e-5
    for kept in indices:
        better = [other for other in indices if other < kept]
        assert not better or alike[kept, better].max() < threshold + 1e-5


@settings(max_examples=examples(40))
@given(rankings, weights, st.integers(1, 30))
def test_a_longer_selection_begins_with_a_shorter_one(ranking, mmr, top_k):
    shorter, longer = (select(ranking, k, mmr=mmr).indices.tolist() for k in (top_k, top_k + 1))
    assert longer[:top_k] == shorter
