"""The verb ``tune-reader``: trains a causal language model to rank passages that it reads as a student's vectors.

The lists to learn from are the first passages of train queries in the student's order. The order to learn has the
passages with the higher judgement first, or that a teacher finds better, then those with the student's higher score;
half of the lists are read in the student's order, half in random order. First the network between the vectors and the
model is trained alone: to let the model repeat passages from their vectors, if the settings say so, then on lists.
Then it is trained with LoRA (``models.listwise_reader`` has the source). With ``texts`` the model also learns to rank
passages that it reads as vectors and texts, and to rank vectors alone as these, as in the paper.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save
from torch import Tensor

from d2llm.core.errors import InputError
from d2llm.core.files import write_bytes
from d2llm.core.fingerprint import fingerprint_json, fingerprint_passages
from d2llm.core.inputs import objects_of
from d2llm.core.json_values import parse_json
from d2llm.core.names import counted
from d2llm.core.progress import progress_bar
from d2llm.core.types import Qrels, Task
from d2llm.data.beir import Dataset
from d2llm.data.labels import LabelStore, only_labels
from d2llm.data.run_folder import require_unfinished, working_folder
from d2llm.models.backbone import Backbone
from d2llm.models.device import use_plain_attention_on_cpu
from d2llm.models.listwise_reader import READER_KIND, ListwiseReader, ReadOrder
from d2llm.models.protocols import task_for
from d2llm.models.student import Student
from d2llm.ops.losses import drawing_divergence, drawing_loss
from d2llm.ops.measures import per_query_measures
from d2llm.recipe import BackboneConfig, Lora, ReaderTuningConfig
from d2llm.retrieval.index import Index
from d2llm.training.checkpoints import trainable
from d2llm.training.mining.choose import key_of
from d2llm.training.pretrain import word_head
from d2llm.training.trainer import Trainable, Trainer, save_tuned

_WEIGHT_DECAY = 0.01
_MEASURED_AT_ONCE = 64
_MIXED_ORDERS = 5  # random orders of each list that are measured
_ARRAYS = ("vectors", "scores", "grades")  # of the lists, in their file
_TEXT_DIVERGENCE = 0.2  # the paper's weight


@dataclass(frozen=True, slots=True)
class ReaderFigures:
    """Mean nDCG@10 on the lists of ``num_queries`` dev queries: in the student's order, by the logits of the first
    step, in the decoded order, and in random order.
    """

    num_queries: int
    student: float
    first_step: float
    decoded: float
    random: float


@dataclass(frozen=True, slots=True)
class ReaderTuningReport:
    """The result of a tuning run.

    Attributes:
        folder: the tuned reader.
        fingerprint: of its weights.
        num_lists: by data set, the train queries whose list has a relevant passage.
        num_shared: train queries left out because they share a relevant passage with a dev or test query.
        steps: number of steps of all stages.
        losses: mean loss in the first and the last tenth of each stage.
        dev: by data set, what it brings on dev queries.
        seconds: since the start, or since the last resumption.
    """

    folder: str
    fingerprint: str
    num_lists: dict[str, int]
    num_shared: int
    steps: int
    losses: tuple[tuple[float, float], ...]
    dev: dict[str, ReaderFigures]
    seconds: float


class ReadList(NamedTuple):
    """The list of one query: row ``row`` of ``lists``, whose passages are read in the order of these places."""

    lists: RankedLists
    row: int
    order: list[int]

    @property
    def query(self) -> str:
        """The query's text."""
        return self.lists.queries[self.row]

    @property
    def vectors(self) -> NDArray[np.float32]:
        """The passages' vectors [n, dim], as they are read."""
        return self.lists.vectors[self.row, self.order]

    @property
    def texts(self) -> list[str] | None:
        """The passages' texts, as they are read; None if a reader is not to learn from them."""
        texts, ids = self.lists.texts, self.lists.ids[self.row]
        return [texts[ids[index]] for index in self.order] if texts else None

    @property
    def target(self) -> list[int]:
        """The order to learn: higher grades first, then those that the student ranks higher."""
        grades = self.lists.grades[self.row, self.order].tolist()
        return sorted(range(len(grades)), key=lambda index: (-grades[index], self.order[index]))


def tune_reader(
    student: Student,
    datasets: Sequence[Dataset] | Dataset,
    folder: str | Path,
    *,
    config: ReaderTuningConfig | None = None,
    task: Task | None = None,
    seed: int = 0,
    device: str | None = None,
    dtype: str | None = None,
) -> ReaderTuningReport:
    """Tune a reader of a student's vectors and write it to ``folder``; an interrupted run continues where it was.

    ``ListwiseReader.load(folder)`` loads it.

    Args:
        student: makes the vectors and ranks the lists.
        datasets: retrieval sets with a train split and, to measure the reader, a dev split.
        folder: where to write the reader; ``<folder>.run`` beside it has the lists, and each stage's log.
        config: the language model, the lists and the schedule.
        task: the type of search whose scores rank the lists; by default what the student was trained for.
        seed: seed of the network's and the adapter's initial weights, of the order of lists, and of the dev queries.
        device: where the reader computes; by default the best device available.
        dtype: its number format; by default the fastest on that device.

    Raises:
        KeyboardInterrupt: Ctrl-C or SIGTERM; a checkpoint of the last complete step is kept.
        DataFormatError: a data set has no train split.
        InputError: there are too few train queries or passages, ``folder`` already holds something, the checkpoint is
            from another run, or the model is not a causal language model.
        TrainingDivergedError: the loss is not finite; the last good checkpoint is kept.
    """
    datasets = objects_of(datasets, "datasets", Dataset)
    config, folder, started = config or ReaderTuningConfig(), Path(folder), time.monotonic()
    task = task_for(student, task)
    require_unfinished(folder, READER_KIND)
    chosen, num_shared = _choose(datasets, config, seed)
    backbone_config = BackboneConfig(model=config.model, layers=config.layers, tuning=Lora(**config.lora.model_dump()))
    backbone = Backbone.load(backbone_config, device=device, dtype=dtype)
    steps = min(config.steps, config.depth)
    reader = ListwiseReader(backbone, student.vector_dim, student.fingerprint, steps=steps, seed=seed)
    run_folder = working_folder(folder)
    lists = {
        dataset.name: collect_lists(student, dataset, chosen[dataset.name], task=task, config=config, folder=run_folder)
        for dataset in datasets
    }
    train = [
        with_texts(lists[dataset.name]["train"], dataset) if config.texts else lists[dataset.name]["train"]
        for dataset in datasets
    ]
    settings = _settings(reader, train, config, seed)
    repeated = passages_to_repeat(student, datasets, config.alignment, seed)
    stages = train_reader(reader, train, config, run_folder, settings, seed=seed, repeated=repeated)
    reader.eval()
    report = ReaderTuningReport(
        folder=str(folder),
        fingerprint="",
        num_lists={name: int(of_set["train"].grades.any(axis=1).sum()) for name, of_set in lists.items()},
        num_shared=num_shared,
        steps=sum(stage.step for stage in stages),
        losses=tuple(stage.mean_losses for stage in stages),
        dev={
            dataset.name: measure(reader, lists[dataset.name]["dev"], dataset.qrels["dev"], seed=seed)
            for dataset in datasets
            if chosen[dataset.name]["dev"]
        },
        seconds=time.monotonic() - started,
    )
    content = {
        "tuning": config.model_dump(mode="json"),
        "task": task,
        "seed": seed,
        "data": [dataset.name for dataset in datasets],
    }
    return save_tuned(report, partial(reader.save, folder), content, stages)


def with_texts(lists: RankedLists, dataset: Dataset) -> RankedLists:
    """The lists with the texts of their passages."""
    return replace(lists, texts={key: dataset.passages[key].full_text for ids in lists.ids for key in ids})


class Repeated(NamedTuple):
    """A passage's text, and its vector [dim] by the student."""

    text: str
    vector: NDArray[np.float32]


def passages_to_repeat(student: Student, datasets: Sequence[Dataset], count: int, seed: int) -> list[Repeated]:
    """A random sample of all data sets' passages; fewer than ``count`` if there are no more."""
    if not count:
        return []
    texts = sorted({passage.full_text for dataset in datasets for passage in dataset.passages.values()})
    chosen = random.Random(seed).sample(texts, min(count, len(texts)))
    vectors = student.encode_passages(chosen).vectors
    return [Repeated(text, vector) for text, vector in zip(chosen, vectors, strict=True)]


def training_lists(lists: Sequence[RankedLists], num_lists: int, seed: int) -> list[ReadList]:
    """Those with a relevant passage, mixed anew in each round; every other one is read in random order.

    Raises:
        InputError: no list has a relevant passage.
    """
    usable = [(ranked, row) for ranked in lists for row in np.flatnonzero(ranked.grades.any(axis=1)).tolist()]
    if not usable:
        raise InputError(
            "the student finds no relevant passage for any train query, so there is no ranking to learn; give another "
            "student or other data"
        )
    rng = random.Random(seed)
    read: list[ReadList] = []
    while len(read) < num_lists:
        for position, (ranked, row) in enumerate(rng.sample(usable, len(usable))):
            positions = range(ranked.grades.shape[1])
            read.append(ReadList(ranked, row, [*positions] if position % 2 else rng.sample(positions, len(positions))))
    return read[:num_lists]


def measure(reader: ListwiseReader, lists: RankedLists, qrels: Qrels, *, seed: int = 0) -> ReaderFigures:
    """nDCG@10 of a reader on lists, beside that of the student's order and of a random one."""
    read: list[ReadOrder] = []
    with progress_bar("measuring the reader", len(lists)) as advance:
        for start in range(0, len(lists), _MEASURED_AT_ONCE):
            part = slice(start, start + _MEASURED_AT_ONCE)
            read += reader.rank(lists.queries[part], list(lists.vectors[part]))
            advance(len(lists.queries[part]))
    rng, depth = random.Random(seed), lists.grades.shape[1]
    by_logits = [np.argsort(-scored.logits, kind="stable").tolist() for scored in read]
    mixed = [[rng.sample(range(depth), depth) for _ in read] for _ in range(_MIXED_ORDERS)]
    return ReaderFigures(
        num_queries=len(lists),
        student=float(ndcg(lists, [range(depth)] * len(lists), qrels).mean()),
        first_step=float(ndcg(lists, by_logits, qrels).mean()),
        decoded=float(ndcg(lists, [scored.order.tolist() for scored in read], qrels).mean()),
        random=float(np.mean([ndcg(lists, orders, qrels) for orders in mixed])),
    )


def ndcg(lists: RankedLists, orders: Sequence[Sequence[int]], qrels: Qrels) -> NDArray[np.float64]:
    """nDCG@10 [n] of each query, with the passages of its list at these places."""
    rankings = {
        query_id: [ids[index] for index in order]
        for query_id, ids, order in zip(lists.query_ids, lists.ids, orders, strict=True)
    }
    values = per_query_measures(rankings, {query_id: qrels[query_id] for query_id in rankings})["nDCG@10"]
    return np.array([values[query_id] for query_id in lists.query_ids])


def train_reader(
    reader: ListwiseReader,
    lists: Sequence[RankedLists],
    config: ReaderTuningConfig,
    folder: Path,
    settings: dict[str, Any],
    *,
    seed: int,
    repeated: Sequence[Repeated] = (),
) -> list[Trainer]:
    """Train a reader in all stages, or resume its training in ``folder``; returns the trainers of the stages."""
    read = training_lists(lists, sum(config.lists), seed)
    use_plain_attention_on_cpu(reader.backbone.model)
    stages: list[tuple[str, Sequence[Any], Callable[[Sequence[Any]], Tensor]]] = [
        ("network", read[: config.lists[0]], partial(loss_of, reader)),
        ("lora", read[config.lists[0] :], partial(loss_of, reader)),
    ]
    if repeated:
        stages.insert(0, ("alignment", repeated, partial(_repetition, reader, word_head(reader.backbone))))
    trainers: list[Trainer] = []
    for name, examples, loss in stages:
        if not examples:
            continue
        stage = _Stage(name, reader, examples, loss, config, seed, sum(earlier.step for earlier in trainers))
        trainer = Trainer(
            stage,
            folder / name,
            settings,
            seed=seed,
            warmup_steps=config.warmup_of(stage.total_steps),
            checkpoint_minutes=config.checkpoint_minutes,
        )
        trainer.train()
        trainers.append(trainer)
    return trainers


class _Stage(Trainable):
    """The network alone, or after these stages the network and the adapter."""

    def __init__(
        self,
        name: str,
        reader: ListwiseReader,
        examples: Sequence[Any],
        loss: Callable[[Sequence[Any]], Tensor],
        config: ReaderTuningConfig,
        seed: int,
        steps_before: int,
    ) -> None:
        self.reader, self.loss, self.seed, self.steps_before = reader, loss, seed, steps_before
        size = config.batch_lists
        self.batches = [examples[start : start + size] for start in range(0, len(examples), size)]
        self.total_steps = len(self.batches)
        self.title, rate, self.parameters = "tuning the reader's network", config.network_rate, reader.own_parameters
        if name == "lora":
            reader.backbone.prepare_training(seed=seed)
            self.title, rate, self.parameters = "tuning the reader", config.lora_rate, trainable(reader)
        self.groups = [([*self.parameters.values()], rate, _WEIGHT_DECAY)]

    def step(self, step: int) -> dict[str, Any]:
        self.reader.train()  # with the dropout of new adapters
        torch.manual_seed(self.seed * 1_000_003 + self.steps_before + step)  # another dropout than in earlier stages
        loss = self.loss(self.batches[step])
        loss.backward()
        return {"loss": loss.detach()}


def _repetition(reader: ListwiseReader, head: Callable[[Tensor], Tensor], batch: Sequence[Repeated]) -> Tensor:
    return reader.repetition_loss([one.text for one in batch], np.stack([one.vector for one in batch]), head)


def loss_of(reader: ListwiseReader, batch: Sequence[ReadList]) -> Tensor:
    """The mean loss of drawing the lists' passages in the order to learn; with texts, PE-Rank's three losses."""
    orders = [example.target[: reader.steps] for example in batch]
    queries, vectors = [example.query for example in batch], np.stack([example.vectors for example in batch])
    logits = reader.step_logits(queries, vectors, orders)
    drawn = torch.tensor(orders, device=logits.device)
    loss = drawing_loss(logits, drawn)
    texts = [example.texts for example in batch]
    if None in texts:
        return loss
    by_texts = reader.step_logits(queries, vectors, orders, cast("list[list[str]]", texts))
    return loss + drawing_loss(by_texts, drawn) + _TEXT_DIVERGENCE * drawing_divergence(logits, by_texts, drawn)


def _choose(
    datasets: Sequence[Dataset], config: ReaderTuningConfig, seed: int
) -> tuple[dict[str, dict[str, list[str]]], int]:
    """The queries by data set and split, and how many train queries were left out."""
    names = [dataset.name for dataset in datasets]
    if len(set(names)) < len(names):
        raise InputError(f"two data sets have the same name: {', '.join(sorted(names))}; rename the folder of one")
    chosen: dict[str, dict[str, list[str]]] = {}
    num_shared = 0
    for dataset in datasets:
        train, shared = train_queries(dataset, config)
        chosen[dataset.name] = {"train": train, "dev": dev_queries(dataset, config.dev_queries, seed)}
        num_shared += shared
    num_train = sum(len(splits["train"]) for splits in chosen.values())
    if num_train < config.batch_lists:
        has_labels = "" if config.labels is None else f" and {config.depth} labelled ones"
        raise InputError(
            f"there are only {counted(num_train, 'train query')} with a relevant passage{has_labels} in "
            f"{', '.join(names) or '(no data)'}, but a step takes {config.batch_lists}; {num_shared} others were left "
            "out because they share one with a dev or test query (exclude_shared_passages = false keeps those). Give "
            "more data"
        )
    return chosen, num_shared


def _settings(
    reader: ListwiseReader, lists: Sequence[RankedLists], config: ReaderTuningConfig, seed: int
) -> dict[str, Any]:
    """Everything that affects a run; a checkpoint with other settings is from another run."""
    return {
        "tuning": config.model_dump(mode="json", exclude={"checkpoint_minutes", "model", "dev_queries", "labels"}),
        "model": reader.backbone.fingerprint_base(),
        "student": reader.student,
        "lists": fingerprint_json(
            [[ranked.query_ids, ranked.queries, ranked.ids, ranked.grades.tolist()] for ranked in lists]
        ),
        "seed": seed,
    }


@dataclass(frozen=True, slots=True)
class RankedLists:
    """The first passages of n queries, in the student's order.

    Attributes:
        query_ids: the queries' ids.
        queries: their texts.
        ids: the passages' ids, by query.
        vectors: the passages' vectors, float32 [n, depth, dim].
        scores: the student's scores, float64 [n, depth].
        grades: their judgements, int64 [n, depth]; 0 if there is none. Of lists that a teacher has labelled, how many
            of the list it does not find better.
        texts: the passages' texts by id, where a reader is to learn from them.
    """

    query_ids: list[str]
    queries: list[str]
    ids: list[list[str]]
    vectors: NDArray[np.float32]
    scores: NDArray[np.float64]
    grades: NDArray[np.int64]
    texts: Mapping[str, str] = field(default_factory=dict[str, str])

    def __len__(self) -> int:
        return len(self.queries)


def train_queries(dataset: Dataset, config: ReaderTuningConfig) -> tuple[list[str], int]:
    """Train queries with a relevant passage, and how many others share one with a dev or test query, so are left out.

    With ``config.labels``, only those of which enough passages are labelled for a list. The last ones in the order of
    the miner: a student that was distilled on these data learnt from the first.

    Raises:
        DataFormatError: the data set has no train split.
    """
    held_out = [split for split in ("dev", "test") if split in dataset.qrels and config.exclude_shared_passages]
    kept = dataset.unshared_positives("train", held_out)
    num_shared = len(dataset.unshared_positives("train")) - len(kept)
    if config.labels is not None:
        store = only_labels(Path(config.labels), dataset.name)
        has_list = [] if store is None else [key for key in kept if len(_labels(dataset, store, key)) >= config.depth]
        kept = {query_id: kept[query_id] for query_id in has_list}
    return sorted(kept, key=lambda query_id: key_of(0, query_id))[-config.max_queries :], num_shared


def dev_queries(dataset: Dataset, num_queries: int, seed: int) -> list[str]:
    """A random sample of the dev queries with a relevant passage."""
    judged = dataset.positives("dev") if "dev" in dataset.qrels else {}
    kept = sorted(query_id for query_id, relevant in judged.items() if relevant)
    return random.Random(seed).sample(kept, min(num_queries, len(kept)))


def collect_lists(
    student: Student,
    dataset: Dataset,
    chosen: dict[str, list[str]],
    *,
    task: Task,
    config: ReaderTuningConfig,
    folder: Path,
) -> dict[str, RankedLists]:
    """The lists of the chosen queries (split -> ids), ranked by the student's full score in a temporary index.

    They are kept in ``folder``, and read from there if they are the same.

    Raises:
        InputError: the data set has fewer than ``config.depth`` passages.
    """
    num_own = max((len(passages) for passages in dataset.own_passages.by_query.values()), default=0)
    if (num_passages := len(dataset.passages) - num_own) < config.depth:
        raise InputError(
            f"{dataset.name}: has {num_passages} passages, but a list takes {config.depth}; lower the depth, or leave "
            "the data set out"
        )
    judged: dict[str, list[list[Any]]] = {
        split: [[query_id, dataset.queries[query_id].text, dataset.qrels[split][query_id]] for query_id in ids]
        for split, ids in chosen.items()
    }
    store = None if config.labels is None else only_labels(Path(config.labels), dataset.name)
    if store is not None:
        judged["train"] = [[*row, _labels(dataset, store, row[0])] for row in judged.get("train", [])]
    corpus = fingerprint_passages(dataset.passages.values())
    weights = student.feature_weights(task).model_dump(mode="json")
    fingerprint = fingerprint_json([student.fingerprint, weights, corpus, judged, task, config.depth])
    file = folder / f"{dataset.name}.lists.safetensors"
    kept = _read(file, fingerprint)
    if kept is not None:
        return kept
    folder.mkdir(parents=True, exist_ok=True)
    lists: dict[str, RankedLists] = {}
    with TemporaryDirectory(dir=folder) as temporary:
        index = Index.create(Path(temporary) / "index", student, task=task)
        index.upsert(dataset.passages.values())
        for split, query_ids in chosen.items():
            if split == "train" and store is not None:
                lists[split] = _labelled(index, dataset, store, query_ids, config.depth, task)
            else:
                lists[split] = _ranked(index, dataset, split, query_ids, config.depth)
    _write(file, lists, fingerprint)
    return lists


def _labels(dataset: Dataset, store: LabelStore, query_id: str) -> dict[str, float]:
    """A query's labels of passages that the data set has."""
    return {name: value for name, value in store.log_odds(query_id).items() if name in dataset.passages}


def _labelled(
    index: Index, dataset: Dataset, store: LabelStore, query_ids: Sequence[str], depth: int, task: Task
) -> RankedLists:
    """The labelled passages of each query that the student scores highest, by its vectors, in the teacher's order."""
    student, texts = index.student, [dataset.queries[query_id].text for query_id in query_ids]
    ids: list[list[str]] = []
    vectors = np.zeros((len(query_ids), depth, student.vector_dim), np.float32)
    scores, grades = np.zeros((len(query_ids), depth)), np.zeros((len(query_ids), depth), np.int64)
    queries = student.encode_queries(texts).vectors if texts else []
    for row, (query_id, query) in enumerate(zip(query_ids, queries, strict=True)):
        log_odds = _labels(dataset, store, query_id)
        names = [*log_odds]
        of_query = index.view.vectors(index.view.rows(names))
        by_student = student.score(query, of_query, task)
        best = np.argsort(-by_student, kind="stable")[:depth]
        ids.append([names[column] for column in best])
        vectors[row], scores[row] = of_query[best], by_student[best]
        values = np.array([log_odds[name] for name in ids[-1]])
        grades[row] = (values[:, None] >= values).sum(axis=1)
    return RankedLists([*query_ids], texts, ids, vectors, scores, grades)


def _ranked(index: Index, dataset: Dataset, split: str, query_ids: Sequence[str], depth: int) -> RankedLists:
    queries = [dataset.queries[query_id] for query_id in query_ids]
    own_passages = dataset.own_passages
    extra = max((len(own_passages.of(query_id)) for query_id in query_ids), default=0)
    rankings = [
        [hit for hit in ranking.passages if hit.passage.id not in own_passages.of(ranking.query.id)][:depth]
        for ranking in index.search(queries, top_k=min(depth + extra, len(index)))
    ]
    ids = [[hit.passage.id for hit in ranking] for ranking in rankings]
    vectors = [index.view.vectors(index.view.rows(passage_ids)) for passage_ids in ids]
    judged = [dataset.qrels[split][query_id] for query_id in query_ids]
    grades = [
        [of_query.get(passage_id, 0) for passage_id in passage_ids]
        for of_query, passage_ids in zip(judged, ids, strict=True)
    ]
    scores = [[hit.score for hit in ranking] for ranking in rankings]
    shape = (len(ids), depth)
    return RankedLists(
        list(query_ids),
        [query.text for query in queries],
        ids,
        np.array(vectors, np.float32).reshape(*shape, -1) if vectors else np.zeros((*shape, 1), np.float32),
        np.array(scores, np.float64).reshape(shape),
        np.array(grades, np.int64).reshape(shape),
    )


def _write(file: Path, lists: dict[str, RankedLists], fingerprint: str) -> None:
    arrays: dict[str, NDArray[Any]] = {}
    texts: dict[str, Any] = {}
    for split, ranked in lists.items():
        arrays |= {f"{split}/{name}": getattr(ranked, name) for name in _ARRAYS}
        texts[split] = [ranked.query_ids, ranked.queries, ranked.ids]
    write_bytes(file, save(arrays, {"fingerprint": fingerprint, "texts": json.dumps(texts)}))


def _read(file: Path, fingerprint: str) -> dict[str, RankedLists] | None:
    """The lists in the file; None if it is missing or has other lists."""
    if not file.is_file():
        return None
    with safe_open(file, "np") as opened:
        metadata: dict[str, str] = opened.metadata()
        if metadata["fingerprint"] != fingerprint:
            return None
        return {
            split: RankedLists(query_ids, queries, ids, *(opened.get_tensor(f"{split}/{name}") for name in _ARRAYS))
            for split, (query_ids, queries, ids) in parse_json(metadata["texts"]).items()
        }
