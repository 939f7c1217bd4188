import numpy as np

from d2llm.ops.selection import top_rows

IDS = ["e", "d", "c", "b", "a"]


def test_best_first():
    scores = np.array([0.1, 0.9, -2.0, 0.5, 0.4], np.float32)
    assert top_rows(scores, 3, IDS.__getitem__).tolist() == [1, 3, 4]


def test_equal_scores_go_by_id_also_at_the_border():
    scores = np.array([1.0, 1.0, 2.0, 1.0, 1.0], np.float32)
    assert top_rows(scores, 3, IDS.__getitem__).tolist() == [2, 4, 3]
    assert top_rows(scores, 9, IDS.__getitem__).tolist() == [2, 4, 3, 1, 0]


def test_ids_are_asked_for_only_where_scores_are_equal():
    asked = []
    top_rows(np.array([3, 1, 2, 2], np.float32), 3, lambda row: asked.append(row) or str(row))
    assert sorted(asked) == [2, 3]


def test_nothing_to_choose_from():
    assert top_rows(np.zeros(0, np.float32), 3, IDS.__getitem__).tolist() == []
    assert top_rows(np.ones(3, np.float32), 0, IDS.__getitem__).tolist() == []


def test_infinities_are_ranked():
    scores = np.array([-np.inf, 1, np.inf, -np.inf, np.inf], np.float32)
    assert top_rows(scores, 4, IDS.__getitem__).tolist() == [4, 2, 1, 3]
    assert top_rows(scores, 1, IDS.__getitem__).tolist() == [4]


def test_one_score_for_a_whole_corpus():
    ids = [f"{number * 7919 % 20_000:05d}" for number in range(20_000)]
    assert [ids[row] for row in top_rows(np.zeros(20_000, np.float32), 3, ids.__getitem__)] == [
        "00000",
        "00001",
        "00002",
    ]
