"""Lists of candidates for dev queries, and dev pairs, on which teachers are tried before they teach."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from d2llm.core.errors import InputError, ModelError
from d2llm.core.progress import progress_bar
from d2llm.core.types import Query, Task
from d2llm.data.beir import Dataset
from d2llm.data.pairs import PairDataset
from d2llm.data.same_text import SameText
from d2llm.evaluation.gold import read_gold
from d2llm.evaluation.judging import PoolScores, judge_pool
from d2llm.models.teachers.judge import Judge
from d2llm.ops.selection import ids_at, top_rows
from d2llm.retrieval.cosine import CosineStudent
from d2llm.retrieval.protocols import SearchStudent
from d2llm.store.bm25 import WordIndex, rank_passages
from d2llm.training.dev import PairDevSet


@dataclass(frozen=True, slots=True)
class DevLists:
    """Candidates (passage ids) of dev queries of one data set, and the judgements of these queries."""

    dataset: Dataset
    task: Task
    candidates: Mapping[str, Sequence[str]]
    qrels: Mapping[str, Mapping[str, int]]

    @property
    def name(self) -> str:
        """The data set's."""
        return self.dataset.name

    @property
    def query_texts(self) -> dict[str, str]:
        """By query id."""
        return {query_id: self.dataset.queries[query_id].text for query_id in self.candidates}

    @property
    def passage_texts(self) -> dict[str, str]:
        """Full texts of the candidates by passage id."""
        wanted = {passage_id for ids in self.candidates.values() for passage_id in ids}
        return {passage_id: self.dataset.passages[passage_id].full_text for passage_id in wanted}

    def ranked(self, scores: Mapping[str, Mapping[str, float]]) -> dict[str, list[str]]:
        """The candidates of each query by falling score, equal ones by id."""
        return {
            query_id: sorted(passage_ids, key=lambda passage_id: (-scores[query_id][passage_id], passage_id))
            for query_id, passage_ids in self.candidates.items()
        }


@dataclass(frozen=True, slots=True)
class DevPairs(PairDevSet):
    """Dev pairs in the form in which judges are asked: the candidates of a query are the passages of its pairs.

    The texts are their own ids: those of many pair sets are line numbers, under which other pairs may stand tomorrow.
    """

    @property
    def candidates(self) -> dict[str, list[str]]:
        """The different passages of each query."""
        found: dict[str, dict[str, None]] = {}
        for pair in self.pairs:
            found.setdefault(pair.query, {})[pair.passage] = None
        return {query: list(passages) for query, passages in found.items()}

    @property
    def query_texts(self) -> dict[str, str]:
        """By themselves."""
        return {pair.query: pair.query for pair in self.pairs}

    @property
    def passage_texts(self) -> dict[str, str]:
        """By themselves."""
        return {pair.passage: pair.passage for pair in self.pairs}

    def of_pairs(self, scores: Mapping[str, Mapping[str, float]]) -> NDArray[np.float64]:
        """The score of each pair [n]."""
        return np.array([scores[pair.query][pair.passage] for pair in self.pairs], np.float64)


def judge_dev(
    judge: Judge, of: DevLists | DevPairs, *, name: str, store: Path, show_progress: bool | None
) -> PoolScores:
    """The scores that a judge gives the candidates of each query.

    Args:
        judge: whom to ask.
        of: the candidates.
        name: of the judge, for the progress bar.
        store: folder of a label store, whose judgements are not made again.
        show_progress: None means: if standard error is a terminal.
    """
    return judge_pool(
        judge,
        of.candidates,
        of.query_texts,
        of.passage_texts,
        of.task,
        dataset=of.name,
        store=store,
        title=f"{name} on {of.name}",
        show_progress=show_progress,
    )


def dev_queries(dataset: Dataset, *, num_queries: int, seed: int, from_end: bool = False) -> list[Query]:
    """A random sample of the dev queries that have a positive, by a hash of their ids.

    A larger sample contains a smaller one. ``from_end`` takes the queries that an equally large sample without it would
    take last, so that what is fitted on the one is tried on others while there are enough.

    Raises:
        InputError: there are none.
    """
    judged = dataset.positives("dev") if "dev" in dataset.qrels else {}
    known = [query_id for query_id, positives in judged.items() if positives]
    if not known:
        raise InputError(
            f"{dataset.path}: qrels/dev.tsv has no query with a positive, so a teacher cannot be tried; move some "
            "training queries there"
        )
    ordered = sorted(known, key=lambda query_id: _place(query_id, seed))
    chosen = ordered[-num_queries:] if from_end else ordered[:num_queries]
    return [dataset.queries[query_id] for query_id in chosen]


def make_dev_pairs(dataset: PairDataset, task: Task, *, num_pairs: int, seed: int) -> DevPairs:
    """A random sample of the dev pairs, by a hash of their ids; a larger sample contains a smaller one.

    Args:
        dataset: with its dev split.
        task: what a pair stands for.
        num_pairs: how many, or all where there are fewer.
        seed: of the order.

    Raises:
        InputError: there are none.
        DataFormatError: the labels of the sample cannot be measured.
    """
    known = dataset.pairs("dev") if "dev" in dataset.splits else ()
    if not known:
        raise InputError(
            f"{dataset.path}: there are no dev pairs, so a teacher cannot be tried; move some training pairs there"
        )
    sample = tuple(sorted(known, key=lambda pair: _place(pair.id, seed))[:num_pairs])
    return DevPairs(dataset.name, task, sample, read_gold(replace(dataset, splits={"dev": sample}), "dev"))


def make_dev_lists(
    dataset: Dataset,
    task: Task,
    queries: Sequence[Query],
    *,
    student: SearchStudent | None,
    depth: int,
    with_positives: bool,
    show_progress: bool | None = None,
) -> DevLists:
    """The union of the first ``depth`` passages of BM25 and of the student's inner products, from the whole corpus.

    Args:
        dataset: with its dev judgements.
        task: what a pair stands for.
        queries: of the dev split.
        student: whose vectors propose; a head without an inner-product part proposes by its vectors' cosine. None:
            BM25 proposes alone, and no passage has to be encoded.
        depth: how many of each list.
        with_positives: put all positives first, and leave out other passages of the same text as one, for lists whose
            every label is believed. Otherwise the lists are just what a search would find.
        show_progress: None means: if standard error is a terminal.

    Raises:
        ModelError: the student gave vectors that are not finite.
    """
    index = WordIndex.from_texts(passage.full_text for passage in dataset.passages.values())
    lexical = rank_passages(index, list(dataset.passages), (query.text for query in queries), depth)
    nearest: list[list[str]] = [[] for _ in queries]
    if student is not None:
        nearest = _nearest(dataset, task, queries, student, depth, show_progress)
    same_text = SameText(dataset) if with_positives else None
    positives = dataset.positives("dev")
    candidates: dict[str, list[str]] = {}
    for query, by_words, by_vectors in zip(queries, lexical, nearest, strict=True):
        first = positives[query.id] if same_text is not None else ()
        repeats = same_text.as_any_of(first) if same_text is not None else set[str]()
        found = dict.fromkeys([*first, *(candidate.passage_id for candidate in by_words), *by_vectors])
        candidates[query.id] = [passage_id for passage_id in found if passage_id in first or passage_id not in repeats]
    return DevLists(dataset, task, candidates, {query.id: dict(dataset.qrels["dev"][query.id]) for query in queries})


def _place(identifier: str, seed: int) -> bytes:
    """By which ids are put into a random order."""
    return hashlib.sha256(f"{seed}:{identifier}".encode()).digest()


def _nearest(
    dataset: Dataset, task: Task, queries: Sequence[Query], student: SearchStudent, depth: int, show: bool | None
) -> list[list[str]]:
    searcher = student if student.has_anchor else CosineStudent(student)
    texts = [passage.full_text for passage in dataset.passages.values()]
    with progress_bar(f"encoding {dataset.name}", len(texts), show=show) as advance:
        passages = searcher.encode_passages(texts, advance=advance).vectors
    encoded = searcher.encode_queries([query.text for query in queries]).vectors
    asked = searcher.anchor_queries(encoded, task)
    if not (np.isfinite(passages).all() and np.isfinite(asked).all()):
        raise ModelError(f"vectors of '{dataset.name}' are not finite; check the student that proposes candidates")
    ids = list(dataset.passages)
    return [ids_at(ids, top_rows(passages @ query, depth, partial(ids_at, ids))) for query in asked]
