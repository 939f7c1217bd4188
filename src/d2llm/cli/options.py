"""Arguments and options that several verbs share. Only light imports: ``d2llm --help`` reads this file."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from d2llm.core.errors import InputError
from d2llm.core.shipped import shipped_recipes
from d2llm.core.types import EngineName, NumberFormat, Task

if TYPE_CHECKING:
    from d2llm.cli.session import Session
    from d2llm.core.recipe import TeacherConfig
    from d2llm.training.run import Run

DISTIL, SEARCH, SERVE, MEASURE, LOOK = "Distil", "Search", "Serve", "Measure", "Look"
"""Headings of the help."""

RecipeArgument = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE",
        help=f"A TOML file, or the name of a recipe that comes with d2llm: {', '.join(shipped_recipes())}.",
        show_default=False,
    ),
]
RunOption = Annotated[
    Path | None,
    typer.Option(
        "--out",
        metavar="RUN_FOLDER",
        file_okay=False,
        help="Where plans, teacher, labels and student go.",
        show_default="runs/<name of the recipe>",
    ),
]
DataOption = Annotated[
    list[str] | None,
    typer.Option(
        "--data",
        metavar="[NAME=]FOLDER",
        help="Where a data set of the recipe is on this machine, or the folder that holds all of them by name; may be "
        "given several times.",
        show_default=False,
    ),
]
AgainOption = Annotated[bool, typer.Option("--again", help="Do it anew even if it is finished.")]


def known_student(name: str | None) -> str | None:
    """For an option that names a student: a wrong name is told before anything heavy is loaded.

    Raises:
        ModelNotFoundError: there is no such student.
        ModelError: what the Hub has under that name is damaged, or could run code.
    """
    if name is not None:
        from d2llm.models.hub import find_student

        find_student(name)
    return name


def known_teacher(name: str | None) -> str | None:
    """``known_student`` for an option that names a teacher."""
    if name is not None:
        from d2llm.models.teachers.identity import find_kind

        find_kind(teacher_config(name, None))
    return name


StudentOption = Annotated[
    str,
    typer.Option(
        "--student",
        metavar="NAME_OR_FOLDER",
        callback=known_student,
        help="A student's folder, or the name of a shipped one.",
    ),
]
DeviceOption = Annotated[
    str | None,
    typer.Option(
        "--device", metavar="NAME", help="Where to compute: cpu, cuda, cuda:1, mps.", show_default="the best here"
    ),
]
DtypeOption = Annotated[
    NumberFormat | None,
    typer.Option("--dtype", help="Number format of the models.", show_default="what is fast here"),
]
EngineOption = Annotated[
    EngineName,
    typer.Option(
        "--engine",
        help="What encodes texts: auto takes the fastest here that gives the same vectors; those with int8 "
        "are faster and change them a little.",
    ),
]


def in_a_folder_that_is_there(path: Path | None) -> Path | None:
    """For a file that is to be written: said before the work begins, and no folder is made of a slip of the keys.

    Raises:
        InputError: there is no such folder, or it cannot be written to.
    """
    if path is not None and not path.parent.is_dir():
        raise InputError(f"{path}: there is no folder {path.parent} to write it in; make it first, or correct the path")
    if path is not None and not os.access(path.parent, os.W_OK):
        raise InputError(
            f"{path}: the folder {path.parent} cannot be written to; give another path, or change its rights"
        )
    return path


def in_a_folder_or_the_run(run: Path, paths: Iterable[Path | None]) -> None:
    """``in_a_folder_that_is_there`` for files of a verb that makes the folder ``run``, in which they may lie.

    Raises:
        InputError: the folder of a file is not there and is not ``run``, or cannot be written to.
    """
    for path in paths:
        if path is not None and path.parent.resolve() != run.resolve():
            in_a_folder_that_is_there(path)


JsonOption = Annotated[
    Path | None,
    typer.Option(
        "--json",
        metavar="PATH",
        dir_okay=False,
        callback=in_a_folder_that_is_there,
        help="Also write the result as JSON.",
        show_default=False,
    ),
]
RunJsonOption = Annotated[
    Path | None,
    typer.Option("--json", metavar="PATH", dir_okay=False, help="Also write the result as JSON.", show_default=False),
]
"""``JsonOption`` of verbs that make a run folder: the file may lie in it (``open_run`` checks that)."""
TaskOption = Annotated[
    Task, typer.Option("--task", help="Whether a passage answers (asymmetric) or says the same (symmetric).")
]
QueryTaskOption = Annotated[
    Task | None, typer.Option("--task", help="What the queries ask.", show_default="the index's")
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


def teacher_config(model: str, prompt: str | None) -> TeacherConfig:
    """The teacher that two options name; ``model`` may be ``KIND:MODEL``."""
    from d2llm.core.recipe import TeacherConfig

    return (TeacherConfig() if prompt is None else TeacherConfig(prompt=prompt)).named(model)


def open_run(
    session: Session,
    recipe: str,
    out: Path | None,
    data: Sequence[str] | None,
    device: str | None,
    dtype: str | None,
    *,
    files: Sequence[Path | None],
) -> Run:
    """The run that the arguments of a verb describe; ``files`` are what the verb will write besides.

    Raises:
        RecipeError: no such recipe, or its data sets cannot be told apart.
        InputError: a data set is not on this machine, or the folder of a file is not there: told before the work.
    """
    from d2llm.training.run import Run

    run = Run(recipe, out, data=data or (), device=device, dtype=dtype, show_progress=session.show_progress)
    in_a_folder_or_the_run(run.parts.path, files)
    return run
