"""Rows for the student with a cheaper search, or with a filter, an instruction or a reranker added."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace

import numpy as np

from d2llm.core.errors import DataFormatError, InputError
from d2llm.core.fingerprint import fingerprint_json
from d2llm.core.types import Query
from d2llm.data.indexed_corpus import iter_corpus
from d2llm.evaluation.contenders import NAME_D2LLM, Contenders
from d2llm.evaluation.report import MissingRow
from d2llm.evaluation.systems import RetrievalWork, System
from d2llm.models.teachers.pair_teacher import RANKING_TEACHER, PairTeacher, ranks_lists
from d2llm.ops.rereading import StudentError
from d2llm.retrieval.build_ann import build_ann
from d2llm.retrieval.calibrate import measure_error
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
