"""From values of single queries to rows with intervals, and to comparisons with a baseline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean

from d2llm.evaluation.report import Comparison, Estimate, EvaluationRow
from d2llm.evaluation.systems import System
from d2llm.ops.significance import bootstrap_interval, holm, paired_bootstrap_interval, paired_randomisation

NUM_PERMUTATIONS = 10_000
_TEST = f"paired randomisation, {NUM_PERMUTATIONS:,} permutations"

Values = Mapping[str, Mapping[str, float]]
"""measure -> query_id -> value."""


def mean_row(system: System, values: Values, query_ids: Sequence[str], *, seed: int) -> EvaluationRow:
    """Means over some queries, each with its bootstrap interval."""
    measures: dict[str, Estimate] = {}
    for measure, by_query in values.items():
        of_queries = [by_query[query_id] for query_id in query_ids]
        interval = bootstrap_interval(of_queries, seed=seed)
        measures[measure] = Estimate(fmean(of_queries), interval.low, interval.high)
    return EvaluationRow(system.name, system.kind, measures, system.cost, len(query_ids), system.fingerprint)


def compare_means(
    values: Mapping[str, Values], baseline: str, asked: Mapping[str, Sequence[str]], *, seed: int
) -> list[Comparison]:
    """Every system against the baseline in every measure; Holm's correction is over the systems of one measure.

    Args:
        values: system -> measure -> query_id -> value.
        baseline: the system compared with.
        asked: system -> the queries that it answered; it is compared on those that the baseline answered too, and of
            two such lists one is part of the other.
        seed: of the permutations and resamples.
    """
    comparisons: list[Comparison] = []
    for measure in values[baseline]:
        found: list[Comparison] = []
        for name in asked:
            if name == baseline:
                continue
            query_ids = min(asked[name], asked[baseline], key=len)
            ours, theirs = ([values[row][measure][query_id] for query_id in query_ids] for row in (name, baseline))
            p_value = paired_randomisation(ours, theirs, num_permutations=NUM_PERMUTATIONS, seed=seed)
            interval = paired_bootstrap_interval(ours, theirs, seed=seed)
            difference = Estimate(fmean(ours) - fmean(theirs), interval.low, interval.high)
            found.append(Comparison(measure, name, baseline, difference, p_value, p_value, len(query_ids), _TEST))
        comparisons += adjusted(found)
    return comparisons


def adjusted(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """The same comparisons, of one measure, with Holm's p-values."""
    values = holm([comparison.p_value for comparison in comparisons])
    return [replace(one, adjusted_p=value) for one, value in zip(comparisons, values, strict=True)]
