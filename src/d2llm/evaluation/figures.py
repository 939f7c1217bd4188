"""Computes a report's parts from measured systems: rows, comparisons, agreement, calibration, histograms, examples."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from statistics import fmean

import numpy as np

from d2llm.core.types import Passage, Query, SystemKind
from d2llm.evaluation.report import (
    AgreementRow,
    Calibration,
    Comparison,
    Estimate,
    EvaluationRow,
    Example,
    Histogram,
    ShownPassage,
)
from d2llm.evaluation.systems import System
from d2llm.ops.agreement import agreement, top_k_overlap
from d2llm.ops.calibration import expected_calibration_error, reliability_bins, score_histogram
from d2llm.ops.significance import bootstrap_interval, holm, paired_randomisation

NUM_PERMUTATIONS = 10_000
_TEST = f"paired randomisation, {NUM_PERMUTATIONS:,} permutations"

Values = Mapping[str, Mapping[str, float]]
"""measure -> query_id -> value."""


def mean_row(system: System, values: Values, query_ids: Sequence[str], *, seed: int) -> EvaluationRow:
    """The mean of each measure over some queries, with its bootstrap interval."""
    measures: dict[str, Estimate] = {}
    for measure, by_query in values.items():
        query_values = [by_query[query_id] for query_id in query_ids]
        interval = bootstrap_interval(query_values, seed=seed)
        measures[measure] = Estimate(fmean(query_values), interval.low, interval.high)
    return EvaluationRow(system.name, system.kind, measures, system.cost, len(query_ids), system.fingerprint)


def compare_means(
    values: Mapping[str, Values], baseline: str, query_ids_of: Mapping[str, Sequence[str]], *, seed: int
) -> list[Comparison]:
    """Compare every system with the baseline in every measure, Holm-corrected over the systems in one measure.

    ``values`` is system -> measure -> query_id -> value, ``query_ids_of`` the queries that each system answered: it is
    compared on those that the baseline answered too; one of the two lists must contain the other.
    """
    comparisons: list[Comparison] = []
    for measure in values[baseline]:
        of_measure: list[Comparison] = []
        for name in query_ids_of:
            if name == baseline:
                continue
            query_ids = min(query_ids_of[name], query_ids_of[baseline], key=len)
            ours, theirs = ([values[row][measure][query_id] for query_id in query_ids] for row in (name, baseline))
            p_value = paired_randomisation(ours, theirs, num_permutations=NUM_PERMUTATIONS, seed=seed)
            interval = bootstrap_interval(np.subtract(ours, theirs), seed=seed)
            difference = Estimate(fmean(ours) - fmean(theirs), interval.low, interval.high)
            of_measure.append(Comparison(measure, name, baseline, difference, p_value, p_value, len(query_ids), _TEST))
        comparisons += adjusted(of_measure)
    return comparisons


def joined_notes(notes: Iterable[tuple[str, str]]) -> list[str]:
    """Notes (system or "", message) as lines, in their order; systems with the same message share a line."""
    names_by_message: dict[str, list[str]] = {}
    for name, message in notes:
        names_by_message.setdefault(message, []).append(name)
    return [f"{'; '.join(names)}: {message}" if all(names) else message for message, names in names_by_message.items()]


def adjusted(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """The comparisons, all in one measure, with Holm-corrected p-values."""
    values = holm([comparison.p_value for comparison in comparisons])
    return [replace(comparison, adjusted_p=value) for comparison, value in zip(comparisons, values, strict=True)]


NUM_EXAMPLES = 10
HISTOGRAM_KINDS: tuple[SystemKind, ...] = ("cosine_tuned", "cosine_untuned", "d2llm", "teacher")
_NUM_TOP = 3

Scores = Mapping[str, Mapping[str, float]]
"""query_id -> passage_id -> score."""
Relevant = Mapping[str, frozenset[str]]


def agreement_row(name: str, teacher: Scores, scores: Scores) -> AgreementRow:
    """How well a system agrees with the teacher on the passages that the teacher scored."""
    by_query = {
        query_id: (list(values.values()), [scores[query_id][passage_id] for passage_id in values])
        for query_id, values in teacher.items()
        if values
    }
    overlaps = [
        top_k_overlap(_best_first(values), _best_first({p: scores[query_id][p] for p in values}))
        for query_id, values in teacher.items()
        if len(values) > 1
    ]
    return AgreementRow(name, agreement(by_query), sum(overlaps) / len(overlaps) if overlaps else None)


def calibration(name: str, log_odds: Sequence[float], labels: Sequence[bool]) -> Calibration:
    """How often the system is right when it says "yes" with probability p."""
    bins = tuple(reliability_bins(log_odds, labels))
    return Calibration(name, bins, expected_calibration_error(bins), len(labels))


def ranking_histogram(system: System, relevant: Relevant) -> Histogram | None:
    """Histogram of the scores of relevant and other passages in a system's rankings; None if it ranked nothing."""
    scores, labels = pool_labels({query_id: dict(ranking) for query_id, ranking in system.rankings.items()}, relevant)
    return Histogram(system.name, score_histogram(scores, labels)) if scores else None


def pool_labels(scores: Scores, relevant: Relevant) -> tuple[list[float], list[bool]]:
    """The scores of a pool and, in the same order, whether each passage is relevant."""
    pairs = [
        (score, passage_id in relevant[query_id])
        for query_id, query_scores in scores.items()
        for passage_id, score in query_scores.items()
    ]
    return [score for score, _ in pairs], [label for _, label in pairs]


def examples(
    ours: Mapping[str, Sequence[str]],
    theirs: Mapping[str, Sequence[str]],
    values: tuple[Mapping[str, float], Mapping[str, float]],
    queries: Mapping[str, Query],
    passages: Mapping[str, Passage],
    relevant: Relevant,
) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """The queries where a system wins and loses most against another.

    Args:
        ours: query_id -> passage ids of one system's ranking.
        theirs: those of the other.
        values: of both systems, query_id -> the main measure.
        queries: by id.
        passages: by id.
        relevant: query_id -> relevant passage ids.
    """
    gains = {query_id: values[0][query_id] - values[1][query_id] for query_id in values[0]}
    ordered = sorted(gains, key=lambda query_id: (-gains[query_id], query_id))

    def passages_of(query_id: str, ids: Sequence[str]) -> tuple[ShownPassage, ...]:
        return tuple(
            ShownPassage(passage_id, passages[passage_id].full_text, passage_id in relevant[query_id])
            for passage_id in ids[:_NUM_TOP]
        )

    def example(query_id: str) -> Example:
        return Example(
            id=query_id,
            query=queries[query_id].text,
            value=values[0][query_id],
            baseline_value=values[1][query_id],
            relevant=passages_of(query_id, sorted(relevant[query_id])),
            top=passages_of(query_id, ours.get(query_id, ())),
            baseline_top=passages_of(query_id, theirs.get(query_id, ())),
        )

    wins = tuple(example(query_id) for query_id in ordered[:NUM_EXAMPLES] if gains[query_id] > 0)
    losses = tuple(example(query_id) for query_id in ordered[::-1][:NUM_EXAMPLES] if gains[query_id] < 0)
    return wins, losses


def _best_first(scores: Mapping[str, float]) -> list[str]:
    return sorted(scores, key=lambda passage_id: (-scores[passage_id], passage_id))
