"""The verb ``init``: a recipe for the user's data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from d2llm.cli.options import DeviceOption, JsonOption, lasting_input_path, output_file, student_option
from d2llm.cli.session import session_of
from d2llm.cli.verbs import verb
from d2llm.core.errors import InputError
from d2llm.core.settings import TASK_HELP
from d2llm.core.types import Task

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
