"""Calibrates a student's scores as probabilities (``models.probabilities``) on judged dev queries."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from d2llm.core.progress import remarks
from d2llm.core.types import Task
from d2llm.data.beir import Dataset
from d2llm.data.same_text import SameText
from d2llm.models.probabilities import ProbabilityCalibration, TaskCalibration, fewer_terms
from d2llm.models.protocols import SearchStudent
from d2llm.models.text_scores import TextScorer
from d2llm.ops.calibration import expected_calibration_error, reliability_bins
from d2llm.ops.ensemble import fit_ensemble, out_of_fold_log_odds
from d2llm.store.bm25 import bm25_lists
from d2llm.training.dev_sets import LEXICAL_DEPTH, MIN_QUERIES, JudgedSet, dev_queries, judged_sets

NUM_HARD, NUM_RANDOM = 1, 8
_POOL = 256  # passages of a corpus that the random ones are drawn from, so that few have to be encoded


@dataclass(frozen=True, slots=True)
class CalibrationSample:
    """Pairs drawn in the proportions that the probabilities assume, with a student's scores: all [n].

    ``scores`` are those of the vectors, ``full_scores`` count the score features too; None if there are none.
    ``queries`` are "data set:query id", ``texts`` theirs; ``num_queries`` is the number of queries by data set.
    """

    queries: list[str]
    texts: list[str]
    scores: NDArray[np.float64]
    relevant: NDArray[np.bool_]
    num_queries: dict[str, int]
    full_scores: NDArray[np.float64] | None = None


def fit_probabilities(
    student: SearchStudent, judged: Sequence[JudgedSet] | JudgedSet, *, num_queries: int = 150, seed: int = 0
) -> ProbabilityCalibration:
    """Fit, for each task, the logistic function that turns a student's scores into probabilities.

    For each dev query, one relevant passage is drawn, ``NUM_HARD`` passages from BM25's top results and those judged
    not relevant, and ``NUM_RANDOM`` from the corpus. One passage in ten is therefore relevant, which the probabilities
    assume. The function is fitted by maximum likelihood to Platt's targets. A task with fewer than ``MIN_QUERIES``
    queries, or with scores that do not distinguish relevant passages from others, is left out, which is logged.

    Args:
        student: the student whose scores to calibrate.
        judged: data sets with a dev split, each with its task.
        num_queries: number of queries per data set; all if there are fewer.
        seed: seed of the draws.

    Raises:
        InputError: a score is not finite.
    """
    tasks: dict[Task, TaskCalibration] = {}
    with_features: dict[Task, TaskCalibration] = {}
    judged = judged_sets(judged)
    names: list[Task] = sorted({task for _, task in judged})
    for task in names:
        samples = [
            score_drawn(student, dataset, task, num_queries=num_queries, seed=seed)
            for dataset, set_task in judged
            if set_task == task
        ]
        fitted = _fit(task, samples, seed)
        if fitted is None:
            continue
        tasks[task] = fitted
        full = [replace(part, scores=part.full_scores) for part in samples if part.full_scores is not None]
        if full and (fitted := _fit(task, full, seed, with_terms=True)) is not None:
            with_features[task] = fitted
    return ProbabilityCalibration(num_hard=NUM_HARD, num_random=NUM_RANDOM, tasks=tasks, with_features=with_features)


def score_drawn(
    student: SearchStudent, dataset: Dataset, task: Task, *, num_queries: int, seed: int
) -> CalibrationSample:
    """Draw passages for judged dev queries of a data set (one relevant, some hard, most at random) and score them.

    A query is left out if there are no other passages to draw from.
    """
    judged = dataset.positives("dev") if "dev" in dataset.qrels else {}
    rng = random.Random(f"{seed}:{dataset.name}:probabilities")
    queries = dev_queries(dataset, num_queries=num_queries, seed=seed) if any(judged.values()) else []
    positives = {query.id: judged[query.id] for query in queries}
    drawn = _draw(dataset, positives, dataset.qrels.get("dev", {}), rng)
    pairs = [
        (dataset.queries[query_id].text, dataset.passages[passage_id].full_text)
        for query_id, ids in drawn.items()
        for passage_id in ids
    ]
    read = TextScorer(student, task=task).read_pairs(pairs, f"calibrating on {dataset.name}")
    scores = read.scores(with_features=False)
    full_scores = read.scores().astype(np.float64) if read.scorer.corpus.weights else None
    return CalibrationSample(
        queries=[f"{dataset.name}:{query_id}" for query_id, ids in drawn.items() for _ in ids],
        texts=[query for query, _ in pairs],
        scores=scores.astype(np.float64),
        relevant=np.array([index == 0 for ids in drawn.values() for index in range(len(ids))], bool),
        num_queries={dataset.name: len(drawn)},
        full_scores=full_scores,
    )


def _draw(
    dataset: Dataset, positives: dict[str, tuple[str, ...]], judged: dict[str, dict[str, int]], rng: random.Random
) -> dict[str, list[str]]:
    """For each query, the passages to score; the first is relevant."""
    if not positives:
        return {}
    title = f"BM25 for calibrating on {dataset.name}"
    queries = [dataset.queries[query_id] for query_id in positives]
    lists = bm25_lists(dataset.passages, list(dataset.passages), queries, LEXICAL_DEPTH, title=title)
    same_text = SameText(dataset.passages)
    pool = rng.sample(sorted(dataset.passages), min(_POOL, len(dataset.passages)))
    drawn: dict[str, list[str]] = {}
    for (query_id, relevant), lexical in zip(positives.items(), lists, strict=True):
        excluded = {*relevant, *same_text.duplicates_of(relevant), *dataset.own_passages.of(query_id)}
        judged_ids = [passage_id for passage_id in judged[query_id] if passage_id in dataset.passages]
        hard = [passage_id for passage_id in dict.fromkeys([*lexical, *judged_ids]) if passage_id not in excluded]
        others = [passage_id for passage_id in pool if passage_id not in excluded]
        if not others:
            continue
        # Passages are drawn with replacement, because a small corpus has too few; only the proportions matter.
        drawn[query_id] = [
            rng.choice(relevant),
            *rng.choices(hard or others, k=NUM_HARD),
            *rng.choices(others, k=NUM_RANDOM),
        ]
    return drawn


def _fit(
    task: Task, samples: Sequence[CalibrationSample], seed: int, *, with_terms: bool = False
) -> TaskCalibration | None:
    num_queries = {name: count for part in samples for name, count in part.num_queries.items()}
    total = sum(num_queries.values())
    if total < MIN_QUERIES:
        remarks.info(
            "scores of %s search are not calibrated as probabilities: %d judged dev queries, but %d are needed",
            task,
            total,
            MIN_QUERIES,
        )
        return None
    scores = np.concatenate([part.scores for part in samples])
    relevant = np.concatenate([part.relevant for part in samples])
    groups = [query for part in samples for query in part.queries]
    columns = scores[:, None]
    if with_terms:
        columns = np.column_stack([scores, fewer_terms([text for part in samples for text in part.texts])])
    ensemble = fit_ensemble(columns, relevant)
    slopes = np.array(ensemble.weights) / np.array(ensemble.scales)
    if slopes[0] <= 0:
        remarks.info(
            "scores of %s search are not calibrated as probabilities: they do not distinguish relevant passages", task
        )
        return None
    after = out_of_fold_log_odds(columns, relevant, groups, seed=seed)
    return TaskCalibration(
        slope=slopes[0],
        offset=ensemble.bias - float(slopes @ np.array(ensemble.means)),
        terms_slope=slopes[1] if with_terms else 0.0,
        num_queries=num_queries,
        num_pairs=len(scores),
        error_before=expected_calibration_error(reliability_bins(scores, relevant)),
        error_after=expected_calibration_error(reliability_bins(after, relevant)),
    )
