"""Rows that show how much words contribute: a fitted sum of cosine and BM25, and the student without part of its score.

The fitted sum does not need D2LLM: it has two weights, fitted on the dev queries of the data set
(``training.fit_evidence``). If dev itself is measured, or there is no dev split, each half of the queries is ranked
with the weights fitted on the other half.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from d2llm.core.errors import InputError
from d2llm.core.fingerprint import fingerprint_json
from d2llm.core.types import EvidenceTerm, PartKind, Query
from d2llm.evaluation.report import MissingRow
from d2llm.evaluation.setting import NAME_BM25, NAME_D2LLM, Contender
from d2llm.evaluation.systems import RetrievalWork, System
from d2llm.models.evidence import EvidenceWeights
from d2llm.ops.weighted_sum import sum_weights
from d2llm.retrieval.cosine import AnchorStudent
from d2llm.retrieval.index import Index
from d2llm.retrieval.protocols import SearchStudent
from d2llm.retrieval.row_evidence import evidence_weights, scored_list

_TERMS: tuple[EvidenceTerm, ...] = ("words", "words_share")
_FIT_QUERIES, _FIT_DEPTH = 500, 100
_MIN_QUERIES = 4  # two for each half

_PARTS: dict[str, tuple[EvidenceTerm, ...]] = {
    "the words of passages": ("words", "words_share"),
    "the words of windows": ("window_words", "window_words_share"),
}
_PART_VECTORS: dict[PartKind, str] = {"window": "windows", "token": "tokens"}


def fitted_sum(work: RetrievalWork, contender: Contender) -> System | MissingRow:
    """The weighted sum of a system's score and BM25, over candidates from both."""
    name, model = f"fitted sum: {NAME_BM25} + {contender.name}", contender.model
    held_out = _dev_queries(work)
    if not held_out and len(work.trial.queries) < _MIN_QUERIES:
        return MissingRow(name, "fitted_sum", "there are too few queries to fit its weights on")

    def measure() -> System:
        index, _ = work.index(model)
        if held_out:
            weights = _fit(work, index, held_out, work.dataset.qrels["dev"])
            system = _ranked(work, index, name, weights, work.trial.queries)
            note = f"{_formula(weights)}, fitted on {len(held_out):,} dev queries"
            return replace(system, notes=(*system.notes, note))
        halves = work.trial.queries[::2], work.trial.queries[1::2]
        first_weights, second_weights = (_fit(work, index, half[:_FIT_QUERIES], work.qrels) for half in halves)
        system = _ranked(work, index, name, second_weights, halves[0])
        second = _ranked(work, index, name, first_weights, halves[1])
        formulas = f"{_formula(first_weights)} and {_formula(second_weights)}"
        note = f"{formulas}, each fitted on the half of the queries it does not rank"
        both = {**system.rankings, **second.rankings}
        in_order = {query.id: both[query.id] for query in work.trial.queries}
        return replace(system, rankings=in_order, notes=(*system.notes, note))

    judged = work.dataset.qrels["dev"] if held_out else work.qrels
    fitted_on = fingerprint_json(
        [(query.id, query.text, sorted(judged[query.id].items())) for query in held_out or work.trial.queries]
    )
    key = work.key(name, model.fingerprint, work.settings.num_candidates, fitted_on, work.settings.dtype)
    try:
        return work.store.system(key, measure)
    except InputError as error:  # nothing relevant is near the few queries that there are
        return MissingRow(name, "fitted_sum", str(error))


def without_parts(work: RetrievalWork, student: SearchStudent, num_candidates: int) -> list[System]:
    """One system per part of the student's score other than the inner product, without that part.

    The list is empty if the score is the inner product alone.
    """
    weights = evidence_weights(student, work.trial.task)
    if not weights:
        return []
    systems: list[System] = []

    def add(part: str, model: SearchStudent, left: EvidenceWeights) -> None:
        name = f"{NAME_D2LLM} without {part}"
        settings = replace(work.search_settings(num_candidates), evidence=left, sources=("vectors", "bm25"))

        def measure() -> System:
            return work.measure(name, "shortcut", work.index(model)[0], settings)

        key = work.key(name, work.identity(student), num_candidates, work.settings.dtype)
        systems.append(work.store.system(key, measure))

    for part, terms in _PARTS.items():
        if any(weights.terms.get(term) for term in terms):
            add(part, student, weights.without(terms))
    for kind, name in _PART_VECTORS.items():
        if kind in weights.part_kinds:
            stored = weights.part_kinds - {kind}
            add(f"the vectors of {name}", student, evidence_weights(student, work.trial.task, stored=stored))
    if weights.words_factor is not None:
        add("the factor of the query's words", student, weights.model_copy(update={"words_factor": None}))
    add("the interaction", AnchorStudent(student), weights)
    return systems


def _dev_queries(work: RetrievalWork) -> list[Query]:
    """Judged dev queries, at most ``_FIT_QUERIES``; none if dev itself is measured."""
    if work.settings.split == "dev" or "dev" not in work.dataset.qrels:
        return []
    positives = work.dataset.positives("dev")
    chosen = [work.dataset.queries[query_id] for query_id, relevant in positives.items() if relevant]
    order = np.random.default_rng(work.settings.seed).permutation(len(chosen))[:_FIT_QUERIES]
    return [chosen[place] for place in order]


def _fit(
    work: RetrievalWork, index: Index, queries: Sequence[Query], qrels: Mapping[str, Mapping[str, int]]
) -> dict[EvidenceTerm, float]:
    """The weights of the word evidence; the student's own score has weight 1."""
    view, student, task = index.view, index.student, work.trial.task
    words = view.words
    vectors = student.encode_queries([query.text for query in queries]).vectors
    lists: list[tuple[NDArray[np.float32], NDArray[np.float64]]] = []
    for query, vector, anchor in zip(queries, vectors, student.anchor_queries(vectors, task), strict=True):
        grades = {p: grade for p, grade in qrels[query.id].items() if grade > 0 and p in work.dataset.passages}
        judged = dict(zip(view.rows(list(grades)).tolist(), grades.values(), strict=True))
        query_words = words.query(query.text)
        near, by_words = view.scan(anchor, _FIT_DEPTH).rows, words.best(query_words, _FIT_DEPTH)[0]
        rows = np.union1d(near, by_words)  # a relevant passage that neither has would teach that low scores are good
        if judged.keys().isdisjoint(rows.tolist()):
            continue
        own = student.score(vector, view.vectors(rows), task)
        lists.append(scored_list(own, words, query_words, rows, judged, _TERMS))
    return dict(zip(_TERMS, sum_weights(lists)[1:].tolist(), strict=True))


def _ranked(
    work: RetrievalWork, index: Index, name: str, weights: Mapping[EvidenceTerm, float], queries: Sequence[Query]
) -> System:
    """Rank some of the queries with these weights; candidates come from vectors and words."""
    num_candidates = work.settings.num_candidates  # as many as for the student
    settings = replace(work.search_settings(num_candidates), evidence=weights, sources=("vectors", "bm25"))
    chosen = {query.id for query in queries}
    probes = [query for query in work.trial.probes if query.id in chosen] or queries[:1]
    return work.measure(name, "fitted_sum", index, settings, trial=replace(work.trial, queries=queries, probes=probes))


def _formula(weights: Mapping[EvidenceTerm, float]) -> str:
    return f"1 x cosine + {weights['words']:.3g} x BM25 + {weights['words_share']:.3g} x BM25 as a share of its limit"
