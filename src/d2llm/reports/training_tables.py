"""Results of data sets, labels and training as tables, and the documents of some."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

from rich.console import RenderableType
from rich.text import Text

from d2llm.core.document import Document, Figures, Note, Section
from d2llm.core.names import counted
from d2llm.core.table import Column, Table
from d2llm.data.check import DataReport, Lengths, SplitCounts
from d2llm.data.label_sets import LabelCounts
from d2llm.evaluation.report import Calibration
from d2llm.reports.html import charts
from d2llm.training.alternate import Round
from d2llm.training.distill import DistillReport
from d2llm.training.ensemble_teachers import EnsembleReport, TaskReport
from d2llm.training.gate import GateReport, Precheck
from d2llm.training.label import LabelReport
from d2llm.training.open_run import Skipped
from d2llm.training.sentences import describe_distillation, describe_gates, describe_labels, describe_precheck
from d2llm.training.tune_teacher import TeacherTuningReport

_BAR_WIDTH = 24
_NUM_LANGUAGES = 6


def data_tables(report: DataReport) -> Iterator[Table]:
    """All tables of a report; empty ones are left out."""
    yield _split_table(report)
    for table in (_leak_table(report), _shared_table(report), _repeats_table(report)):
        if table.rows:
            yield table
    yield from (_length_table(lengths) for lengths in report.lengths)
    if report.languages:
        yield _language_table(report)


def _split_table(report: DataReport) -> Table:
    items = "judgements" if report.kind == "retrieval" else "pairs"
    values = {"retrieval": "by grade", "scores": "min / mean / max"}.get(report.kind, "by class")
    counts = f"{counted(report.num_queries, 'query')}, {counted(report.num_passages, 'passage')}"
    table = Table(
        "split",
        Column("queries", ","),
        Column("passages", ","),
        Column(items, ","),
        values,
        title=f"{report.name} ({report.kind}): {counts}",
    )
    for split in report.splits:
        table.add_row(split.name, split.num_queries, split.num_passages, split.num_items, _values(split))
    return table


def _values(split: SplitCounts) -> str:
    if split.score_range:
        return " / ".join(f"{score:.3g}" for score in split.score_range)
    return ", ".join(f"{value}: {count:,}" for value, count in split.values.items())


def _leak_table(report: DataReport) -> Table:
    table = Table("splits", Column("count", ","), "kind", "first few", title="Leaks between splits")
    for leak in report.leaks:
        examples = ", ".join(" = ".join(ids) for ids in leak.examples)
        table.add_row(f"{leak.first} / {leak.second}", leak.count, leak.kind, examples)
    return table


def _shared_table(report: DataReport) -> Table:
    title = "Relevant passages that splits share (usual where one corpus serves all)"
    table = Table("splits", Column("count", ","), Column("fraction", ".1%"), title=title)
    for shared in report.shared_positives:
        table.add_row(f"{shared.first} / {shared.second}", shared.count, shared.count / shared.total)
    return table


def _repeats_table(report: DataReport) -> Table:
    table = Table("what", Column("count", ","), "first few", title="Repeated texts (letters and digits compared)")
    for repeats in report.repeats:
        table.add_row(repeats.label, repeats.count, ", ".join(repeats.examples))
    return table


def _length_table(lengths: Lengths) -> Table:
    texts = "all" if lengths.num_texts == lengths.num_all else f"a sample of {lengths.num_texts:,} of"
    table = Table(
        "tokens",
        Column("fraction", ".1%"),
        "",
        title=f"Tokens of {texts} {lengths.num_all:,} {lengths.label}; {lengths.fraction_over:.2%} are over "
        f"{lengths.limit}",
        caption="percentiles: " + ", ".join(f"{p}%: {length:,}" for p, length in lengths.percentiles.items()),
    )
    highest = max(fraction for _, fraction in lengths.bars)
    for bound, fraction in lengths.bars:
        name = f"to {bound:,}" if bound is not None else f"over {lengths.limit:,}"
        table.add_row(name, fraction, "█" * round(_BAR_WIDTH * fraction / highest))
    return table


def _language_table(report: DataReport) -> Table:
    title = "Languages detected in a sample (a guess, often wrong for short texts)"
    table = Table("texts", Column("sampled", ","), "languages", title=title)
    for languages in report.languages:
        fractions = [f"{name} {count / languages.num_texts:.1%}" for name, count in languages.counts.items()]
        rest = len(fractions) - _NUM_LANGUAGES
        first = fractions[:_NUM_LANGUAGES] + ([f"{rest} more"] if rest > 0 else [])
        table.add_row(languages.label, languages.num_texts, ", ".join(first))
    return table


def label_table(counts: LabelCounts) -> Table:
    """The label sets of a store."""
    numbers = ("queries", "pairs", "repeated", "with features")
    table = Table(
        "data set",
        "teacher",
        "prompt",
        *(Column(name, ",") for name in numbers),
        Column("yes", ".1%"),
        Column("log-odds", ".2f"),
        Column("spread", ".2f"),
        title=f"{counts.store}: {counted(counts.num_shards, 'shard')}, {counts.num_bytes / 2**20:,.1f} MiB",
        caption="repeated: pairs labelled more than once, of which the last label counts; with features: queries with "
        "cosines between the teacher's features; yes: fraction with log-odds above 0; spread: standard deviation",
    )
    for one in counts.sets:
        table.add_row(
            *(one.dataset, one.teacher, one.prompt, one.num_queries, one.num_pairs, one.num_repeated, one.num_grams),
            *(one.fraction_yes, one.mean, one.spread),
        )
    return table


_STACK_CAPTION = (
    "Lists contain all positives and the top of BM25 and of the cosine. Before: the score taken as log-odds. After: "
    "calibrated, each query by a fit without it. ECE: expected calibration error, over ten bins."
)


def run_table(results: Mapping[str, Any]) -> Table:
    """What each step of a run did, or why it was skipped."""
    table = Table("step", "result", title="The run, step by step")
    for step, result in results.items():
        table.add_row(step, _step_words(step, result))
    return table


def _step_words(step: str, result: Any) -> str:
    if isinstance(result, Skipped):
        return result.skipped.removeprefix(f"{step}: ")
    if isinstance(result, dict):
        plans = cast("dict[str, Any]", result)
        return "; ".join(f"{name}: {_plan_words(step, name, counts)}" for name, counts in plans.items())
    if isinstance(result, Precheck):
        return describe_precheck(result).removeprefix("precheck: ")
    if isinstance(result, TeacherTuningReport):
        return f"{counted(result.pairs, 'pair')}, final loss {result.loss:.3f}, in {result.folder}"
    if isinstance(result, EnsembleReport):
        return f"one teacher of several, in {result.folder}"
    if isinstance(result, GateReport):
        return describe_gates({row.name: row.is_open for row in result.sets})
    if isinstance(result, LabelReport):
        return describe_labels(result)
    return describe_distillation(cast(DistillReport, result))


def _plan_words(step: str, name: str, counts: Mapping[str, Any] | Skipped) -> str:
    if isinstance(counts, Skipped):
        return "mined before" if step == "mine" else counts.skipped.removeprefix(f"{step}: {name}: ")
    queries = counted(counts["num_entries"], "query")
    if step == "mine":
        return queries
    return f"{queries}, {counted(counts['num_dropped']['teacher_margin'], 'passage')} dropped by the teacher's margin"


def rounds_table(rounds: Sequence[Round]) -> Table:
    """The dev measure of each round's student, before and after the round."""
    table = Table("round", "data", Column("before", ".4f"), Column("after", ".4f"), "student", title="Round by round")
    for finished in rounds:
        for name, dev in finished.dev.items():
            table.add_row(str(finished.number), name, dev["start"], dev["kept"], finished.student)
    return table


def gate_table(report: GateReport) -> Table:
    """Teacher and cosine for each data set, and for each task over its sets of one measure."""
    table = Table(
        "data",
        "measure",
        Column("tried on", ","),
        Column("teacher", ".4f"),
        Column("cosine", ".4f"),
        Column("difference", "+.4f"),
        Column("p", ".4f"),
        Column("gate"),
        title="Teacher against cosine on dev queries and pairs",
    )
    for rows in (report.sets, report.tasks):
        table.add_section()
        for row in rows:
            verdict = "open" if row.is_open else "closed"
            figures = (row.num_items, row.teacher, row.cosine, row.difference, row.p_value)
            table.add_row(row.name, row.measure, *figures, verdict)
    return table


def ensemble_tables(report: EnsembleReport) -> list[RenderableType]:
    """One table for each task: weights, ranking, and calibration before and after."""
    tables = [ensemble_table(task, task_report) for task, task_report in report.tasks.items()]
    remark = (
        "nDCG and MRR over lists that contain all positives. ECE: expected calibration error. Before: the score taken "
        "as log-odds; after: calibrated, each query by a fit without it."
    )
    truncated = f" {report.num_truncated:,} of {report.num_scored:,} pairs scored now were truncated."
    return [*tables, Text(remark + truncated * bool(report.num_truncated))]


def ensemble_table(task: str, report: TaskReport) -> Table:
    """The members and their ensemble in one task; the title names the data."""
    queries = ", ".join(f"{count:,} of {name}" for name, count in report.num_queries.items())
    measures = [f"{name} {measure}" for name, values in report.rows[0].measures.items() for measure in values]
    table = Table(
        "teacher",
        Column("weight", ".3f"),
        *(Column(measure, ".4f") for measure in measures),
        Column("log-loss before", ".4f"),
        Column("after", ".4f"),
        Column("ECE before", ".4f"),
        Column("after", ".4f"),
        title=f"{task}: {counted(report.num_pairs, 'pair')}, {report.num_positives:,} relevant; dev queries: {queries}",
    )
    for row in report.rows:
        before, after = row.before, row.after
        table.add_row(
            row.name,
            row.weight,
            *(value for values in row.measures.values() for value in values.values()),
            None if before is None else before.log_loss,
            after.log_loss,
            None if before is None else before.expected_error,
            after.expected_error,
        )
    return table


def stack_document(report: EnsembleReport) -> Document:
    """The results of ``ensemble`` with reliability diagrams."""
    sections: list[Section] = []
    for task, task_report in report.tasks.items():
        table = ensemble_table(task, task_report)
        diagrams = [Figures(pair) for pair in _diagrams(task, task_report)]
        sections.append(Section(table.title, [table, Note(_STACK_CAPTION), *diagrams]))
    written = Note(f"Written to {report.folder}, fingerprint {report.fingerprint}.")
    return Document("Ensemble of teachers", [*sections, Section("", [written])])


def _diagrams(task: str, report: TaskReport) -> list[list[tuple[str, str]]]:
    """For each row, its diagrams before (if there is one) and after calibration, with captions."""
    rows: list[list[tuple[str, str]]] = []
    for index, row in enumerate(report.rows):
        pair: list[tuple[str, str]] = []
        for when, figures in (("before", row.before), ("after", row.after)):
            if figures is not None:
                name = f"{row.name}, {when} calibration"
                caption = f"{name}: ECE {figures.expected_error:.4f}, log-loss {figures.log_loss:.4f}"
                num_pairs = sum(part.count for part in figures.bins)
                calibration = Calibration(name, figures.bins, figures.expected_error, num_pairs)
                pair.append((charts.reliability(calibration, f"plot-{task}-{index}-{when}"), caption))
        rows.append(pair)
    return rows
