"""What ``stack``, ``gate`` and ``distill`` found, as tables for a terminal and as sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any, cast

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from d2llm.core.recipe import TrainingConfig
from d2llm.core.types import Task
from d2llm.pipeline.distill import DistillReport
from d2llm.pipeline.gate import FirstLook, GateReport, GateRow
from d2llm.pipeline.label import LabelReport
from d2llm.pipeline.stack_teachers import StackReport, StackRow, TaskReport
from d2llm.pipeline.tune_teacher import TeacherTuningReport

_ABSENT = "–"
_HARDLY = 0.002  # a change of the dev measure that says nothing
_FEW = 50


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


def look_sentence(found: FirstLook) -> str:
    """How an untuned teacher does, and what that asks of its tuning."""
    sets = ", ".join(f"{row.name} {row.measure} {row.teacher:.3f} against {row.cosine:.3f}" for row in found.sets)
    if found.difference >= 0:
        return f"first-look: untuned, the teacher is as good as the cosine or better: {sets}"
    return (
        f"first-look: untuned, the teacher is behind the cosine by {-found.difference:.3f} on average ({sets}). Its "
        "tuning has to make up for that, or the gate will close and its labels count for nothing; if you doubt it, "
        "stop now and name a better teacher"
    )


def verdict_words(gates: Mapping[str, bool]) -> str:
    """For which data sets the gate is open, and for which it is closed."""
    by_verdict = {
        word: [name for name, is_open in gates.items() if is_open == (word == "open")] for word in ("open", "closed")
    }
    return "; ".join(f"{word} for {', '.join(names)}" for word, names in by_verdict.items() if names)


def label_words(report: LabelReport) -> str:
    """What was labelled now, and what had been before."""
    if not report.pairs:
        return f"all {report.finished_pairs:,} pairs of {report.finished_queries:,} queries were labelled before"
    before = f"; {report.finished_pairs:,} pairs were labelled before" if report.finished_pairs else ""
    return f"{report.pairs:,} pairs of {report.queries:,} queries labelled{before}"


def run_table(results: Mapping[str, Any]) -> Table:
    """What each step of a run did, or why it did nothing."""
    table = Table(title=Text("The run, step by step"), title_justify="left")
    table.add_column("step", no_wrap=True)
    table.add_column("what came of it", overflow="fold")
    for step, result in results.items():
        table.add_row(Text(step), Text(_step_words(step, result)))
    return table


def _step_words(step: str, result: Any) -> str:
    if isinstance(result, dict):
        parts = cast("dict[str, Any]", result)
        if "skipped" in parts:
            return str(parts["skipped"]).removeprefix(f"{step}: ")
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


def _plan_words(step: str, name: str, counts: Mapping[str, Any]) -> str:
    if "skipped" in counts:
        return "mined before" if step == "mine" else str(counts["skipped"]).removeprefix(f"{step}: {name}: ")
    queries = f"{counts['num_entries']:,} queries"
    if step == "mine":
        return queries
    return f"{queries}, {counts['num_dropped']['teacher_margin']:,} passages dropped by the teacher's margin"


def student_words(report: DistillReport) -> str:
    """What a distillation gave: steps, dev, and whether its scores can be read as probabilities."""
    dev = [
        f"{name} {found['start']:.3f} -> {found['kept']:.3f} ({found['num_items']:,} questions or pairs)"
        for name, found in report.dev.items()
    ]
    words = f"{evidence_words(report.evidence)}; " if report.evidence else ""
    return (
        f"{report.steps:,} steps, best at {report.best_step:,}; dev: {', '.join(dev)}; {words}probabilities: "
        f"{probability_words(report.probabilities)}; in {report.folder}"
    )


def evidence_words(fitted: Mapping[Task, Mapping[str, Any]]) -> str:
    """What the evidence of words is worth on dev, and where it is left out."""
    parts: list[str] = []
    for task, found in fitted.items():
        worth = ", ".join(f"{name} {own:.3f} -> {fused:.3f}" for name, (own, fused) in found["dev"].items())
        is_used = any(found["weights"].values())
        parts.append(f"words in the {task} score: {worth}{'' if is_used else ' (no better, so they are left out)'}")
    return "; ".join(parts)


def probability_words(fitted: Mapping[Task, Mapping[str, Any]]) -> str:
    """How far the probabilities of each task can be believed."""
    return (
        ", ".join(
            f"{task} (expected calibration error {found['error_before']:.3f} before, {found['error_after']:.3f} after)"
            for task, found in fitted.items()
        )
        or "too few dev queries"
    )


def gate_advice(report: GateReport) -> str:
    """Which gates closed, and what the recipe makes of it."""
    parts: list[str] = []
    if report.num_seen:
        parts.append(f"{report.num_seen} of the queries have fitted the stack's weights, so its figures flatter it.")
    if report.num_truncated:
        parts.append(f"{report.num_truncated:,} pairs were cut to the teacher's length limit.")
    if not report.closed:
        return " ".join(["gate: open for every data set: the teacher is significantly better than the cosine.", *parts])
    closed = ", ".join(report.closed)
    parts.insert(0, f"gate: closed for {closed}: the teacher is not significantly better than the cosine there.")
    consequence = {
        "labels": "The recipe's when_closed is 'labels': learn there from the data set's own judgements.",
        "teacher": "The recipe's when_closed is 'teacher': it teaches all the same.",
        "stop": "The recipe's when_closed is 'stop'. Tune the teacher further, stack it with the cosine, or raise "
        "queries in [gate] if the difference is small.",
    }
    return " ".join([*parts, consequence[report.settings.when_closed]])


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


def untrained_advice(report: DistillReport, training: TrainingConfig) -> str:
    """What a distillation that learnt nothing should be told: what dev said, and what to turn."""
    starts, ends = ([found[key] for found in report.dev.values()] for key in ("start", "last"))
    seen = ", ".join(f"{name} {found['start']:.4f} -> {found['last']:.4f}" for name, found in report.dev.items())
    change = fmean(ends) - fmean(starts)
    worse = [name for name, found in report.dev.items() if found["last"] < found["start"]]
    if change < -_HARDLY:
        advice = (
            f"Training made it worse: lower training.learning_rate ({training.learning_rate:g} now) to a third, and "
            "see whether the training questions are of the same kind as those of dev"
        )
    elif change > _HARDLY:
        advice = (
            f"The mean rose, but {', '.join(worse) or 'a data set'} lost more than chance explains, and such a state "
            "is not kept: lower training.learning_rate, or keep less of the change (training.interpolation)"
        )
    else:
        advice = (
            f"It hardly moved in {report.steps:,} steps: raise training.learning_rate ({training.learning_rate:g} now) "
            "threefold, or training.epochs"
        )
    few = [f"{name} {found['num_items']}" for name, found in report.dev.items() if found["num_items"] < _FEW]
    if few:
        advice += f". Few dev questions see no small gain ({', '.join(few)}): better {2 * _FEW} or more"
    return (
        "nothing was learnt: no state of the run was better on dev than the start, so what is written is the student "
        f"before training (dev, start -> last look: {seen}). {advice}. Then --again"
    )
