"""The verbs of recipes: ``init``, ``run`` and its single steps, ``recipe``, and ``labels``, which a run writes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, cast, get_args

import typer

from d2llm.cli.options import (
    AgainOption,
    DeviceOption,
    JsonOption,
    RecipeArgument,
    RunnerOptions,
    RunOptions,
    in_existing_folder,
    input_path,
    lasting_input_path,
    output_file,
    output_path,
    student_option,
    teacher_option,
    written_option,
)
from d2llm.cli.session import session_of
from d2llm.cli.verbs import verb, verb_group
from d2llm.core.errors import InputError
from d2llm.core.names import counted
from d2llm.core.settings import TASK_HELP
from d2llm.core.types import RunStep, Task

_LayersOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Keep so many of the backbone's layers: of an encoder those that turn the states of DATA's tokens most, "
        "of a decoder the first.",
        show_default="all",
    ),
]

_TeacherOption = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        help="Untuned model that scores pairs: a folder, a Hub name, or KIND:MODEL.",
        show_default="made from the backbone if there are at least 1,000 questions, else none",
    ),
]


@verb("Distil")
def init(
    context: typer.Context,
    data: Annotated[
        str,
        typer.Argument(
            metavar="DATA",
            callback=lasting_input_path,
            help="A data set with judged questions in train and dev: a folder in BEIR layout, or of pairs.",
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            metavar="FILE",
            dir_okay=False,
            callback=output_file,
            help="Where the recipe goes; an existing file is not replaced.",
        ),
    ] = Path("recipe.toml"),
    backbone: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Model that encodes texts: a folder or a Hub name.",
            show_default="minilm, or e5 if the texts are not English",
        ),
    ] = None,
    start: Annotated[
        str | None,
        student_option(help="Train this student further, instead of a backbone.", show_default="none"),
    ] = None,
    layers: _LayersOption = None,
    teacher: _TeacherOption = None,
    task: Annotated[
        Task | None,
        typer.Option(
            help=TASK_HELP,
            show_default="what START was trained for, or chosen by the lengths of the texts",
        ),
    ] = None,
    device: DeviceOption = None,
    json_path: JsonOption = None,
) -> None:
    """Write a recipe for your data, with the reason for each value.

    Epochs and teacher depend on the number of questions, token limits on the lengths of the texts.
    """
    from d2llm.core.files import is_stream, write_bytes
    from d2llm.training.starting_recipe import starting_recipe

    if out.exists() and not is_stream(out):
        raise InputError(f"{out}: already exists and is not replaced; give another path with --out")
    session = session_of(context)
    made = starting_recipe(
        data, backbone=backbone, start=start, layers=layers, teacher=teacher, task=task, device=device
    )
    write_bytes(out, made.text.encode())
    for note in made.notes:
        session.complain("warning", note)
    session.say(
        f"init: {made.num_train:,} questions or pairs to train on, {made.num_dev:,} for dev; review {out}, then: "
        f"d2llm run {out} (about {made.duration} at the speed of this machine)"
    )
    session.write_report(context, json_path, made)


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
        written_option("--html", callback=output_path, help="Also write one HTML page with reliability diagrams."),
    ] = None,
) -> None:
    """Combine several teachers into an ensemble, calibrated on dev.

    It is written to the folder ensemble in the run folder. To learn from it, name that folder as model of [teacher] in
    a recipe.
    """
    from d2llm.recipe.recipe import named_teacher
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
    from d2llm.recipe.recipe import named_teacher
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


labels_app = verb_group("labels", "Count, merge and export teachers' labels.", heading="Distil")
_StoreArgument = Annotated[Path, typer.Argument(metavar="FOLDER", help="A label store, as `d2llm label` writes it.")]


@labels_app.command("stats")
def stats(context: typer.Context, folder: _StoreArgument, json_path: JsonOption = None) -> None:
    """Count the labels of each teacher, prompt and data set."""
    from d2llm.data.label_sets import count_labels
    from d2llm.reports.training_tables import label_table

    session = session_of(context)
    counts = count_labels(folder)
    session.show(label_table(counts))
    session.write_report(context, json_path, counts)


@labels_app.command("merge")
def merge(
    context: typer.Context,
    folders: Annotated[
        list[Path], typer.Argument(metavar="FOLDER...", help="Label stores, for example of several machines.")
    ],
    out: Annotated[Path, typer.Option(metavar="FOLDER", callback=in_existing_folder, help="The new store.")],
    json_path: JsonOption = None,
) -> None:
    """Write the labels of several stores into a new one, each pair once.

    Of a pair that several stores have, the label of the last one counts. Old stores are kept.
    """
    from d2llm.data.label_sets import merge_labels

    session = session_of(context)
    report = merge_labels(folders, out)
    message = f"labels: {counted(report.num_pairs, 'pair')} of {counted(report.num_queries, 'query')}"
    if report.num_repeated:
        message += (
            f"; {counted(report.num_repeated, 'was', 'were')} labelled more than once, with log-odds that differ by "
        )
        message += f"{report.largest_difference:.3g} at most"
    session.say(f"{message}; in {out}")
    session.write_report(context, json_path, report)


@labels_app.command("export")
def export(
    context: typer.Context,
    folder: _StoreArgument,
    out: Annotated[
        Path,
        typer.Option(
            metavar="FILE",
            callback=output_file,
            help="The file to write: .parquet, .jsonl or .csv; -: JSON lines to standard output.",
        ),
    ],
    teacher: Annotated[
        str | None, typer.Option(metavar="FINGERPRINT", help="Only labels of this teacher; a beginning is enough.")
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(metavar="FINGERPRINT", help="Only labels with this prompt; a beginning is enough.")
    ] = None,
    dataset: Annotated[str | None, typer.Option(metavar="NAME", help="Only labels of this data set.")] = None,
) -> None:
    """Write labels as one table for other programs, a row for each pair."""
    from d2llm.data.label_sets import export_labels

    num_pairs = export_labels(folder, out, teacher=teacher, prompt=prompt, dataset=dataset)
    session_of(context).say(f"labels: {counted(num_pairs, 'pair')} in {out}")


recipe_app = verb_group("recipe", "Check recipes, and describe them to editors.", heading="Distil")
_RECIPES = typer.Argument(metavar="RECIPE...", callback=input_path, help="TOML files, or names of shipped recipes.")


@recipe_app.command("check")
def check(context: typer.Context, recipes: Annotated[list[str], _RECIPES]) -> None:
    """Read recipes as every verb would, and show the settings that differ from their defaults.

    Warns of data sets, models, students and files that it names and that are not on this machine.
    """
    from d2llm.core.table import Column, Table
    from d2llm.data.run_folder import require_distinct_data
    from d2llm.recipe import Recipe
    from d2llm.recipe.losses import RECOMMENDED
    from d2llm.recipe.recipe import load_recipe
    from d2llm.training.open_run import is_absent
    from d2llm.training.recipe_inputs import absent_inputs, check_asked, check_models

    session, defaults = session_of(context), dict(_settings(Recipe().model_dump(mode="json")))
    for source in recipes:
        recipe = load_recipe(source)
        if recipe.data:
            require_distinct_data(recipe, where=source)
        value_column = Column("value", align="left", max_width=60)
        table = Table("setting", value_column, "default", title=f"{source}: {recipe.name}")
        left_out = {f"losses.{kind}": 0.0 for kind in RECOMMENDED if not recipe.losses.weight(kind)}
        for name, value in (dict(_settings(recipe.model_dump(mode="json"))) | left_out).items():
            if value != defaults.get(name) and name != "name" and not name.startswith("data"):
                table.add_row(name, _text(value), _text(defaults.get(name)))
        if table.rows:
            session.show(table)
        sets = ", ".join(f"{one.path} ({one.task})" for one in recipe.data) or "none"
        missing, remote = absent_inputs(recipe)
        check_models(recipe)
        check_asked(recipe, recipe.teacher)
        missing += [f"data: {one.path}: not here; give --data to a run" for one in recipe.data if is_absent(one)]
        for problem in missing:
            session.complain("warning", f"{source}: {problem}")
        if remote:
            session.say(f"{source}: taken from the Hub or its cache, so not checked: {', '.join(remote)}")
        session.say(f"{source} is valid; data sets: {sets}")


@recipe_app.command("schema")
def schema(
    context: typer.Context,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            callback=output_path,
            help="Write it there, for a line '#:schema FILE' at the top of recipes; by default to standard output.",
        ),
    ] = None,
) -> None:
    """Print the JSON Schema of recipes, with which editors of TOML complete, explain and check settings."""
    from d2llm.core.files import write_json
    from d2llm.recipe import Recipe

    described = {"$schema": "http://json-schema.org/draft-07/schema#", **Recipe.model_json_schema()}
    if out is None:
        session_of(context).write(json.dumps(described, indent=2, ensure_ascii=False))
    else:
        write_json(out, described)


def _settings(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """All settings by their path; a list counts as one."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _settings(cast("Mapping[str, Any]", value), f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _text(value: Any) -> str | None:
    if value is None:
        return None
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
