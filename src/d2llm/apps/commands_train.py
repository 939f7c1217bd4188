"""The verbs that make a student: mine, tune-teacher, label, distill, and run, which is all four."""

from __future__ import annotations

from typing import Annotated

import typer

from d2llm.apps.options import (
    DISTIL,
    AgainOption,
    DataOption,
    DeviceOption,
    DtypeOption,
    RecipeArgument,
    RunJsonOption,
    RunOption,
)
from d2llm.apps.session import session_of


def run(
    context: typer.Context,
    recipe: RecipeArgument,
    out: RunOption = None,
    data: DataOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    json_path: RunJsonOption = None,
) -> None:
    """Make a student from a recipe: the steps below in order.

    What is finished in the run folder is skipped, so the same command goes on after an interruption.
    """
    from d2llm.apps import steps
    from d2llm.apps.job import job_of
    from d2llm.apps.mine_step import mine_plans

    job = job_of(session_of(context), recipe, out, data, device, dtype)
    result = {
        "mine": mine_plans(job),
        "tune-teacher": steps.tune_the_teacher(job),
        "stack": steps.stack_with_cosine(job),
        "gate": steps.try_the_teacher(job, again=False),
    }
    if len(steps.closed_gates(job)) < len(job.recipe.data):
        result["label"] = steps.label_pairs(job)
    result["distill"] = steps.distill_student(job)
    session_of(context).write_report(context, json_path, result)


def mine(
    context: typer.Context,
    recipe: RecipeArgument,
    out: RunOption = None,
    data: DataOption = None,
    student: Annotated[
        str | None,
        typer.Option(
            "--student",
            metavar="NAME_OR_FOLDER",
            help="A trained student that ranks the passages, by its full score.",
            show_default="mining.student, else the recipe's backbone before training",
        ),
    ] = None,
    again: AgainOption = False,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    json_path: RunJsonOption = None,
) -> None:
    """Choose answers and near misses for each training query.

    Read audit.md in the plan's folder. Stopped, it goes on with what it had encoded and judged when given again.
    """
    from d2llm.apps.job import job_of
    from d2llm.apps.mine_step import mine_plans

    job = job_of(session_of(context), recipe, out, data, device, dtype)
    session_of(context).write_report(context, json_path, mine_plans(job, again=again, student=student))


def tune_teacher(
    context: typer.Context,
    recipe: RecipeArgument,
    out: RunOption = None,
    data: DataOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    json_path: RunJsonOption = None,
) -> None:
    """Teach the language model to answer yes or no on your pairs.

    Comes after mine. Optional: without it, label and distill use the recipe's teacher as it is.
    """
    from d2llm.apps import steps
    from d2llm.apps.job import job_of

    session_of(context).write_report(
        context, json_path, steps.tune_the_teacher(job_of(session_of(context), recipe, out, data, device, dtype))
    )


def label(
    context: typer.Context,
    recipe: RecipeArgument,
    out: RunOption = None,
    data: DataOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    json_path: RunJsonOption = None,
) -> None:
    """Let the teacher judge every pair that mine chose.

    Stopped, it goes on where it was when the same command is given again.
    """
    from d2llm.apps import steps
    from d2llm.apps.job import job_of

    session_of(context).write_report(
        context, json_path, steps.label_pairs(job_of(session_of(context), recipe, out, data, device, dtype))
    )


def distill(
    context: typer.Context,
    recipe: RecipeArgument,
    out: RunOption = None,
    data: DataOption = None,
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
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    json_path: RunJsonOption = None,
) -> None:
    """Train the student on the teacher's judgements.

    Comes after label. Stopped, it goes on from its last checkpoint when the same command is given again.
    """
    from d2llm.apps import steps
    from d2llm.apps.job import job_of

    job = job_of(session_of(context), recipe, out, data, device, dtype)
    session_of(context).write_report(context, json_path, steps.distill_student(job, variant=variant, again=again))


def register(app: typer.Typer) -> None:
    """Add these verbs to the program."""
    for name, verb in (
        ("run", run),
        ("mine", mine),
        ("tune-teacher", tune_teacher),
        ("label", label),
        ("distill", distill),
    ):
        app.command(name, rich_help_panel=DISTIL)(verb)
