"""The weights of the evidence in a student's score, fitted on dev queries (``models.evidence``, ``ops.fusion``).

The student's own score keeps weight 1; each task has one set of weights for all of its data sets, to which every query
counts the same. What is reported is measured on queries that took no part in the fit: each half of the dev queries with
the weights of the other half. Where that is not better than the student's own score, the weights stay 0.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from d2llm.core.errors import InputError
from d2llm.core.types import EvidenceTerm, Query, Task
from d2llm.data.beir import Dataset
from d2llm.index.words import QueryWords, WordIndex
from d2llm.models.interaction import TASKS
from d2llm.models.student import Student
from d2llm.ops.fusion import fit_weights
from d2llm.ops.measures import per_query_measures
from d2llm.pipeline.dev_lists import dev_queries
from d2llm.pipeline.progress import progress_bar

_MEASURE = "nDCG@10"


@dataclass(frozen=True, slots=True)
class EvidenceLists:
    """Lists of passages of the dev queries of one data set, scored by each kind of evidence.

    Attributes:
        name: of the data set.
        task: of its pairs.
        lists: for each query the scores [passages, 1 + terms], the student's own first, and the grades [passages].
    """

    name: str
    task: Task
    lists: Sequence[tuple[NDArray[np.float32], NDArray[np.float64]]]


@dataclass(frozen=True, slots=True)
class FittedEvidence:
    """What was fitted for one task.

    ``measure`` has for each data set nDCG@10 of its lists by the student's own score, and with evidence, whose weights
    were fitted without the queries measured. ``weights`` are of all queries; all 0 where evidence is no better.
    """

    weights: dict[EvidenceTerm, float]
    measure: dict[str, tuple[float, float]]
    num_queries: int

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        own_and_with = {name: list(values) for name, values in self.measure.items()}
        return {"weights": dict(self.weights), "nDCG@10": own_and_with, "num_queries": self.num_queries}


def make_evidence_lists(
    student: Student,
    dataset: Dataset,
    task: Task,
    *,
    num_queries: int = 200,
    depth: int = 50,
    num_passages: int = 2_000,
    seed: int = 0,
    show_progress: bool | None = None,
) -> EvidenceLists:
    """Score the dev queries' positives and nearest passages: by words of the whole corpus, by vectors of a part of it.

    Args:
        student: whose evidence it is.
        dataset: with judged dev queries.
        task: of its pairs.
        num_queries: of dev, at most.
        depth: so many of the best by words are in a query's list, and of the best by vectors.
        num_passages: of the corpus that are read, at least: all positives, the best by words, others at random.
        seed: of the choice.
        show_progress: None means: if standard error is a terminal.

    Raises:
        InputError: there are no judged dev queries.
    """
    queries = dev_queries(dataset, num_queries=num_queries, seed=seed)
    ids = list(dataset.passages)
    row_of = {passage_id: row for row, passage_id in enumerate(ids)}
    words = WordIndex.from_texts(passage.full_text for passage in dataset.passages.values())
    asked = [words.query(query.text) for query in queries]
    by_words = [words.best(one, depth)[0] for one in asked]
    grades = [_grades(dataset, query, row_of) for query in queries]
    needed = np.unique(np.concatenate([*by_words, *(np.array([*own], np.int64) for own in grades)]))
    others = np.setdiff1d(np.arange(len(ids)), needed).tolist()
    extra = random.Random(seed).sample(others, min(len(others), max(0, num_passages - len(needed))))
    pool = np.union1d(needed, np.array(extra, np.int64))
    texts = [dataset.passages[ids[row]].full_text for row in pool]
    with progress_bar(f"reading {dataset.name} for its evidence", len(texts), show=show_progress) as advance:
        passages = student.encode_passages(texts, advance=advance).vectors
    vectors = student.encode_queries([query.text for query in queries]).vectors
    terms = student.evidence.terms
    lists: list[tuple[NDArray[np.float32], NDArray[np.float64]]] = []
    for query_words, vector, found, judged in zip(asked, vectors, by_words, grades, strict=True):
        own = student.score(vector, passages, task)
        nearest = pool[np.argsort(-own, kind="stable")[:depth]]
        rows = np.unique(np.concatenate([found, nearest, np.array([*judged], np.int64)]))
        scores = [own[np.searchsorted(pool, rows)], *evidence_of(words, query_words, rows, terms)]
        graded = np.array([judged.get(row, 0.0) for row in rows.tolist()])
        lists.append((np.stack(scores, axis=1), graded))
    return EvidenceLists(dataset.name, task, lists)


def evidence_of(
    words: WordIndex, query: QueryWords, rows: NDArray[np.int64], terms: Sequence[EvidenceTerm]
) -> list[NDArray[np.floating[Any]]]:
    """Each kind of evidence for some rows [n], in the order of ``terms``, as ``RowEvidence`` weighs it."""
    of_passages, of_windows = words.score(query, rows)
    limit = query.limit or 1.0
    found: dict[EvidenceTerm, NDArray[np.floating[Any]]] = {
        "words": of_passages,
        "words_share": of_passages / limit,
        "window_words": of_windows,
        "window_words_share": of_windows / limit,
    }
    return [found[term] for term in terms]


def fit_evidence(student: Student, made: Sequence[EvidenceLists]) -> dict[Task, FittedEvidence]:
    """Fit the weights of each task that there are lists of, and give them to the student where they are worth it.

    Raises:
        InputError: the student's configuration has no evidence.
    """
    if not student.evidence.terms:
        raise InputError("this student's score has no evidence to weigh; set student.evidence.words in the recipe")
    fitted: dict[Task, FittedEvidence] = {}
    for task in TASKS:
        if all(each.task != task for each in made):
            continue
        found = _fit_task(student.evidence.terms, [each for each in made if each.task == task])
        student.evidence.set_weights(task, found.weights)
        fitted[task] = found
    return fitted


def _fit_task(terms: Sequence[EvidenceTerm], made: Sequence[EvidenceLists]) -> FittedEvidence:
    halves = [[[*each.lists[half::2]] for each in made] for half in (0, 1)]
    own: dict[str, list[float]] = {each.name: [] for each in made}
    fused: dict[str, list[float]] = {each.name: [] for each in made}
    for tried, others in (halves, halves[::-1]):
        weights = sum_weights([one for lists in others for one in lists])
        for each, lists in zip(made, tried, strict=True):
            own[each.name] += _ndcg(lists, np.eye(1, 1 + len(terms))[0])
            fused[each.name] += _ndcg(lists, weights)
    measure = {name: (float(np.mean(own[name])), float(np.mean(fused[name]))) for name in own}
    is_better = np.mean([after for _, after in measure.values()]) > np.mean([before for before, _ in measure.values()])
    found = sum_weights([one for each in made for one in each.lists])[1:] if is_better else np.zeros(len(terms))
    fitted: dict[EvidenceTerm, float] = dict(zip(terms, found.tolist(), strict=True))
    return FittedEvidence(fitted, measure, sum(len(each.lists) for each in made))


def sum_weights(lists: Sequence[tuple[NDArray[np.floating[Any]], NDArray[np.floating[Any]]]]) -> NDArray[np.float64]:
    """Weights [1 + terms] of the columns of such lists, of which the first, the student's own, is 1.

    Raises:
        InputError: no list has a relevant passage.
    """
    weights = fit_weights(lists)
    return weights / max(float(weights[0]), 1e-3 * float(weights.max()))


def _ndcg(
    lists: Sequence[tuple[NDArray[np.float32], NDArray[np.float64]]], weights: NDArray[np.float64]
) -> list[float]:
    rankings: dict[str, list[str]] = {}
    qrels: dict[str, dict[str, int]] = {}
    for number, (scores, grades) in enumerate(lists):
        order = np.argsort(-(scores @ weights), kind="stable")
        rankings[str(number)] = [str(place) for place in order.tolist()]
        qrels[str(number)] = {str(place): int(grade) for place, grade in enumerate(grades.tolist()) if grade > 0}
    values = per_query_measures(rankings, qrels)[_MEASURE]
    return [values[str(number)] for number in range(len(lists))]


def _grades(dataset: Dataset, query: Query, row_of: Mapping[str, int]) -> dict[int, float]:
    judged = dataset.qrels["dev"][query.id]
    return {
        row_of[passage_id]: float(grade) for passage_id, grade in judged.items() if grade > 0 and passage_id in row_of
    }
