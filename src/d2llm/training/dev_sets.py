"""Dev sets: queries or pairs of a dev split, the passages to score them with, and the measures of scores.

All samples of dev queries come from ``dev_queries``. ``make_dev_set`` is for training, which repeatedly ranks a small
corpus for its queries; ``make_teacher_dev_set`` is for teachers, which score a few candidates per query;
``make_dev_pairs`` is for both.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float32
from numpy.typing import NDArray

from d2llm.core.errors import InputError, ModelError, TrainingDivergedError
from d2llm.core.inputs import list_of, shown
from d2llm.core.progress import Advance, ignore, progress_bar
from d2llm.core.types import TASKS, Query, Task
from d2llm.data.beir import Dataset
from d2llm.data.collation import ScorePassages
from d2llm.data.pairs import LabelledPair, PairDataset
from d2llm.data.plan import TrainingSource
from d2llm.data.same_text import SameText
from d2llm.evaluation.gold import Gold, NliGold, measure_all, read_gold
from d2llm.evaluation.pool_scores import score_pool
from d2llm.models.interaction import Interaction
from d2llm.models.protocols import SearchStudent
from d2llm.models.row_features import mean_of_cosines
from d2llm.models.student import Student
from d2llm.models.teachers.pair_teacher import PairTeacher
from d2llm.models.tokens import TextKind
from d2llm.models.vector_scorer import SCORE_BLOCK
from d2llm.ops.measures import per_query_measures
from d2llm.ops.ranking import top_k
from d2llm.ops.selection import ids_at, nearest_rows
from d2llm.retrieval.cosine import CosineStudent
from d2llm.retrieval.reading import encode_shard, encode_texts
from d2llm.runners.placement import HERE, Placement
from d2llm.store.bm25 import bm25_lists
from d2llm.store.part_vectors import PartVectors
from d2llm.training.processes import ALONE, Processes

INTERACTION_WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""The candidates for an interaction weight r; of equally good ones the smallest is chosen."""
PAIRS_PER_QUERY = 10
"""A dev set of labelled pairs has this many pairs for each query that a dev set of queries would have."""
LEXICAL_DEPTH = 10
"""How many of BM25's best passages are among those that a dev query is measured or fitted on."""
MIN_QUERIES = 30
"""Minimum number of judged dev queries of a task; with fewer, nothing is fitted on them."""
_MEASURE, _DEPTH = "nDCG@10", 10

JudgedSet = tuple[Dataset, Task]
"""A data set whose dev queries something is fitted on, and the task that they are for."""

Scores = Sequence[NDArray[np.floating[Any]]]
"""For each query of a dev set, the scores of its candidates; both are in the dev set's order."""


def judged_sets(judged: Sequence[JudgedSet] | JudgedSet) -> list[JudgedSet]:
    """A list of data sets, each with its task; one data set with its task is a list of one.

    Raises:
        InputError: something is not a data set with its task.
    """
    is_one = isinstance(judged, tuple) and len(judged) == 2 and isinstance(judged[1], str)
    entries: list[Any] = [judged] if is_one else list_of(judged, "judged")
    for index, entry in enumerate(entries):
        if not isinstance(entry, tuple) or len(cast("tuple[Any, ...]", entry)) != 2 or entry[1] not in TASKS:
            raise InputError(f"judged[{index}] is {shown(entry)}; give a data set with its task: (dataset, task)")
    return entries


@dataclass(frozen=True, slots=True)
class Measured:
    """A measure on a dev set: its value, and the value of each item [items], in the order of ``DevSet.item_ids``."""

    measure: str
    value: float
    by_item: NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class DevSet:
    """Queries or labelled pairs from the dev split of one data set, and the candidate passages of each query.

    The measure is nDCG@10, or the main measure of the kind of pairs (``evaluation.gold``). For pairs, the texts serve
    as ids, because the ids of many pair sets are line numbers, which change when the file does.

    Attributes:
        name: name of the data set.
        task: the task of its pairs.
        queries: query_id -> text.
        passages: passage_id -> full text, of all candidates.
        candidates: query_id -> passage ids, for each of ``queries`` and in their order.
        qrels: query_id -> passage_id -> grade; empty for pairs.
        pairs: the labelled pairs; empty if there are qrels.
        gold: the true labels of the pairs.
        word_scores: query_id -> what words add to the scores of its candidates; empty if they add nothing.
        token_weight: the weight of the token embeddings in the scores; 0 if they do not count.
        instructions: what the student reads before those queries that have an instruction, in place of its prefix.
    """

    name: str
    task: Task
    queries: Mapping[str, str]
    passages: Mapping[str, str]
    candidates: Mapping[str, Sequence[str]]
    qrels: Mapping[str, Mapping[str, int]] = field(default_factory=dict[str, Mapping[str, int]])
    pairs: tuple[LabelledPair, ...] = ()
    gold: Gold | None = None
    word_scores: Mapping[str, NDArray[np.float32]] = field(default_factory=dict[str, NDArray[np.float32]])
    token_weight: float = 0.0
    instructions: Mapping[str, str] = field(default_factory=dict[str, str])

    def with_score_features(self, score_words: ScorePassages | None, token_weight: float) -> DevSet:
        """The same set, whose scores count words, if they are given, and token embeddings with this weight."""
        scores: dict[str, NDArray[np.float32]] = {}
        if score_words is not None:
            scores = {query_id: score_words(self.queries[query_id], ids) for query_id, ids in self.candidates.items()}
        return replace(self, word_scores=scores, token_weight=token_weight)

    @property
    def num_texts(self) -> int:
        """How many queries and passages it has."""
        return len(self.queries) + len(self.passages)

    @property
    def item_ids(self) -> tuple[str, ...]:
        """The ids of the measured items: queries, or pairs."""
        return tuple(self.queries) if self.gold is None else tuple(pair.id for pair in self.pairs)

    @property
    def measure_name(self) -> str:
        """The measure's name in reports."""
        return _MEASURE if self.gold is None else self.gold.main_measure

    def per_query(self, scores: Scores) -> dict[str, dict[str, float]]:
        """Measure -> query_id -> value, for a set with qrels; equal scores are ranked by passage id."""
        rankings = {
            query_id: [passage_id for passage_id, _ in top_k(values, ids, _DEPTH)]
            for (query_id, ids), values in zip(self.candidates.items(), scores, strict=True)
        }
        return per_query_measures(rankings, self.qrels)

    def measure(self, scores: Scores, *, cross_fit: bool = False) -> Measured:
        """Measure scores.

        Args:
            scores: the scores of each query's candidates.
            cross_fit: fit the thresholds between classes on each half of the pairs and use them on the other; fit none
                if the measure needs none. By default thresholds are fitted on all pairs.
        """
        if self.gold is None:
            values = self.per_query(scores)[_MEASURE]
            by_query = np.array([values[query_id] for query_id in self.queries])
            return Measured(_MEASURE, float(by_query.mean()), by_query)
        by_pair = {
            (query_id, passage_id): value
            for (query_id, ids), values in zip(self.candidates.items(), scores, strict=True)
            for passage_id, value in zip(ids, values, strict=True)
        }
        pair_scores = np.array([by_pair[pair.query, pair.passage] for pair in self.pairs], np.float64)
        if cross_fit and isinstance(self.gold, NliGold):
            by_item = _cross_fitted(self.gold, pair_scores)
            return Measured(self.measure_name, float(by_item.mean()), by_item)
        positions = np.arange(len(self.pairs))
        thresholds: Any = None if cross_fit else self.gold.fit(pair_scores, positions)
        value = measure_all(self.gold, pair_scores, positions, thresholds)[self.measure_name]
        return Measured(self.measure_name, value, self.gold.item_values(pair_scores, positions, thresholds))


def _cross_fitted(gold: NliGold, scores: NDArray[np.float64]) -> NDArray[np.float64]:
    by_class = np.argsort(gold.classes, kind="stable")  # so that both halves have pairs of each class
    halves = by_class[::2], by_class[1::2]
    values = np.empty(len(scores))
    for half, other in (halves, halves[::-1]):
        values[half] = gold.item_values(scores[half], half, gold.fit(scores[other], other))
    return values


# Samples of the dev split, for training and for teachers --------------------------------------------------------------


def dev_queries(dataset: Dataset, *, num_queries: int, seed: int, from_end: bool = False) -> list[Query]:
    """A random sample of the dev queries that have a positive, ordered by a hash of their ids.

    A larger sample contains a smaller one. ``from_end`` takes the queries from the other end of that order, so that the
    two samples do not overlap if there are enough queries: one is for fitting, the other for testing.

    Raises:
        InputError: there are none.
    """
    judged = dataset.positives("dev") if "dev" in dataset.qrels else {}
    with_positives = [query_id for query_id, passage_ids in judged.items() if passage_ids]
    if not with_positives:
        raise InputError(
            f"{dataset.path}: qrels/dev.tsv has no query with a positive, so nothing can be measured on it; move some "
            "training queries there"
        )
    ordered = sorted(with_positives, key=lambda query_id: _random_key(query_id, seed))
    chosen = ordered[-num_queries:] if from_end else ordered[:num_queries]
    return [dataset.queries[query_id] for query_id in chosen]


def make_dev_pairs(dataset: PairDataset, task: Task, *, num_pairs: int, seed: int) -> DevSet:
    """A random sample of the dev pairs, ordered by a hash of their ids; a larger sample contains a smaller one.

    Args:
        dataset: the data set, with its dev split.
        task: the task of its pairs.
        num_pairs: number of pairs; all if there are fewer.
        seed: seed of the order.

    Raises:
        InputError: there are none.
        DataFormatError: the labels of the sample cannot be measured.
    """
    available = dataset.pairs("dev") if "dev" in dataset.splits else ()
    if not available:
        raise InputError(
            f"{dataset.path}: there are no dev pairs, so nothing can be measured on them; move some training pairs "
            "there"
        )
    sample = sorted(available, key=lambda pair: _random_key(pair.id, seed))[:num_pairs]
    candidates: dict[str, dict[str, None]] = {}
    for pair in sample:
        candidates.setdefault(pair.query, {})[pair.passage] = None
    return DevSet(
        name=dataset.name,
        task=task,
        queries={query: query for query in candidates},
        passages={pair.passage: pair.passage for pair in sample},
        candidates={query: list(passages) for query, passages in candidates.items()},
        pairs=tuple(sample),
        gold=read_gold(replace(dataset, splits={"dev": tuple(sample)}), "dev"),
    )


def _random_key(identifier: str, seed: int) -> bytes:
    """A sort key that puts ids into a random order."""
    return hashlib.sha256(f"{seed}:{identifier}".encode()).digest()


def _dev_set(
    dataset: Dataset,
    task: Task,
    queries: Sequence[Query],
    candidates: Mapping[str, Sequence[str]],
    passage_ids: Sequence[str] | Mapping[str, None],
) -> DevSet:
    return DevSet(
        name=dataset.name,
        task=task,
        queries={query.id: query.text for query in queries},
        passages={passage_id: dataset.passages[passage_id].full_text for passage_id in passage_ids},
        candidates=candidates,
        qrels={query.id: dict(dataset.qrels["dev"][query.id]) for query in queries},
    )


def make_dev_set(source: TrainingSource, *, num_queries: int, num_passages: int, seed: int) -> DevSet:
    """Sample dev queries; their corpus is their positives, BM25's first ten for each query, and random passages.

    From a set of labelled pairs, ten times as many pairs are sampled.

    Args:
        source: the data set, with its dev split.
        num_queries: number of queries to measure on; all if there are fewer.
        num_passages: size of the corpus to rank; larger if the positives and BM25's passages are more.
        seed: seed of the samples.

    Raises:
        InputError: the data set has no dev queries with a positive, or no dev pairs.
        DataFormatError: the classes of the dev pairs cannot be measured.
    """
    if source.pairs is not None:
        pairs = make_dev_pairs(source.pairs, source.task, num_pairs=PAIRS_PER_QUERY * num_queries, seed=seed)
        usual = source.instruction
        return pairs if usual is None else replace(pairs, instructions=dict.fromkeys(pairs.queries, usual))
    dataset = source.dataset
    queries = dev_queries(dataset, num_queries=num_queries, seed=seed)
    positives = dataset.positives("dev")
    needed = {passage_id for query in queries for passage_id in positives[query.id]}
    title = f"BM25 for the dev queries of {dataset.name}"
    own_passages = dataset.own_passages
    lists = bm25_lists(
        dataset.passages, list(dataset.passages), queries, LEXICAL_DEPTH, left_out=own_passages.by_query, title=title
    )
    needed.update(passage_id for ids in lists for passage_id in ids)
    others = sorted(dataset.passages.keys() - needed)
    rng = random.Random(f"{seed}:{dataset.name}:dev")
    filled = rng.sample(others, max(0, min(len(others), num_passages - len(needed))))
    passage_ids = sorted(needed.union(filled))
    candidates = {query.id: passage_ids for query in queries}
    for query_id in own_passages.by_query.keys() & candidates.keys():
        candidates[query_id] = [passage_id for passage_id in passage_ids if passage_id not in own_passages.of(query_id)]
    dev = _dev_set(dataset, source.task, queries, candidates, passage_ids)
    read = {query.id: source.instruction if query.instruction is None else query.instruction for query in queries}
    return replace(dev, instructions={name: text for name, text in read.items() if text is not None})


def evaluate_dev(
    student: Student,
    dev_sets: Sequence[DevSet],
    *,
    title: str = "measuring on dev",
    processes: Processes = ALONE,
) -> dict[str, DevResult]:
    """Measure a student on every dev set for each weight r of the interaction, whatever the student's own weight.

    Several processes encode the texts together, and the first one measures; for the others the result is empty.

    The progress bar with this ``title`` counts texts encoded and queries ranked.

    Raises:
        TrainingDivergedError: scores are not finite.
    """
    results: dict[str, DevResult] = {}
    total = sum(2 * len(dev.queries) + len(dev.passages) for dev in dev_sets)
    with progress_bar(title, total) as advance:
        for dev in dev_sets:
            advance(0, dev.name)
            encoded = encode_dev(student, dev, advance=advance, processes=processes)
            if processes.is_first:
                results[dev.name] = measure_by_weight(student, encoded, advance=advance)
    return results


@dataclass(frozen=True, slots=True)
class DevResult:
    """The dev measure by weight r of the interaction; ``by_item`` has the values of each query or pair.

    The cosine and the head ``paper`` have only r = 1, a dot head without an interaction in this task only r = 0.
    """

    task: Task
    values: dict[float, float]
    by_item: dict[float, NDArray[np.float64]] = field(default_factory=dict[float, NDArray[np.float64]])


@dataclass(frozen=True)
class EncodedDev:
    """A dev set encoded by a student; while the vectors are fixed, its interaction can be measured repeatedly.

    ``rows`` has, for each query, the rows of its candidates among the passages, ``token_scores`` what token embeddings
    add to the candidates' scores, if they count.
    """

    dev: DevSet
    queries: Float32[np.ndarray, "queries dim"]
    passages: Float32[np.ndarray, "passages dim"]
    rows: list[NDArray[np.intp]]
    token_scores: Scores = ()


def encode_dev(student: Student, dev: DevSet, *, advance: Advance = ignore, processes: Processes = ALONE) -> EncodedDev:
    """Encode the texts of a dev set; ``advance`` is called with the number of texts finished.

    Several processes share the texts, and all get all vectors; those of tokens are only known to the first.
    """
    row = {passage_id: index for index, passage_id in enumerate(dev.passages)}
    rows = [np.array([row[passage_id] for passage_id in ids], np.intp) for ids in dev.candidates.values()]
    if dev.token_weight:
        if not processes.is_first:
            nothing = np.zeros((0, student.vector_dim), np.float32)
            return EncodedDev(dev, nothing, nothing, rows)
        queries = student.encode_with_tokens([*dev.queries.values()], "query", advance=advance)
        passages = student.encode_with_tokens([*dev.passages.values()], "passage", advance=advance)
        assert queries.tokens is not None
        assert passages.tokens is not None
        stored = PartVectors.of_texts(passages.tokens.vectors, passages.tokens.counts)
        best = [
            dev.token_weight * stored.sum_of_best(mean_of_cosines(tokens), candidates)
            for tokens, candidates in zip(queries.tokens.split(), rows, strict=True)
        ]
        return EncodedDev(dev, queries.vectors, passages.vectors, rows, best)
    encode = partial(encode_together, student, advance=advance, processes=processes)
    prefix = student.config.backbone.query_prefix
    vectors = encode([dev.instructions.get(name, prefix) + text for name, text in dev.queries.items()], "query")
    return EncodedDev(dev, vectors, encode([*dev.passages.values()], "passage"), rows)


def encode_together(
    student: Student,
    texts: Sequence[str],
    kind: TextKind,
    *,
    advance: Advance = ignore,
    processes: Processes = ALONE,
) -> Float32[np.ndarray, "texts dim"]:
    """Vectors of passages, or of queries that have their instruction or prefix already; each process encodes some.

    ``advance`` is called with the number of texts finished, as if the other processes were as fast as this one.
    """
    queries = partial(student.encode_queries, instruction="")
    encode = queries if kind == "query" else student.encode_passages
    if processes.count == 1:
        return encode(texts, advance=advance).vectors

    def encode_own(chosen: Sequence[str]) -> NDArray[np.float32]:
        return encode(chosen, advance=lambda count: advance(count * processes.count)).vectors

    return processes.share_rows(texts, encode_own, student.vector_dim, student.backbone.device)


def has_interaction_weight(student: Student, task: Task) -> bool:
    """Whether the score has an interaction in addition to its inner product, and so a weight r to choose."""
    return student.has_dot and student.interaction.has_interaction(task)


def measure_by_weight(student: Student, encoded: EncodedDev, *, advance: Advance = ignore) -> DevResult:
    """Measure a dev set for each weight r of the interaction; ``advance`` is called with the number of queries ranked.

    Raises:
        TrainingDivergedError: scores are not finite.
    """
    dev = encoded.dev
    scores: dict[float, Scores] = {1.0: _score(student, encoded, advance)}
    if has_interaction_weight(student, dev.task):
        dots = [
            _dot(student, query, encoded.passages[rows], dev.task)
            for query, rows in zip(encoded.queries, encoded.rows, strict=True)
        ]
        scores = {
            weight: [dot + weight * (whole - dot) for dot, whole in zip(dots, scores[1.0], strict=True)]
            for weight in INTERACTION_WEIGHTS
        }
    elif isinstance(student.interaction, Interaction) and student.has_dot:
        scores = {0.0: scores[1.0]}
    words = [dev.word_scores[query_id] for query_id in dev.queries] if dev.word_scores else []
    for score_features in (words, encoded.token_scores):
        if score_features:
            scores = {
                weight: [base + added for base, added in zip(weight_scores, score_features, strict=True)]
                for weight, weight_scores in scores.items()
            }
    results = {weight: dev.measure(weight_scores) for weight, weight_scores in scores.items()}
    return DevResult(
        dev.task,
        {weight: result.value for weight, result in results.items()},
        {weight: result.by_item for weight, result in results.items()},
    )


def _score(student: Student, encoded: EncodedDev, advance: Advance) -> list[NDArray[np.float32]]:
    """The scores with the whole interaction, r = 1."""
    scores: list[NDArray[np.float32]] = []
    for query, rows in zip(encoded.queries, encoded.rows, strict=True):
        scores.append(student.score(query, encoded.passages[rows], encoded.dev.task, interaction_weight=1.0))
        advance(1)
    if not all(np.isfinite(query_scores).all() for query_scores in scores):
        raise TrainingDivergedError(
            f"the student's scores of the dev queries of '{encoded.dev.name}' are not finite; the last good checkpoint "
            "is kept. Lower the learning rate, or compute in bfloat16 or float32"
        )
    return scores


def _dot(
    student: Student, query: Float32[np.ndarray, " dim"], passages: Float32[np.ndarray, "passages dim"], task: Task
) -> Float32[np.ndarray, " passages"]:
    """Inner products computed exactly as in ``Student.score``, equal to its score without interaction."""
    dot_query = torch.from_numpy(student.query_vectors(query[None], task))
    blocks = torch.from_numpy(passages).split(SCORE_BLOCK)
    return torch.cat([(dot_query @ block.T)[0] for block in blocks]).numpy()


def make_teacher_dev_set(
    dataset: Dataset,
    task: Task,
    queries: Sequence[Query],
    *,
    student: SearchStudent | None,
    depth: int,
    with_positives: bool,
    placement: Placement = HERE,
) -> DevSet:
    """Dev queries with the first ``depth`` passages of BM25 and of the student's inner products, from the whole corpus.

    Passages that are the query itself are left out (``data.same_text``).

    Args:
        dataset: the data set, with its dev judgements.
        task: the task of its pairs.
        queries: queries of the dev split.
        student: proposes candidates by its inner product, or by cosine if its head has no inner product. If None, only
            BM25 proposes candidates, and no passages are encoded.
        depth: number of passages from each list.
        with_positives: put all positives first, and leave out other passages with the same text as a positive, for uses
            that rely on every label. Otherwise the lists are exactly what a search would find.
        placement: where the corpus is encoded.

    Raises:
        ModelError: the student's vectors are not finite.
    """
    title = f"BM25 for the dev queries of {dataset.name}"
    own_passages = dataset.own_passages
    lexical = bm25_lists(
        dataset.passages, list(dataset.passages), queries, depth, left_out=own_passages.by_query, title=title
    )
    nearest: list[list[str]] = [[] for _ in queries]
    if student is not None:
        nearest = _nearest(dataset, task, queries, student, depth, placement)
    same_text = SameText(dataset.passages) if with_positives else None
    positives = dataset.positives("dev")
    candidates: dict[str, list[str]] = {}
    for query, by_words, by_vectors in zip(queries, lexical, nearest, strict=True):
        first = positives[query.id] if same_text is not None else ()
        repeats = same_text.duplicates_of(first) if same_text is not None else set[str]()
        proposed = dict.fromkeys([*first, *by_words, *by_vectors])
        candidates[query.id] = [
            p for p in proposed if p in first or not (p in repeats or p in own_passages.of(query.id))
        ]
    passage_ids = dict.fromkeys(passage_id for ids in candidates.values() for passage_id in ids)
    return _dev_set(dataset, task, queries, candidates, passage_ids)


@dataclass(frozen=True, slots=True)
class DevSetScores:
    """A teacher's scores of a dev set, and counts of the ``num_new`` pairs scored now (``PoolScores``).

    ``is_ungraded`` says of each query's candidates to which a teacher of grades gave none.
    """

    scores: Scores
    num_new: int
    num_truncated: int
    num_undecided: int
    is_ungraded: Sequence[NDArray[np.bool_]]


def score_dev_set(
    teacher: PairTeacher, dev: DevSet, *, name: str, store: Path, placement: Placement = HERE
) -> DevSetScores:
    """Let a teacher score the candidates of each query.

    Args:
        teacher: scores.
        dev: the queries and their candidates.
        name: the teacher's name in the progress bar.
        store: folder of a label store; pairs with a label in it are not scored again.
        placement: where the teacher works.
    """
    pool = score_pool(
        teacher,
        dev.candidates,
        dev.queries,
        dev.passages,
        dev.task,
        dataset=dev.name,
        store=store,
        title=f"{name} on {dev.name}",
        placement=placement,
    )
    scores = [
        np.array([pool.scores[query_id][passage_id] for passage_id in ids]) for query_id, ids in dev.candidates.items()
    ]
    is_ungraded = [
        np.array([passage_id in pool.ungraded.get(query_id, ()) for passage_id in ids], np.bool_)
        for query_id, ids in dev.candidates.items()
    ]
    return DevSetScores(scores, pool.num_new, pool.num_truncated, pool.num_undecided, is_ungraded)


def _nearest(
    dataset: Dataset, task: Task, queries: Sequence[Query], student: SearchStudent, depth: int, placement: Placement
) -> list[list[str]]:
    searcher = student if student.has_dot else CosineStudent(student)
    texts = [passage.full_text for passage in dataset.passages.values()]
    with (
        progress_bar(f"encoding {dataset.name}", len(texts)) as advance,
        placement.workers(searcher, encode_shard) as workers,
    ):
        passages = encode_texts(workers, texts, "passage", advance=advance).vectors
    dots = searcher.query_vectors(searcher.encode_queries([query.text for query in queries]).vectors, task)
    if not (np.isfinite(passages).all() and np.isfinite(dots).all()):
        raise ModelError(f"vectors of '{dataset.name}' are not finite; check the student that proposes candidates")
    ids, own_passages = list(dataset.passages), dataset.own_passages
    extra = max((len(own_passages.of(query.id)) for query in queries), default=0)
    ranked = (ids_at(ids, rows) for rows in nearest_rows(dots, passages, depth + extra, ids))
    return [
        [p for p in passage_ids if p not in own_passages.of(query.id)][:depth]
        for query, passage_ids in zip(queries, ranked, strict=True)
    ]
