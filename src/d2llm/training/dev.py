"""The dev measure of a distillation, of anchor and interaction on a held-out split, for each data set."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from jaxtyping import Float32
from numpy.typing import NDArray

from d2llm.core.errors import InputError, TrainingDivergedError
from d2llm.core.progress import ignore, progress_bar
from d2llm.core.types import Query, Task
from d2llm.data.beir import Dataset
from d2llm.data.pairs import LabelledPair, PairDataset
from d2llm.data.training import TrainingSource
from d2llm.evaluation.gold import Gold, measure_all, read_gold
from d2llm.models.interaction import CosineHead
from d2llm.models.student import SCORE_BLOCK, Student
from d2llm.ops.measures import per_query_measures
from d2llm.ops.ranking import top_k
from d2llm.training.mining.ranking import bm25_lists

INTERACTION_WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)
PAIRS_PER_QUERY = 10
"""Pairs of a dev set for each query that a dev set of queries would have."""
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

    @property
    def num_items(self) -> int:
        """Queries that are measured."""
        return len(self.queries)

    @property
    def num_passages(self) -> int:
        """Passages that they are ranked among."""
        return len(self.passage_ids)


@dataclass(frozen=True, slots=True)
class PairDevSet:
    """Judged pairs of the dev split of one data set, and what is true of them."""

    name: str
    task: Task
    pairs: tuple[LabelledPair, ...]
    gold: Gold

    @property
    def num_items(self) -> int:
        """Pairs that are measured."""
        return len(self.pairs)

    @property
    def num_passages(self) -> int:
        """Different passages among them."""
        return len({pair.passage for pair in self.pairs})


@dataclass(frozen=True, slots=True)
class DevResult:
    """The dev measure by weight r of the interaction: nDCG@10, or of pairs what their kind is measured by.

    ``by_item`` has its value for each query or pair. A head that is not an anchor with an interaction has r = 1 alone.
    """

    task: Task
    values: dict[float, float]
    by_item: dict[float, NDArray[np.float64]] = field(default_factory=dict[float, NDArray[np.float64]])


def make_dev_set(
    source: TrainingSource, *, num_queries: int, num_passages: int, seed: int, show_progress: bool | None = None
) -> DevSet | PairDevSet:
    """Sample dev queries; their corpus is their positives, BM25's first ten of each, and random passages.

    Of a set of labelled pairs a sample of ten times as many pairs is taken.

    Args:
        source: the data set, with its dev split.
        num_queries: that are measured, or all where there are fewer.
        num_passages: that they are ranked among; more where their positives and BM25's are more.
        seed: of the draws.
        show_progress: None means: if standard error is a terminal.

    Raises:
        InputError: the data set has no dev queries with a positive, or no dev pairs.
        DataFormatError: the classes of the dev pairs cannot be measured.
    """
    if source.pairs is not None:
        return _make_pair_dev_set(source, source.pairs, num_pairs=PAIRS_PER_QUERY * num_queries, seed=seed)
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
    needed |= _lexical_neighbours(dataset, queries, show_progress)
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


def evaluate_dev(
    student: Student,
    dev_sets: Sequence[DevSet | PairDevSet],
    *,
    title: str = "measuring on dev",
    show_progress: bool | None = None,
) -> dict[str, DevResult]:
    """The measure of every dev set by weight of the interaction; the student's own weights are left as they are.

    Args:
        student: whose texts are read and scored.
        dev_sets: to measure on.
        title: of the progress bar, which counts texts that are read and queries that are ranked.
        show_progress: None means: if standard error is a terminal.

    Raises:
        TrainingDivergedError: scores are no numbers.
    """
    results: dict[str, DevResult] = {}
    total = sum(num_texts(dev) + num_rankings(dev) for dev in dev_sets)
    with progress_bar(title, total, show=show_progress) as advance:
        for dev in dev_sets:
            advance(0, dev.name)
            results[dev.name] = measure_dev(student, encode_dev(student, dev, advance=advance), advance=advance)
    return results


def num_texts(dev: DevSet | PairDevSet) -> int:
    """Texts that ``encode_dev`` reads."""
    return sum(map(len, _texts(dev)))


def num_rankings(dev: DevSet | PairDevSet) -> int:
    """Queries whose passages ``measure_dev`` scores."""
    return len(_texts(dev)[0])


@dataclass(frozen=True)
class EncodedDev:
    """A dev set as a student's vectors: while these stay, its interaction can be measured again and again.

    ``wanted`` has, for each query, the rows of the passages that it is scored with.
    """

    dev: DevSet | PairDevSet
    queries: Float32[np.ndarray, "queries dim"]
    passages: Float32[np.ndarray, "passages dim"]
    wanted: list[NDArray[np.intp]]


def encode_dev(student: Student, dev: DevSet | PairDevSet, *, advance: Callable[[int], None] = ignore) -> EncodedDev:
    """Read the texts of a dev set, each once; ``advance`` is called with the number of those finished."""
    queries, passages = _texts(dev)
    if isinstance(dev, DevSet):
        wanted = [np.arange(len(passages))] * len(queries)
    else:
        row = {text: number for number, text in enumerate(passages)}
        wanted = [np.array([row[dev.pairs[p].passage] for p in of_query]) for of_query in _positions(dev)]
    return EncodedDev(
        dev,
        student.encode_queries(queries, advance=advance).vectors,
        student.encode_passages(passages, advance=advance).vectors,
        wanted,
    )


def measure_dev(student: Student, encoded: EncodedDev, *, advance: Callable[[int], None] = ignore) -> DevResult:
    """The measure of a dev set by weight of the interaction; ``advance`` is called with the number of queries ranked.

    Raises:
        TrainingDivergedError: scores are no numbers.
    """
    dev = encoded.dev
    scores = _scores_by_weight(student, encoded, advance)
    if isinstance(dev, DevSet):
        by_item = {weight: _ndcg(found, dev) for weight, found in scores.items()}
        return DevResult(dev.task, {weight: float(values.mean()) for weight, values in by_item.items()}, by_item)
    return _measure_pairs(dev, scores)


def choose_interaction_weights(results: dict[str, DevResult]) -> dict[Task, float]:
    """For each task the weight r with the best mean over its dev sets; of equal ones the smallest."""
    chosen: dict[Task, float] = {}
    tasks: list[Task] = sorted({result.task for result in results.values()})
    for task in tasks:
        of_task = [result.values for result in results.values() if result.task == task]
        chosen[task] = max(sorted(of_task[0]), key=lambda weight: sum(values[weight] for values in of_task))
    return chosen


def value_by_set(results: dict[str, DevResult], weights: dict[Task, float]) -> dict[str, float]:
    """The measure of each dev set at its task's weight."""
    return {name: result.values[weights[result.task]] for name, result in results.items()}


def _texts(dev: DevSet | PairDevSet) -> tuple[list[str], list[str]]:
    """The queries and the passages of a dev set, each once."""
    if isinstance(dev, DevSet):
        return [query.text for query in dev.queries], list(dev.passage_texts)
    return list(dict.fromkeys(p.query for p in dev.pairs)), list(dict.fromkeys(p.passage for p in dev.pairs))


def _positions(dev: PairDevSet) -> list[list[int]]:
    """For each distinct query the places of its pairs."""
    positions: dict[str, list[int]] = {}
    for position, pair in enumerate(dev.pairs):
        positions.setdefault(pair.query, []).append(position)
    return list(positions.values())


def _measure_pairs(dev: PairDevSet, scores: dict[float, list[NDArray[np.float32]]]) -> DevResult:
    order = np.argsort(np.concatenate(_positions(dev)))
    everything = np.arange(len(dev.pairs))
    values: dict[float, float] = {}
    by_item: dict[float, NDArray[np.float64]] = {}
    for weight, found in scores.items():
        of_pairs = np.concatenate(found)[order].astype(np.float64)
        thresholds = dev.gold.fit(of_pairs, everything)
        values[weight] = measure_all(dev.gold, of_pairs, everything, thresholds)[dev.gold.main_measure]
        by_item[weight] = dev.gold.of_items(of_pairs, everything, thresholds)
    return DevResult(dev.task, values, by_item)


def _scores_by_weight(
    student: Student, encoded: EncodedDev, advance: Callable[[int], None]
) -> dict[float, list[NDArray[np.float32]]]:
    """For each weight r, the scores of each query with the passages that are wanted of it."""
    head = student.interaction
    if isinstance(head, CosineHead) or not student.has_anchor:
        return {1.0: _score_all(student, encoded, advance)}
    task = encoded.dev.task
    anchors = [
        _anchor(student, query, encoded.passages[rows], task)
        for query, rows in zip(encoded.queries, encoded.wanted, strict=True)
    ]
    whole = _score_all(student, encoded, advance, interaction_weight=1.0)
    return {
        weight: [anchor + weight * (score - anchor) for anchor, score in zip(anchors, whole, strict=True)]
        for weight in INTERACTION_WEIGHTS
    }


def _score_all(
    student: Student, encoded: EncodedDev, advance: Callable[[int], None], *, interaction_weight: float | None = None
) -> list[NDArray[np.float32]]:
    scores: list[NDArray[np.float32]] = []
    for query, rows in zip(encoded.queries, encoded.wanted, strict=True):
        scores.append(
            student.score(query, encoded.passages[rows], encoded.dev.task, interaction_weight=interaction_weight)
        )
        advance(1)
    if not all(np.isfinite(of_query).all() for of_query in scores):
        raise TrainingDivergedError(
            f"the student's scores of the dev queries of '{encoded.dev.name}' are no numbers; the last good checkpoint "
            "is kept. Lower the learning rate, or compute in bfloat16 or float32"
        )
    return scores


def _anchor(
    student: Student, query: Float32[np.ndarray, " dim"], passages: Float32[np.ndarray, "passages dim"], task: Task
) -> Float32[np.ndarray, " passages"]:
    """The anchor logits, by the same products as in ``Student.score``: where the interaction is 0, so is the change."""
    anchor_query = torch.from_numpy(student.anchor_queries(query[None], task))
    blocks = torch.from_numpy(passages).split(SCORE_BLOCK)
    return torch.cat([(anchor_query @ block.T)[0] for block in blocks]).numpy()


def _ndcg(scores: Sequence[NDArray[np.float32]], dev: DevSet) -> NDArray[np.float64]:
    """nDCG@10 of each query."""
    rankings = {
        query.id: [passage_id for passage_id, _ in top_k(row, dev.passage_ids, _DEPTH)]
        for query, row in zip(dev.queries, scores, strict=True)
    }
    values = per_query_measures(rankings, dev.qrels)[_MEASURE]
    return np.array([values[query.id] for query in dev.queries])


def _make_pair_dev_set(source: TrainingSource, pairs: PairDataset, *, num_pairs: int, seed: int) -> PairDevSet:
    available = pairs.pairs("dev") if "dev" in pairs.splits else ()
    if not available:
        raise InputError(
            f"{pairs.path}: there are no dev pairs, so there is nothing to choose the best step by; move some training "
            "pairs there"
        )
    rng = random.Random(f"{seed}:{pairs.name}:dev")
    chosen = sorted(rng.sample(range(len(available)), min(num_pairs, len(available))))
    sample = tuple(available[position] for position in chosen)
    return PairDevSet(pairs.name, source.task, sample, read_gold(replace(pairs, splits={"dev": sample}), "dev"))


def _lexical_neighbours(dataset: Dataset, queries: Sequence[Query], show: bool | None) -> set[str]:
    title = f"passages for the dev queries of {dataset.name}"
    found = bm25_lists(dataset.passages, list(dataset.passages), queries, _LEXICAL_DEPTH, show, title=title)
    return {passage_id for of_query in found for passage_id in of_query}
