"""The verb ``run``, and those that take one step of a run: mine, tune-teacher, stack, gate, label, distill."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, get_args

import typer

from d2llm.cli.options import (
    AgainOption,
    RecipeArgument,
    RunOptions,
    known_student,
    known_teacher,
    with_option_groups,
)
from d2llm.cli.session import session_of
from d2llm.core.errors import InputError
from d2llm.core.types import RunStep

_MODEL = "a folder, a name, or KIND:MODEL such as cosine:FOLDER for a student or a bi-encoder"


@with_option_groups
def run(
    context: typer.Context,
    recipe: RecipeArgument,
    options: RunOptions,
    again: Annotated[
        RunStep | None,
        typer.Option(
            "--again",
            metavar="STEP",
            help=f"Repeat this step and those after it, and put what was there aside: {', '.join(get_args(RunStep))}.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Make a student from a recipe: the steps below, to distill.

    Before a teacher is tuned, a first look tries it as it is on a few dev queries. Where the recipe has a
    teacher_margin, mine leaves it out until the teacher is tuned; filter then mines again with it.

    What is finished in the run folder is skipped, so the same command continues after an interruption. What was made
    with other settings than the recipe has now is named; --again STEP repeats it, and what comes after it.
    """
    session = session_of(context)
    opened = options.open(session, recipe)  # finds mistakes before torch is loaded
    from d2llm.reports.training_tables import gate_table, run_table
    from d2llm.training.gate import GateReport
    from d2llm.training.sentences import gate_advice

    def show_gate(step: str, result: object) -> None:
        if step == "gate" and isinstance(result, GateReport):
            session.show(gate_table(result))
            session.say(gate_advice(result))

    results = opened.finish(again=again, after=show_gate)
    session.show(run_table(results))
    session.write_report(context, options.json_path, results)


@with_option_groups
def mine(
    context: typer.Context,
    recipe: RecipeArgument,
    options: RunOptions,
    student: Annotated[
        str | None,
        typer.Option(
            "--student",
            metavar="NAME_OR_FOLDER",
            callback=known_student,
            help="A trained student that ranks the passages, by its full score.",
            show_default="mining.student, else the recipe's backbone before training",
        ),
    ] = None,
    again: AgainOption = False,
) -> None:
    """Choose answers and near misses for each training query.

    Read audit.md in the plan's folder. Stopped, the same command continues with what was encoded and judged.
    """
    opened = options.open(session_of(context), recipe)
    session_of(context).write_report(context, options.json_path, opened.mine(again=again, student=student))


@with_option_groups
def tune_teacher(
    context: typer.Context, recipe: RecipeArgument, options: RunOptions, again: AgainOption = False
) -> None:
    """Teach the language model to answer yes or no on your pairs.

    Comes after mine. Optional: without it, label and distill use the recipe's teacher as it is. Stopped, the same
    command continues from the last checkpoint.
    """
    opened = options.open(session_of(context), recipe)
    session_of(context).write_report(context, options.json_path, opened.tune_teacher(again=again))


@with_option_groups
def stack(
    context: typer.Context,
    recipe: RecipeArgument,
    options: RunOptions,
    members: Annotated[
        list[str],
        typer.Option(
            "--member", metavar="MODEL", help=f"A teacher: {_MODEL}. Give it once for each; one is calibrated."
        ),
    ],
    queries: Annotated[int, typer.Option("--queries", min=2, help="Dev queries of each data set.")] = 200,
    depth: Annotated[
        int, typer.Option("--depth", min=1, help="Candidates of each query: this many of BM25 and of the cosine.")
    ] = 20,
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
    from d2llm.reports.training_tables import render_stack_page, stack_tables

    session = session_of(context)
    opened = options.open(session, recipe, files=[html_path])
    teachers = [opened.recipe.teacher.named(member) for member in members]
    report = opened.stack(teachers, num_queries=queries, depth=depth)
    for part in stack_tables(report):
        session.show(part)
    session.write_report(context, options.json_path, report)
    if html_path is not None:
        write_bytes(html_path, render_stack_page(report).encode())


@with_option_groups
def gate(
    context: typer.Context,
    recipe: RecipeArgument,
    options: RunOptions,
    student: Annotated[
        str | None,
        typer.Option(
            "--student",
            metavar="NAME_OR_FOLDER",
            callback=known_student,
            help="The student whose score the teacher must beat.",
            show_default="the recipe's backbone before training",
        ),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(
            "--teacher",
            metavar="MODEL",
            callback=known_teacher,
            help=f"Another teacher: {_MODEL}.",
            show_default="the run's, or the recipe's",
        ),
    ] = None,
) -> None:
    """Test on the dev split whether the teacher beats the cosine.

    Comes before label. [gate] in the recipe says how many queries (ten times as many pairs), and what becomes of a data
    set whose gate is closed.
    """
    from d2llm.reports.training_tables import gate_table
    from d2llm.training.gate import GateReport
    from d2llm.training.sentences import gate_advice

    session = session_of(context)
    opened = options.open(session, recipe)
    config = opened.recipe.teacher.named(teacher) if teacher is not None else None
    report = opened.gate(teacher=config, student=student)
    session.write_report(context, options.json_path, report)
    if not isinstance(report, GateReport):
        return
    session.show(gate_table(report))
    if report.closed and report.settings.when_closed == "stop":
        raise InputError(gate_advice(report))
    session.say(gate_advice(report))


@with_option_groups
def label(context: typer.Context, recipe: RecipeArgument, options: RunOptions) -> None:
    """Let the teacher judge every pair that mine chose.

    Stopped, the same command continues where it was.
    """
    opened = options.open(session_of(context), recipe)
    session_of(context).write_report(context, options.json_path, opened.label())


@with_option_groups
def distill(
    context: typer.Context,
    recipe: RecipeArgument,
    options: RunOptions,
    variant: Annotated[
        str | None,
        typer.Option(
            "--variant",
            metavar="NAME",
            help="Train a changed student on the same plans, beside the student: cosine and paper are the baselines "
            "that evaluate compares with; d2llm ablate --list names all.",
            show_default=False,
        ),
    ] = None,
    again: AgainOption = False,
) -> None:
    """Train the student on the teacher's judgements.

    Comes after label. Stopped, the same command continues from the last checkpoint.
    """
    opened = options.open(session_of(context), recipe)
    session_of(context).write_report(context, options.json_path, opened.distill(variant=variant, again=again))
