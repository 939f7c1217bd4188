"""Runs a student on tasks of mteb, and sums up what it scored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from d2llm.core.errors import InputError
from d2llm.core.extras import require
from d2llm.core.inputs import strings_of
from d2llm.core.names import did_you_mean
from d2llm.core.shipped import DEFAULT_STUDENT
from d2llm.core.table import Column, Table
from d2llm.integrations.mteb import load_mteb_model
from d2llm.integrations.mteb_data import parse_task, task_of_data
from d2llm.integrations.mteb_tasks import scores_with_interaction


@dataclass(frozen=True, slots=True)
class MtebRow:
    """One task: its name and type, mteb's main measure, its value, and the value by the student's own score.

    The two values differ in pair tasks alone (``mteb_tasks.scores_with_interaction``).
    """

    task: str
    type: str
    measure: str
    value: float
    by_own_score: float
    seconds: float


@dataclass(frozen=True, slots=True)
class MtebReport:
    """What a student scored on some tasks; ``results`` is the folder of mteb's files, ``revision`` its fingerprint."""

    student: str
    revision: str
    mteb: str
    results: str
    rows: tuple[MtebRow, ...]


def run_mteb(
    student: str | Path = DEFAULT_STUDENT,
    *,
    tasks: Sequence[str] | str = (),
    benchmark: str | None = None,
    out: str | Path,
    split: str = "test",
    language: str | None = None,
    symmetric: Sequence[str] | str = (),
    device: str | None = None,
) -> MtebReport:
    """Measure a student on tasks of mteb with its whole score; results are written to ``out`` as mteb writes them.

    An interrupted run goes on with the next task. Data sets on disk need no network.

    Args:
        student: a folder that ``d2llm distill`` wrote, or the name of a shipped student.
        tasks: names of mteb's tasks, data sets on disk, or ``KIND=FOLDER`` (``mteb_data.TaskKind``).
        benchmark: the name of a benchmark of mteb, all of whose tasks are added.
        out: the folder of the results.
        split: of data sets on disk, what is measured.
        language: of data sets on disk (``mteb_data.task_of_data``).
        symmetric: names of tasks whose queries look for texts that mean the same (``mteb_tasks.branch_of``).
        device: None means the best one available.

    Raises:
        MissingExtraError: mteb is not installed.
        ModelNotFoundError: there is no such student.
        InputError: no task is given, a name is unknown, or a data set cannot be downloaded.
        DataFormatError: a data set cannot be read.

    Example:
        >>> from d2llm.integrations.mteb_run import run_mteb
        >>> report = run_mteb("d2llm-minilm", tasks=["DATA"], split="dev", out="results")
        >>> report.rows[0].type
        'Retrieval'
    """
    mteb = require("mteb", extra="mteb", purpose="measuring by mteb")
    symmetric = strings_of(symmetric, "symmetric")
    chosen = [
        *_tasks(mteb, strings_of(tasks, "tasks"), split, language),
        *(_benchmark(mteb, benchmark) if benchmark else ()),
    ]
    if not chosen:
        raise InputError("no tasks: name tasks of mteb, data sets on disk, or a benchmark")
    names = [task.metadata.name for task in chosen]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"two of the tasks are called {name!r}, and mteb keeps results by name: rename one")
    unknown = [name for name in symmetric if name not in names]
    if unknown:
        raise InputError(f"{unknown[0]!r} is not among the tasks{did_you_mean(unknown[0], names)}")
    model = load_mteb_model(student, device=device, tasks=dict.fromkeys(symmetric, "symmetric"))
    try:
        results = mteb.evaluate(
            model,
            chosen,
            cache=mteb.ResultCache(Path(out)),
            co2_tracker=False,
            encode_kwargs={"show_progress_bar": False},
            show_progress_bar=False,
        )
    except ConnectionError as error:
        remedy = "mteb's own tasks are downloaded once: connect, or name data sets on disk"
        raise InputError(f"{error}; {remedy}") from error
    by_own_score = scores_with_interaction(results, chosen)
    described = {task.metadata.name: task.metadata for task in chosen}
    rows = [
        MtebRow(
            result.task_name,
            described[result.task_name].type,
            described[result.task_name].main_score,
            float(result.get_score()),
            by_own_score[result.task_name],
            float(result.evaluation_time or 0.0),
        )
        for result in results.task_results
    ]
    return MtebReport(str(student), model.mteb_model_meta.revision or "", version("mteb"), str(out), tuple(rows))


def mteb_table(report: MtebReport) -> Table:
    """One line for each task."""
    table = Table(
        "task",
        "type",
        "measure",
        Column("value", ".4f"),
        Column("by the student's score", ".4f"),
        Column("s", ".1f"),
        title=f"{report.student} on {len(report.rows)} tasks, by mteb {report.mteb}",
        caption=(
            "Value: mteb's main measure, as on its leaderboard. Of pairs it counts the cosine, or the best of five "
            "similarities; beside it is the same measure by the student's own score."
        ),
    )
    for row in report.rows:
        table.add_row(row.task, row.type, row.measure, row.value, row.by_own_score, row.seconds)
    return table


def _tasks(mteb: Any, names: Sequence[str], split: str, language: str | None) -> list[Any]:
    tasks: list[Any] = []
    for name in names:
        parsed = parse_task(name)
        if parsed is not None:
            kind, path = parsed
            tasks.append(task_of_data(path, kind=kind, split=split, language=language))
            continue
        try:
            tasks.append(mteb.get_task(name))
        except KeyError:
            known = [task.metadata.name for task in mteb.get_tasks()]
            raise InputError(
                f"{name!r} is neither a data set on disk nor a task of mteb{did_you_mean(name, known)}"
            ) from None
    return tasks


def _benchmark(mteb: Any, name: str) -> Sequence[Any]:
    try:
        return mteb.get_benchmark(name).tasks
    except KeyError:
        known = [benchmark.name for benchmark in mteb.get_benchmarks()]
        raise InputError(f"mteb has no benchmark {name!r}{did_you_mean(name, known)}") from None
