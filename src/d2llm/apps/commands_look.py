"""The verbs that look at what there is: evaluate, judge and demo."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from d2llm.apps.options import (
    DEFAULT_STUDENT,
    LOOK,
    DeviceOption,
    DtypeOption,
    JsonOption,
    StudentOption,
)
from d2llm.apps.session import session_of
from d2llm.core.types import Task

if TYPE_CHECKING:
    from d2llm.core.recipe import TeacherConfig

TaskOption = Annotated[
    Task, typer.Option("--task", help="Whether a passage answers (asymmetric) or says the same (symmetric).")
]
PromptOption = Annotated[
    str | None,
    typer.Option(
        "--prompt",
        metavar="NAME",
        help="How a teacher that was not tuned is asked: a name or TOML file.",
        show_default="paper",
    ),
]


def _teacher_config(model: str, prompt: str | None) -> TeacherConfig:
    from d2llm.core.recipe import TeacherConfig

    return TeacherConfig(model=model) if prompt is None else TeacherConfig(model=model, prompt=prompt)


def evaluate(
    context: typer.Context,
    data: Annotated[
        Path, typer.Argument(metavar="DATA", help="A folder in BEIR layout.", show_default=False, file_okay=False)
    ],
    student: StudentOption = DEFAULT_STUDENT,
    split: Annotated[str, typer.Option("--split", help="The judgements to measure by: qrels/SPLIT.tsv.")] = "test",
    task: TaskOption = "asymmetric",
    teacher: Annotated[
        str | None,
        typer.Option(
            "--teacher", metavar="NAME_OR_FOLDER", help="Measure this teacher too (slow).", show_default=False
        ),
    ] = None,
    teacher_depth: Annotated[
        int, typer.Option("--teacher-depth", min=1, help="Passages of BM25 and of the student that it reorders.")
    ] = 20,
    teacher_queries: Annotated[
        int | None,
        typer.Option("--teacher-queries", min=1, help="Ask it a random sample of so many.", show_default="all"),
    ] = None,
    prompt: PromptOption = None,
    num_candidates: Annotated[
        int, typer.Option("--candidates", min=1, help="Passages that get the student's full score.")
    ] = 1000,
    work: Annotated[
        Path | None,
        typer.Option("--work", metavar="FOLDER", help="Keep the indexes here and find them again.", show_default=False),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of samples and of the significance test.")] = 0,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    json_path: JsonOption = None,
) -> None:
    """Measure a student beside BM25, cosine and the teacher."""
    from d2llm.apps.tables import evaluation_table, sample_table
    from d2llm.data.beir import read_beir
    from d2llm.models.student import Student
    from d2llm.models.teacher import Teacher
    from d2llm.pipeline.cosine import untuned_config
    from d2llm.pipeline.evaluate import evaluate

    session = session_of(context)
    dataset = read_beir(data, splits=[split])
    model = Student.load(student, device=device, dtype=dtype)
    judge = Teacher.load(_teacher_config(teacher, prompt), device=device, dtype=dtype) if teacher else None
    report = evaluate(
        dataset,
        student=model,
        split=split,
        baseline=Student.create(untuned_config(model.config), device=device, dtype=dtype),
        teacher=judge,
        task=task,
        num_candidates=num_candidates,
        teacher_depth=teacher_depth,
        teacher_queries=teacher_queries,
        seed=seed,
        work_folder=work,
        show_progress=session.show_progress,
    )
    session.show(evaluation_table(report))
    if (sample := sample_table(report)) is not None:
        session.show(sample)
    session.write_report(context, json_path, report)


def judge(
    context: typer.Context,
    query: Annotated[str, typer.Argument(metavar="QUERY", help="What is asked.", show_default=False)],
    passages: Annotated[list[str], typer.Argument(metavar="PASSAGE", help="Texts to judge.", show_default=False)],
    teacher: Annotated[
        str, typer.Option("--teacher", metavar="NAME_OR_FOLDER", help="A model, or a folder that tune-teacher wrote.")
    ] = "smollm2",
    task: TaskOption = "asymmetric",
    prompt: PromptOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    json_path: JsonOption = None,
) -> None:
    """Ask a teacher how surely a passage answers a query."""
    from d2llm.apps.tables import judgement_table
    from d2llm.models.teacher import Teacher

    session = session_of(context)
    model = Teacher.load(_teacher_config(teacher, prompt), device=device, dtype=dtype)
    log_odds: list[float] = model.judge([(query, passage) for passage in passages], task).log_odds.tolist()
    session.show(judgement_table(query, passages, log_odds))
    judged = [{"passage": text, "log_odds": value} for text, value in zip(passages, log_odds, strict=True)]
    session.write_report(context, json_path, {"teacher": model.fingerprint, "judgements": judged})


def demo(
    context: typer.Context,
    folder: Annotated[
        Path | None,
        typer.Option("--out", metavar="FOLDER", help="Keep the indexes here.", show_default="the user's cache folder"),
    ] = None,
    student: StudentOption = DEFAULT_STUDENT,
    json_path: JsonOption = None,
) -> None:
    """Search your Python's documentation, to see it work.

    Takes a few minutes: the texts are read from the standard library on this machine, nothing is downloaded.
    """
    from d2llm.apps.demo import run_demo

    session = session_of(context)
    report = run_demo(folder, student=student, show_progress=session.show_progress)
    session.write_report(context, json_path, report)


def register(app: typer.Typer) -> None:
    """Add these verbs to the program."""
    for verb in (demo, evaluate, judge):
        app.command(verb.__name__, rich_help_panel=LOOK)(verb)
