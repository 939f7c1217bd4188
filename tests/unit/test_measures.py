from math import log2

import pytest

from d2llm.ops.measures import per_query_measures

QRELS = {"q1": {"a": 2, "b": 1, "c": 0}, "q2": {"d": 1}, "q3": {"e": 1}, "q4": {"f": 1, "g": 1}}


def test_by_hand():
    rankings = {
        "q1": ["x", "b", "c", "a"],
        "q2": [f"x{n}" for n in range(10)] + ["d"],  # eleventh: beyond 10, within 100
        "q4": ["g"],
        "unknown": ["a"],
    }
    values = per_query_measures(rankings, QRELS)
    ideal = 2 / log2(2) + 1 / log2(3)
    assert values["nDCG@10"] == pytest.approx(
        {"q1": (1 / log2(3) + 2 / log2(5)) / ideal, "q2": 0, "q3": 0, "q4": 1 / (1 + 1 / log2(3))}
    )
    assert values["MRR@10"] == pytest.approx({"q1": 1 / 2, "q2": 0, "q3": 0, "q4": 1})
    assert values["Recall@100"] == pytest.approx({"q1": 1, "q2": 1, "q3": 0, "q4": 0.5})


def test_order_of_the_list_counts_and_not_the_ids():
    # trec_eval alone would put the higher id first among equal scores.
    assert per_query_measures({"q2": ["d", "z"]}, QRELS)["MRR@10"]["q2"] == 1
    assert per_query_measures({"q2": ["z", "d"]}, QRELS)["MRR@10"]["q2"] == 0.5


def test_place_101_is_not_recalled():
    ranking = [f"x{n}" for n in range(100)] + ["d"]
    assert per_query_measures({"q2": ranking}, QRELS)["Recall@100"]["q2"] == 0


def test_no_rankings_at_all():
    values = per_query_measures({"q1": []}, QRELS)
    assert values["nDCG@10"] == dict.fromkeys(QRELS, 0.0)
