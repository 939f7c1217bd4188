"""The verbs that make a student: init, mine, tune-teacher, label, distill, and run, which is the last four."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, get_args

import typer

from d2llm.cli.options import (
    DISTIL,
    AgainOption,
    DataOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    RecipeArgument,
    RunJsonOption,
    RunOption,
    TaskOption,
    in_a_folder_that_is_there,
    known_student,
    open_run,
)
from d2llm.cli.session import session_of
from d2llm.core.types import RunStep, Task


def init(
    context: typer.Context,
    data: Annotated[
        str,
        typer.Argument(
            metavar="DATA",
            help="A data set with judged questions in train and dev: a folder in BEIR layout, or of pairs.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            metavar="FILE",
            dir_okay=False,
            callback=in_a_folder_that_is_there,
            help="Where the recipe goes; none is replaced.",
        ),
    ] = Path("recipe.toml"),
    backbone: Annotated[
        str, typer.Option("--backbone", metavar="MODEL", help="What reads each text alone: a folder, a Hub name.")
    ] = "minilm",
    teacher: Annotated[
        str | None,
        typer.Option(
            "--teacher",
            metavar="MODEL",
            help="What judges pairs as it is: a folder, a Hub name, or KIND:MODEL.",
            show_default="one made of the backbone from 1,000 questions on, else none",
        ),
    ] = None,
    task: Annotated[
        Task | None,
        typer.Option(
            "--task",
            help="Whether a passage answers (asymmetric) or says the same (symmetric).",
            show_default="told by the lengths",
        ),
    ] = None,
    device: DeviceOption = None,
    json_path: JsonOption = None,
) -> None:
    """Write a recipe for your data, with the reason for each value.

    Epochs and teacher follow from how many questions there are, limits from how long the texts are.
    """
    from d2llm.core.errors import InputError
    from d2llm.core.files import write_bytes
    from d2llm.training.starting_recipe import starting_recipe

    if out.exists():
        raise InputError(f"{out}: is there already and stays as it is; give another place with --out")
    session = session_of(context)
    found = starting_recipe(data, backbone=backbone, teacher=teacher, task=task, device=device)
    write_bytes(out, found.text.encode())
    for note in found.notes:
        session.complain("warning", note)
    session.say(
        f"init: {found.num_train:,} questions or pairs to train on, {found.num_dev:,} of dev; read {out}, then: "
        f"d2llm run {out} (about {found.duration}, as fast as this machine is now)"
    )
    session.write_report(context, json_path, found)


def run(
    context: typer.Context,
    recipe: RecipeArgument,
    out: RunOption = None,
    data: DataOption = None,
    again: Annotated[
        RunStep | None,
        typer.Option(
            "--again",
            metavar="STEP",
            help=f"Do this step and those after it anew, keeping what was there aside: {', '.join(get_args(RunStep))}.",
            show_default=False,
        ),
    ] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    json_path: RunJsonOption = None,
) -> None:
    """Make a student from a recipe: the steps below in order.

    Before a teacher is tuned, a first look tries it as it is on a few dev queries. Where the recipe has a
    teacher_margin, mine leaves it out until the teacher is tuned; filter then mines again with it.

    What is finished in the run folder is skipped, so the same command goes on after an interruption. What was made with
    other settings than the recipe has now is named; --again STEP makes it anew, and what comes after it.
    """
    session = session_of(context)
    opened = open_run(session, recipe, out, data, device, dtype, files=(json_path,))  # told before torch is loaded
    from d2llm.reports.training_tables import gate_table, run_table
    from d2llm.training.gate import GateReport
    from d2llm.training.sentences import gate_advice

    def show_gate(step: str, found: object) -> None:
        if step == "gate" and isinstance(found, GateReport):
            session.show(gate_table(found))
            session.say(gate_advice(found))

    result = opened.finish(again=again, after=show_gate)
    session.show(run_table(result))
    session.write_report(context, json_path, result)


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
            callback=known_student,
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
    opened = open_run(session_of(context), recipe, out, data, device, dtype, files=(json_path,))
    session_of(context).write_report(context, json_path, opened.mine(again=again, student=student))


def tune_teacher(
    context: typer.Context,
    recipe: RecipeArgument,
    out: RunOption = None,
    data: DataOption = None,
    again: AgainOption = False,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    json_path: RunJsonOption = None,
) -> None:
    """Teach the language model to answer yes or no on your pairs.

    Comes after mine. Optional: without it, label and distill use the recipe's teacher as it is. Stopped, it goes on
    from its last checkpoint when the same command is given again.
    """
    opened = open_run(session_of(context), recipe, out, data, device, dtype, files=(json_path,))
    session_of(context).write_report(context, json_path, opened.tune_teacher(again=again))


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
    opened = open_run(session_of(context), recipe, out, data, device, dtype, files=(json_path,))
    session_of(context).write_report(context, json_path, opened.label())


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
    opened = open_run(session_of(context), recipe, out, data, device, dtype, files=(json_path,))
    session_of(context).write_report(context, json_path, opened.distill(variant=variant, again=again))


def fit_scores(
    context: typer.Context,
    student: Annotated[
        str,
        typer.Argument(
            metavar="STUDENT", help="A student's folder, or its name.", callback=known_student, show_default=False
        ),
    ],
    data: Annotated[
        list[str],
        typer.Argument(
            metavar="DATA...", help="Data sets with a corpus and judged queries in their dev split.", show_default=False
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            metavar="FOLDER",
            callback=in_a_folder_that_is_there,
            help="Where the student goes with what was fitted.",
            show_default=False,
        ),
    ],
    task: TaskOption = "asymmetric",
    num_queries: Annotated[int, typer.Option("--queries", min=1, help="Dev queries of each data set, at most.")] = 200,
    words: Annotated[
        bool, typer.Option("--words/--no-words", help="Also weigh what words (BM25) add to the score in an index.")
    ] = True,
    window_vectors: Annotated[
        bool,
        typer.Option(
            "--window-vectors/--no-window-vectors",
            help="With words: also weigh vectors of each two sentences; an index then takes longer to make.",
        ),
    ] = True,
    seed: Annotated[int, typer.Option("--seed", help="Of the choice of queries and passages.")] = 0,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    json_path: JsonOption = None,
) -> None:
    """Fit a student's scores to your judged queries; no training.

    Two things are fitted on dev: what words (BM25) and sentences add to the score of a passage in an index, and what
    turns scores into probabilities. Vectors stay as they are, so an index made with the student can be searched with
    the one that is written. What the student has for the other task is kept.
    """
    from d2llm.data.open_data import open_data
    from d2llm.models.student import Student
    from d2llm.training.fit_scores import fit_scores
    from d2llm.training.sentences import evidence_words, probability_words

    session = session_of(context)
    datasets = [open_data(place, splits=["dev"]) for place in data]
    model = Student.load(student, device=device, dtype=dtype)
    report = fit_scores(
        model,
        datasets,
        task,
        words=words,
        window_vectors=window_vectors,
        num_queries=num_queries,
        seed=seed,
        show_progress=session.show_progress,
    )
    model.save(out)
    weighed = evidence_words({task: report.evidence}) if report.evidence else "words were not weighed"
    calibrated = probability_words({task: report.probabilities} if report.probabilities else {})
    session.say(f"fit-scores: {weighed}; probabilities: {calibrated}; in {out}")
    session.write_report(context, json_path, report)


def register(app: typer.Typer) -> None:
    """Add these verbs to the program."""
    for name, verb in (
        ("init", init),
        ("run", run),
        ("mine", mine),
        ("tune-teacher", tune_teacher),
        ("label", label),
        ("distill", distill),
        ("fit-scores", fit_scores),
    ):
        app.command(name, rich_help_panel=DISTIL)(verb)
