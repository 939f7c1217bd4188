"""The verb ``ensemble``: fits weights for several teachers on dev queries; a single teacher is only calibrated."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from d2llm.core.errors import InputError
from d2llm.core.files import check_replaceable
from d2llm.core.types import Task
from d2llm.data.beir import Dataset
from d2llm.data.run_folder import working_folder
from d2llm.evaluation.pool_scores import place_teacher
from d2llm.models.protocols import SearchStudent
from d2llm.models.teachers.ensemble import ENSEMBLE_KIND, EnsembleMember, write_ensemble
from d2llm.models.teachers.pair_teacher import load_teacher
from d2llm.ops.calibration import ReliabilityBin, expected_calibration_error, log_loss, reliability_bins
from d2llm.ops.ensemble import DEFAULT_L2, Ensemble, fit_ensemble, out_of_fold_log_odds
from d2llm.recipe import TeacherConfig
from d2llm.retrieval.reading import encoder_loads
from d2llm.runners.placement import Placement
from d2llm.runners.runner import LocalRunner, Runner
from d2llm.training.dev_sets import DevSet, DevSetScores, dev_queries, make_teacher_dev_set, score_dev_set

_MEASURES = ("nDCG@10", "MRR@10")
ENSEMBLE_NAME = "ensemble"


@dataclass(frozen=True, slots=True)
class CalibrationFigures:
    """How well log-odds are calibrated: mean log-loss in nats, expected calibration error, and its bins."""

    log_loss: float
    expected_error: float
    bins: tuple[ReliabilityBin, ...]


@dataclass(frozen=True, slots=True)
class EnsembleRow:
    """One member, or the ensemble, on the dev lists of one task.

    ``measures`` is data set -> measure -> value over its lists. ``before`` takes the member's raw score as log-odds
    (None for the ensemble); ``after`` is cross-fitted: each query is calibrated by a fit without it. ``weight`` is that
    of the standardised score (None for the ensemble).
    """

    name: str
    weight: float | None
    measures: Mapping[str, Mapping[str, float]]
    before: CalibrationFigures | None
    after: CalibrationFigures


@dataclass(frozen=True, slots=True)
class TaskReport:
    """The members and their ensemble in one task, and the numbers of queries, pairs and relevant pairs."""

    rows: tuple[EnsembleRow, ...]
    num_queries: Mapping[str, int]
    num_pairs: int
    num_positives: int
    temperature: float
    bias: float


@dataclass(frozen=True, slots=True)
class EnsembleReport:
    """The result of combining teachers. ``num_truncated`` of the ``num_scored`` pairs scored now were truncated."""

    folder: str
    fingerprint: str
    tasks: Mapping[Task, TaskReport]
    num_scored: int
    num_truncated: int


@dataclass(frozen=True, slots=True)
class _Pairs:
    """All pairs of one task: scores [pairs, members], labels [pairs], and "data set:query" of each pair."""

    dev_sets: tuple[DevSet, ...]
    scores: NDArray[np.float64]
    labels: NDArray[np.bool_]
    groups: tuple[str, ...]


def ensemble_teachers(
    judged: Sequence[tuple[Dataset, Task]],
    folder: Path,
    *,
    members: Sequence[TeacherConfig],
    student: SearchStudent,
    num_queries: int,
    depth: int,
    l2: float = DEFAULT_L2,
    num_folds: int = 5,
    seed: int = 0,
    device: str | None = None,
    dtype: str | None = None,
    runner: Runner | None = None,
    load_student: Callable[[], SearchStudent] | None = None,
) -> EnsembleReport:
    """Fit an ensemble to relevance on dev lists and write it to ``folder`` as a teacher of kind ``ensemble``.

    A query's list has its positives, and the first ``depth`` passages of BM25 and of ``student``. Labels are kept
    in ``<folder>.run`` beside the folder, so an interrupted call can continue. A calibrated log-odds gives the
    probability of relevance among such candidates, not among all passages.

    Each task of the ``judged`` data sets has its own weights, fitted over its sets: on ``num_queries`` dev queries of
    each, from the other end of the random order that ``gate`` uses. ``seed``: of this sample and of the folds of the
    reported results. Remote members are asked from here, whatever the ``runner``; ``load_student`` is how the workers
    of a cluster load ``student``.

    Raises:
        InputError: there are no members, no data sets or no dev queries, a member is given twice, ``folder`` holds
            something else, or no member's score increases with relevance.
        ModelError: a member cannot be loaded, or some of its log-odds are not numbers.
    """
    check_replaceable(folder, ENSEMBLE_KIND)
    if not members:
        raise InputError("an ensemble needs at least one member; name a teacher")
    if not judged:
        raise InputError("an ensemble is fitted on dev queries, but no retrieval set has any; add one")
    loads = {} if load_student is None else encoder_loads(student, load_student)
    names = _names(members)
    choose = partial(dev_queries, num_queries=num_queries, seed=seed, from_end=True)
    identified: list[EnsembleMember] = []
    by_member: list[dict[str, DevSetScores]] = []
    with Placement(runner or LocalRunner(), device, loads).connected() as placement:
        dev_sets = [
            make_teacher_dev_set(
                dataset, task, choose(dataset), student=student, depth=depth, with_positives=True, placement=placement
            )
            for dataset, task in judged
        ]
        for name, config in zip(names, members, strict=True):  # one after another, so that only one is in memory
            load = partial(load_teacher, config, device=device, dtype=dtype)
            teacher, where = place_teacher(config, load, placement.runner, device=device)
            if teacher.fingerprint in (part.fingerprint for part in identified):
                raise InputError(f"member '{name}' is the same teacher as another member; name each once")
            identified.append(EnsembleMember(config, teacher.fingerprint))
            store = working_folder(folder)
            by_member.append(
                {dev.name: score_dev_set(teacher, dev, name=name, store=store, placement=where) for dev in dev_sets}
            )
    tasks: dict[Task, TaskReport] = {}
    ensembles: dict[Task, Ensemble] = {}
    different: list[Task] = list(dict.fromkeys(task for _, task in judged))
    for task in different:
        pairs = _pairs_of(tuple(dev for dev in dev_sets if dev.task == task), by_member)
        ensembles[task] = fit_ensemble(pairs.scores, pairs.labels, l2=l2)
        tasks[task] = _report(pairs, names, ensembles[task], l2=l2, num_folds=num_folds, seed=seed)
    content = {
        "fitted_on": {dev.name: {"task": dev.task, "dev_queries": sorted(dev.queries)} for dev in dev_sets},
        "settings": {"depth": depth, "l2": l2, "num_folds": num_folds, "seed": seed, "student": student.fingerprint},
        "report": {task: asdict(report) for task, report in tasks.items()},
    }
    fingerprint = write_ensemble(folder, identified, ensembles, content)
    scores = [one for by_set in by_member for one in by_set.values()]
    num_scored, num_truncated = sum(one.num_new for one in scores), sum(one.num_truncated for one in scores)
    return EnsembleReport(str(folder), fingerprint, tasks, num_scored, num_truncated)


def _pairs_of(dev_sets: tuple[DevSet, ...], by_member: Sequence[Mapping[str, DevSetScores]]) -> _Pairs:
    """Pairs of dev sets; ``by_member`` has each member's scores by data set."""
    rows = [(dev, query, passage) for dev in dev_sets for query, ids in dev.candidates.items() for passage in ids]
    member_scores = [
        np.concatenate([values for dev in dev_sets for values in by_set[dev.name].scores]) for by_set in by_member
    ]
    labels = [dev.qrels[query].get(passage, 0) > 0 for dev, query, passage in rows]
    groups = tuple(f"{dev.name}:{query}" for dev, query, _ in rows)
    return _Pairs(dev_sets, np.stack(member_scores, axis=1).astype(np.float64), np.array(labels), groups)


def _report(
    pairs: _Pairs, names: Sequence[str], ensemble: Ensemble, *, l2: float, num_folds: int, seed: int
) -> TaskReport:
    def cross_fitted(scores: NDArray[np.float64]) -> NDArray[np.float64]:
        return out_of_fold_log_odds(scores, pairs.labels, pairs.groups, l2=l2, num_folds=num_folds, seed=seed)

    rows: list[EnsembleRow] = []
    for index, name in enumerate(names):
        member_scores = pairs.scores[:, index]
        after = cross_fitted(member_scores[:, None])
        rows.append(
            EnsembleRow(
                name,
                ensemble.weights[index],
                _measures(pairs, member_scores),
                _figures(member_scores, pairs.labels),
                _figures(after, pairs.labels),
            )
        )
    combined = cross_fitted(pairs.scores)
    rows.append(EnsembleRow(ENSEMBLE_NAME, None, _measures(pairs, combined), None, _figures(combined, pairs.labels)))
    return TaskReport(
        tuple(rows),
        {dev.name: len(dev.queries) for dev in pairs.dev_sets},
        len(pairs.labels),
        int(pairs.labels.sum()),
        ensemble.temperature,
        ensemble.bias,
    )


def _figures(log_odds: NDArray[np.float64], labels: NDArray[np.bool_]) -> CalibrationFigures:
    bins = reliability_bins(log_odds, labels)
    return CalibrationFigures(log_loss(log_odds, labels), expected_calibration_error(bins), tuple(bins))


def _measures(pairs: _Pairs, scores: NDArray[np.float64]) -> dict[str, dict[str, float]]:
    """Data set -> measure -> mean over the queries of its lists."""
    measures: dict[str, dict[str, float]] = {}
    start = 0
    for dev in pairs.dev_sets:
        ends = np.cumsum([len(ids) for ids in dev.candidates.values()])
        values = dev.per_query(np.split(scores[start : start + ends[-1]], ends[:-1]))
        measures[dev.name] = {measure: float(np.mean(list(values[measure].values()))) for measure in _MEASURES}
        start += int(ends[-1])
    return measures


def _names(members: Sequence[TeacherConfig]) -> list[str]:
    """Short, distinct names of the members: the last part of the path, or kind and full path if that is not unique."""
    short = [Path(member.model).name or member.model for member in members]
    return [
        name if short.count(name) == 1 else f"{member.kind}:{member.model}"
        for name, member in zip(short, members, strict=True)
    ]
