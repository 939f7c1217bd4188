"""The verb ``gate``: is the teacher better than the cosine it is to improve? Where it is not, say so."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from d2llm.core.errors import DataFormatError
from d2llm.core.files import write_json
from d2llm.core.manifest import package_versions
from d2llm.core.recipe import GateConfig, TeacherConfig
from d2llm.core.types import Task
from d2llm.data.beir import Dataset
from d2llm.data.pairs import PairDataset
from d2llm.evaluation.gold import Gold, NliGold, measure_all
from d2llm.evaluation.judging import PoolScores
from d2llm.models.student import Student
from d2llm.models.teachers.cosine import CosineTeacher
from d2llm.models.teachers.judge import Judge, load_judge
from d2llm.models.teachers.stacked import stacked_queries
from d2llm.ops.gating import better
from d2llm.ops.measures import per_query_measures
from d2llm.training.dev import PAIRS_PER_QUERY
from d2llm.training.dev_lists import DevLists, DevPairs, dev_queries, judge_dev, make_dev_lists, make_dev_pairs

GATE_FILE = "gate.json"
LOOK_QUERIES = 20
"""Dev queries of each data set that a first look takes."""
_KIND, _FORMAT_VERSION = "gate", 1
_MEASURE = "nDCG@10"


@dataclass(frozen=True, slots=True)
class GateRow:
    """One data set, or one task over its sets of one measure: the measure of both on the same items, and the verdict.

    Items are queries, or pairs of a set of labelled pairs. ``difference`` is teacher minus cosine, ``p_value``
    two-sided by the paired randomisation test over items. Over several sets the measure is their mean, each set with
    as much weight as it has items.
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

    ``num_seen`` of the queries had already fitted the teacher's weights (a stack's). ``num_truncated`` of the
    ``num_judged`` pairs judged now were cut.
    """

    teacher: str
    cosine: str
    settings: GateConfig
    sets: tuple[GateRow, ...]
    tasks: tuple[GateRow, ...]
    num_seen: int
    num_judged: int
    num_truncated: int
    seconds: float

    @property
    def closed(self) -> tuple[str, ...]:
        """The data sets on which the teacher is not better."""
        return tuple(row.name for row in self.sets if not row.is_open)

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self) | {"settings": self.settings.model_dump()}


@dataclass(frozen=True, slots=True)
class FirstLook:
    """How a teacher that is yet to be tuned does beside the cosine, on few queries: no verdict, and none is kept."""

    sets: tuple[GateRow, ...]
    num_judged: int
    seconds: float

    @property
    def difference(self) -> float:
        """Mean over the data sets of the teacher's measure minus the cosine's."""
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
    show_progress: bool | None = None,
) -> GateReport:
    """Let teacher and cosine score the same dev queries or pairs, and test the difference item by item.

    Of a retrieval set both rank the candidates of dev queries, the first of BM25 and of the student's vectors, as a
    search would find them; the measure is nDCG@10. Of labelled pairs both score a sample of the dev pairs; the measure
    is that of their kind: average precision (yes or no), accuracy of three classes, or Spearman's correlation. What is
    tested there is a value of each pair (``evaluation.gold``): for AP the share of pairs of the other label that it is
    on the right side of, for a correlation how near its places by score and by grade are. The thresholds between
    classes are fitted on one half of the sample and used on the other, in turn, for both alike.

    The gate of a data set is open where the teacher has the higher measure, and the higher mean of these values with a
    p-value below ``settings.alpha``; few items close a gate that more might open. The verdicts go to ``gate.json`` in
    ``folder``, beside those of other teachers; judgements are kept in ``gate-judgements``, so an interrupted call goes
    on where it stopped.

    Args:
        judged: data sets with a dev split, each with its task.
        folder: of the run.
        teacher: of any kind.
        student: the cosine to beat: untuned, or a tuned bi-encoder.
        settings: how many queries (ten times as many pairs), how deep, which level.
        seed: of the sample and the test.
        device: by default what this machine has.
        dtype: by default what is fast there.
        show_progress: None means: if standard error is a terminal.

    Raises:
        InputError: a data set has no dev queries or pairs, or its pairs too few of a class to fit thresholds.
        DataFormatError: ``gate.json`` is there and is something else, or the labels of dev pairs cannot be measured.
        ModelError: the teacher cannot be loaded, or gave log-odds that are no numbers.
    """
    settings = settings or GateConfig()
    started = time.monotonic()
    earlier = _read_gates(folder / GATE_FILE)
    sets = [_sample(dataset, task, student, settings, seed, show_progress) for dataset, task in judged]
    by_cosine = _ask(CosineTeacher(student), sets, "cosine", folder, show_progress)
    model = load_judge(teacher, device=device, dtype=dtype)
    by_teacher = _ask(model, sets, "teacher", folder, show_progress)
    tried = _tried(sets, by_cosine, by_teacher)
    pooled: dict[tuple[Task, str], list[_Tried]] = {}
    for one in tried:
        pooled.setdefault((one.task, one.cosine.measure), []).append(one)
    seen = stacked_queries(teacher)
    report = GateReport(
        teacher=model.fingerprint,
        cosine=student.fingerprint,
        settings=settings,
        sets=tuple(_row(one.name, [one], alpha=settings.alpha, seed=seed) for one in tried),
        tasks=tuple(_row(task, of, alpha=settings.alpha, seed=seed) for (task, _), of in pooled.items()),
        num_seen=sum(len(seen.get(of.name, frozenset()) & of.candidates.keys()) for of in sets),
        num_judged=sum(found.num_new for found in by_teacher),
        num_truncated=sum(found.num_truncated for found in by_teacher),
        seconds=time.monotonic() - started,
    )
    _write(folder / GATE_FILE, earlier, report)
    return report


def first_look(
    judged: Sequence[tuple[Dataset | PairDataset, Task]],
    folder: Path,
    *,
    teacher: TeacherConfig,
    student: Student,
    settings: GateConfig | None = None,
    seed: int = 0,
    device: str | None = None,
    dtype: str | None = None,
    show_progress: bool | None = None,
) -> FirstLook:
    """Teacher and cosine on ``LOOK_QUERIES`` dev queries of each data set, before hours go into tuning the teacher.

    Both rank BM25's candidates, so that no corpus has to be encoded. ``gate.json`` stays as it is; judgements are kept
    with the gate's. Arguments and errors are those of ``gate``.
    """
    started = time.monotonic()
    few = (settings or GateConfig()).model_copy(update={"queries": LOOK_QUERIES})
    sets = [_sample(dataset, task, None, few, seed, show_progress) for dataset, task in judged]
    by_cosine = _ask(CosineTeacher(student), sets, "cosine", folder, show_progress)
    by_teacher = _ask(load_judge(teacher, device=device, dtype=dtype), sets, "untuned teacher", folder, show_progress)
    tried = _tried(sets, by_cosine, by_teacher)
    return FirstLook(
        sets=tuple(_row(one.name, [one], alpha=few.alpha, seed=seed) for one in tried),
        num_judged=sum(found.num_new for found in by_teacher),
        seconds=time.monotonic() - started,
    )


def read_gate(folder: Path, teacher_fingerprint: str) -> dict[str, bool] | None:
    """Whether the gate of each data set is open for a teacher, by the data set's name; None where it was not tried.

    Args:
        folder: of the run.
        teacher_fingerprint: ``identify_judge(config).fingerprint``.

    Raises:
        DataFormatError: ``gate.json`` is there and cannot be read.
    """
    found = _read_gates(folder / GATE_FILE).get(teacher_fingerprint)
    return None if found is None else {row["name"]: bool(row["is_open"]) for row in found["sets"]}


@dataclass(frozen=True, slots=True)
class _Measured:
    """How a judge did on one data set: the value of its measure, and a value for each item by its id."""

    measure: str
    value: float
    of_items: dict[str, float]


@dataclass(frozen=True, slots=True)
class _Tried:
    """Both judges on one data set."""

    name: str
    task: Task
    cosine: _Measured
    teacher: _Measured


def _ask(
    judge: Judge, sets: Sequence[DevLists | DevPairs], name: str, folder: Path, show: bool | None
) -> list[PoolScores]:
    store = folder / "gate-judgements"
    return [judge_dev(judge, of, name=name, store=store, show_progress=show) for of in sets]


def _tried(
    sets: Sequence[DevLists | DevPairs], by_cosine: Sequence[PoolScores], by_teacher: Sequence[PoolScores]
) -> list[_Tried]:
    return [
        _Tried(of.name, of.task, _measure(of, cosine.scores), _measure(of, taught.scores))
        for of, cosine, taught in zip(sets, by_cosine, by_teacher, strict=True)
    ]


def _sample(
    dataset: Dataset | PairDataset,
    task: Task,
    student: Student | None,
    settings: GateConfig,
    seed: int,
    show: bool | None,
) -> DevLists | DevPairs:
    if isinstance(dataset, PairDataset):
        return make_dev_pairs(dataset, task, num_pairs=PAIRS_PER_QUERY * settings.queries, seed=seed)
    queries = dev_queries(dataset, num_queries=settings.queries, seed=seed)
    return make_dev_lists(
        dataset, task, queries, student=student, depth=settings.depth, with_positives=False, show_progress=show
    )


def _measure(of: DevLists | DevPairs, scores: Mapping[str, Mapping[str, float]]) -> _Measured:
    if isinstance(of, DevLists):
        of_queries = per_query_measures(of.ranked(scores), of.qrels)[_MEASURE]
        return _Measured(_MEASURE, fmean(of_queries.values()), of_queries)
    value, values = _measure_pairs(of.gold, of.of_pairs(scores))
    of_items = dict(zip((pair.id for pair in of.pairs), values.tolist(), strict=True))
    return _Measured(of.gold.main_measure, value, of_items)


def _measure_pairs(gold: Gold, scores: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
    """The main measure of the scores [n] of pairs, and a value of each pair [n]."""
    if not isinstance(gold, NliGold):  # AP and correlations need no threshold
        everything = np.arange(len(scores))
        found = measure_all(gold, scores, everything, None)[gold.main_measure]
        return found, gold.of_items(scores, everything, None)
    by_class = np.argsort(gold.classes, kind="stable")  # so that both halves have pairs of each class
    halves = by_class[::2], by_class[1::2]
    values = np.empty(len(scores))
    for here, other in (halves, halves[::-1]):
        values[here] = gold.of_items(scores[here], here, gold.fit(scores[other], other))
    return float(values.mean()), values


def _row(name: str, tried: Sequence[_Tried], *, alpha: float, seed: int) -> GateRow:
    """One data set, or several of one task and measure: all their items together, each named with its set."""
    of_cosine = {f"{one.name}:{item}": value for one in tried for item, value in one.cosine.of_items.items()}
    of_teacher = {f"{one.name}:{item}": value for one in tried for item, value in one.teacher.of_items.items()}
    test = better(of_cosine, of_teacher, alpha=alpha, seed=seed)
    sizes = [len(one.cosine.of_items) for one in tried]
    cosine = float(np.average([one.cosine.value for one in tried], weights=sizes))
    teacher = float(np.average([one.teacher.value for one in tried], weights=sizes))
    return GateRow(
        name,
        tried[0].task,
        tried[0].cosine.measure,
        len(of_cosine),
        teacher,
        cosine,
        teacher - cosine,
        test.p_value,
        is_open=test.passed and teacher > cosine,
    )


def _read_gates(path: Path) -> dict[str, Any]:
    """The reports in a gate file by the teacher's fingerprint; none where there is no file."""
    if not path.is_file():
        return {}
    try:
        content: object = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataFormatError(path, f"not valid JSON ({error}); delete it and run the gate again") from error
    record = cast("dict[str, Any]", content) if isinstance(content, dict) else {}
    if record.get("kind") != _KIND or record.get("format_version") != _FORMAT_VERSION:
        raise DataFormatError(path, "is not what this d2llm's gate writes; delete it and run the gate again")
    return record["gates"]


def _write(path: Path, earlier: Mapping[str, Any], report: GateReport) -> None:
    head = {"kind": _KIND, "format_version": _FORMAT_VERSION, "packages": package_versions()}
    write_json(path, head | {"gates": {**earlier, report.teacher: report.to_json()}})
