"""Measures systems that score labelled pairs of texts: their scores, their cost, and the report."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from itertools import groupby
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from d2llm.core.errors import InputError
from d2llm.core.fingerprint import fingerprint_json
from d2llm.core.names import counted
from d2llm.core.progress import showing_progress
from d2llm.core.types import SystemKind
from d2llm.data.pairs import LabelledPair, PairDataset
from d2llm.evaluation import figures
from d2llm.evaluation.contenders import NAME_BM25, NAME_D2LLM, Contender, Contenders, check_baseline, choose_baseline
from d2llm.evaluation.figures import adjusted
from d2llm.evaluation.gold import Floats, Gold, Positions, measure_all, read_gold
from d2llm.evaluation.pool_scores import score_pool
from d2llm.evaluation.report import (
    AgreementRow,
    Calibration,
    Comparison,
    Cost,
    Details,
    Estimate,
    EvaluationReport,
    EvaluationRow,
    Example,
    Histogram,
    MissingRow,
    ShownPassage,
)
from d2llm.evaluation.settings import EvaluationSettings
from d2llm.evaluation.systems import MeasuredStore, milliseconds, peak_memory, sample
from d2llm.models.protocols import SearchStudent
from d2llm.models.teachers.pair_teacher import PairTeacher
from d2llm.ops.calibration import score_histogram
from d2llm.ops.significance import bootstrap_statistic, resampled_p_value
from d2llm.retrieval.reading import EncodedPairs, encode_pairs
from d2llm.runners.placement import HERE, Placement
from d2llm.store.bm25 import WordIndex

_TIMED_PAIRS = 10  # number of pairs scored again, one by one and then as a batch, to measure the time


@dataclass(frozen=True, slots=True)
class ScoredSplits:
    """One system's scores on the measured split and on the split that thresholds are fitted on (empty without one).

    ``positions`` and ``tuning_positions`` are the positions of the pairs that were scored.
    """

    name: str
    kind: SystemKind
    positions: Positions
    scores: Floats
    tuning_positions: Positions
    tuning_scores: Floats
    cost: Cost
    fingerprint: str | None = None


@dataclass
class PairWork:
    """The data, settings and stores that all systems of one evaluation share."""

    dataset: PairDataset
    settings: EvaluationSettings
    pairs: Sequence[LabelledPair]
    tuning_pairs: Sequence[LabelledPair]
    folder: Path
    labels: Path | None
    placement: Placement = HERE

    def __post_init__(self) -> None:
        self.store = MeasuredStore(self.folder / "measured")
        texts = [[(pair.id, pair.query, pair.passage) for pair in split] for split in (self.pairs, self.tuning_pairs)]
        self.content = fingerprint_json(texts)
        self.notes: list[tuple[str, str]] = []
        """(system, message)."""

    def sample(self, size: int) -> Positions:
        """Sorted positions of a random sample of ``teacher_queries`` of ``size`` pairs; all if there are fewer."""
        return sample(size, self.settings.teacher_queries or None, self.settings.seed)

    @property
    def probes(self) -> list[LabelledPair]:
        """The pairs that are timed."""
        positions = sample(len(self.pairs), self.settings.latency_queries, self.settings.seed)
        return [self.pairs[index] for index in positions]

    def scored(
        self, name: str, kind: SystemKind, fingerprint: str | None, measure: Callable[[], dict[str, Any]]
    ) -> ScoredSplits:
        """The scores of all pairs, measured now or taken from an earlier run."""
        measured = self.store.values([name, fingerprint, self.content, self.settings.settled_task, "pairs"], measure)
        cost = Cost(total=milliseconds(measured["probe_seconds"]), **measured["costs"])
        if measured.get("num_truncated"):
            self.notes.append((name, f"{counted(measured['num_truncated'], 'text was', 'texts were')} truncated"))
        positions, tuning_positions = np.arange(len(self.pairs)), np.arange(len(self.tuning_pairs))
        scores, tuning_scores = (np.array(measured[part], np.float64) for part in ("scores", "tuning_scores"))
        return ScoredSplits(name, kind, positions, scores, tuning_positions, tuning_scores, cost, fingerprint)


def lexical_scores(work: PairWork) -> ScoredSplits:
    """The BM25 score of each pair, with the passages of its split as the collection."""

    def score_split(pairs: Sequence[LabelledPair]) -> list[float]:
        passages = list(dict.fromkeys(pair.passage for pair in pairs))
        if not passages:
            return []
        row_of = {text: row for row, text in enumerate(passages)}
        index = WordIndex.from_texts(passages)
        scores = np.zeros(len(pairs))
        positions_of: defaultdict[str, list[int]] = defaultdict(list)
        for position, pair in enumerate(pairs):
            positions_of[pair.query].append(position)
        for query, positions in positions_of.items():
            query_scores = index.scores(index.query(query))
            scores[positions] = query_scores[[row_of[pairs[position].passage] for position in positions]]
        return scores.tolist()

    def measure() -> dict[str, Any]:
        with peak_memory() as peak:
            begin = perf_counter()
            scores = score_split(work.pairs)
            rate = len(scores) / (perf_counter() - begin)
            measured = {"scores": scores, "tuning_scores": score_split(work.tuning_pairs), "probe_seconds": []}
            return {**measured, "costs": {"pairs_per_second": rate, "peak_memory_mib": peak()}}

    return work.scored(NAME_BM25, "bm25", None, measure)


def student_scores(work: PairWork, contenders: Sequence[Contender]) -> list[ScoredSplits]:
    """The scores of all pairs by students with the same vectors; each text is encoded once for all of them."""
    first, task = contenders[0].model, work.settings.settled_task
    description = f"encoding for {' and '.join(contender.name for contender in contenders)}"

    def encode(pairs: Sequence[LabelledPair], placement: Placement) -> EncodedPairs:
        return encode_pairs(first, _texts(pairs), description, placement=placement)

    @cache
    def encoded() -> tuple[EncodedPairs, EncodedPairs | None, float, float | None]:
        """Both splits, the seconds that the first took, and the peak of the memory."""
        with peak_memory() as peak:
            begin = perf_counter()
            measured = encode(work.pairs, work.placement)
            seconds = perf_counter() - begin
            tuning = encode(work.tuning_pairs, work.placement) if work.tuning_pairs else None
            return measured, tuning, seconds, peak()

    def measure(model: SearchStudent) -> dict[str, Any]:
        pairs, tuning, seconds, peak = encoded()
        begin = perf_counter()
        scores = pairs.score(model, task)
        seconds += perf_counter() - begin
        times: list[float] = []
        with showing_progress(False):
            for pair in work.probes:
                begin = perf_counter()
                encode([pair], HERE).score(model, task)
                times.append(perf_counter() - begin)
        return {
            "scores": scores.tolist(),
            "tuning_scores": [] if tuning is None else tuning.score(model, task).tolist(),
            "probe_seconds": times,
            "costs": {"pairs_per_second": len(work.pairs) / seconds, "peak_memory_mib": peak},
            "num_truncated": pairs.num_truncated,
        }

    return [
        work.scored(contender.name, contender.kind, contender.model.fingerprint, partial(measure, contender.model))
        for contender in contenders
    ]


def score_sample(work: PairWork, name: str, kind: SystemKind, teacher: PairTeacher) -> ScoredSplits:
    """A teacher's scores of a sample of both splits."""
    splits = [(work.settings.split, work.pairs), ("tuning", work.tuning_pairs)]
    positions = [work.sample(len(pairs)) for _, pairs in splits]
    chosen = {
        f"{label}:{pairs[position].id}": pairs[position]
        for (label, pairs), of_split in zip(splits, positions, strict=True)
        for position in of_split.tolist()
    }
    pool = score_pool(
        teacher,
        {key: [key] for key in chosen},
        {key: pair.query for key, pair in chosen.items()},
        {key: pair.passage for key, pair in chosen.items()},
        work.settings.settled_task,
        dataset=work.dataset.name,
        store=work.folder / "labels" / work.content,
        known=work.labels,
        title=f"scoring pairs with {name}",
        placement=work.placement,
    )
    work.notes += [(name, note) for note in pool.notes]

    def measure_time() -> dict[str, Any]:
        probes = _texts(work.probes[:_TIMED_PAIRS])
        seconds: list[float] = []
        for pairs in (*([pair] for pair in probes), probes):
            begin = perf_counter()
            teacher.score_pairs(pairs, work.settings.settled_task)
            seconds.append(perf_counter() - begin)
        return {"alone": seconds[:-1], "costs": {"pairs_per_second": len(probes) / seconds[-1]}}

    times = work.store.values(
        [name, teacher.fingerprint, work.content, work.settings.settled_task, "time"], measure_time
    )
    scores = [
        np.array([pool.scores[key][key] for key in (f"{label}:{pairs[p].id}" for p in of_split.tolist())])
        for (label, pairs), of_split in zip(splits, positions, strict=True)
    ]
    cost = Cost(total=milliseconds(times["alone"]), **times["costs"])
    return ScoredSplits(name, kind, positions[0], scores[0], positions[1], scores[1], cost, teacher.fingerprint)


def _texts(pairs: Sequence[LabelledPair]) -> list[tuple[str, str]]:
    return [(pair.query, pair.passage) for pair in pairs]


NUM_RESAMPLES = 2_000  # enough for p to be below .01 after the correction over all rows
_TEST = f"paired bootstrap, {NUM_RESAMPLES:,} resamples"
_NO_FUSION = MissingRow(
    f"hybrid: {NAME_BM25} + {NAME_D2LLM}", "hybrid", "single pairs have no ranks that could be fused"
)
_NO_RANKING = "a run ranks passages, and this data set has single pairs"


def evaluate_pairs(
    dataset: PairDataset,
    contenders: Contenders,
    settings: EvaluationSettings,
    *,
    folder: Path,
    labels: Path | None,
    placement: Placement = HERE,
) -> EvaluationReport:
    """See ``evaluation.evaluate.evaluate``; ``folder`` stores measured scores and labels.

    Thresholds are fitted on the split "dev", or on "train" if dev itself is measured. There is an ``InputError`` if
    classes have no such split, or the teacher's sample is too small to measure.
    """
    check_baseline(contenders, settings.baseline, ["bm25"])
    tuning = "train" if settings.split == "dev" else "dev"
    pairs, tuning_pairs = dataset.pairs(settings.split), dataset.splits.get(tuning, ())
    gold = read_gold(dataset, settings.split)
    tuning_gold = read_gold(dataset, tuning) if tuning_pairs else None
    work = PairWork(dataset, settings, pairs, tuning_pairs, folder, labels, placement)
    teachers = contenders.teachers(None)
    _check_measurable(work, gold, tuning_gold, sampled=bool(teachers))
    students = contenders.students(settings.num_candidates, settings.top_k)
    by_vectors = groupby(students, key=lambda contender: contender.model.fingerprint)  # a student follows its cosine
    systems = [
        lexical_scores(work),
        *(scores for _, same_vectors in by_vectors for scores in student_scores(work, list(same_vectors))),
        *(score_sample(work, *teacher) for teacher in teachers),
    ]
    return _PairFigures(work, contenders, gold, tuning_gold, systems, [name for name, _, _ in teachers]).report()


def _check_measurable(work: PairWork, gold: Gold, tuning_gold: Gold | None, *, sampled: bool) -> None:
    """Check, before anything is scored, that all measures can be computed."""

    def check(positions: Positions, tuning: Positions) -> None:
        thresholds = None if tuning_gold is None else tuning_gold.fit(np.zeros(len(tuning)), tuning)
        measure_all(gold, np.zeros(len(positions)), positions, thresholds)

    check(np.arange(len(work.pairs)), np.arange(len(work.tuning_pairs)))
    if sampled:
        sample, tuning = work.sample(len(work.pairs)), work.sample(len(work.tuning_pairs))
        try:
            check(sample, tuning)
        except InputError as error:
            raise InputError(
                f"a sample of {len(sample)} pairs, and of {len(tuning)} to choose thresholds on, is too small to "
                f"measure the teacher: {error}; increase the sample (teacher_queries)"
            ) from error


Resampled = dict[str, tuple[Estimate, NDArray[np.float64]]]
"""measure -> its value with interval, and its value on each resample."""


@dataclass
class _PairFigures:
    """Computes the report from the scores. ``teachers`` are the systems that scored only a sample."""

    work: PairWork
    contenders: Contenders
    gold: Gold
    tuning_gold: Gold | None
    systems: Sequence[ScoredSplits]
    teachers: Sequence[str]

    def report(self) -> EvaluationReport:
        work, settings, gold = self.work, self.work.settings, self.gold
        measured = {system.name: self._measure(system, system.positions) for system in self.systems}
        rows = [self._row(system, measured[system.name]) for system in self.systems]
        on_sample = measured
        if self._is_sampled:
            on_sample = {system.name: self._measure(system, self._sample) for system in self.systems}
        sample_rows = [self._row(system, on_sample[system.name]) for system in self.systems] if self._is_sampled else []
        baseline = choose_baseline(rows, settings.baseline)
        subject = next(system for system in self.systems if system.kind == "d2llm")
        reference = next(system for system in self.systems if system.name == baseline)
        wins, losses = self._examples(subject, reference)
        notes = [*self.contenders.notes_on(work.dataset.name, settings.settled_task), *work.dataset.issues]
        notes += figures.joined_notes(work.notes)
        if self.tuning_gold is None and gold.positive is not None:
            notes.append("there is no dev split to choose thresholds on; the measures that need one are left out")
        if work.store.num_found:
            notes.append(f"{work.store.num_found} parts were measured by an earlier run")
        return EvaluationReport(
            kind="pairs",
            dataset=work.dataset.name,
            split=settings.split,
            task=settings.settled_task,
            num_passages=len({pair.passage for pair in work.pairs}),
            num_items=len(work.pairs),
            num_left_out=0,
            main_measure=gold.main_measure,
            subject=subject.name,
            baseline=baseline,
            rows=tuple(rows),
            missing=(
                _NO_FUSION,
                *self.contenders.missing_rows(None),
                *(MissingRow(run.name, "external", _NO_RANKING) for run in self.contenders.runs),
            ),
            sample_rows=tuple(replace(row, num_items=len(self._sample)) for row in sample_rows),
            comparisons=tuple(self._comparisons(measured, on_sample, baseline)),
            agreement=tuple(self._agreement()),
            calibration=tuple(self._calibration()),
            histograms=tuple(self._histograms()),
            settings=settings.model_dump(),
            provenance=self.contenders.provenance,
            notes=tuple(notes),
            seconds=0.0,
            details=Details(
                item_ids=tuple(pair.id for pair in work.pairs),
                values={
                    system.name: {gold.main_measure: tuple(self._item_values(system, self._all).tolist())}
                    for system in self.systems
                    if system.name not in self.teachers
                },
                wins=wins,
                losses=losses,
            ),
        )

    @cached_property
    def _sample(self) -> Positions:
        """Positions of the pairs that every system scored."""
        return next((system.positions for system in self.systems if system.name in self.teachers), self._all)

    @cached_property
    def _all(self) -> Positions:
        return np.arange(len(self.work.pairs))

    @property
    def _is_sampled(self) -> bool:
        return len(self._sample) < len(self._all)

    @cached_property
    def _thresholds(self) -> dict[str, Any]:
        if self.tuning_gold is None:
            return dict.fromkeys((system.name for system in self.systems), None)
        return {
            system.name: self.tuning_gold.fit(system.tuning_scores, system.tuning_positions) for system in self.systems
        }

    def _item_values(self, system: ScoredSplits, positions: Positions) -> Floats:
        """How well a system scored each of the pairs at ``positions``."""
        return self.gold.item_values(_at(system, positions), positions, self._thresholds[system.name])

    def _measure(self, system: ScoredSplits, positions: Positions) -> Resampled:
        """The measures of a system on the pairs at ``positions``, all of which it scored, with resamples."""
        thresholds = self._thresholds[system.name]
        measure_rows = self.gold.measurer(_at(system, positions), positions, thresholds)
        values = measure_rows(np.arange(len(positions)))
        resampled_values: list[dict[str, float]] = []

        def record_all(rows: Positions) -> float:
            try:
                resampled_values.append(measure_rows(rows))
            except InputError:  # a resample with only one label
                resampled_values.append(dict.fromkeys(values, np.nan))
            return resampled_values[-1][self.gold.main_measure]

        bootstrap_statistic(record_all, len(positions), num_resamples=NUM_RESAMPLES, seed=self.work.settings.seed)
        resamples: Resampled = {}
        for measure, value in values.items():
            resampled = np.array([resample[measure] for resample in resampled_values])
            low, high = np.nanquantile(resampled, [0.025, 0.975]).tolist()
            resamples[measure] = (Estimate(value, low, high), resampled)
        return resamples

    def _row(self, system: ScoredSplits, measured: Resampled) -> EvaluationRow:
        measures = {measure: estimate for measure, (estimate, _) in measured.items()}
        return EvaluationRow(system.name, system.kind, measures, system.cost, len(system.positions), system.fingerprint)

    def _comparisons(
        self, measured: dict[str, Resampled], on_sample: dict[str, Resampled], baseline: str
    ) -> list[Comparison]:
        """Compare every system with the baseline in every measure, on the pairs that both scored."""
        comparisons: list[Comparison] = []
        for measure in measured[baseline]:
            of_measure: list[Comparison] = []
            for system in self.systems:
                if system.name == baseline:
                    continue
                source = on_sample if {system.name, baseline} & set(self.teachers) else measured
                ours, theirs = source[system.name][measure], source[baseline][measure]
                differences = ours[1] - theirs[1]
                p_value = resampled_p_value(differences)
                low, high = np.nanquantile(differences, [0.025, 0.975]).tolist()
                estimate = Estimate(ours[0].value - theirs[0].value, low, high)
                size = len(self._all if source is measured else self._sample)
                of_measure.append(Comparison(measure, system.name, baseline, estimate, p_value, p_value, size, _TEST))
            comparisons += adjusted(of_measure)
        return comparisons

    def _teacher(self) -> ScoredSplits | None:
        return next((system for system in self.systems if system.kind == "teacher"), None)

    def _agreement(self) -> list[AgreementRow]:
        teacher = self._teacher()
        if teacher is None:
            return []
        teacher_scores = _as_one_query(teacher.scores)
        return [
            replace(
                figures.agreement_row(system.name, teacher_scores, _as_one_query(system.scores[teacher.positions])),
                top_10_overlap=None,
            )
            for system in self.systems
            if system.name not in self.teachers
        ]

    def _calibration(self) -> list[Calibration]:
        teacher, positive = self._teacher(), self.gold.positive
        if positive is None:
            return []
        return [
            figures.calibration(system.name, system.scores.tolist(), positive[system.positions].tolist())
            for system in self.systems
            if system.kind == "d2llm" or system is teacher
        ]

    def _histograms(self) -> list[Histogram]:
        positive = self.gold.positive
        if positive is None:
            return []
        return [
            Histogram(system.name, score_histogram(system.scores, positive[system.positions]))
            for system in self.systems
            if system.kind in figures.HISTOGRAM_KINDS
        ]

    def _examples(
        self, subject: ScoredSplits, reference: ScoredSplits
    ) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
        """The pairs that the subject scores best, and worst, relative to the reference."""
        positions = reference.positions
        ours, theirs = self._item_values(subject, positions), self._item_values(reference, positions)
        order = np.argsort(theirs - ours, kind="stable").tolist()
        wins = [index for index in order[: figures.NUM_EXAMPLES] if ours[index] > theirs[index]]
        losses = [index for index in order[::-1][: figures.NUM_EXAMPLES] if ours[index] < theirs[index]]

        def example(index: int) -> Example:
            position, positive = positions[index], self.gold.positive
            pair = self.work.pairs[position]
            label = pair.label if pair.score is None else f"{pair.score:g}"
            passage = ShownPassage(
                f"{pair.id}: {label}", pair.passage, positive is not None and bool(positive[position])
            )
            return Example(pair.id, pair.query, float(ours[index]), float(theirs[index]), (passage,), (), ())

        return tuple(map(example, wins)), tuple(map(example, losses))


def _at(system: ScoredSplits, positions: Positions) -> Floats:
    """A system's scores of the pairs at ``positions``, all of which it scored."""
    return system.scores[np.searchsorted(system.positions, positions)]


def _as_one_query(scores: Floats) -> dict[str, dict[str, float]]:
    """Pairs as the passages of a single query, so that they are compared with each other."""
    return {"": {str(position): value for position, value in enumerate(scores.tolist())}}
