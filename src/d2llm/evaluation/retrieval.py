"""Measures systems that rank the passages of a corpus."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from d2llm.core.errors import DataFormatError, InputError
from d2llm.core.fingerprint import fingerprint_json
from d2llm.core.types import Query, SystemKind
from d2llm.data.beir import Dataset
from d2llm.evaluation import figures
from d2llm.evaluation.contenders import NAME_BM25, Contender, Contenders, check_baseline, choose_baseline, teacher_name
from d2llm.evaluation.figures import Values, compare_means, mean_row
from d2llm.evaluation.pool_scores import Pool, interleaved, score_pool
from d2llm.evaluation.report import (
    AgreementRow,
    Calibration,
    Comparison,
    Details,
    EvaluationReport,
    EvaluationRow,
    MissingRow,
)
from d2llm.evaluation.settings import EvaluationSettings
from d2llm.evaluation.shortcuts import Shortcuts, fitted_student, fitted_sum, measure_shortcuts, without_parts
from d2llm.evaluation.systems import (
    RankedIds,
    RetrievalWork,
    System,
    Trial,
    hybrid_system,
    lexical_system,
    reranked,
    run_system,
    sample,
    timed,
    with_first_stages,
)
from d2llm.models.teachers.pair_teacher import PairTeacher
from d2llm.ops.measures import per_query_measures
from d2llm.runners.placement import HERE, Placement

MAIN_MEASURE = "nDCG@10"
_TIMED_PAIRS = 5  # number of queries whose pool is scored again, one query at a time, to measure latency


def evaluate_retrieval(
    dataset: Dataset,
    contenders: Contenders,
    settings: EvaluationSettings,
    *,
    folder: Path,
    labels: Path | None,
    placement: Placement = HERE,
    indexes: Sequence[Path] = (),
) -> EvaluationReport:
    """See ``evaluation.evaluate.evaluate``; ``folder`` stores indexes, measured systems and labels."""
    check_baseline(
        contenders, settings.baseline, ["bm25", "hybrid", "fitted_sum", *(["external"] if contenders.runs else [])]
    )
    queries, num_left_out = _judged_queries(dataset, settings.split)
    probes, sampled = (
        [queries[position] for position in sample(len(queries), size, settings.seed)]
        for size in (settings.latency_queries, settings.teacher_queries or None)
    )
    trial = Trial(queries, probes, settings.settled_task, settings.top_k, dataset.own_passages)
    work = RetrievalWork(dataset, settings, trial, sampled, folder, labels, placement, indexes)
    students = contenders.students(settings.num_candidates, settings.top_k)
    for row in students:
        work.store_parts_for(row.model)
    searched = [_search(work, row) for row in students]
    subject = searched[[row.kind for row in students].index("d2llm")]
    shortcuts = measure_shortcuts(work, contenders, subject)
    lexical = work.store.system(work.key(NAME_BM25), lambda: lexical_system(NAME_BM25, work.passages, trial))
    fused, missing = _fused(work, students, lexical, searched)
    shortcuts.missing += missing
    fitted = fitted_student(work, contenders.student) if settings.score_parts else None
    if isinstance(fitted, MissingRow):
        shortcuts.missing.append(fitted)
    elif fitted is not None:
        searched.append(fitted)
    ablated = without_parts(work, contenders.student, settings.num_candidates) if settings.score_parts else []
    runs = [run_system(run, trial, dataset.passages) for run in contenders.runs]
    pool = {
        query.id: interleaved([lexical.ids(query.id), subject.ids(query.id)], settings.teacher_depth)
        for query in work.sampled
    }
    teachers = contenders.teachers(settings.teacher_depth)
    sampled = [_score(work, name, kind, teacher, pool, lexical, subject) for name, kind, teacher in teachers]
    systems = [lexical, *fused, *searched, *ablated, *shortcuts.systems, *(system for system, _ in sampled), *runs]
    teacher_scores = next((scores for system, scores in sampled if system.kind == "teacher"), None)
    followers: dict[str, figures.Scores] = {}
    if teacher_scores is not None:
        followers = {row.name: _pool_scores(work, row, pool) for row in students}
    return _RetrievalFigures(
        work,
        contenders,
        systems,
        [name for name, _, _ in teachers],
        [system.name for system in ablated],
        shortcuts,
        subject,
        teacher_scores,
        followers,
    ).report(num_left_out)


def _fused(
    work: RetrievalWork, students: Sequence[Contender], lexical: System, searched: Sequence[System]
) -> tuple[list[System], list[MissingRow]]:
    """BM25 with cosines and the student: fused by ranks, and summed with fitted weights, or why there is no sum."""
    fused = [
        hybrid_system(f"hybrid: {lexical.name} + {other.name}", lexical, other, work.trial)
        for other in searched
        if other.kind in ("cosine_untuned", "d2llm")
    ]
    cosine = next((row for row in reversed(students) if row.kind in ("cosine_tuned", "cosine_untuned")), None)
    summed = None if cosine is None else fitted_sum(work, cosine)
    if isinstance(summed, System):
        return [*fused, summed], []
    if work.settings.baseline == "fitted_sum":
        reason = "there is no cosine to add to BM25" if summed is None else summed.reason
        raise InputError(f"the baseline 'fitted_sum' cannot be measured: {reason}")
    return fused, [] if summed is None else [summed]


def _judged_queries(dataset: Dataset, split: str) -> tuple[list[Query], int]:
    """The queries that have a relevant passage in the corpus, and the number of queries in the split that do not."""
    positives = dataset.positives(split)
    queries = [dataset.queries[query_id] for query_id, relevant in positives.items() if relevant]
    if not queries:
        raise DataFormatError(
            dataset.path / "qrels" / f"{split}.tsv",
            f"none of its {len(dataset.qrels[split])} queries has a relevant passage in the corpus; check the ids",
        )
    return queries, len(dataset.qrels[split]) - len(queries)


def _search(work: RetrievalWork, contender: Contender) -> System:
    def measure() -> System:
        index, rate = work.index(contender.model)
        settings = work.search_settings(contender.num_candidates)
        return work.measure(contender.name, contender.kind, index, settings, passages_per_second=rate)

    model = contender.model
    key = work.key(contender.name, work.identity(model), contender.num_candidates, work.settings.dtype)
    return work.store.system(key, measure)


def _score(
    work: RetrievalWork, name: str, kind: SystemKind, teacher: PairTeacher, pool: Pool, lexical: System, subject: System
) -> tuple[System, figures.Scores]:
    """Rerank the pool with a teacher; returns the system and its scores."""
    texts = {query.id: query.text for query in work.sampled}
    passages = {p: work.dataset.passages[p].full_text for ids in pool.values() for p in ids}
    scored = score_pool(
        teacher,
        pool,
        texts,
        passages,
        work.settings.settled_task,
        dataset=work.dataset.name,
        store=work.folder / "labels" / work.corpus,
        known=work.labels,
        title=f"scoring pairs with {name}",
        placement=work.placement,
    )

    def measure_time() -> list[float]:
        return list(
            timed(
                lambda query: teacher.score_pairs(
                    [(query.text, passages[p]) for p in pool[query.id]], work.settings.settled_task
                ),
                list(work.sampled[:_TIMED_PAIRS]),
            )
        )

    seconds = work.store.values(work.key(name, teacher.fingerprint, fingerprint_json(pool), "time"), measure_time)
    sampled = replace(work.trial, queries=work.sampled)
    system = reranked(subject, scored.scores, sampled, name=name, kind=kind)
    num_timed = sum(len(pool[query.id]) for query in work.sampled[:_TIMED_PAIRS])
    rate = num_timed / max(sum(seconds), 1e-9)
    system = replace(system, fingerprint=teacher.fingerprint, costs={"pairs_per_second": rate}, notes=scored.notes)
    return with_first_stages(system, seconds, (lexical, subject)), scored.scores


def _pool_scores(work: RetrievalWork, contender: Contender, pool: Pool) -> figures.Scores:
    """A student's scores of the passages that the teacher scored."""
    texts = {query.id: query.text for query in work.sampled}
    view = work.index(contender.model)[0].view

    def score() -> dict[str, dict[str, float]]:
        vectors = contender.model.encode_queries([texts[query_id] for query_id in pool]).vectors
        scores_by_query: dict[str, dict[str, float]] = {}
        for vector, (query_id, ids) in zip(vectors, pool.items(), strict=True):
            scores = contender.model.score(vector, view.vectors(view.rows(ids)), work.settings.settled_task)
            scores_by_query[query_id] = dict(zip(ids, scores.tolist(), strict=True))
        return scores_by_query

    key = work.key(contender.name, contender.model.fingerprint, fingerprint_json(pool), work.settings.dtype, "pool")
    return work.store.values(key, score)


@dataclass
class _RetrievalFigures:
    """Computes the report from the rankings.

    ``teachers`` are the rows that answered a sample of the queries, ``ablated`` those of the student without a part of
    its score; ``followers`` are the students' scores of the passages that the teacher scored.
    """

    work: RetrievalWork
    contenders: Contenders
    systems: Sequence[System]
    teachers: Sequence[str]
    ablated: Sequence[str]
    shortcuts: Shortcuts
    subject: System
    teacher_scores: figures.Scores | None
    followers: Mapping[str, figures.Scores]

    def __post_init__(self) -> None:
        self._all_ids = [query.id for query in self.work.trial.queries]
        self._sampled_ids = [query.id for query in self.work.sampled]
        self._query_ids = {
            **{system.name: self._all_ids for system in self.systems},
            **dict.fromkeys(self.teachers, self._sampled_ids),
            **self.shortcuts.query_ids,
        }
        self._values: dict[str, Values] = {
            system.name: per_query_measures(
                {query_id: system.ids(query_id) for query_id in system.rankings},
                self.shortcuts.qrels.get(system.name, self.work.qrels),
            )
            for system in self.systems
        }
        self._comparable = [system for system in self.systems if system.name not in self.shortcuts.qrels]

    def report(self, num_left_out: int) -> EvaluationReport:
        """The whole report; ``num_left_out`` queries of the split have no relevant passage."""
        work, settings = self.work, self.work.settings
        own_passages = work.trial.own_passages.counts(self._all_ids)
        rows = [self._row(system, self._query_ids[system.name]) for system in self.systems]
        sample_rows: list[EvaluationRow] = []
        if self.teachers and len(self._sampled_ids) < len(self._all_ids):
            sample_rows = [self._row(system, self._sampled_ids) for system in self._comparable]
        baseline = choose_baseline(rows, settings.baseline)
        compared = [system.name for system in self._comparable if system.name not in self.ablated]
        histograms = [
            figures.ranking_histogram(system, work.relevant)
            for system in self.systems
            if system.kind in figures.HISTOGRAM_KINDS
        ]
        return EvaluationReport(
            kind="retrieval",
            dataset=work.dataset.name,
            split=settings.split,
            task=settings.settled_task,
            num_passages=len(work.passages),
            num_items=len(self._all_ids),
            num_left_out=num_left_out,
            num_own_passages=own_passages.num_left_out,
            num_own_passages_judged_relevant=own_passages.num_judged,
            main_measure=MAIN_MEASURE,
            subject=self.subject.name,
            baseline=baseline,
            rows=tuple(rows),
            missing=(*self.contenders.missing_rows(settings.teacher_depth), *self.shortcuts.missing),
            sample_rows=tuple(sample_rows),
            comparisons=self._compare(baseline, compared),
            parts=self._compare(self.subject.name, [self.subject.name, *self.ablated]),
            agreement=self._agreement(),
            calibration=self._calibration(),
            histograms=tuple(histogram for histogram in histograms if histogram is not None),
            settings=settings.model_dump(),
            provenance=self.contenders.provenance,
            notes=self._notes(),
            seconds=0.0,
            details=self._details(baseline),
        )

    def _row(self, system: System, query_ids: Sequence[str]) -> EvaluationRow:
        return mean_row(system, self._values[system.name], query_ids, seed=self.work.settings.seed)

    def _compare(self, baseline: str, names: Sequence[str]) -> tuple[Comparison, ...]:
        query_ids = {name: self._query_ids[name] for name in names}
        return tuple(compare_means(self._values, baseline, query_ids, seed=self.work.settings.seed))

    def _agreement(self) -> tuple[AgreementRow, ...]:
        if self.teacher_scores is None:
            return ()
        return tuple(
            figures.agreement_row(name, self.teacher_scores, scores) for name, scores in self.followers.items()
        )

    def _calibration(self) -> tuple[Calibration, ...]:
        """The calibration of the teacher and the student, on the passages that the teacher scored."""
        if self.teacher_scores is None:
            return ()
        name = teacher_name(self.work.settings.teacher_depth)
        by_system = {name: self.teacher_scores, self.subject.name: self.followers[self.subject.name]}
        return tuple(
            figures.calibration(name, *figures.pool_labels(scores, self.work.relevant))
            for name, scores in by_system.items()
        )

    def _notes(self) -> tuple[str, ...]:
        work = self.work
        num_reused = work.store.num_found
        students = self.contenders.students(work.settings.num_candidates, work.settings.top_k)
        of_systems = [(system.name, note) for system in self.systems for note in system.notes]
        return (
            *self.contenders.notes_on(work.dataset.name, work.trial.task),
            *([note] if (note := str(self.work.trial.own_passages.counts(self._all_ids))) else []),
            *work.dataset.issues,
            *figures.joined_notes(of_systems),
            *work.notes,
            *(
                f"{folder} was not searched: it is not of these passages alone as one of the students encodes them here"
                for folder in work.unused_indexes([row.model for row in students])
            ),
            *([f"{num_reused} parts were measured by an earlier run"] if num_reused else []),
        )

    def _details(self, baseline: str) -> Details:
        def main_values(name: str) -> dict[str, float]:
            """The main measure on the queries that the baseline answered."""
            return {query_id: self._values[name][MAIN_MEASURE][query_id] for query_id in self._query_ids[baseline]}

        theirs = next(system for system in self.systems if system.name == baseline)
        wins, losses = figures.examples(
            _ranked_ids(self.subject.rankings),
            _ranked_ids(theirs.rankings),
            (main_values(self.subject.name), main_values(baseline)),
            self.work.dataset.queries,
            self.work.dataset.passages,
            self.work.relevant,
        )
        return Details(
            item_ids=tuple(self._all_ids),
            values={
                name: {measure: tuple(by_query[q] for q in self._all_ids) for measure, by_query in measures.items()}
                for name, measures in self._values.items()
                if self._query_ids[name] is self._all_ids
            },
            wins=wins,
            losses=losses,
            rankings={system.name: system.rankings for system in self.systems},
        )


def _ranked_ids(rankings: Mapping[str, RankedIds]) -> dict[str, list[str]]:
    return {query_id: [passage_id for passage_id, _ in ranking] for query_id, ranking in rankings.items()}


def about_row(report: EvaluationReport, name: str, dataset: Dataset) -> EvaluationReport:
    """The same report, whose subject and examples are another row that answered every query of the baseline."""
    details, measure = report.details, report.main_measure
    assert measure is not None
    assert report.baseline is not None
    ours, theirs = (
        dict(zip(details.item_ids, details.values[system][measure], strict=True)) for system in (name, report.baseline)
    )
    positives = dataset.positives(report.split)
    relevant = {query_id: frozenset(positives[query_id]) for query_id in details.item_ids}
    wins, losses = figures.examples(
        _ranked_ids(details.rankings[name]),
        _ranked_ids(details.rankings[report.baseline]),
        (ours, theirs),
        dataset.queries,
        dataset.passages,
        relevant,
    )
    return replace(report, subject=name, details=replace(details, wins=wins, losses=losses))
