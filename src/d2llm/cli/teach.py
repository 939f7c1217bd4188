"""What may teach: stack (several teachers as one, calibrated) and gate (teacher against cosine)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from d2llm.cli.options import (
    DISTIL,
    DataOption,
    DeviceOption,
    DtypeOption,
    RecipeArgument,
    RunJsonOption,
    RunOption,
    known_student,
    known_teacher,
    open_run,
)
from d2llm.cli.session import session_of
from d2llm.core.errors import InputError

_HOW = "a folder, a name, or KIND:MODEL such as cosine:FOLDER for a student or a bi-encoder"


def stack(
    context: typer.Context,
    recipe: RecipeArgument,
    members: Annotated[
        list[str],
        typer.Option("--member", metavar="MODEL", help=f"A teacher: {_HOW}. Give it once for each; one is calibrated."),
    ],
    out: RunOption = None,
    data: DataOption = None,
    queries: Annotated[int, typer.Option("--queries", min=2, help="Dev queries of each data set.")] = 200,
    depth: Annotated[
        int, typer.Option("--depth", min=1, help="Candidates of each query: so many of BM25 and of the cosine.")
    ] = 20,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    json_path: RunJsonOption = None,
    html_path: Annotated[
        Path | None,
        typer.Option(
            "--html",
            metavar="PATH",
            dir_okay=False,
            help="Also write one HTML page with reliability diagrams.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Make one calibrated teacher of several, on dev queries.

    It goes to the folder stack in the run folder. To learn from it, name that folder as model of [teacher] in a recipe.
    """
    from d2llm.core.files import write_bytes
    from d2llm.reports.training_tables import stack_tables

    session = session_of(context)
    run = open_run(session, recipe, out, data, device, dtype, files=(json_path, html_path))
    named = [run.recipe.teacher.named(member) for member in members]
    report = run.stack(named, num_queries=queries, depth=depth)
    for part in stack_tables(report):
        session.show(part)
    session.write_report(context, json_path, report)
    if html_path is not None:
        from d2llm.reports.training_tables import render_stack_page

        write_bytes(html_path, render_stack_page(report).encode())


def gate(
    context: typer.Context,
    recipe: RecipeArgument,
    out: RunOption = None,
    data: DataOption = None,
    student: Annotated[
        str | None,
        typer.Option(
            "--student",
            metavar="NAME_OR_FOLDER",
            callback=known_student,
            help="The student whose score is to be beaten.",
            show_default="the recipe's backbone before training",
        ),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(
            "--teacher",
            metavar="MODEL",
            callback=known_teacher,
            help=f"{_HOW.capitalize()}.",
            show_default="the run's, or the recipe's",
        ),
    ] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    json_path: RunJsonOption = None,
) -> None:
    """Is the teacher better than the cosine? Tried on the dev split.

    Comes before label. [gate] in the recipe says how many queries (ten times as many pairs), and what becomes of a data
    set whose gate is closed.
    """
    from d2llm.reports.training_tables import gate_table
    from d2llm.training.gate import GateReport
    from d2llm.training.sentences import gate_advice

    session = session_of(context)
    run = open_run(session, recipe, out, data, device, dtype, files=(json_path,))
    named = run.recipe.teacher.named(teacher) if teacher is not None else None
    report = run.gate(teacher=named, student=student)
    session.write_report(context, json_path, report)
    if not isinstance(report, GateReport):
        return
    session.show(gate_table(report))
    if report.closed and report.settings.when_closed == "stop":
        raise InputError(gate_advice(report))
    session.say(gate_advice(report))


def register(app: typer.Typer) -> None:
    """Add these verbs to the program."""
    for name, verb in (("stack", stack), ("gate", gate)):
        app.command(name, rich_help_panel=DISTIL)(verb)
