"""Rows for the student with a cheaper search, or with a filter, an instruction or a reranker added.

Other rows show how much words contribute. The fitted sum of cosine and BM25 does not need D2LLM: it has two weights,
fitted on the dev queries of the data set. So that the student can be compared with the same knowledge of the data set,
there is a row of it with such weights for all its score features, as ``d2llm fit-scores`` would fit them. If dev itself
is measured, or there is no dev split, each half of the queries is ranked with the weights fitted on the other half.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from d2llm.core.errors import DataFormatError, InputError
from d2llm.core.fingerprint import fingerprint_json
from d2llm.core.types import PART_NAMES, Query, ScoreFeature, SystemKind
from d2llm.data.indexed_corpus import iter_corpus
from d2llm.evaluation.contenders import NAME_BM25, NAME_D2LLM, Contender, Contenders
from d2llm.evaluation.report import MissingRow
from d2llm.evaluation.systems import RetrievalWork, System
from d2llm.models.protocols import SearchStudent, term_factors
from d2llm.models.row_features import mean_of_cosines, scored_list
from d2llm.models.score_features import VECTOR_TERMS, FeatureWeights
from d2llm.models.teachers.pair_teacher import RANKING_TEACHER, PairTeacher, ranks_lists
from d2llm.ops.rereading import StudentError
from d2llm.ops.weighted_sum import sum_weights
from d2llm.retrieval.build_ann import build_ann
from d2llm.retrieval.calibrate import measure_error
from d2llm.retrieval.cosine import DotStudent
from d2llm.retrieval.index import Index
from d2llm.retrieval.reranker import OpenReranker, TeacherReranker, named_reranker

_CALIBRATING_QUERIES = 40
_TIMED_RERANKINGS = 10  # queries that are timed one at a time


@dataclass
class Shortcuts:
    """Rows of cheaper or extended searches.

    ``query_ids``: row -> the queries that it answered, if it did not answer all. ``qrels``: row -> query_id ->
    passage_id -> grade, if a filter excludes passages.
    """

    systems: list[System] = field(default_factory=list[System])
    query_ids: dict[str, list[str]] = field(default_factory=dict[str, list[str]])
    qrels: dict[str, Mapping[str, Mapping[str, int]]] = field(
        default_factory=dict[str, Mapping[str, Mapping[str, int]]]
    )
    missing: list[MissingRow] = field(default_factory=list[MissingRow])


def measure_shortcuts(work: RetrievalWork, contenders: Contenders, subject: System) -> Shortcuts:
    """Measure the rows that the settings enable; ``subject`` is the student with its ordinary search."""
    settings, rows = work.settings, Shortcuts()
    index, _ = work.index(contenders.student)
    for vector_format in dict.fromkeys(settings.stored_as):
        rows.systems.append(_stored_as(work, index, vector_format))
    if settings.exact:
        _add_exact(rows, work, index)
    if settings.ann_recall is not None:
        _add_ann(rows, work, index, settings.ann_recall)
    if settings.reranker is not None:
        _add_reranker(rows, work, index, contenders.teacher, settings.reranker)
    if settings.filter is not None:
        _add_filter(rows, work, index, settings.filter, subject)
    if settings.instruction is not None:
        rows.systems.append(_with_instruction(work, index, settings.instruction))
    return rows


def _stored_as(work: RetrievalWork, index: Index, vector_format: str) -> System:
    """The student with vectors in another format."""
    name, search = f"{NAME_D2LLM}, {vector_format} vectors", work.search_settings(work.settings.num_candidates)
    return work.store.system(
        work.key(name, work.identity(index.student), search.num_candidates, work.settings.dtype),
        lambda: work.measure(name, "shortcut", index, search, view=index.unsharded_view.stored_as(vector_format)),
    )


def _add_exact(rows: Shortcuts, work: RetrievalWork, index: Index) -> None:
    """Search exactly by the full score, with a certificate."""
    name = f"{NAME_D2LLM}, exact"
    if not index.student.has_dot:
        reason = "this student's head has no inner product, so its search is always exact"
        rows.missing.append(MissingRow(name, "shortcut", reason))
        return
    search = work.search_settings(work.settings.num_candidates).replace(exact=True)
    key = work.key(name, work.identity(index.student), work.settings.dtype)
    rows.systems.append(work.store.system(key, lambda: work.measure(name, "shortcut", index, search)))


def _add_ann(rows: Shortcuts, work: RetrievalWork, index: Index, recall: float) -> None:
    """Take candidates from an approximate index, tuned on queries that are not measured."""
    name, depth = f"{NAME_D2LLM}, approximate ({recall:g})", work.settings.num_candidates
    search = work.search_settings(depth).replace(sources=("ann",))

    def measure() -> System:
        texts = [query.text for query in _held_out(work)]
        build_ann(
            index.store, index.student, recall=recall, depth=depth, queries=texts or None, seed=work.settings.seed
        )
        index.refresh()
        return work.measure(name, "shortcut", index, search)

    try:
        key = work.key(name, work.identity(index.student), depth, work.settings.dtype)
        rows.systems.append(work.store.system(key, measure))
    except InputError as error:  # too few passages, or the exact scan is faster
        rows.missing.append(MissingRow(name, "shortcut", str(error)))


def _add_reranker(rows: Shortcuts, work: RetrievalWork, index: Index, teacher: PairTeacher | None, named: str) -> None:
    """Let a reranker score the first passages again."""
    settings = named_reranker(named)
    name, uses_error = f"{NAME_D2LLM}, reranker {settings.kind}", False
    search = work.search_settings(work.settings.num_candidates)
    trial = replace(work.trial, queries=work.sampled, probes=work.sampled[:_TIMED_RERANKINGS])

    def measure(reranker: OpenReranker) -> System:
        return work.measure(name, "shortcut", index, search, trial=trial, rerank=reranker)

    if isinstance(settings, TeacherReranker):
        teacher, uses_error = teacher if settings.model is None else settings.load_teacher(), settings.uses_error
        held_out, reason = _held_out(work) if uses_error else [], None
        if teacher is None:
            reason = "no teacher was given"
        elif uses_error and ranks_lists(teacher):
            reason = RANKING_TEACHER
        elif uses_error and not held_out:
            reason = "no other split has queries to calibrate it with"
        if teacher is None or reason is not None:
            rows.missing.append(MissingRow(name, "shortcut", reason or ""))
            return
        task, model = work.trial.task, teacher
        key = work.key(
            name,
            work.identity(index.student),
            model.fingerprint,
            model.prompt_fingerprint(task),
            fingerprint_json(settings.model_dump(mode="json")),
            search.num_candidates,
            work.settings.dtype,
            fingerprint_json([query.id for query in work.sampled]),
        )

        def calibrate() -> dict[str, float]:
            chosen = held_out[:_CALIBRATING_QUERIES]
            return asdict(measure_error(index.view, index.student, model, chosen, task=task))

        def measure_taught() -> System:
            error = StudentError(**work.store.values([*key, "error"], calibrate)) if uses_error else None
            return measure(settings.with_teacher(model, error))

        rows.systems.append(work.store.system(key, measure_taught))
    else:  # its models may have changed since they were measured
        rows.systems.append(measure(settings.open()))
    rows.query_ids[name] = [query.id for query in work.sampled]


def _add_filter(rows: Shortcuts, work: RetrievalWork, index: Index, condition: str, subject: System) -> None:
    """Restrict results to passages that match a condition: one row filters before taking the top k, one after.

    Both are measured by the relevant passages that match, on the queries that have one.
    """
    _add_metadata(work, index)
    view = index.unsharded_view
    allowed = set(view.ids(view.live_rows(view.select(condition))))
    qrels = {
        query_id: {passage_id: grade for passage_id, grade in grades.items() if passage_id in allowed}
        for query_id, grades in work.qrels.items()
        if not allowed.isdisjoint(work.relevant[query_id])
    }
    if not qrels:
        raise InputError(
            f"no relevant passage of the split '{work.settings.split}' matches the filter {condition!r}; "
            f"{len(allowed):,} of {len(view):,} passages do"
        )
    before, afterwards = f"{NAME_D2LLM} WHERE {condition}", f"{NAME_D2LLM}, WHERE {condition} afterwards"
    queries = [query for query in work.trial.queries if query.id in qrels]
    probes = [query for query in work.trial.probes if query.id in qrels] or queries[:1]
    trial = replace(work.trial, queries=queries, probes=probes)
    search = work.search_settings(work.settings.num_candidates).replace(filter=condition)
    key = work.key(before, work.identity(index.student), search.num_candidates, work.settings.dtype)
    rows.systems.append(work.store.system(key, lambda: work.measure(before, "shortcut", index, search, trial=trial)))
    filtered = {
        query_id: tuple(
            (passage_id, score) for passage_id, score in subject.rankings[query_id] if passage_id in allowed
        )
        for query_id in qrels
    }
    rows.systems.append(replace(subject, name=afterwards, kind="shortcut", rankings=filtered))
    for name in (before, afterwards):
        rows.query_ids[name] = list(qrels)
        rows.qrels[name] = qrels
    work.notes.append(
        f"{condition}: {len(allowed):,} of {len(view):,} passages match; {len(qrels):,} of {len(work.qrels):,} queries "
        "have a relevant one among them, and the two rows are measured on those queries"
    )


def _add_metadata(work: RetrievalWork, index: Index) -> None:
    """Add the corpus's metadata to the index, because data sets are read without it; vectors are kept."""
    try:
        index.upsert(p for p in iter_corpus(work.dataset.path) if p.id in work.dataset.passages)
    except (DataFormatError, OSError):  # this layout has no metadata
        return


def _with_instruction(work: RetrievalWork, index: Index, instruction: str) -> System:
    """The student with an instruction before each query."""
    name = f"{NAME_D2LLM}, with an instruction"
    search = work.search_settings(work.settings.num_candidates).replace(instruction=instruction)
    key = work.key(name, work.identity(index.student), search.num_candidates, work.settings.dtype, instruction)
    return work.store.system(key, lambda: work.measure(name, "shortcut", index, search))


def _held_out(work: RetrievalWork) -> Sequence[Query]:
    """Queries of the other splits, in a random order."""
    measured = {query.id for query in work.trial.queries}
    others = {
        query_id: None
        for split, judged in work.dataset.qrels.items()
        if split != work.settings.split
        for query_id in judged
        if query_id in work.dataset.queries and query_id not in measured
    }
    queries = [work.dataset.queries[query_id] for query_id in others]
    return [queries[position] for position in np.random.default_rng(work.settings.seed).permutation(len(queries))]


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
    if student.why_no_interaction(work.trial.task) is None:
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
