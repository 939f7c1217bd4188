"""Queries with their first passages in a student's order: what a ``ListwiseReader`` learns from and is measured on."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save

from d2llm.core.errors import InputError
from d2llm.core.files import write_bytes
from d2llm.core.fingerprint import fingerprint_json, fingerprint_passages
from d2llm.core.types import Task
from d2llm.data.beir import Dataset
from d2llm.data.labels import LabelStore, only_labels
from d2llm.models.student import Student
from d2llm.recipe import ReaderTuningConfig
from d2llm.retrieval.index import Index
from d2llm.training.mining.choose import key_of

_ARRAYS = ("vectors", "scores", "grades")


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
    """

    query_ids: list[str]
    queries: list[str]
    ids: list[list[str]]
    vectors: NDArray[np.float32]
    scores: NDArray[np.float64]
    grades: NDArray[np.int64]

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
            for split, (query_ids, queries, ids) in json.loads(metadata["texts"]).items()
        }
