"""The weights of the score features in a student's score, fitted on dev queries (``models.score_features``,
``ops.weighted_sum``).

The student's own score keeps weight 1. Each task has one set of weights for all of its data sets, and every query
counts equally in the fit. The reported results are cross-fitted: each half of the dev queries is measured with weights
fitted on the other half. If that is not better than the student's own score, the weights are 0. If the vectors of
windows or tokens gain next to nothing, they are left out, because they make an index larger. The weight of words
depends on the query's words, and on how near its nearest passage is, if that is better on queries, and on whole data
sets, that the fit did not see, or on request.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, cast, get_args

import numpy as np
from numpy.typing import NDArray

from d2llm.core.errors import InputError
from d2llm.core.inputs import strings_of
from d2llm.core.progress import progress_bar, remarks
from d2llm.core.types import PartKind, Query, ScoreFeature, Task
from d2llm.data.beir import Dataset
from d2llm.models.protocols import SearchStudent, term_factors
from d2llm.models.row_features import mean_of_cosines, scored_list
from d2llm.models.score_features import VECTOR_TERMS, ScoreFeatures, TaskFeatureWeights, WordsFactor
from d2llm.ops.measures import per_query_measures
from d2llm.ops.weighted_sum import beside_first, fit_scaled_weights, sum_weights
from d2llm.retrieval.open_index import PART_FORMATS
from d2llm.retrieval.reading import read_passages, read_windows
from d2llm.store.bm25 import WordIndex
from d2llm.store.part_vectors import EncodedParts, PartVectors
from d2llm.store.vector_formats import make_format
from d2llm.store.word_segment import WordSegment
from d2llm.training.dev_sets import MIN_QUERIES, JudgedSet, dev_queries, judged_sets
from d2llm.training.settings import LISTED_PASSAGES

LISTED_DEPTH = 20
"""How many of the best passages by words and by vectors are in a query's list; minimum number of passages encoded."""
MIN_PART_GAIN: dict[PartKind, float] = {"window": 0.01, "token": 0.002}
"""Minimum mean gain in nDCG@10 on dev, over the data sets of a task, for the vectors of parts to be used. Windows cost
more: an index then encodes long passages three times."""
FactorKind = Literal["words", "nearest"]
"""What the weight of words depends on: the statistics of the query's words, or also how near the nearest passage is."""
_MEASURE = "nDCG@10"
_MIN_STANDARD_ERRORS = 1.0  # of the gain of a factor of the query's words, which overfits a hundred queries easily


@dataclass(frozen=True, slots=True)
class FeatureLists:
    """Lists of passages of the dev queries of one data set, scored by each score feature.

    Attributes:
        name: name of the data set.
        lists: for each query the scores [passages, 1 + terms], the student's own first, and the grades [passages].
        statistics: [queries, k], statistics of each query's words (``store.bm25.QueryWords``).
        nearest: [queries], the highest inner product of each query with a passage; None if it may not count.
    """

    name: str
    lists: Sequence[tuple[NDArray[np.float32], NDArray[np.float64]]]
    statistics: NDArray[np.float32]
    nearest: NDArray[np.float32] | None = None

    def half(self, first: int) -> FeatureLists:
        """Every other query, starting with the first (0) or the second (1)."""
        nearest = None if self.nearest is None else self.nearest[first::2]
        return FeatureLists(self.name, self.lists[first::2], self.statistics[first::2], nearest)

    def inputs(self, kind: FactorKind) -> NDArray[np.float32]:
        """What a factor of this kind depends on, [queries, k] or [queries, k + 1]."""
        if kind == "words":
            return self.statistics
        assert self.nearest is not None, "it is not known how near the nearest passages are"
        return np.concatenate([self.statistics, self.nearest[:, None]], axis=1)

    def of_terms(self, terms: Sequence[ScoreFeature], kept: Sequence[ScoreFeature]) -> FeatureLists:
        """The same lists with the columns of the ``kept`` terms among its ``terms``."""
        columns = [0, *(1 + index for index, term in enumerate(terms) if term in kept)]
        return replace(self, lists=[(scores[:, columns], grades) for scores, grades in self.lists])


def fit_score_features(
    student: SearchStudent,
    judged: Sequence[JudgedSet] | JudgedSet,
    *,
    terms: Sequence[ScoreFeature] | ScoreFeature | None = None,
    words_factor: bool | None = None,
    use_nearest: bool = True,
    num_queries: int = 200,
    num_passages: int = LISTED_PASSAGES,
    seed: int = 0,
) -> ScoreFeatures:
    """Fit the weights of the score features for each task; the result becomes the student's ``score_features``.

    A task with fewer than ``MIN_QUERIES`` judged dev queries is left out, which is logged.

    Args:
        student: the student to whose score they are added.
        judged: data sets with a dev split, each with its task.
        terms: the score features that may be used; by default all that the student has.
        words_factor: whether the weight of words depends on the query (``models.score_features.WordsFactor``); by
            default if that is better.
        use_nearest: whether it may also depend on how near the nearest passage is, which only an index knows.
        num_queries: maximum number of queries per data set.
        num_passages: minimum number of passages to encode per data set (``make_feature_lists``).
        seed: seed of the choice of queries and passages.

    Raises:
        InputError: a data set has no judged dev queries, or there are no terms.
    """
    judged = judged_sets(judged)
    if terms is not None:
        terms = cast("list[ScoreFeature]", strings_of(terms, "terms"))
    if terms is None:
        has_tokens = student.token_dim is not None
        terms = [term for term in get_args(ScoreFeature) if has_tokens or term != "maxsim"]
    if not terms:
        raise InputError("there are no score features to fit weights for; name at least one term, such as 'bm25'")
    tasks: dict[Task, TaskFeatureWeights] = {}
    names: list[Task] = sorted({task for _, task in judged})
    for task in names:
        task_sets = [dataset for dataset, set_task in judged if set_task == task]
        # Before anything is encoded: with fewer queries there are fewer lists.
        num_judged = sum(len(dev_queries(dataset, num_queries=num_queries, seed=seed)) for dataset in task_sets)
        if num_judged < MIN_QUERIES:
            _warn_of_few(task, num_judged)
            continue
        lists = [
            make_feature_lists(
                student, dataset, task, terms=terms, num_queries=num_queries, num_passages=num_passages, seed=seed
            )
            for dataset in task_sets
        ]
        for feature_lists in lists:
            if not feature_lists.lists:
                remarks.warning(
                    "%s: word weights are fitted without it: no dev query has a relevant passage among its nearest",
                    feature_lists.name,
                )
        lists = [scored if use_nearest else replace(scored, nearest=None) for scored in lists if scored.lists]
        num_lists = sum(len(scored.lists) for scored in lists)
        if num_lists < MIN_QUERIES:
            _warn_of_few(task, num_lists)
        else:
            tasks[task] = fit_task_weights(lists, terms, words_factor=words_factor)
    return ScoreFeatures(tasks=tasks)


def _warn_of_few(task: Task, num_judged: int) -> None:
    remarks.warning(
        "%s: word weights are not fitted: %d dev queries, but at least %d are needed", task, num_judged, MIN_QUERIES
    )


def make_feature_lists(
    student: SearchStudent,
    dataset: Dataset,
    task: Task,
    *,
    terms: Sequence[ScoreFeature],
    num_queries: int = 200,
    depth: int = LISTED_DEPTH,
    num_passages: int = LISTED_PASSAGES,
    seed: int = 0,
) -> FeatureLists:
    """Score the nearest passages of dev queries, without the queries none of whose nearest passages is relevant.

    The nearest by words come from the whole corpus, the nearest by vectors from a part of it. Relevant passages that
    are far by both are not added: all irrelevant passages of a list have a high score by one of the two, so these
    would teach that low scores are good. On nfcorpus, with 38 relevant passages a query, no weight was left.

    Args:
        student: the student whose score features to score.
        dataset: a data set with judged dev queries.
        task: the task of its pairs.
        terms: the score features, in the order of the columns.
        num_queries: maximum number of dev queries.
        depth: how many of the best passages by words, and by vectors, are in a query's list.
        num_passages: minimum number of passages to encode: all positives, the best by words, and others at random.
        seed: seed of the sample.

    Raises:
        InputError: there are no judged dev queries.
    """
    queries = dev_queries(dataset, num_queries=num_queries, seed=seed)
    ids = list(dataset.passages)
    row_of = {passage_id: row for row, passage_id in enumerate(ids)}
    segment = WordSegment.from_texts(passage.full_text for passage in dataset.passages.values())
    words = WordIndex([segment])
    texts = [query.text for query in queries]
    words_of_queries = [*map(words.query, texts, term_factors(student, texts))]
    by_words = [words.best(query_words, depth)[0] for query_words in words_of_queries]
    own_rows = [np.array([row_of[name] for name in dataset.own_passages.of(one.id)], np.int64) for one in queries]
    grades = [_grades(dataset, query, row_of) for query in queries]
    needed = np.unique(np.concatenate([*by_words, *(np.array([*judged], np.int64) for judged in grades)]))
    pool = _filled(needed, len(ids), num_passages, seed)
    with progress_bar(f"encoding {dataset.name} for its score features", len(pool)) as advance:
        chosen = [dataset.passages[ids[row]] for row in pool]
        kinds: set[PartKind] = {"token"} if "maxsim" in terms else set()
        read = read_passages(student, chosen, advance, parts=kinds, expand=student.document_expansion is not None)
    passages = read.vectors
    if read.added is not None:  # passages outside the pool, of which no list has any, go without
        added = dict(zip(pool.tolist(), read.added, strict=True))
        words = WordIndex([segment.with_added([added.get(row, {}) for row in range(len(ids))])])
    vectors = student.encode_queries(texts).vectors
    kept, listed, scores = list[int](), list[NDArray[np.int64]](), list[NDArray[np.float32]]()
    for index, (vector, lexical, judged) in enumerate(zip(vectors, by_words, grades, strict=True)):
        logits = student.score(vector, passages, task)
        best = pool[np.argsort(-logits, kind="stable")[:depth]]
        rows = np.setdiff1d(np.union1d(lexical, best), own_rows[index])
        if not judged.keys().isdisjoint(rows.tolist()):
            kept.append(index)
            listed.append(rows)
            scores.append(logits[np.searchsorted(pool, rows)])
    best_windows: Sequence[NDArray[np.float32] | None] = [None] * len(kept)
    best_tokens: Sequence[NDArray[np.float32] | None] = best_windows
    if kept and "window_vectors" in terms:
        windows = _read_windows(student, dataset, ids, np.unique(np.concatenate(listed)), pool, passages)
        dot_queries = student.query_vectors(vectors, task)
        best_windows = [
            windows.best(dot_query, rows) for dot_query, rows in zip(dot_queries[kept], listed, strict=True)
        ]
    if kept and "token" in read.parts:
        positions = [np.searchsorted(pool, rows) for rows in listed]
        best_tokens = _best_tokens(student, [texts[index] for index in kept], read.parts["token"], positions)
    lists = [
        scored_list(base, words, words_of_queries[index], rows, grades[index], terms, by_window, by_token)
        for index, base, rows, by_window, by_token in zip(kept, scores, listed, best_windows, best_tokens, strict=True)
    ]
    statistics = np.array([words_of_queries[index].statistics for index in kept], np.float32)
    dot_queries = student.query_vectors(vectors, task)[kept] if student.has_dot else ()
    nearest = np.array([(passages @ dot_query).max() for dot_query in dot_queries], np.float32)
    return FeatureLists(dataset.name, lists, statistics, nearest if student.has_dot else None)


def _filled(needed: NDArray[np.int64], num_rows: int, num_passages: int, seed: int) -> NDArray[np.int64]:
    """The needed rows, and others at random up to this number, in order."""
    others = np.setdiff1d(np.arange(num_rows), needed).tolist()
    extra = random.Random(seed).sample(others, min(len(others), max(0, num_passages - len(needed))))
    return np.union1d(needed, np.array(extra, np.int64))


def _best_tokens(
    student: SearchStudent, texts: Sequence[str], read: EncodedParts, positions: Sequence[NDArray[np.int64]]
) -> list[NDArray[np.float32]]:
    """What token embeddings say of each query's passages, at these ``positions`` among those that were ``read``."""
    stored = make_format(PART_FORMATS["token"], read.vectors.shape[1])
    tokens = PartVectors.of_texts(read.vectors, read.counts, stored)
    queries = student.encode_with_tokens(texts, "query").tokens
    assert queries is not None
    return [
        tokens.sum_of_best(mean_of_cosines(embeddings), rows)
        for embeddings, rows in zip(queries.split(), positions, strict=True)
    ]


def _read_windows(
    student: SearchStudent,
    dataset: Dataset,
    ids: Sequence[str],
    rows: NDArray[np.int64],
    pool: NDArray[np.int64],
    passages: NDArray[np.float32],
) -> PartVectors:
    """The windows of the passages at ``rows``. A passage without windows has its own vector, from those of ``pool``."""
    texts = [dataset.passages[ids[int(row)]].full_text for row in rows]
    with progress_bar(f"encoding the windows of {dataset.name}", None) as advance:
        read = read_windows(student, texts, advance)
    counts = np.maximum(read.counts, 1)
    firsts = np.cumsum(counts) - counts
    vectors = np.empty((int(counts.sum()), student.vector_dim), np.float32)
    alone = read.counts == 0
    is_own = np.zeros(len(vectors), np.bool_)
    is_own[firsts[alone]] = True
    vectors[is_own] = passages[np.searchsorted(pool, rows[alone])]
    vectors[~is_own] = read.vectors
    extents = np.zeros((len(ids), 2), np.int64)
    extents[rows] = np.stack([firsts, counts], axis=1)
    stored = make_format("float32", student.vector_dim)
    return PartVectors(extents, stored.encode(vectors, [ids[int(row)] for row in np.repeat(rows, counts)]), stored)


def fit_task_weights(
    sets: Sequence[FeatureLists], terms: Sequence[ScoreFeature], *, words_factor: bool | None = None
) -> TaskFeatureWeights:
    """Fit weights for the data sets of one task; all are 0 if score features are no better than the student's own
    score.

    If window vectors or token embeddings get a weight, the result also has weights for an index without them.

    Raises:
        InputError: a half of the lists has no relevant passage.
    """
    best = fit_all_terms(sets, terms, words_factor=words_factor)
    lesser: TaskFeatureWeights | None = None
    for term, kind in VECTOR_TERMS.items():  # windows first: with them and tokens, those without windows come next
        if term not in terms:
            continue
        kept: list[ScoreFeature] = [other for other in terms if other != term]
        without = fit_task_weights(
            [data_set.of_terms(terms, kept) for data_set in sets], kept, words_factor=words_factor
        )
        if not best.weights[term] or _mean_after(best) < _mean_after(without) + MIN_PART_GAIN[kind]:
            return without
        lesser = lesser or without
    return best.model_copy(update={"without_parts": lesser})


def _mean_after(fitted: TaskFeatureWeights) -> float:
    return float(np.mean([after for _, after in fitted.dev.values()]))


class _Sum(NamedTuple):
    """A weighted sum of a student's own score and score features: weights [1 + terms], and l(q) if it was fitted."""

    weights: NDArray[np.float64]
    is_words: NDArray[np.bool_]
    factor: WordsFactor | None = None

    def ndcg(self, score_features: FeatureLists) -> list[float]:
        """nDCG@10 of each list."""
        rankings: dict[str, list[str]] = {}
        qrels: dict[str, dict[str, int]] = {}
        for index, ((scores, grades), statistics) in enumerate(
            zip(score_features.lists, score_features.statistics, strict=True)
        ):
            nearest = None if score_features.nearest is None else float(score_features.nearest[index])
            scale = 1.0 if self.factor is None else self.factor(statistics, nearest)
            order = np.argsort(-(scores @ np.where(self.is_words, scale * self.weights, self.weights)), kind="stable")
            rankings[str(index)] = [str(position) for position in order.tolist()]
            qrels[str(index)] = {
                str(position): int(grade) for position, grade in enumerate(grades.tolist()) if grade > 0
            }
        values = per_query_measures(rankings, qrels)[_MEASURE]
        return [values[str(index)] for index in range(len(score_features.lists))]


def fit_all_terms(
    sets: Sequence[FeatureLists], terms: Sequence[ScoreFeature], *, words_factor: bool | None = None
) -> TaskFeatureWeights:
    """Fit weights as ``fit_task_weights`` does, but leave out no vectors of parts, however little they gain."""
    plain = _Sum(np.eye(1, 1 + len(terms))[0], _are_words(terms))
    before = {data_set.name: float(np.mean(plain.ndcg(data_set))) for data_set in sets}
    kind, after = _best_factor(sets, terms, words_factor)
    held_out = {name: float(np.mean(values)) for name, values in after.items()}
    fitted = plain
    if np.mean([*held_out.values()]) > np.mean([*before.values()]):
        fitted = _fit_sum(sets, terms, kind)
    return TaskFeatureWeights(
        weights=dict(zip(terms, fitted.weights[1:].tolist(), strict=True)),
        words_factor=fitted.factor,
        dev={name: (before[name], held_out[name]) for name in before},
        num_queries={data_set.name: len(data_set.lists) for data_set in sets},
    )


def _best_factor(
    sets: Sequence[FeatureLists], terms: Sequence[ScoreFeature], words_factor: bool | None
) -> tuple[FactorKind | None, dict[str, list[float]]]:
    """What the weight of words should depend on, None for nothing, and ``_on_halves`` of sums with such a weight.

    A factor with more inputs is taken if it is better on other queries and on other data sets.
    """
    best: FactorKind | None = "words" if words_factor else None
    on_halves = _on_halves(sets, terms, best)
    on_others: dict[str, list[float]] | None = None
    kinds: list[FactorKind] = [] if words_factor is False or not _are_words(terms).any() else ["words", "nearest"]
    for kind in kinds:
        if kind == best or (kind == "nearest" and any(data_set.nearest is None for data_set in sets)):
            continue
        better = _on_halves(sets, terms, kind)
        if not _is_gain(on_halves, better, num_errors=_MIN_STANDARD_ERRORS):
            continue
        if len(sets) > 1:
            on_others = on_others or _on_other_sets(sets, terms, best)
            others = _on_other_sets(sets, terms, kind)
            if not _is_gain(on_others, others):
                continue
            on_others = others
        best, on_halves = kind, better
    return best, on_halves


def _is_gain(
    before: Mapping[str, Sequence[float]], after: Mapping[str, Sequence[float]], *, num_errors: float = 0.0
) -> bool:
    """Whether the mean over queries rises by more than so many standard errors of the paired differences."""
    differences = np.concatenate([np.subtract(after[name], before[name]) for name in before])
    return bool(differences.mean() > num_errors * differences.std() / np.sqrt(len(differences)))


def _on_halves(
    sets: Sequence[FeatureLists], terms: Sequence[ScoreFeature], kind: FactorKind | None
) -> dict[str, list[float]]:
    """nDCG@10 of the queries of each data set; each half is ranked by a sum that was fitted on the other half."""
    halves = [[data_set.half(first) for data_set in sets] for first in (0, 1)]
    by_set: dict[str, list[float]] = {data_set.name: [] for data_set in sets}
    for measured, others in (halves, halves[::-1]):
        fitted = _fit_sum(others, terms, kind)
        for half in measured:
            by_set[half.name] += fitted.ndcg(half)
    return by_set


def _on_other_sets(
    sets: Sequence[FeatureLists], terms: Sequence[ScoreFeature], kind: FactorKind | None
) -> dict[str, list[float]]:
    """nDCG@10 of the queries of each data set, ranked by a sum that was fitted on the other sets."""
    return {
        held_out.name: _fit_sum([data_set for data_set in sets if data_set is not held_out], terms, kind).ndcg(held_out)
        for held_out in sets
    }


def _fit_sum(sets: Sequence[FeatureLists], terms: Sequence[ScoreFeature], kind: FactorKind | None) -> _Sum:
    lists, is_words = [scored for data_set in sets for scored in data_set.lists], _are_words(terms)
    if kind is not None:
        inputs = np.concatenate([data_set.inputs(kind) for data_set in sets])
        fitted = fit_scaled_weights(lists, inputs, is_words)
        if fitted.weights.any():
            exponents = inputs @ fitted.slopes + fitted.offset
            slopes: list[float] = fitted.slopes.tolist()
            factor = WordsFactor(
                slopes=tuple(slopes if kind == "words" else slopes[:-1]),
                offset=fitted.offset,
                lowest=float(exponents.min()),
                highest=float(exponents.max()),
                nearest_slope=0.0 if kind == "words" else slopes[-1],
            )
            return _Sum(beside_first(fitted.weights), is_words, factor)
    return _Sum(sum_weights(lists), is_words)


def _are_words(terms: Sequence[ScoreFeature]) -> NDArray[np.bool_]:
    return np.array([False, *(term not in VECTOR_TERMS for term in terms)])


def _grades(dataset: Dataset, query: Query, row_of: Mapping[str, int]) -> dict[int, float]:
    judged = dataset.qrels["dev"][query.id]
    return {
        row_of[passage_id]: float(grade) for passage_id, grade in judged.items() if grade > 0 and passage_id in row_of
    }
