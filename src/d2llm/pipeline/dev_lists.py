"""Lists of candidates for dev queries, on which teachers are tried before they teach."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from d2llm.core.errors import InputError, ModelError
from d2llm.core.types import Query, Task
from d2llm.data.beir import Dataset
from d2llm.data.same_text import SameText
from d2llm.index.lexical import LexicalIndex
from d2llm.ops.selection import top_rows
from d2llm.pipeline.cosine import CosineStudent
from d2llm.pipeline.progress import progress_bar
from d2llm.pipeline.protocols import SearchStudent


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
    ordered = sorted(known, key=lambda query_id: hashlib.sha256(f"{seed}:{query_id}".encode()).digest())
    chosen = ordered[-num_queries:] if from_end else ordered[:num_queries]
    return [dataset.queries[query_id] for query_id in chosen]


def make_dev_lists(
    dataset: Dataset,
    task: Task,
    queries: Sequence[Query],
    *,
    student: SearchStudent,
    depth: int,
    with_positives: bool,
    show_progress: bool | None = None,
) -> DevLists:
    """The union of the first ``depth`` passages of BM25 and of the student's inner products, from the whole corpus.

    Args:
        dataset: with its dev judgements.
        task: what a pair stands for.
        queries: of the dev split.
        student: whose vectors propose; a head without an inner-product part proposes by its vectors' cosine.
        depth: how many of each list.
        with_positives: put all positives first, and leave out other passages of the same text as one, for lists whose
            every label is believed. Otherwise the lists are just what a search would find.
        show_progress: None means: if standard error is a terminal.

    Raises:
        ModelError: the student gave vectors that are not finite.
    """
    lexical = LexicalIndex(list(dataset.passages.values())).search([query.text for query in queries], depth)
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
    return [[ids[row] for row in top_rows(passages @ query, depth, ids.__getitem__).tolist()] for query in asked]
