import random
from math import log2
from statistics import fmean

import pytest
import pytrec_eval

from d2llm.ops.measures import per_query_measures

TREC_NAMES = {
    "nDCG@10": "ndcg_cut_10",
    "MRR@10": "recip_rank",
    "MAP": "map",
    "Recall@10": "recall_10",
    "Recall@100": "recall_100",
}
QRELS = {"q1": {"a": 2, "b": 1, "c": 0}, "q2": {"d": 1}, "q3": {"e": 1}, "q4": {"f": 1, "g": 1}}


def test_list_order_matters_not_the_ids():
    # trec_eval alone would put the higher id first among equal scores.
    assert per_query_measures({"q2": ["d", "z"]}, QRELS)["MRR@10"]["q2"] == 1
    assert per_query_measures({"q2": ["z", "d"]}, QRELS)["MRR@10"]["q2"] == 0.5


def test_rank_101_does_not_count_for_recall_at_100():
    ranking = [f"x{n}" for n in range(100)] + ["d"]
    assert per_query_measures({"q2": ranking}, QRELS)["Recall@100"]["q2"] == 0


def test_queries_without_rankings_count_as_zero():
    values = per_query_measures({"q1": []}, QRELS)
    assert values["nDCG@10"] == dict.fromkeys(QRELS, 0.0)


def reference_measures(ranking, grades):
    """The measures of one query from their definitions."""
    relevant = {passage_id for passage_id, grade in grades.items() if grade > 0}
    hits = [rank for rank, passage_id in enumerate(ranking, start=1) if passage_id in relevant]
    gains = [max(grades.get(passage_id, 0), 0) for passage_id in ranking[:10]]
    ideal = sorted((max(grade, 0) for grade in grades.values()), reverse=True)[:10]

    def discounted(values):
        return sum(gain / log2(1 + rank) for rank, gain in enumerate(values, start=1))

    return {
        "nDCG@10": discounted(gains) / discounted(ideal),
        "MRR@10": 1 / hits[0] if hits and hits[0] <= 10 else 0,
        "MAP": sum(number / rank for number, rank in enumerate(hits, start=1)) / len(relevant),
        "Recall@10": sum(rank <= 10 for rank in hits) / len(relevant),
        "Recall@100": sum(rank <= 100 for rank in hits) / len(relevant),
    }


@pytest.mark.parametrize("seed", range(5))
def test_measures_match_trec_eval_and_the_definitions(seed):
    rng = random.Random(seed)
    passage_ids = [f"p{n:03}" for n in range(150)]
    qrels, rankings = {}, {}
    for query in range(20):
        judged = rng.sample(passage_ids, rng.randint(3, 40))
        qrels[f"q{query}"] = {passage_id: rng.choice([0, 1, 1, 2, 3]) for passage_id in judged} | {judged[0]: 1}
        # Ties in our own order: only the order of the list must count.
        scores = {passage_id: rng.randint(0, 9) for passage_id in rng.sample(passage_ids, 120)}
        rankings[f"q{query}"] = sorted(scores, key=lambda passage_id: (-scores[passage_id], passage_id))

    values = per_query_measures(rankings, qrels)

    by_rank = {
        query_id: {passage_id: 1 / rank for rank, passage_id in enumerate(ranking, start=1)}
        for query_id, ranking in rankings.items()
    }
    trec = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut.10", "map", "recall.10,100"}).evaluate(by_rank)
    first_ten = {
        query_id: dict(list(scored.items())[:10]) for query_id, scored in by_rank.items()
    }  # trec_eval's reciprocal rank has no cutoff
    reciprocal = pytrec_eval.RelevanceEvaluator(qrels, {"recip_rank"}).evaluate(first_ten)
    for query_id, ranking in rankings.items():
        ours = {name: values[name][query_id] for name in values}
        expected = trec[query_id] | reciprocal[query_id]
        assert ours == pytest.approx({name: expected[theirs] for name, theirs in TREC_NAMES.items()}, abs=1e-12)
        assert ours == pytest.approx(reference_measures(ranking, qrels[query_id]), abs=1e-12)
    assert fmean(values["MRR@10"].values()) < 1  # the rankings are not trivially good
