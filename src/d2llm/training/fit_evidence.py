"""The weights of the evidence in a student's score, fitted on dev queries (``models.evidence``, ``ops.fusion``).

The student's own score keeps weight 1; each task has one set of weights for all of its data sets, to which every query
counts the same. What is reported is measured on queries that took no part in the fit: each half of the dev queries with
the weights of the other half. Where that is not better than the student's own score, the weights are 0; where the
vectors of windows add next to nothing, they have none, since an index pays for them. What words count for goes by the
query where that is better for queries, and for whole data sets, that the fit did not see.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from d2llm.core.errors import InputError
from d2llm.core.progress import progress_bar
from d2llm.core.types import EvidenceTerm, Query, Task
from d2llm.data.beir import Dataset
from d2llm.models.evidence import Evidence, TaskEvidence, WordsFactor
from d2llm.ops.fusion import beside_first, fit_scaled_weights, sum_weights
from d2llm.ops.measures import per_query_measures
from d2llm.retrieval.protocols import SearchStudent
from d2llm.retrieval.reading import read_windows
from d2llm.retrieval.row_evidence import scored_list
from d2llm.store.bm25 import WordIndex
from d2llm.store.vector_formats import make_format
from d2llm.store.window_vectors import WindowVectors
from d2llm.training.dev import dev_queries

MIN_QUERIES = 30
"""Judged dev queries of a task below which nothing is fitted."""
LISTED_DEPTH, LISTED_PASSAGES = 20, 2_000
"""How many of the best by words, and of the best by vectors, are in a query's list; of so many passages, at least."""
WORTH_READING = 0.002
"""nDCG@10 on dev that the vectors of windows must add, over all data sets of a task: an index pays for them."""
_MEASURE = "nDCG@10"

_remarks = logging.getLogger("d2llm.remarks")


@dataclass(frozen=True, slots=True)
class EvidenceLists:
    """Lists of passages of the dev queries of one data set, scored by each kind of evidence.

    Attributes:
        name: of the data set.
        lists: for each query the scores [passages, 1 + terms], the student's own first, and the grades [passages].
        statistics: [queries, k] of each query's words (``store.bm25.QueryWords``).
    """

    name: str
    lists: Sequence[tuple[NDArray[np.float32], NDArray[np.float64]]]
    statistics: NDArray[np.float32]

    def half(self, number: int) -> EvidenceLists:
        """Every other query, from the first (0) or the second (1)."""
        return EvidenceLists(self.name, self.lists[number::2], self.statistics[number::2])


def fit_evidence(
    student: SearchStudent,
    judged: Sequence[tuple[Dataset, Task]],
    *,
    terms: Sequence[EvidenceTerm] = get_args(EvidenceTerm),
    num_queries: int = 200,
    seed: int = 0,
    show_progress: bool | None = None,
) -> Evidence:
    """Fit for each task what words add to a student's score; give it to the student as its ``evidence``.

    A task with fewer than ``MIN_QUERIES`` judged dev queries is left out with a remark.

    Args:
        student: whose score it is added to.
        judged: data sets with a dev split, each with its task.
        terms: the kinds of evidence that may be added.
        num_queries: of each data set, at most.
        seed: of the choice of queries and passages.
        show_progress: None means: if standard error is a terminal.

    Raises:
        InputError: a data set has no judged dev queries, or there are no terms.
    """
    if not terms:
        raise InputError("there is no evidence to weigh; name at least one term, such as 'words'")
    tasks: dict[Task, TaskEvidence] = {}
    names: list[Task] = sorted({task for _, task in judged})
    for task in names:
        lists = [
            make_evidence_lists(
                student, dataset, task, terms=terms, num_queries=num_queries, seed=seed, show_progress=show_progress
            )
            for dataset, set_task in judged
            if set_task == task
        ]
        num_lists = sum(len(each.lists) for each in lists)
        if num_lists < MIN_QUERIES:
            _remarks.warning("%s: words are not weighed by %d dev queries; it takes %d", task, num_lists, MIN_QUERIES)
        else:
            tasks[task] = weigh(lists, terms)
    return Evidence(student=student.fingerprint, tasks=tasks)


def make_evidence_lists(
    student: SearchStudent,
    dataset: Dataset,
    task: Task,
    *,
    terms: Sequence[EvidenceTerm],
    num_queries: int = 200,
    depth: int = LISTED_DEPTH,
    num_passages: int = LISTED_PASSAGES,
    seed: int = 0,
    show_progress: bool | None = None,
) -> EvidenceLists:
    """Score the dev queries' positives and nearest passages: by words of the whole corpus, by vectors of a part of it.

    Args:
        student: whose evidence it is.
        dataset: with judged dev queries.
        task: of its pairs.
        terms: the kinds of evidence, in the order of the columns.
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
    words_of_queries = [words.query(query.text) for query in queries]
    by_words = [words.best(one, depth)[0] for one in words_of_queries]
    grades = [_grades(dataset, query, row_of) for query in queries]
    needed = np.unique(np.concatenate([*by_words, *(np.array([*own], np.int64) for own in grades)]))
    others = np.setdiff1d(np.arange(len(ids)), needed).tolist()
    extra = random.Random(seed).sample(others, min(len(others), max(0, num_passages - len(needed))))
    pool = np.union1d(needed, np.array(extra, np.int64))
    texts = [dataset.passages[ids[row]].full_text for row in pool]
    with progress_bar(f"reading {dataset.name} for its evidence", len(texts), show=show_progress) as advance:
        passages = student.encode_passages(texts, advance=advance).vectors
    vectors = student.encode_queries([query.text for query in queries]).vectors
    listed: list[NDArray[np.int64]] = []
    scores: list[NDArray[np.float32]] = []
    for vector, lexical, judged in zip(vectors, by_words, grades, strict=True):
        own = student.score(vector, passages, task)
        nearest = pool[np.argsort(-own, kind="stable")[:depth]]
        listed.append(rows := np.unique(np.concatenate([lexical, nearest, np.array([*judged], np.int64)])))
        scores.append(own[np.searchsorted(pool, rows)])
    best_windows: list[NDArray[np.float32] | None] = [None] * len(queries)
    if "window_vectors" in terms:
        windows = _read_windows(student, dataset, ids, np.unique(np.concatenate(listed)), pool, passages, show_progress)
        anchors = student.anchor_queries(vectors, task)
        best_windows = [windows.best(anchor, rows) for anchor, rows in zip(anchors, listed, strict=True)]
    return EvidenceLists(
        dataset.name,
        [
            scored_list(own, words, query_words, rows, judged, terms, of_windows)
            for own, query_words, rows, judged, of_windows in zip(
                scores, words_of_queries, listed, grades, best_windows, strict=True
            )
        ],
        np.stack([query_words.statistics for query_words in words_of_queries]),
    )


def _read_windows(
    student: SearchStudent,
    dataset: Dataset,
    ids: Sequence[str],
    rows: NDArray[np.int64],
    pool: NDArray[np.int64],
    passages: NDArray[np.float32],
    show_progress: bool | None,
) -> WindowVectors:
    """The windows of the passages at some rows; ``passages`` are the vectors of ``pool``, a window where it is one."""
    of_rows = [dataset.passages[ids[int(row)]].full_text for row in rows]
    with progress_bar(f"reading the windows of {dataset.name}", None, show=show_progress) as advance:
        read = read_windows(student, of_rows, advance)
    counts = np.maximum(read.counts, 1)
    firsts = np.cumsum(counts) - counts
    vectors = np.empty((int(counts.sum()), student.vector_dim), np.float32)
    alone = read.counts == 0
    is_own = np.zeros(len(vectors), np.bool_)
    is_own[firsts[alone]] = True
    vectors[is_own] = passages[np.searchsorted(pool, rows[alone])]
    vectors[~is_own] = read.vectors
    places = np.zeros((len(ids), 2), np.int64)
    places[rows] = np.stack([firsts, counts], axis=1)
    stored = make_format("float32", student.vector_dim)
    return WindowVectors(places, stored.encode(vectors, [ids[int(row)] for row in np.repeat(rows, counts)]), stored)


def weigh(sets: Sequence[EvidenceLists], terms: Sequence[EvidenceTerm]) -> TaskEvidence:
    """Weights for the data sets of one task, all 0 where evidence is no better than the student's own score.

    Where the vectors of windows get a weight, there are others for an index without them.

    Raises:
        InputError: a half of the lists has no relevant passage.
    """
    best = _weigh(sets, terms)
    if "window_vectors" not in terms:
        return best
    kept = [place for place, term in enumerate(terms) if term != "window_vectors"]
    columns = [0, *(1 + place for place in kept)]
    fewer = [replace(each, lists=[(scores[:, columns], grades) for scores, grades in each.lists]) for each in sets]
    without = _weigh(fewer, [terms[place] for place in kept])
    if not best.weights["window_vectors"] or _mean_after(best) < _mean_after(without) + WORTH_READING:
        return without
    return best.model_copy(update={"without_windows": without})


def _mean_after(fitted: TaskEvidence) -> float:
    return float(np.mean([after for _, after in fitted.dev.values()]))


class _Sum(NamedTuple):
    """A student's own score and evidence, added up: weights [1 + terms], and l(q) where it is fitted."""

    weights: NDArray[np.float64]
    is_words: NDArray[np.bool_]
    factor: WordsFactor | None = None

    def ndcg(self, evidence: EvidenceLists) -> list[float]:
        """Of each list."""
        rankings: dict[str, list[str]] = {}
        qrels: dict[str, dict[str, int]] = {}
        for number, ((scores, grades), statistics) in enumerate(zip(evidence.lists, evidence.statistics, strict=True)):
            scale = 1.0 if self.factor is None else self.factor(statistics)
            order = np.argsort(-(scores @ np.where(self.is_words, scale * self.weights, self.weights)), kind="stable")
            rankings[str(number)] = [str(place) for place in order.tolist()]
            qrels[str(number)] = {str(place): int(grade) for place, grade in enumerate(grades.tolist()) if grade > 0}
        values = per_query_measures(rankings, qrels)[_MEASURE]
        return [values[str(number)] for number in range(len(evidence.lists))]


def _weigh(sets: Sequence[EvidenceLists], terms: Sequence[EvidenceTerm]) -> TaskEvidence:
    own = _Sum(np.eye(1, 1 + len(terms))[0], _are_words(terms))
    before = {each.name: float(np.mean(own.ndcg(each))) for each in sets}
    after, others = _on_halves(sets, terms), _on_other_sets(sets, terms)
    after_by_query = _on_halves(sets, terms, by_query=True)
    gained = [after_by_query[name] - after[name] for name in after]
    for name, value in _on_other_sets(sets, terms, by_query=True).items():
        gained.append(value - others[name])
    by_query = float(np.mean(gained)) > 0
    if by_query:
        after = after_by_query
    fitted = own
    if np.mean([*after.values()]) > np.mean([*before.values()]):
        fitted = _fit_sum(sets, terms, by_query=by_query)
    return TaskEvidence(
        weights=dict(zip(terms, fitted.weights[1:].tolist(), strict=True)),
        words_factor=fitted.factor,
        dev={name: (before[name], after[name]) for name in before},
        num_queries={each.name: len(each.lists) for each in sets},
    )


def _on_halves(
    sets: Sequence[EvidenceLists], terms: Sequence[EvidenceTerm], *, by_query: bool = False
) -> dict[str, float]:
    """nDCG@10 of each data set, each half of the queries by a sum that was fitted on the other half."""
    halves = [[each.half(number) for each in sets] for number in (0, 1)]
    by_set: dict[str, list[float]] = {each.name: [] for each in sets}
    for half_of_sets, others in (halves, halves[::-1]):
        fitted = _fit_sum(others, terms, by_query=by_query)
        for half in half_of_sets:
            by_set[half.name] += fitted.ndcg(half)
    return {name: float(np.mean(values)) for name, values in by_set.items()}


def _on_other_sets(
    sets: Sequence[EvidenceLists], terms: Sequence[EvidenceTerm], *, by_query: bool = False
) -> dict[str, float]:
    """nDCG@10 of each data set by a sum that was fitted on the others; of nothing where there is only one."""
    if len(sets) == 1:
        return {}
    return {
        one.name: float(
            np.mean(_fit_sum([each for each in sets if each is not one], terms, by_query=by_query).ndcg(one))
        )
        for one in sets
    }


def _fit_sum(sets: Sequence[EvidenceLists], terms: Sequence[EvidenceTerm], *, by_query: bool) -> _Sum:
    lists, is_words = [one for each in sets for one in each.lists], _are_words(terms)
    if by_query:
        statistics = np.concatenate([each.statistics for each in sets])
        fitted = fit_scaled_weights(lists, statistics, is_words)
        if fitted.weights.any():
            exponents = statistics @ fitted.slopes + fitted.offset
            factor = WordsFactor(
                slopes=tuple(fitted.slopes.tolist()),
                offset=fitted.offset,
                lowest=float(exponents.min()),
                highest=float(exponents.max()),
            )
            return _Sum(beside_first(fitted.weights), is_words, factor)
    return _Sum(sum_weights(lists), is_words)


def _are_words(terms: Sequence[EvidenceTerm]) -> NDArray[np.bool_]:
    return np.array([False, *(term != "window_vectors" for term in terms)])


def _grades(dataset: Dataset, query: Query, row_of: Mapping[str, int]) -> dict[int, float]:
    judged = dataset.qrels["dev"][query.id]
    return {
        row_of[passage_id]: float(grade) for passage_id, grade in judged.items() if grade > 0 and passage_id in row_of
    }
