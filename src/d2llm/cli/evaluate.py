"""The verb ``evaluate``: measures quality and cost of each scorer on the user's data."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from d2llm.cli.options import (
    DeviceOption,
    DtypeOption,
    JsonOption,
    PromptOption,
    RunnerOptions,
    StudentOption,
    input_path,
    output_file,
    teacher_config,
    teacher_option,
)
from d2llm.cli.session import Session, session_of
from d2llm.cli.verbs import verb
from d2llm.core.errors import InputError
from d2llm.core.shipped import DEFAULT_STUDENT
from d2llm.evaluation.settings import EvaluationSettings

if TYPE_CHECKING:
    from d2llm.evaluation.contenders import Contenders
    from d2llm.evaluation.report import EvaluationReport

DataArgument = Annotated[
    str,
    typer.Argument(
        metavar="DATA",
        callback=input_path,
        help="Queries with a corpus (BEIR layout, Parquet) or labelled pairs: a folder, a file, or hf://OWNER/NAME.",
    ),
]


@dataclass(frozen=True)
class SystemOptions:
    """Options that name what is compared."""

    student: StudentOption = DEFAULT_STUDENT
    tuned_cosine: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="Student for the row of that name.", show_default="STUDENT-cosine"),
    ] = None
    paper_head: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="Student for the row of that name.", show_default="STUDENT-paper"),
    ] = None
    teacher: Annotated[
        str | None,
        teacher_option(metavar="NAME_OR_FOLDER", help="The teacher to measure.", show_default="the student's own"),
    ] = None
    no_teacher: Annotated[bool, typer.Option("--no-teacher", help="Leave out the teacher's row, the slowest.")] = False
    prompt: PromptOption = None
    models: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            metavar="NAME_OR_FOLDER",
            help="Also measure this model: another student, or a bi-encoder or CrossEncoder for "
            "sentence-transformers. May be repeated.",
        ),
    ] = None
    runs: Annotated[
        list[Path] | None,
        typer.Option(
            "--run", metavar="FILE", callback=input_path, help="Also measure a TREC run file. May be repeated."
        ),
    ] = None

    def load(self, *, device: str | None, dtype: str | None) -> Contenders:
        """Load the systems.

        Raises:
            InputError: options contradict each other.
        """
        from d2llm.evaluation.loading import load_contenders

        return load_contenders(
            self.student,
            tuned_cosine=self.tuned_cosine,
            paper_head=self.paper_head,
            teacher=None if self.teacher is None else teacher_config(self.teacher, self.prompt),
            with_teacher=not self.no_teacher,
            models=self.models or (),
            runs=self.runs or (),
            device=device,
            dtype=dtype,
        )

    def __post_init__(self) -> None:
        """Check that the options fit together, before anything is loaded."""
        if self.teacher is None and self.prompt is not None:
            raise InputError("--prompt is for a teacher; name one with --teacher, or leave it out")
        if self.teacher is not None and self.no_teacher:
            raise InputError("--teacher names a teacher and --no-teacher leaves it out; give one of them")


@dataclass(frozen=True)
class ReportOptions:
    """Options that say where the report is written, besides the terminal."""

    html: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            dir_okay=False,
            callback=output_file,
            help="Write an HTML page with plots and texts.",
        ),
    ] = None
    markdown: Annotated[
        Path | None,
        typer.Option(metavar="PATH", dir_okay=False, callback=output_file, help="Write the tables as Markdown."),
    ] = None
    save_runs: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Write every ranking as a TREC run.")] = None

    def write(self, session: Session, report: EvaluationReport) -> None:
        """Write the report where an option says."""
        from d2llm.core.files import write_bytes
        from d2llm.data.trec import write_run
        from d2llm.reports.evaluation_tables import evaluation_document
        from d2llm.reports.html import render_html

        session.write_document(evaluation_document(report), self.markdown)
        if self.html is not None:
            write_bytes(self.html, render_html(report).encode())
        if self.save_runs is not None:
            for name, rankings in report.details.rankings.items():
                tag = "-".join(re.findall(r"\w+", name))
                write_run(self.save_runs / f"{tag}.run", tag, rankings)


@verb("Measure")
def evaluate(
    context: typer.Context,
    data: DataArgument,
    *,
    settings: EvaluationSettings,
    workers: RunnerOptions,
    systems: SystemOptions,
    labels: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="A label store with the teacher's scores.")
    ] = None,
    indexes: Annotated[
        list[Path] | None,
        typer.Option(
            "--index",
            metavar="FOLDER",
            help="An index of this corpus, searched instead of encoding the passages again. May be repeated.",
        ),
    ] = None,
    work: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Keep indexes and measured rows here: an interrupted evaluation continues, a repeated one is quick.",
            show_default="the user's cache folder",
        ),
    ] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    output: ReportOptions,
    json_path: JsonOption = None,
) -> None:
    """Compare a student with BM25, cosines, a teacher and others.

    Every row is measured on the same queries (or pairs), with intervals, and compared with the baseline by a paired
    test. Some rows need another student trained on the same data (tuned cosine, paper head), which is looked for beside
    the student; d2llm distill RECIPE --variant cosine trains one.
    """
    from platformdirs import user_cache_path

    from d2llm.data.open_data import open_data
    from d2llm.data.pairs import PairDataset
    from d2llm.evaluation.evaluate import evaluate
    from d2llm.reports.evaluation_tables import evaluation_tables

    session = session_of(context)
    runner = workers.find()
    dataset = open_data(data)
    if output.save_runs is not None and isinstance(dataset, PairDataset):
        raise InputError("--save-runs: this data set has single pairs, which have no rankings; leave the option out")
    report = evaluate(
        dataset,
        systems.load(device=device, dtype=dtype),
        settings,
        work_folder=work or user_cache_path("d2llm") / "evaluate",
        labels=labels,
        indexes=indexes or (),
        runner=runner,
        device=device,
    )
    for table in evaluation_tables(report, has_styles=session.has_styles):
        session.show(table)
    session.write_report(context, json_path, report)
    output.write(session, report)
