"""The verb ``gate``: does the teacher rank better than the cosine it is to improve? Where it does not, say so."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from d2llm.core.errors import DataFormatError
from d2llm.core.files import write_json
from d2llm.core.manifest import package_versions
from d2llm.core.recipe import GateConfig, TeacherConfig
from d2llm.core.types import Task
from d2llm.data.beir import Dataset
from d2llm.models.cosine_teacher import CosineTeacher
from d2llm.models.judge import load_judge
from d2llm.models.stacked_teacher import stacked_queries
from d2llm.models.student import Student
from d2llm.ops.gating import GateTest, better
from d2llm.ops.measures import per_query_measures
from d2llm.pipeline.dev_lists import DevLists, dev_queries, make_dev_lists
from d2llm.pipeline.evaluation.judging import Judged, judge_pool
from d2llm.pipeline.protocols import PairJudge

GATE_FILE = "gate.json"
_KIND, _FORMAT_VERSION = "gate", 1
_MEASURE = "nDCG@10"


@dataclass(frozen=True, slots=True)
class GateRow:
    """One data set, or one task over its sets: mean nDCG@10 of both over the same lists, and the verdict.

    ``difference`` is teacher minus cosine, ``p_value`` two-sided by the paired randomisation test.
    """

    name: str
    task: Task
    num_queries: int
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
    measure: str
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


def gate(
    judged: Sequence[tuple[Dataset, Task]],
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
    """Let teacher and cosine rank the same candidates of dev queries, and test the difference query by query.

    Candidates are the first of BM25 and of the student's vectors, as a search would find them. The gate of a data set
    is open where the teacher has the higher nDCG@10 with a p-value below ``settings.alpha``; few queries close a gate
    that more might open. The verdicts go to ``gate.json`` in ``folder``, beside those of other teachers; judgements are
    kept in ``gate-judgements``, so an interrupted call goes on where it stopped.

    Args:
        judged: data sets with dev judgements, each with its task.
        folder: of the run.
        teacher: of any kind.
        student: the cosine to beat: untuned, or a tuned bi-encoder.
        settings: how many queries, how deep, which level.
        seed: of the sample and the test.
        device: by default what this machine has.
        dtype: by default what is fast there.
        show_progress: None means: if standard error is a terminal.

    Raises:
        InputError: a data set has no dev queries.
        DataFormatError: ``gate.json`` is there and is something else.
        ModelError: the teacher cannot be loaded, or gave log-odds that are no numbers.
    """
    settings = settings or GateConfig()
    started = time.monotonic()
    earlier = _read_gates(folder / GATE_FILE)
    lists = [
        make_dev_lists(
            dataset,
            task,
            dev_queries(dataset, num_queries=settings.queries, seed=seed),
            student=student,
            depth=settings.depth,
            with_positives=False,
            show_progress=show_progress,
        )
        for dataset, task in judged
    ]
    trial = _Trial(folder / "gate-judgements", show_progress)
    by_cosine = trial.measure(CosineTeacher(student), lists, "cosine")
    trial.num_judged = trial.num_truncated = 0  # of the teacher alone
    model = load_judge(teacher, device=device, dtype=dtype)
    by_teacher = trial.measure(model, lists, "teacher")
    sets = [
        _row(of.name, of.task, better(cosine, taught, alpha=settings.alpha, seed=seed))
        for of, cosine, taught in zip(lists, by_cosine, by_teacher, strict=True)
    ]
    tasks: list[Task] = list(dict.fromkeys(of.task for of in lists))
    over_tasks = [
        _row(task, task, _over_task(task, lists, by_cosine, by_teacher, alpha=settings.alpha, seed=seed))
        for task in tasks
    ]
    seen = stacked_queries(teacher)
    report = GateReport(
        teacher=model.fingerprint,
        cosine=student.fingerprint,
        measure=_MEASURE,
        settings=settings,
        sets=tuple(sets),
        tasks=tuple(over_tasks),
        num_seen=sum(len(seen.get(of.name, frozenset()) & of.candidates.keys()) for of in lists),
        num_judged=trial.num_judged,
        num_truncated=trial.num_truncated,
        seconds=time.monotonic() - started,
    )
    _write(folder / GATE_FILE, earlier, report)
    return report


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


class _Trial:
    """Asks judges about the lists and measures what comes of it."""

    def __init__(self, store: Path, show_progress: bool | None) -> None:
        self._store, self._show = store, show_progress
        self.num_judged = self.num_truncated = 0

    def measure(self, judge: PairJudge, lists: Sequence[DevLists], name: str) -> list[dict[str, float]]:
        """nDCG@10 by query id, for each of the lists."""
        return [self._measure_one(judge, of, name) for of in lists]

    def _measure_one(self, judge: PairJudge, of: DevLists, name: str) -> dict[str, float]:
        found: Judged = judge_pool(
            judge,
            of.candidates,
            of.query_texts,
            of.passage_texts,
            of.task,
            dataset=of.name,
            store=self._store,
            title=f"{name} on {of.name}",
            show_progress=self._show,
        )
        self.num_judged += found.num_new
        self.num_truncated += found.num_truncated
        return per_query_measures(of.ranked(found.scores), of.qrels)[_MEASURE]


def _over_task(
    task: Task,
    lists: Sequence[DevLists],
    by_cosine: Sequence[Mapping[str, float]],
    by_teacher: Sequence[Mapping[str, float]],
    *,
    alpha: float,
    seed: int,
) -> GateTest:
    """The queries of all sets of a task together, each named with its set."""
    of_task = [place for place, of in enumerate(lists) if of.task == task]

    def joined(values: Sequence[Mapping[str, float]]) -> dict[str, float]:
        return {f"{lists[place].name}:{query}": v for place in of_task for query, v in values[place].items()}

    return better(joined(by_cosine), joined(by_teacher), alpha=alpha, seed=seed)


def _row(name: str, task: Task, test: GateTest) -> GateRow:
    return GateRow(
        name, task, test.num_queries, test.second, test.first, test.difference, test.p_value, is_open=test.passed
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
