"""Ranking measures per query, most of them computed by ir_measures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import ir_measures

from d2llm.core.types import Qrels


@dataclass(frozen=True, slots=True)
class Measure:
    """A measure of a ranking.

    Attributes:
        formula: one of ir_measures, or a function of one query's passage ids, best first, and of their grades.
        meaning: how to read it, in one clause, for reports.
    """

    formula: ir_measures.measures.Measure | Callable[[Sequence[str], Mapping[str, int]], float]
    meaning: str


_RECALL = "fraction of the relevant passages that are in the top ranks"
MEASURES = {
    "nDCG@10": Measure(
        ir_measures.nDCG @ 10,
        "how high the relevant passages rank; higher grades and top ranks count most; 1 is the best possible order",
    ),
    "MRR@10": Measure(
        ir_measures.RR @ 10,
        "one divided by the rank of the first relevant passage, or 0 if there is none in the top ranks",
    ),
    "MAP": Measure(
        ir_measures.AP,
        "precision at the rank of each relevant passage, averaged over all of them, including those not found",
    ),
    "Recall@10": Measure(ir_measures.R @ 10, _RECALL),
    "Recall@100": Measure(ir_measures.R @ 100, _RECALL),
}
"""All measures of a ranking, in the order of the reports; another one is another entry. nDCG takes the grade itself as
gain, divided by log2(1 + rank).

MAP is computed over the given ranking: a relevant passage beyond its end adds nothing, so for a ranking of the best
100 it is trec_eval's ``map_cut_100``.
"""


def per_query_measures(rankings: Mapping[str, Sequence[str]], qrels: Qrels) -> dict[str, dict[str, float]]:
    """Measure every query of ``qrels``.

    Args:
        rankings: query_id -> passage ids, best first. A missing query or an empty ranking counts as 0.
        qrels: the judgements; a grade above 0 is relevant.

    Returns:
        measure name -> query_id -> value in [0, 1], queries in the order of ``qrels``.
    """
    values = {name: dict.fromkeys(qrels, 0.0) for name in MEASURES}
    answered = {query_id: ranking for query_id, ranking in rankings.items() if query_id in qrels and ranking}
    names: dict[ir_measures.measures.Measure, str] = {}
    for name, measure in MEASURES.items():
        if isinstance(measure.formula, ir_measures.measures.Measure):
            names[measure.formula] = name
        else:
            values[name] |= {
                query_id: float(measure.formula(answered[query_id], qrels[query_id])) for query_id in answered
            }
    if not answered:
        return values
    # Scores derived from ranks preserve our order of ties; trec_eval would break ties by descending id.
    run = {
        query_id: {passage_id: -float(rank) for rank, passage_id in enumerate(ranking)}
        for query_id, ranking in answered.items()
    }
    judged = {query_id: dict(grades) for query_id, grades in qrels.items()}
    for metric in ir_measures.iter_calc([*names], judged, run):
        values[names[metric.measure]][metric.query_id] = float(metric.value)
    return values
