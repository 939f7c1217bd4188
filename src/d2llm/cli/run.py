"""The verb ``run``, and the verbs for single steps of a run: mine, tune-teacher, ensemble, gate, label, distill."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, get_args

import typer

from d2llm.cli.options import (
    AgainOption,
    RecipeArgument,
    RunnerOptions,
    RunOptions,
    input_path,
    output_path,
    student_option,
    teacher_option,
)
from d2llm.cli.session import session_of
from d2llm.cli.verbs import verb
from d2llm.core.errors import InputError
from d2llm.core.types import RunStep

_MODEL = "a folder, a name, KIND:MODEL such as cosine:FOLDER for a student or a bi-encoder, or a TOML file"


@verb("Distil")
def run(
    context: typer.Context,
    recipe: RecipeArgument,
    options: RunOptions,
    workers: RunnerOptions,
    again: Annotated[
        RunStep | None,
        typer.Option(
            metavar="STEP",
            help=f"Repeat this step and those after it, and move old results aside: {', '.join(get_args(RunStep))}.",
        ),
    ] = None,
    rounds: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Instead, student and teacher teach each other this many times, without the data sets' judgements.",
        ),
    ] = None,
    beside: Annotated[
        list[str] | None,
        typer.Option(
            metavar="RECIPE",
            callback=input_path,
            help="With --rounds: a recipe whose student and teacher take part; all learn the mean of what they say. "
            "Repeat for more.",
        ),
    ] = None,
    continue_teachers: Annotated[
        bool,
        typer.Option("--continue-teachers", help="With --rounds: tune the teachers of the round before, not new ones."),
    ] = False,
) -> None:
    """Train a student from a recipe: all steps up to distill.

    Before a teacher is tuned, a precheck tests the untuned teacher on a few dev queries. If the recipe has a
    teacher_margin, mine ignores it until the teacher is tuned; filter then mines again with it.

    Steps that are finished in the run folder are skipped, so the same command continues after an interruption, with any
    runner. Steps that were run with settings other than the recipe's current ones are named; --again STEP repeats a
    step and those after it.
    """
    session = session_of(context)
    runner = workers.find()
    opened = options.open(recipe)  # finds mistakes before torch is loaded
    if rounds is not None:
        if again is not None or not runner.is_local:
            raise InputError("--rounds cannot be combined with --again or --runner; move old rounds aside yourself")
        from d2llm.reports.training_tables import rounds_table

        report = opened.alternate(rounds, beside=beside or (), continue_teachers=continue_teachers)
        session.show(rounds_table(report))
        session.write_report(context, options.json_path, report)
        return
    if beside or continue_teachers:
        raise InputError("--beside and --continue-teachers are for rounds: give --rounds, too")
    from d2llm.reports.training_tables import gate_table, run_table
    from d2llm.training.gate import GateReport
    from d2llm.training.sentences import gate_advice

    def show_gate(step: str, result: object) -> None:
        if step == "gate" and isinstance(result, GateReport):
            session.show(gate_table(result))
            session.say(gate_advice(result))

    results = opened.finish(again=again, after=show_gate, runner=runner)
    session.show(run_table(results))
    session.write_report(context, options.json_path, results)


@verb("Distil")
def mine(
    context: typer.Context,
    recipe: RecipeArgument,
    options: RunOptions,
    workers: RunnerOptions,
    student: Annotated[
        str | None,
        student_option(
            help="A trained student that ranks the passages, by its full score.",
            show_default="mining.student, else the recipe's backbone before training",
        ),
    ] = None,
    again: AgainOption = False,
) -> None:
    """Choose positives and hard negatives for each training query.

    Review audit.md in the plan's folder. If interrupted, the same command continues with what was encoded and scored,
    with any runner.
    """
    runner = workers.find()
    opened = options.open(recipe)
    report = opened.mine(again=again, student=student, runner=runner)
    session_of(context).write_report(context, options.json_path, report)


@verb("Distil")
def tune_teacher(
    context: typer.Context, recipe: RecipeArgument, options: RunOptions, again: AgainOption = False
) -> None:
    """Tune the language model to answer yes or no on your pairs.

    Run it after mine. Optional: without it, label and distill use the recipe's teacher as it is. If interrupted, the
    same command continues from the last checkpoint.
    """
    opened = options.open(recipe)
    session_of(context).write_report(context, options.json_path, opened.tune_teacher(again=again))


@verb("Distil")
def ensemble(
    context: typer.Context,
    recipe: RecipeArgument,
    options: RunOptions,
    workers: RunnerOptions,
    members: Annotated[
        list[str],
        typer.Option(
            "--member", metavar="MODEL", help=f"A teacher: {_MODEL}. Repeat for each; a single one is only calibrated."
        ),
    ],
    queries: Annotated[
        int | None, typer.Option(min=2, help="Dev queries of each data set.", show_default="queries of [gate]")
    ] = None,
    depth: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Candidates of each query: this many each from BM25 and the cosine.",
            show_default="depth of [gate]",
        ),
    ] = None,
    html_path: Annotated[
        Path | None,
        typer.Option(
            "--html",
            metavar="PATH",
            dir_okay=False,
            callback=output_path,
            help="Also write one HTML page with reliability diagrams.",
        ),
    ] = None,
) -> None:
    """Combine several teachers into an ensemble, calibrated on dev.

    It is written to the folder ensemble in the run folder. To learn from it, name that folder as model of [teacher] in
    a recipe.
    """
    from d2llm.recipe.recipe_file import named_teacher
    from d2llm.reports.training_tables import ensemble_tables, stack_document

    session = session_of(context)
    runner = workers.find()
    opened = options.open(recipe, files=[html_path])
    teachers = [named_teacher(member, opened.recipe.teacher) for member in members]
    report = opened.ensemble(teachers, num_queries=queries, depth=depth, runner=runner)
    for part in ensemble_tables(report):
        session.show(part)
    session.write_report(context, options.json_path, report)
    session.write_document(stack_document(report), html=html_path)


@verb("Distil")
def gate(
    context: typer.Context,
    recipe: RecipeArgument,
    options: RunOptions,
    workers: RunnerOptions,
    student: Annotated[
        str | None,
        student_option(
            help="The student whose score the teacher must beat.", show_default="the recipe's backbone before training"
        ),
    ] = None,
    teacher: Annotated[
        str | None, teacher_option(help=f"Another teacher: {_MODEL}.", show_default="the run's, or the recipe's")
    ] = None,
) -> None:
    """Test on the dev split whether the teacher beats the cosine.

    Run it before label. [gate] in the recipe says how many queries to use (ten times as many pairs), and what to do
    with a data set whose gate is closed.
    """
    from d2llm.recipe.recipe_file import named_teacher
    from d2llm.reports.training_tables import gate_table
    from d2llm.training.gate import GateReport
    from d2llm.training.sentences import gate_advice

    session = session_of(context)
    runner = workers.find()
    opened = options.open(recipe)
    config = named_teacher(teacher, opened.recipe.teacher) if teacher is not None else None
    report = opened.gate(teacher=config, student=student, runner=runner)
    session.write_report(context, options.json_path, report)
    if not isinstance(report, GateReport):
        return
    session.show(gate_table(report))
    if report.closed and report.settings.when_closed == "stop":
        raise InputError(gate_advice(report))
    session.say(gate_advice(report))


@verb("Distil")
def label(context: typer.Context, recipe: RecipeArgument, options: RunOptions, workers: RunnerOptions) -> None:
    """Have the teacher score every pair that mine chose.

    If interrupted, the same command continues where it stopped, with any runner.
    """
    runner = workers.find()
    opened = options.open(recipe)
    session_of(context).write_report(context, options.json_path, opened.label(runner=runner))


@verb("Distil")
def distill(
    context: typer.Context,
    recipe: RecipeArgument,
    options: RunOptions,
    variant: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Train a variant of the student on the same plans, beside it: cosine and paper are the baselines that "
            "evaluate compares with; d2llm ablate --list shows all.",
        ),
    ] = None,
    again: AgainOption = False,
) -> None:
    """Train the student on the teacher's labels.

    Run it after label. If interrupted, the same command continues from the last checkpoint.
    """
    opened = options.open(recipe)
    session_of(context).write_report(context, options.json_path, opened.distill(variant=variant, again=again))
