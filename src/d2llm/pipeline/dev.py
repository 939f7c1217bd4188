"""The dev measure of a distillation: nDCG@10 of anchor and interaction on a held-out split, for each data set."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float32

from d2llm.core.errors import InputError, TrainingDivergedError
from d2llm.core.types import Query, Task
from d2llm.data.beir import Dataset
from d2llm.data.training import TrainingSource
from d2llm.index.lexical import LexicalIndex
from d2llm.models.interaction import CosineHead
from d2llm.models.student import SCORE_BLOCK, Student
from d2llm.ops.measures import per_query_measures
from d2llm.ops.ranking import top_k

RESIDUAL_WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)
_LEXICAL_DEPTH = 10
_MEASURE, _DEPTH = "nDCG@10", 10


@dataclass(frozen=True, slots=True)
class DevSet:
    """Queries of the dev split of one data set, and a small corpus for them."""

    name: str
    task: Task
    queries: tuple[Query, ...]
    passage_ids: tuple[str, ...]
    passage_texts: tuple[str, ...]
    qrels: dict[str, dict[str, int]]


@dataclass(frozen=True, slots=True)
class DevResult:
    """nDCG@10 by weight r of the interaction; a head that is not an anchor with an interaction has r = 1 alone."""

    task: Task
    ndcg: dict[float, float]


def make_dev_set(source: TrainingSource, *, num_queries: int, num_passages: int, seed: int) -> DevSet:
    """Sample dev queries; their corpus is their positives, BM25's first ten of each, and random passages.

    Raises:
        InputError: the data set has no dev queries with a positive.
    """
    dataset = source.dataset
    judged = dataset.positives("dev") if "dev" in dataset.qrels else {}
    positives = {query_id: passage_ids for query_id, passage_ids in judged.items() if passage_ids}
    if not positives:
        raise InputError(
            f"{dataset.path}: qrels/dev.tsv has no query with a positive, so there is nothing to choose the best step "
            "by; move some training queries there"
        )
    rng = random.Random(f"{seed}:{dataset.name}:dev")
    chosen = sorted(rng.sample(sorted(positives), min(num_queries, len(positives))))
    queries = tuple(dataset.queries[query_id] for query_id in chosen)
    needed = {passage_id for query_id in chosen for passage_id in positives[query_id]}
    needed |= _lexical_neighbours(dataset, queries)
    others = sorted(dataset.passages.keys() - needed)
    filled = rng.sample(others, max(0, min(len(others), num_passages - len(needed))))
    passage_ids = tuple(sorted(needed.union(filled)))
    return DevSet(
        name=dataset.name,
        task=source.task,
        queries=queries,
        passage_ids=passage_ids,
        passage_texts=tuple(dataset.passages[passage_id].full_text for passage_id in passage_ids),
        qrels={query_id: dict(dataset.qrels["dev"][query_id]) for query_id in chosen},
    )


def evaluate_dev(student: Student, dev_sets: Sequence[DevSet]) -> dict[str, DevResult]:
    """nDCG@10 of every dev set by weight of the interaction; the student's own weights are left as they are.

    Raises:
        TrainingDivergedError: scores are no numbers.
    """
    return {dev.name: _evaluate_one(student, dev) for dev in dev_sets}


def choose_residual_weights(results: dict[str, DevResult]) -> dict[Task, float]:
    """For each task the weight r with the best mean over its dev sets; of equal ones the smallest."""
    chosen: dict[Task, float] = {}
    tasks: list[Task] = sorted({result.task for result in results.values()})
    for task in tasks:
        of_task = [result.ndcg for result in results.values() if result.task == task]
        chosen[task] = max(sorted(of_task[0]), key=lambda weight: sum(ndcg[weight] for ndcg in of_task))
    return chosen


def ndcg_by_set(results: dict[str, DevResult], weights: dict[Task, float]) -> dict[str, float]:
    """nDCG@10 of each dev set at its task's weight."""
    return {name: result.ndcg[weights[result.task]] for name, result in results.items()}


def _evaluate_one(student: Student, dev: DevSet) -> DevResult:
    queries = student.encode_queries([query.text for query in dev.queries]).vectors
    passages = student.encode_passages(dev.passage_texts).vectors
    head = student.interaction
    if isinstance(head, CosineHead) or not student.has_anchor:
        return DevResult(dev.task, {1.0: _ndcg(_score_all(student, queries, passages, dev), dev)})
    anchors = np.stack([_anchor(student, query, passages, dev.task) for query in queries])
    residual = head.residual_weight(dev.task)
    kept = residual.clone()
    residual.fill_(1.0)
    try:
        changes = _score_all(student, queries, passages, dev) - anchors
    finally:
        residual.copy_(kept)
    return DevResult(dev.task, {weight: _ndcg(anchors + weight * changes, dev) for weight in RESIDUAL_WEIGHTS})


def _score_all(
    student: Student,
    queries: Float32[np.ndarray, "queries dim"],
    passages: Float32[np.ndarray, "passages dim"],
    dev: DevSet,
) -> Float32[np.ndarray, "queries passages"]:
    logits = np.stack([student.score(query, passages, dev.task) for query in queries])
    if not np.isfinite(logits).all():
        raise TrainingDivergedError(
            f"the student's scores of the dev queries of '{dev.name}' are no numbers; the last good checkpoint is "
            "kept. Lower the learning rate, or compute in bfloat16 or float32"
        )
    return logits


def _anchor(
    student: Student, query: Float32[np.ndarray, " dim"], passages: Float32[np.ndarray, "passages dim"], task: Task
) -> Float32[np.ndarray, " passages"]:
    """The anchor logits, by the same products as in ``Student.score``: where the interaction is 0, so is the change."""
    anchor_query = torch.from_numpy(student.anchor_queries(query[None], task))
    blocks = torch.from_numpy(passages).split(SCORE_BLOCK)
    return torch.cat([(anchor_query @ block.T)[0] for block in blocks]).numpy()


def _ndcg(scores: Float32[np.ndarray, "queries passages"], dev: DevSet) -> float:
    rankings = {
        query.id: [passage_id for passage_id, _ in top_k(row, dev.passage_ids, _DEPTH)]
        for query, row in zip(dev.queries, scores, strict=True)
    }
    values = per_query_measures(rankings, dev.qrels)[_MEASURE]
    return float(np.mean(list(values.values())))


def _lexical_neighbours(dataset: Dataset, queries: Sequence[Query]) -> set[str]:
    found = LexicalIndex(list(dataset.passages.values())).search([query.text for query in queries], _LEXICAL_DEPTH)
    return {candidate.passage_id for candidates in found for candidate in candidates}
