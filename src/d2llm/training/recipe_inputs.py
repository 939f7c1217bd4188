"""Whether the models, students and files that a recipe names are on this machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

from d2llm.core.errors import D2LLMError, InputError
from d2llm.core.types import TASKS
from d2llm.models.downloads import find_saved
from d2llm.models.hub import find_student, is_on_hub
from d2llm.models.sources import locate_model
from d2llm.models.teachers.prompts import load_prompt
from d2llm.recipe import CosineTeacherConfig, PromptedTeacherConfig, Recipe
from d2llm.recipe.teacher import LocalTeacherConfig, VllmTeacherConfig

_Find = Callable[[str], bool]
_KEYS: dict[str, str] = {
    "start": "student",
    "student": "student",
    "mistaken_student": "student",
    "compared_students": "student",
    "labels": "path",
    "lists": "path",
}
"""What the settings of these names hold, in any section."""


def absent_inputs(recipe: Recipe) -> tuple[list[str], list[str]]:
    """What a recipe names and is not here: what a run would miss, and what it would look for on the Hub.

    Nothing is downloaded. Data sets are left out, whose location a run can be given, and so is a teacher that is not
    used. Each entry begins with the path of the setting.
    """
    missing: list[str] = []
    remote: list[str] = []
    for setting, name, find in _named(recipe):
        try:
            if not find(name):
                remote.append(f"{setting} = '{name}'")
        except (D2LLMError, OSError) as error:
            missing.append(f"{setting}: {error}")
    return missing, remote


def _named(recipe: Recipe) -> Iterator[tuple[str, str, _Find]]:
    backbone, teacher = recipe.student.backbone, recipe.teacher
    if backbone.address is None and "model" in type(backbone).model_fields:
        yield "student.backbone.model", backbone.model, _is_model_here
    finders: dict[str, _Find] = {"student": _is_student_here, "path": _is_path_here}
    sections = ("training", "mining", "labelling", "teacher_tuning", "teacher")
    for path, key, names in _texts(recipe.model_dump(include={*sections})):
        if key in _KEYS:
            yield from ((path, name, finders[_KEYS[key]]) for name in names)
    for kind, loss in recipe.losses.root.items():
        for key, find in (("teacher", _is_student_here), ("passages", _is_path_here)):
            if isinstance(name := getattr(loss, key, None), str) and getattr(loss, "writer", None) is None:
                yield f"losses.{kind}.{key}", name, find
    if not recipe.losses.imitates and recipe.mining.teacher_margin is None:
        return
    if isinstance(teacher, PromptedTeacherConfig):
        yield "teacher.prompt", teacher.prompt, _is_prompt_here
    if isinstance(teacher, CosineTeacherConfig):
        yield "teacher.model", teacher.model, _is_student_here
    elif isinstance(teacher, LocalTeacherConfig | VllmTeacherConfig):
        yield "teacher.model", teacher.model, _is_teacher_here


def _texts(values: Any, path: str = "", key: str = "") -> Iterator[tuple[str, str, list[str]]]:
    """Every setting with a text or a list of texts: its path, its name, the texts."""
    if isinstance(values, dict):
        for name, value in cast("dict[str, Any]", values).items():
            yield from _texts(value, f"{path}.{name}".removeprefix("."), name)
    elif isinstance(values, str):
        yield path, key, [values]
    elif isinstance(values, list | tuple):
        yield path, key, [name for name in cast("list[Any]", values) if isinstance(name, str)]


def _is_student_here(name: str) -> bool:
    if find_saved(name, "students") is not None:
        return True
    if is_on_hub(name):
        return False
    find_student(name)  # raises an error that says what to give
    return True


def _is_model_here(name: str) -> bool:
    return Path(locate_model(name)).is_dir()


def _is_teacher_here(name: str) -> bool:
    return find_saved(name, "teachers") is not None or find_saved(name, "students") is not None or _is_model_here(name)


def _is_path_here(name: str) -> bool:
    if not Path(name).exists():
        raise InputError(f"{name}: no such file or folder; check the path")
    return True


def _is_prompt_here(name: str) -> bool:
    for task in TASKS:
        load_prompt(name, task)
    return True
