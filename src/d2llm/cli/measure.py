"""The verbs that measure: ``evaluate``, ``leaderboard``, ``mteb``, ``probe``, ``ablate`` and ``data check``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from d2llm.cli.index_options import warn_of_skipped
from d2llm.cli.options import (
    MARKDOWN_HELP,
    DeviceOption,
    DtypeOption,
    HtmlOption,
    JsonOption,
    MarkdownOption,
    PromptOption,
    RunnerOptions,
    RunOptions,
    StudentArgument,
    StudentOption,
    TaskOption,
    in_existing_folder,
    input_path,
    output_path,
    recipe_argument,
    teacher_config,
    teacher_option,
    written_option,
)
from d2llm.cli.session import Session, session_of
from d2llm.cli.verbs import verb, verb_group
from d2llm.core.document import Document, Note, Section
from d2llm.core.errors import InputError
from d2llm.core.shipped import DEFAULT_STUDENT
from d2llm.evaluation.settings import EvaluationSettings
from d2llm.training.settings import AblationSettings

if TYPE_CHECKING:
    from d2llm.data.check import DataReport
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
        from d2llm.evaluation.contenders import load_contenders

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

    html: HtmlOption = None
    markdown: MarkdownOption = None
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


@verb("Measure")
def leaderboard(
    context: typer.Context,
    reports: Annotated[
        list[Path],
        typer.Argument(
            metavar="REPORT...",
            callback=input_path,
            help="Files that d2llm evaluate --json wrote, or folders of such files.",
        ),
    ],
    markdown_path: MarkdownOption = None,
    html_path: HtmlOption = None,
    json_path: JsonOption = None,
) -> None:
    """Show evaluations of several sets and students in one table.

    Each system gets its mean over the data sets, and the number of sets on which it differs significantly from the
    baseline. Reports of different students can be mixed.
    """
    from rich.text import Text

    from d2llm.evaluation.leaderboard import read_leaderboard
    from d2llm.reports.leaderboard import leaderboard_document, leaderboard_tables

    board = read_leaderboard(reports)
    session = session_of(context)
    for table in leaderboard_tables(board):
        session.show(table)
    if board.notes:
        session.show(Text("\n".join(board.notes)))
    session.write_report(context, json_path, board)
    session.write_document(leaderboard_document(board), markdown_path, html_path)


@verb("Measure")
def mteb(
    context: typer.Context,
    student: StudentArgument,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            "--tasks",
            "-t",
            metavar="TASK",
            help="A task of mteb, a data set on disk, or KIND=FOLDER, as Reranking=data/wikiqa-pairs. Repeatable.",
        ),
    ] = None,
    benchmark: Annotated[
        str | None, typer.Option(metavar="NAME", help='All tasks of a benchmark of mteb, as "MTEB(eng, v2)".')
    ] = None,
    out: Annotated[
        Path, typer.Option(metavar="FOLDER", help="Where results go, as mteb writes and submits them.")
    ] = Path("mteb-results"),
    split: Annotated[str, typer.Option(help="Of data sets on disk, what is measured.")] = "test",
    language: Annotated[
        str | None, typer.Option(metavar="CODE", help="Of data sets on disk, as mteb writes it.", show_default="told")
    ] = None,
    symmetric: Annotated[
        list[str] | None,
        typer.Option(metavar="TASK", help="A task whose queries look for texts that mean the same. Repeatable."),
    ] = None,
    device: DeviceOption = None,
    markdown_path: MarkdownOption = None,
    json_path: JsonOption = None,
) -> None:
    """Measure a student on tasks of mteb, by its whole score.

    A data set on disk is Retrieval, PairClassification, STS or Classification by what it holds; KIND also allows
    Reranking and Clustering. Tasks of mteb are downloaded. Finished tasks are not run again.
    """
    from d2llm.integrations.mteb_run import mteb_table, run_mteb

    session = session_of(context)
    report = run_mteb(
        student,
        tasks=tasks or (),
        benchmark=benchmark,
        out=out,
        split=split,
        language=language,
        symmetric=symmetric or (),
        device=device,
    )
    table = mteb_table(report)
    session.show(table)
    session.write_report(context, json_path, report)
    session.write_document(Document(table.title, [Section("", [table, Note(table.caption)])]), markdown_path)


@verb("Measure")
def probe(
    context: typer.Context,
    student: StudentArgument,
    corpus: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[CORPUS]...",
            callback=input_path,
            help="Texts to probe with: a corpus, or documents. Without: generated sets alone.",
        ),
    ] = None,
    texts: Annotated[int, typer.Option(min=200, help="Sentences of the corpus to probe with, at most.")] = 2000,
    persons: Annotated[int, typer.Option(min=5, help="Passages of LIMIT of which each two answer one query.")] = 30,
    distractors: Annotated[int, typer.Option(min=0, help="Passages of LIMIT that answer no query.")] = 270,
    scenes: Annotated[int, typer.Option(min=20, help="Passages of the granularity set.")] = 200,
    task: TaskOption = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of sentences, classes and generated sets.")] = 0,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    html_path: HtmlOption = None,
    markdown_path: MarkdownOption = None,
    json_path: JsonOption = None,
) -> None:
    """Measure what a student's vectors know, without annotated data.

    From the vectors of CORPUS's sentences, a linear classifier reads length, words and their order (probing tasks of
    SentEval). Two generated sets show what the vectors can rank: LIMIT, whose queries are answered by every pair of
    some passages, and one whose queries name the gist of a passage, a thing in it, or a detail.
    """
    from d2llm.data.indexed_corpus import open_corpus
    from d2llm.evaluation.probe import probe
    from d2llm.models.protocols import task_for
    from d2llm.models.student import Student
    from d2llm.reports.leaderboard import probe_document, probe_tables

    session = session_of(context)
    opened = open_corpus(corpus, with_metadata=False) if corpus else None
    model = Student.load(student, device=device, dtype=dtype)
    report = probe(
        model,
        None if opened is None else opened.passages,
        name=student,
        fingerprint=model.fingerprint,
        task=task_for(model, task),
        num_texts=texts,
        num_persons=persons,
        num_distractors=distractors,
        num_scenes=scenes,
        seed=seed,
    )
    if opened is not None:
        warn_of_skipped(session, opened.skipped)
    for table in probe_tables(report, has_styles=session.has_styles):
        session.show(table)
    session.write_report(context, json_path, report)
    session.write_document(probe_document(report), markdown_path, html_path)


@verb("Measure")
def ablate(
    context: typer.Context,
    options: RunOptions,
    *,
    recipe: Annotated[str | None, recipe_argument] = None,
    settings: Annotated[dict[str, Any], AblationSettings],
    variants: Annotated[
        str | None, typer.Option(metavar="A,B,C", help=AblationSettings.model_fields["variants"].description)
    ] = None,
    list_variants: Annotated[bool, typer.Option("--list", help="List the variants and exit.")] = False,
    markdown_path: Annotated[
        Path | None, written_option("--markdown", callback=output_path, help=MARKDOWN_HELP)
    ] = None,
    html_path: Annotated[
        Path | None, written_option("--html", callback=output_path, help="Also write one HTML page with a plot.")
    ] = None,
) -> None:
    """Train a recipe with parts left out or exchanged, and compare.

    Run it after mine and label. Finished runs are skipped, so the same command continues after an interruption.
    """
    from d2llm.recipe.recipe import load_recipe
    from d2llm.reports.ablation import ablation_document, ablation_table, listed, variants_table

    session = session_of(context)
    if list_variants:
        in_existing_folder(options.json_path)
        session.show(variants_table(load_recipe(recipe) if recipe else None))
        session.write_report(context, options.json_path, listed())
        return
    if recipe is None:
        raise InputError("RECIPE is missing: give a TOML file or the name of a recipe; --list needs none")
    if variants is not None:
        settings["variants"] = [name.strip() for name in variants.split(",")]
    run = options.open(recipe, files=[markdown_path, html_path])
    report = run.ablate(**settings)
    session.show(ablation_table(report))
    session.write_report(context, options.json_path, report)
    session.write_document(ablation_document(report), markdown_path, html_path)


_NUM_NAMED = 3
data_app = verb_group("data", "Inspect data sets.", heading="Measure")


@data_app.command("check")
def check(
    context: typer.Context,
    data: Annotated[
        str,
        typer.Argument(
            metavar="PATH",
            callback=input_path,
            help="A folder in BEIR layout, a folder or file of pairs, or hf://owner/name[:config].",
        ),
    ],
    allow_leaks: Annotated[
        bool, typer.Option("--allow-leaks", help="Do not fail if queries or pairs are in two splits.")
    ] = False,
    tokenizer: Annotated[
        str, typer.Option(metavar="NAME_OR_FOLDER", help="Student or model whose tokenizer and limits to use.")
    ] = DEFAULT_STUDENT,
    near: Annotated[
        float, typer.Option(min=0.1, max=1.0, help="Minimum similarity of near queries (shared trigrams); 1: none.")
    ] = 0.8,
    sample: Annotated[
        int, typer.Option(min=1, help="Number of queries and passages whose length to measure.")
    ] = 50_000,
    json_path: JsonOption = None,
) -> None:
    """Count what is in a data set and find leaks between its splits."""
    from d2llm.reports.training_tables import data_tables
    from d2llm.training.check_data import check_data

    session = session_of(context)
    report = check_data(data, tokenizer=tokenizer, near=near, sample_size=sample)
    for table in data_tables(report):
        session.show(table)
    session.write_report(context, json_path, report)
    if report.leaks and not allow_leaks:
        raise InputError(_leak_message(report))


def _leak_message(report: DataReport) -> str:
    leaks = [
        f"{leak.count} of {leak.second} in {leak.first} ({leak.kind}: "
        f"{', '.join(' = '.join(ids) for ids in leak.examples[:_NUM_NAMED])})"
        for leak in report.leaks
    ]
    return (
        f"{report.path}: {report.num_leaks} leaks between splits: {'; '.join(leaks)}. Results measured on such splits "
        "are too high: remove these from one split, or accept them with --allow-leaks"
    )
