"""Ranking measures per query, computed by ir_measures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import ir_measures

from d2llm.core.types import Qrels

MEASURES = {"nDCG@10": "nDCG@10", "MRR@10": "RR@10", "MAP": "AP", "Recall@10": "R@10", "Recall@100": "R@100"}
"""Our name -> the name in ir_measures. nDCG takes the grade itself as gain, divided by log2(1 + rank).

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
    by_library_name = {library: name for name, library in MEASURES.items()}
    values = {name: dict.fromkeys(qrels, 0.0) for name in MEASURES}
    # Scores derived from ranks preserve our order of ties; trec_eval would break ties by descending id.
    run = {
        query_id: {passage_id: -float(rank) for rank, passage_id in enumerate(ranking)}
        for query_id, ranking in rankings.items()
        if query_id in qrels and ranking
    }
    if not run:
        return values
    measures = [ir_measures.parse_measure(library) for library in by_library_name]
    judged = {query_id: dict(grades) for query_id, grades in qrels.items()}
    for metric in ir_measures.iter_calc(measures, judged, run):
        values[by_library_name[str(metric.measure)]][metric.query_id] = float(metric.value)
    return values
