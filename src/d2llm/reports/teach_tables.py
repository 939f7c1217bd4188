"""What the steps of a run, ``stack`` and ``gate`` found, as tables for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from d2llm.training.distill import DistillReport
from d2llm.training.gate import FirstLook, GateReport, GateRow
from d2llm.training.label import LabelReport
from d2llm.training.run import Skipped
from d2llm.training.sentences import label_words, look_sentence, student_words, verdict_words
from d2llm.training.stack_teachers import StackReport, StackRow, TaskReport
from d2llm.training.tune_teacher import TeacherTuningReport

_ABSENT = "–"


def gate_table(report: GateReport) -> Table:
    """Teacher and cosine for each data set, and for each task over its sets of one measure."""
    table = Table(title=Text("Teacher against cosine on dev queries and pairs"), title_justify="left")
    table.add_column("")
    table.add_column("measure")
    for heading in ("tried on", "teacher", "cosine", "difference", "p", "gate"):
        table.add_column(heading, justify="right")
    for row in report.sets:
        table.add_row(*_gate_cells(row))
    table.add_section()
    for row in report.tasks:
        table.add_row(*_gate_cells(row))
    return table


def run_table(results: Mapping[str, Any]) -> Table:
    """What each step of a run did, or why it did nothing."""
    table = Table(title=Text("The run, step by step"), title_justify="left")
    table.add_column("step", no_wrap=True)
    table.add_column("what came of it", overflow="fold")
    for step, result in results.items():
        table.add_row(Text(step), Text(_step_words(step, result)))
    return table


def _step_words(step: str, result: Any) -> str:
    if isinstance(result, Skipped):
        return result.skipped.removeprefix(f"{step}: ")
    if isinstance(result, dict):
        parts = cast("dict[str, Any]", result)
        return "; ".join(f"{name}: {_plan_words(step, name, counts)}" for name, counts in parts.items())
    if isinstance(result, FirstLook):
        return look_sentence(result).removeprefix("first-look: ")
    if isinstance(result, TeacherTuningReport):
        return f"{result.pairs:,} pairs, final loss {result.loss:.3f}, in {result.folder}"
    if isinstance(result, StackReport):
        return f"one teacher of several, in {result.folder}"
    if isinstance(result, GateReport):
        return verdict_words({row.name: row.is_open for row in result.sets})
    if isinstance(result, LabelReport):
        return label_words(result)
    return student_words(cast(DistillReport, result))


def _plan_words(step: str, name: str, counts: Mapping[str, Any] | Skipped) -> str:
    if isinstance(counts, Skipped):
        return "mined before" if step == "mine" else counts.skipped.removeprefix(f"{step}: {name}: ")
    queries = f"{counts['num_entries']:,} queries"
    if step == "mine":
        return queries
    return f"{queries}, {counts['num_dropped']['teacher_margin']:,} passages dropped by the teacher's margin"


def stack_tables(report: StackReport) -> list[RenderableType]:
    """One table for each task: weights, ranking, and calibration before and after."""
    parts: list[RenderableType] = [stack_table(task, found) for task, found in report.tasks.items()]
    remark = (
        "nDCG and MRR over lists that hold all positives. ECE: expected calibration error. Before: the score taken as "
        "log-odds; after: calibrated, each query by a fit without it."
    )
    cut = f" {report.num_truncated:,} of {report.num_judged:,} pairs judged now were cut." * bool(report.num_truncated)
    return [*parts, Text(remark + cut)]


def stack_table(task: str, found: TaskReport) -> Table:
    """The members and their stack in one task."""
    table = Table(title=Text(stack_title(task, found)), title_justify="left")
    table.add_column("")
    for heading in stack_headings(found)[1:]:
        table.add_column(heading, justify="right")
    for row in found.rows:
        table.add_row(*map(Text, stack_cells(row)))
    return table


def stack_title(task: str, found: TaskReport) -> str:
    """What a task's figures were measured on."""
    queries = ", ".join(f"{count:,} of {name}" for name, count in found.num_queries.items())
    return f"{task}: {found.num_pairs:,} pairs, {found.num_positives:,} relevant; dev queries: {queries}"


def stack_headings(found: TaskReport) -> Sequence[str]:
    """Headings of a task's table."""
    measured = [f"{name} {measure}" for name, values in found.rows[0].measures.items() for measure in values]
    return ["teacher", "weight", *measured, "log-loss before", "after", "ECE before", "after"]


def stack_cells(row: StackRow) -> list[str]:
    """One row of it."""
    measured = [f"{value:.4f}" for values in row.measures.values() for value in values.values()]
    before = row.before
    return [
        row.name,
        _ABSENT if row.weight is None else f"{row.weight:.3f}",
        *measured,
        _ABSENT if before is None else f"{before.log_loss:.4f}",
        f"{row.after.log_loss:.4f}",
        _ABSENT if before is None else f"{before.expected_error:.4f}",
        f"{row.after.expected_error:.4f}",
    ]


def _gate_cells(row: GateRow) -> list[Text]:
    figures = [row.measure, f"{row.num_items:,}", f"{row.teacher:.4f}", f"{row.cosine:.4f}", f"{row.difference:+.4f}"]
    verdict = "open" if row.is_open else "closed"
    return [Text(cell) for cell in (row.name, *figures, f"{row.p_value:.4f}", verdict)]
