import numpy as np
import pytest

from d2llm.ops.diversity import maximal_marginal_relevance, select_diverse

EAST, NORTH = [1.0, 0.0], [0.0, 1.0]
NORTH_EAST = [1.0, 1.0]


def selected(scores, vectors, top_k, **settings):
    diverse = select_diverse(np.array(scores, np.float32), np.array(vectors, np.float32), top_k, **settings)
    return diverse.indices.tolist(), diverse.num_near_duplicates


def test_mmr_by_hand():
    # Scores as shares of the range 10 to 20: 1, 0.9, 0.5, 0. The second points almost where the first points.
    scores, vectors = [20, 19, 15, 10], [EAST, [10, 1], NORTH_EAST, NORTH]
    # After the first, with weight 0.5: 0.45 - 0.498 < 0.25 - 0.354 < 0 - 0 for the last.
    assert selected(scores, vectors, 4, mmr=0.5)[0] == [0, 3, 1, 2]
    # With weight 0.8: 0.72 - 0.199 > 0.4 - 0.141.
    assert selected(scores, vectors, 2, mmr=0.8)[0] == [0, 1]


def test_the_scale_of_scores_and_vectors_does_not_matter():
    rng = np.random.default_rng(0)
    scores, vectors = np.sort(rng.standard_normal(30))[::-1], rng.standard_normal((30, 4))
    lengths = rng.uniform(0.1, 9, (30, 1))
    expected = selected(scores, vectors, 9, mmr=0.4, near_duplicates=0.9)
    assert selected(1000 * scores - 7, vectors * lengths, 9, mmr=0.4, near_duplicates=0.9) == expected
    assert expected[0] != list(range(9))


def test_near_duplicates_of_kept_results_are_left_out():
    # The second is like the first; the third is like the second, but not like the first.
    vectors = [EAST, [1, 0.2], [1, 0.5], NORTH, [0, 2]]
    assert selected([5, 4, 3, 2, 1], vectors, 5, near_duplicates=0.95) == ([0, 2, 3], 2)
    # Counted are only those before the last result.
    assert selected([5, 4, 3, 2, 1], vectors, 2, near_duplicates=0.95) == ([0, 2], 1)
    # MMR may choose any, so all are counted.
    assert selected([5, 4, 3, 2, 1], vectors, 2, near_duplicates=0.95, mmr=0.0) == ([0, 3], 2)


def test_one_leaves_out_only_equal_vectors():
    vector = np.random.default_rng(1).standard_normal(384)
    assert selected([3, 2, 1], [vector, 3 * vector, vector + 0.01], 3, near_duplicates=1.0) == ([0, 2], 1)


@pytest.mark.parametrize("settings", [{"mmr": 0.3}, {"near_duplicates": 0.5}, {"mmr": 0.3, "near_duplicates": 0.5}])
def test_no_results_equal_scores_and_zero_vectors(settings):
    assert selected([], np.zeros((0, 2)), 3, **settings) == ([], 0)
    assert selected([1, 1, 1], np.zeros((3, 2)), 3, **settings) == ([0, 1, 2], 0)


def test_top_k_may_be_zero():
    assert maximal_marginal_relevance(np.ones(2), np.eye(2), 0.5, 0).tolist() == []
