"""Rows that show how much words contribute: fitted sums, and the student without part of its score.

The fitted sum of cosine and BM25 does not need D2LLM: it has two weights, fitted on the dev queries of the data set. So
that the student can be compared with the same knowledge of the data set, there is a row of it with such weights for all
its score features, as ``d2llm fit-scores`` would fit them. If dev itself is measured, or there is no dev split, each
half of the queries is ranked with the weights fitted on the other half.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from d2llm.core.errors import InputError
from d2llm.core.fingerprint import fingerprint_json
from d2llm.core.types import PART_NAMES, Query, ScoreFeature, SystemKind
from d2llm.evaluation.contenders import NAME_BM25, NAME_D2LLM, Contender
from d2llm.evaluation.report import MissingRow
from d2llm.evaluation.systems import RetrievalWork, System
from d2llm.models.row_features import mean_of_cosines, scored_list
from d2llm.models.score_features import VECTOR_TERMS, FeatureWeights
from d2llm.ops.weighted_sum import sum_weights
from d2llm.retrieval.cosine import DotStudent
from d2llm.retrieval.index import Index
from d2llm.retrieval.protocols import SearchStudent, term_factors

_FORMULA: dict[ScoreFeature, str] = {
    "bm25": "BM25",
    "bm25_fraction": "BM25 / its bound",
    "window_bm25": "BM25 of the best window",
    "window_bm25_fraction": "BM25 of the best window / its bound",
    "window_vectors": "best window's vector",
    "maxsim": "tokens",
}
_FIT_QUERIES, _FIT_DEPTH = 500, 100
_MIN_QUERIES = 4  # two for each half

_PARTS: dict[str, tuple[ScoreFeature, ...]] = {
    "BM25 of passages": ("bm25", "bm25_fraction"),
    "BM25 of windows": ("window_bm25", "window_bm25_fraction"),
}


def fitted_sum(work: RetrievalWork, contender: Contender) -> System | MissingRow:
    """The weighted sum of a system's score and BM25, over candidates from both."""
    name = f"fitted sum: {NAME_BM25} + {contender.name}"
    return _fitted(work, contender.model, name, "fitted_sum", "cosine", ("bm25", "bm25_fraction"))


def fitted_student(work: RetrievalWork, student: SearchStudent) -> System | MissingRow | None:
    """The student with weights of words, windows and tokens that were fitted here; None if it has no inner product."""
    if not student.has_dot:
        return None
    stored = work.index(student)[0].view.part_kinds
    kept = (term for term in get_args(ScoreFeature) if VECTOR_TERMS.get(term) in {None, *stored})
    return _fitted(work, student, f"{NAME_D2LLM}, weights fitted here", "fitted_student", NAME_D2LLM, tuple(kept))


def _fitted(
    work: RetrievalWork,
    model: SearchStudent,
    name: str,
    kind: SystemKind,
    own_name: str,
    terms: Sequence[ScoreFeature],
) -> System | MissingRow:
    held_out = _dev_queries(work)
    if not held_out and len(work.trial.queries) < _MIN_QUERIES:
        return MissingRow(name, kind, "there are too few queries to fit its weights on")

    def formula(weights: Mapping[ScoreFeature, float]) -> str:
        # The two terms of a fitted sum are named even if one has no weight.
        summands = [f"{weight:.3g} x {_FORMULA[term]}" for term, weight in weights.items() if weight or len(terms) == 2]
        return " + ".join([f"1 x {own_name}", *summands])

    def measure() -> System:
        index, _ = work.index(model)
        if held_out:
            weights = _fit(work, index, held_out, work.dataset.qrels["dev"], terms)
            system = _ranked(work, index, name, kind, weights, work.trial.queries)
            note = f"{formula(weights)}, fitted on {len(held_out):,} dev queries"
            return replace(system, notes=(*system.notes, note))
        halves = work.trial.queries[::2], work.trial.queries[1::2]
        first_weights, second_weights = (_fit(work, index, half[:_FIT_QUERIES], work.qrels, terms) for half in halves)
        system = _ranked(work, index, name, kind, second_weights, halves[0])
        second = _ranked(work, index, name, kind, first_weights, halves[1])
        formulas = f"{formula(first_weights)} and {formula(second_weights)}"
        note = f"{formulas}, each fitted on the half of the queries it does not rank"
        both = {**system.rankings, **second.rankings}
        in_order = {query.id: both[query.id] for query in work.trial.queries}
        return replace(system, rankings=in_order, notes=(*system.notes, note))

    judged = work.dataset.qrels["dev"] if held_out else work.qrels
    fitted_on = fingerprint_json(
        [(query.id, query.text, sorted(judged[query.id].items())) for query in held_out or work.trial.queries]
    )
    key = work.key(name, work.identity(model), work.settings.num_candidates, fitted_on, work.settings.dtype)
    try:
        return work.store.system(key, measure)
    except InputError as error:  # nothing relevant is near the few queries that there are
        return MissingRow(name, kind, str(error))


def without_parts(work: RetrievalWork, student: SearchStudent, num_candidates: int) -> list[System]:
    """One system per part of the student's score other than the inner product, without that part.

    The list is empty if the score is the inner product alone.
    """
    weights = student.feature_weights(work.trial.task)
    if not weights:
        return []
    systems: list[System] = []

    def add(part: str, model: SearchStudent, left: FeatureWeights) -> None:
        name = f"{NAME_D2LLM} without {part}"
        settings = work.search_settings(num_candidates).replace(score_features=left, sources=("vectors", "bm25"))

        def measure() -> System:
            return work.measure(name, "shortcut", work.index(model)[0], settings)

        key = work.key(name, work.identity(student), num_candidates, work.settings.dtype)
        systems.append(work.store.system(key, measure))

    for part, terms in _PARTS.items():
        if any(weights.terms.get(term) for term in terms):
            add(part, student, weights.without(terms))
    for kind, name in PART_NAMES.items():
        if kind in weights.part_kinds:
            stored = weights.part_kinds - {kind}
            add(name, student, student.feature_weights(work.trial.task, stored=stored))
    if weights.words_factor is not None:
        add("the words factor", student, weights.model_copy(update={"words_factor": None}))
    add("the interaction", DotStudent(student), weights)
    return systems


def _dev_queries(work: RetrievalWork) -> list[Query]:
    """Judged dev queries, at most ``_FIT_QUERIES``; none if dev itself is measured."""
    if work.settings.split == "dev" or "dev" not in work.dataset.qrels:
        return []
    positives = work.dataset.positives("dev")
    chosen = [work.dataset.queries[query_id] for query_id, relevant in positives.items() if relevant]
    order = np.random.default_rng(work.settings.seed).permutation(len(chosen))[:_FIT_QUERIES]
    return [chosen[index] for index in order]


def _fit(
    work: RetrievalWork,
    index: Index,
    queries: Sequence[Query],
    qrels: Mapping[str, Mapping[str, int]],
    terms: Sequence[ScoreFeature],
) -> dict[ScoreFeature, float]:
    """The weights of the score features; the student's own score has weight 1."""
    view, student, task = index.unsharded_view, index.student, work.trial.task
    words, texts = view.words, [query.text for query in queries]
    tokens: Sequence[NDArray[np.float32] | None] = [None] * len(queries)
    if "maxsim" in terms:
        encoded = student.encode_with_tokens(texts, "query")
        assert encoded.tokens is not None
        vectors, tokens = encoded.vectors, [mean_of_cosines(embeddings) for embeddings in encoded.tokens.split()]
    else:
        vectors = student.encode_queries(texts).vectors
    dot_queries = student.query_vectors(vectors, task)
    lists: list[tuple[NDArray[np.float32], NDArray[np.float64]]] = []
    factors = term_factors(student, texts)
    for query, vector, dot_query, own_tokens, own_factors in zip(
        queries, vectors, dot_queries, tokens, factors, strict=True
    ):
        grades = {p: grade for p, grade in qrels[query.id].items() if grade > 0 and p in work.dataset.passages}
        judged = dict(zip(view.rows(list(grades)).tolist(), grades.values(), strict=True))
        query_words = words.query(query.text, own_factors)
        near, by_words = view.scan(dot_query, _FIT_DEPTH).rows, words.best(query_words, _FIT_DEPTH)[0]
        rows = np.union1d(near, by_words)  # a relevant passage that neither has would teach that low scores are good
        rows = np.setdiff1d(rows, view.rows([*work.trial.own_passages.of(query.id)]))
        if judged.keys().isdisjoint(rows.tolist()):
            continue
        student_scores = student.score(vector, view.vectors(rows), task)
        best_windows = view.best_windows(dot_query, rows) if "window_vectors" in terms else None
        best_tokens = None if own_tokens is None else view.best_tokens(own_tokens, rows)
        lists.append(scored_list(student_scores, words, query_words, rows, judged, terms, best_windows, best_tokens))
    return dict(zip(terms, sum_weights(lists)[1:].tolist(), strict=True))


def _ranked(
    work: RetrievalWork,
    index: Index,
    name: str,
    kind: SystemKind,
    weights: Mapping[ScoreFeature, float],
    queries: Sequence[Query],
) -> System:
    """Rank some of the queries with these weights; candidates come from vectors and words."""
    num_candidates = work.settings.num_candidates  # as many as for the student
    used = {term: weight for term, weight in weights.items() if weight}
    settings = work.search_settings(num_candidates).replace(score_features=used, sources=("vectors", "bm25"))
    chosen = {query.id for query in queries}
    probes = [query for query in work.trial.probes if query.id in chosen] or queries[:1]
    return work.measure(name, kind, index, settings, trial=replace(work.trial, queries=queries, probes=probes))
