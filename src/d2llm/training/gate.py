"""The verb ``gate``: tests whether the teacher beats the cosine on dev, before its labels are used."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, cast

import numpy as np

from d2llm.core.errors import DataFormatError
from d2llm.core.files import write_json
from d2llm.core.json_values import parse_json
from d2llm.core.manifest import package_versions
from d2llm.core.types import Task
from d2llm.data.beir import Dataset
from d2llm.data.pairs import PairDataset
from d2llm.evaluation.pool_scores import place_teacher
from d2llm.models.student import Student
from d2llm.models.teachers.cosine import CosineTeacher
from d2llm.models.teachers.ensemble import ensemble_queries
from d2llm.models.teachers.pair_teacher import PairTeacher, load_teacher
from d2llm.ops.gating import better
from d2llm.recipe import GateConfig, TeacherConfig
from d2llm.retrieval.reading import encoder_loads
from d2llm.runners.placement import HERE, Placement
from d2llm.runners.runner import LocalRunner, Runner
from d2llm.training.dev_sets import (
    PAIRS_PER_QUERY,
    DevSet,
    DevSetScores,
    Measured,
    Scores,
    dev_queries,
    make_dev_pairs,
    make_teacher_dev_set,
    score_dev_set,
)

GATE_FILE = "gate.json"
PRECHECK_QUERIES = 20
"""Number of dev queries per data set in a precheck."""
_KIND, _FORMAT_VERSION = "gate", 1


@dataclass(frozen=True, slots=True)
class GateRow:
    """Teacher and cosine on the same items of one data set, or of all sets with one task and measure; and the verdict.

    Items are queries, or pairs of a set of labelled pairs. ``difference`` is teacher minus cosine; ``p_value`` is
    two-sided, from the paired randomisation test over items. Over several sets, the measure is the mean over sets
    weighted by their numbers of items.
    """

    name: str
    task: Task
    measure: str
    num_items: int
    teacher: float
    cosine: float
    difference: float
    p_value: float
    is_open: bool


@dataclass(frozen=True, slots=True)
class GateReport:
    """The gates of one teacher (fingerprint) against one cosine (fingerprint).

    ``num_seen`` of the queries were used to fit the weights of the teacher, if it is an ensemble. ``num_truncated`` of
    the
    ``num_scored`` pairs scored now were truncated, ``num_undecided`` got no answer and count as log-odds 0;
    ``num_ungraded`` of all candidates have no grade and come last in both rankings.
    """

    teacher: str
    cosine: str
    settings: GateConfig
    sets: tuple[GateRow, ...]
    tasks: tuple[GateRow, ...]
    num_seen: int
    num_scored: int
    num_truncated: int
    num_undecided: int
    seconds: float
    num_ungraded: int = 0

    @property
    def closed(self) -> tuple[str, ...]:
        """The data sets on which the teacher is not better."""
        return tuple(row.name for row in self.sets if not row.is_open)

    def to_json(self) -> dict[str, Any]:
        """The report as JSON-serialisable values."""
        return asdict(self) | {"settings": self.settings.model_dump()}


@dataclass(frozen=True, slots=True)
class Precheck:
    """How an untuned teacher compares with the cosine on a few queries. It is not a verdict and is not recorded."""

    sets: tuple[GateRow, ...]
    num_scored: int
    seconds: float

    @property
    def difference(self) -> float:
        """The teacher's measure minus the cosine's, averaged over the data sets."""
        return fmean(row.difference for row in self.sets)


def gate(
    judged: Sequence[tuple[Dataset | PairDataset, Task]],
    folder: Path,
    *,
    teacher: TeacherConfig,
    student: Student,
    settings: GateConfig | None = None,
    seed: int = 0,
    device: str | None = None,
    dtype: str | None = None,
    runner: Runner | None = None,
    load_student: Callable[[], Student] | None = None,
) -> GateReport:
    """Let teacher and cosine score the same dev queries or pairs, and test the difference with a paired test.

    On a retrieval set, both rank the candidates of dev queries: the top of BM25 and of the student's vectors, as a
    search would find them. The measure is nDCG@10. Candidates without a grade of a graded teacher (it was not recorded,
    or the teacher gave none) come last in both rankings. On labelled pairs, both score a sample of the dev pairs. The
    measure depends on the labels: average precision (yes or no), accuracy over three classes, or Spearman's
    correlation. The test uses one value per pair (``evaluation.gold``): for AP, the fraction of pairs with the other
    label that it is ranked correctly against; for a correlation, how close its ranks by score and by grade are.
    Thresholds between classes are cross-fitted for both: fitted on one half of the sample and used on the other.

    The gate of a data set is open if the teacher has the higher measure, and a higher mean of these values with a
    p-value below ``settings.alpha``. With few items, a gate may stay closed that would open with more. The verdicts are
    written to ``gate.json`` in ``folder``, beside those of other teachers. Labels are kept in ``gate-labels``,
    so an interrupted call can continue.

    ``judged`` are data sets with a dev split, each with its task, ``folder`` is the run folder, and ``student`` the
    cosine to beat: untuned, or a tuned bi-encoder. ``seed``: of the sample and the test. A remote teacher is asked from
    here, whatever the ``runner``; ``load_student`` is how the workers of a cluster load ``student``.

    Raises:
        InputError: a data set has no dev queries or pairs, or too few pairs of a class to fit thresholds.
        DataFormatError: ``gate.json`` exists and is something else, or the labels of dev pairs cannot be measured.
        ModelError: the teacher cannot be loaded, or some of its log-odds are not numbers.
    """
    settings = settings or GateConfig()
    started = time.monotonic()
    earlier = _read_gates(folder / GATE_FILE)
    loads = {} if load_student is None else encoder_loads(student, load_student)
    with Placement(runner or LocalRunner(), device, loads).connected() as placement:
        load = partial(load_teacher, teacher, device=device, dtype=dtype)
        # A teacher that cannot be loaded fails before corpora are encoded.
        model, where = place_teacher(teacher, load, placement.runner, device=device)
        sets = [_sample(dataset, task, student, settings, seed, placement) for dataset, task in judged]
        by_cosine = _score(CosineTeacher(student), sets, "cosine", folder)
        by_teacher = _score(model, sets, "teacher", folder, where)
    paired = _measure_both(sets, by_cosine, by_teacher)
    pooled: dict[tuple[Task, str], list[_PairedMeasures]] = {}
    for one in paired:
        pooled.setdefault((one.dev.task, one.cosine.measure), []).append(one)
    fitted_on = ensemble_queries(teacher)
    report = GateReport(
        teacher=model.fingerprint,
        cosine=student.fingerprint,
        settings=settings,
        sets=tuple(_row(one.dev.name, [one], alpha=settings.alpha, seed=seed) for one in paired),
        tasks=tuple(_row(task, members, alpha=settings.alpha, seed=seed) for (task, _), members in pooled.items()),
        num_seen=sum(len(fitted_on.get(dev.name, frozenset()) & dev.queries.keys()) for dev in sets),
        num_scored=sum(dev_scores.num_new for dev_scores in by_teacher),
        num_truncated=sum(dev_scores.num_truncated for dev_scores in by_teacher),
        num_undecided=sum(dev_scores.num_undecided for dev_scores in by_teacher),
        seconds=time.monotonic() - started,
        num_ungraded=sum(
            int(flags.sum())
            for dev, dev_scores in zip(sets, by_teacher, strict=True)
            for flags in dev_scores.is_ungraded
            if dev.gold is None
        ),
    )
    head = {"kind": _KIND, "format_version": _FORMAT_VERSION, "packages": package_versions()}
    write_json(folder / GATE_FILE, head | {"gates": {**earlier, report.teacher: report.to_json()}})
    return report


def precheck(
    judged: Sequence[tuple[Dataset | PairDataset, Task]],
    folder: Path,
    *,
    teacher: TeacherConfig,
    student: Student,
    settings: GateConfig | None = None,
    seed: int = 0,
    device: str | None = None,
    dtype: str | None = None,
) -> Precheck:
    """Compare teacher and cosine on ``PRECHECK_QUERIES`` dev queries per data set, before hours are spent on tuning.

    Both rank BM25's candidates, so no corpus has to be encoded. ``gate.json`` is not changed; labels are kept with
    those of the gate. Arguments and errors are those of ``gate``.
    """
    started = time.monotonic()
    few = (settings or GateConfig()).model_copy(update={"queries": PRECHECK_QUERIES})
    sets = [_sample(dataset, task, None, few, seed) for dataset, task in judged]
    by_cosine = _score(CosineTeacher(student), sets, "cosine", folder)
    model = load_teacher(teacher, device=device, dtype=dtype)
    by_teacher = _score(model, sets, "untuned teacher", folder)
    return Precheck(
        sets=tuple(
            _row(one.dev.name, [one], alpha=few.alpha, seed=seed) for one in _measure_both(sets, by_cosine, by_teacher)
        ),
        num_scored=sum(dev_scores.num_new for dev_scores in by_teacher),
        seconds=time.monotonic() - started,
    )


def read_gate(folder: str | Path, teacher_fingerprint: str) -> dict[str, bool] | None:
    """Whether the gate of each data set is open for a teacher, by the data set's name; None before ``gate`` has run.

    Args:
        folder: the run folder.
        teacher_fingerprint: ``identify_teacher(config).fingerprint``.

    Raises:
        DataFormatError: ``gate.json`` exists and cannot be read.
    """
    report = _read_gates(Path(folder) / GATE_FILE).get(teacher_fingerprint)
    return None if report is None else {row["name"]: bool(row["is_open"]) for row in report["sets"]}


@dataclass(frozen=True, slots=True)
class _PairedMeasures:
    """What cosine and teacher reach on one data set."""

    dev: DevSet
    cosine: Measured
    teacher: Measured


def _score(
    teacher: PairTeacher, sets: Sequence[DevSet], name: str, folder: Path, placement: Placement = HERE
) -> list[DevSetScores]:
    store = folder / "gate-labels"
    return [score_dev_set(teacher, dev, name=name, store=store, placement=placement) for dev in sets]


def _measure_both(
    sets: Sequence[DevSet], by_cosine: Sequence[DevSetScores], by_teacher: Sequence[DevSetScores]
) -> list[_PairedMeasures]:
    return [
        _PairedMeasures(
            dev,
            dev.measure(_with_ungraded_last(dev, cosine.scores, teacher), cross_fit=True),
            dev.measure(_with_ungraded_last(dev, teacher.scores, teacher), cross_fit=True),
        )
        for dev, cosine, teacher in zip(sets, by_cosine, by_teacher, strict=True)
    ]


def _with_ungraded_last(dev: DevSet, scores: Scores, teacher: DevSetScores) -> Scores:
    """Scores of a set's candidates; candidates without a grade come last."""
    if dev.gold is not None:
        return scores
    return [
        np.where(is_ungraded, values.min(initial=0) - 1, values)  # a query may have no candidate
        for values, is_ungraded in zip(scores, teacher.is_ungraded, strict=True)
    ]


def _sample(
    dataset: Dataset | PairDataset,
    task: Task,
    student: Student | None,
    settings: GateConfig,
    seed: int,
    placement: Placement = HERE,
) -> DevSet:
    if isinstance(dataset, PairDataset):
        return make_dev_pairs(dataset, task, num_pairs=PAIRS_PER_QUERY * settings.queries, seed=seed)
    queries = dev_queries(dataset, num_queries=settings.queries, seed=seed)
    return make_teacher_dev_set(
        dataset, task, queries, student=student, depth=settings.depth, with_positives=False, placement=placement
    )


def _row(name: str, paired: Sequence[_PairedMeasures], *, alpha: float, seed: int) -> GateRow:
    """Compare both on one data set, or on the items of several with the same task and measure together."""
    items = [f"{one.dev.name}:{item}" for one in paired for item in one.dev.item_ids]
    cosines, teachers = [one.cosine for one in paired], [one.teacher for one in paired]
    by_cosine, by_teacher = (
        dict(zip(items, np.concatenate([result.by_item for result in measured]).tolist(), strict=True))
        for measured in (cosines, teachers)
    )
    test = better(by_cosine, by_teacher, alpha=alpha, seed=seed)
    sizes = [len(cosine.by_item) for cosine in cosines]
    cosine, teacher = (
        float(np.average([result.value for result in measured], weights=sizes)) for measured in (cosines, teachers)
    )
    return GateRow(
        name,
        paired[0].dev.task,
        cosines[0].measure,
        len(items),
        teacher,
        cosine,
        teacher - cosine,
        test.p_value,
        is_open=test.passed and teacher > cosine,
    )


def _read_gates(path: Path) -> dict[str, Any]:
    """The reports in a gate file, by the teacher's fingerprint; empty if there is no file."""
    if not path.is_file():
        return {}
    try:
        content: object = parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataFormatError(path, f"not valid JSON ({error}); delete it and run the gate again") from error
    record = cast("dict[str, Any]", content) if isinstance(content, dict) else {}
    if record.get("kind") != _KIND or record.get("format_version") != _FORMAT_VERSION:
        raise DataFormatError(path, "is not a gate file of this version of d2llm; delete it and run the gate again")
    return record["gates"]
