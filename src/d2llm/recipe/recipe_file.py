"""Reading recipes from TOML files or plain values. An unknown key is an error that suggests the closest known key."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

from pydantic import ValidationError

from d2llm.core.errors import RecipeError
from d2llm.core.inputs import path_of
from d2llm.core.problems import describe_errors
from d2llm.core.shipped import shipped_recipes
from d2llm.core.toml import parse_toml, read_toml
from d2llm.recipe import (
    Recipe,
    TeacherConfig,
    VllmTeacherConfig,
    WriterConfig,
    shaping_student_settings,
)
from d2llm.recipe.sections import SectionOfKind

_Kind = TypeVar("_Kind", bound=SectionOfKind)
_NOT_SET = "not set"
_NOT_SHAPING = {
    *("trackers", "checkpoint_every", "checkpoint_minutes", "max_minutes"),
    *("gradient_caching", "gradient_checkpointing", "graph_gib"),
    "tokens",  # made at the end, from the finished student
}


def load_recipe(path_or_name: str | Path) -> Recipe:
    """Read a TOML recipe from a file, or one shipped with d2llm by its name.

    Relative data paths are resolved against the current directory.

    Raises:
        RecipeError: the file is missing, is not TOML, or has an unknown key (the closest one is suggested) or a bad
            value.

    Example:
        >>> from d2llm import load_recipe
        >>> load_recipe("d2llm-small").name
        'd2llm-small'
    """
    path = _find_recipe(path_of(path_or_name, "path_or_name"))
    return parse_recipe(read_toml(path, RecipeError), where=str(path))


def load_recipe_text(text: str, *, where: str) -> Recipe:
    """Read the text of a TOML recipe; ``where`` names its origin in errors.

    Raises:
        RecipeError: as ``load_recipe``.
    """
    return parse_recipe(parse_toml(text, where=where, error=RecipeError), where=where)


def named_teacher(text: str, like: TeacherConfig | None = None, *, prompt: str | None = None) -> TeacherConfig:
    """The teacher that a text names: ``MODEL``, ``KIND:MODEL``, or a TOML file with the settings of [teacher].

    Args:
        text: what the user gave.
        like: the settings of a teacher that is named without a file.
        prompt: its prompt, in place of that of ``like`` or the file.

    Raises:
        RecipeError: the file is missing, is not TOML, or has an unknown key or a bad value, or such a teacher has no
            prompt.
    """
    teacher = named_section(text, "teacher", TeacherConfig, (like or TeacherConfig()).named)
    if prompt is None:
        return teacher
    if "prompt" not in type(teacher).model_fields:
        raise RecipeError(f"the teacher '{text}' is of kind {teacher.kind}, which has no prompt; leave it out")
    return teacher.model_copy(update={"prompt": prompt})


def named_writer(text: str) -> WriterConfig:
    """The writer that a text names: ``MODEL``, ``KIND:MODEL``, or a TOML file with the settings of [writer].

    Raises:
        RecipeError: as ``named_teacher``.
    """

    def named(text: str) -> WriterConfig:
        kind, model = WriterConfig.split_kind(text)
        return WriterConfig.model_validate({"kind": kind, "model": model})

    return named_section(text, "writer", WriterConfig, named)


def named_section(text: str, section: str, base: type[_Kind], named: Callable[[str], _Kind], **changes: Any) -> _Kind:
    """The section of kinds that a text names: what ``named`` makes of it, or a TOML file, with some ``changes``.

    Raises:
        RecipeError: as ``named_teacher``.
    """
    is_file = text.endswith(".toml") and base.split_kind(text)[1] == text
    try:
        if not is_file:
            return named(text)
        values = read_toml(Path(text), RecipeError)
        return base.model_validate({**values.get(section, values), **changes})
    except ValidationError as error:
        problem = describe_errors(error, base, section)
        if not is_file:
            text, problem = f"the {section} '{text}'", problem.removeprefix(f"{section}: ")
        raise RecipeError(f"{text}: {problem}") from error


def _find_recipe(path_or_name: str | Path) -> Path:
    path, shipped = Path(path_or_name), shipped_recipes()
    if path.name != str(path_or_name) or path.suffix or path.is_file():
        return path
    if path.name not in shipped:
        raise RecipeError(
            f"no recipe '{path}': give the path of a TOML file, or one of the shipped recipes: {', '.join(shipped)}"
        )
    return shipped[path.name]


def parse_recipe(values: dict[str, Any], *, where: str = "recipe") -> Recipe:
    """Build a Recipe from plain values; ``where`` names their origin in errors.

    Raises:
        RecipeError: there is an unknown key (the closest one is suggested) or a bad value.
    """
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise RecipeError(f"{where}: {describe_errors(error, Recipe)}") from error


def shaping_settings(recipe: Recipe) -> dict[str, Any]:
    """The settings of a recipe that determine the student, given its plans and labels, as plain JSON.

    Settings of other steps are left out, and so are those that affect only speed or convenience.
    """
    values = recipe.model_dump(
        mode="json",
        include={"seed", "student", "training"},
        exclude={"training": _NOT_SHAPING},
    )
    values["losses"] = recipe.losses.shaping()
    values["student"] = shaping_student_settings(values["student"])
    data = {Path(item.path).name: {"task": item.task, "max_labelled": item.max_labelled} for item in recipe.data}
    values["data"] = data
    if recipe.training.remine:
        values["mining"] = recipe.mining.model_dump(mode="json")
    if recipe.score_features.in_training:
        values["score_features"] = recipe.score_features.model_dump(mode="json")
    return values


def tuning_settings(recipe: Recipe) -> dict[str, Any]:
    """The settings of a recipe that determine a tuned teacher, given its plans, as plain JSON.

    Settings for scoring are left out, and so are those that affect only speed, memory or convenience.
    """
    teacher, tuning = recipe.teacher, recipe.teacher_tuning
    # A teacher that vLLM runs is tuned as any other.
    tuned = teacher.as_kind("auto") if isinstance(teacher, VllmTeacherConfig) else teacher
    scoring = {"ensemble_with_cosine", "remote", "lists", "recorded", "dtype", "device_map", "quantization"}
    values = tuning.model_dump(
        mode="json", exclude={"checkpoint_minutes", "graph_gib", "gradient_checkpointing", "quantization"}
    )
    values["quantization"] = tuning.base_quantization(teacher)
    return {"teacher": tuned.model_dump(mode="json", exclude=scoring), "teacher_tuning": values, "seed": recipe.seed}


def changed_recipe(
    before: Mapping[str, Any], after: Mapping[str, Any], shaping: Callable[[Recipe], dict[str, Any]] = shaping_settings
) -> list[str]:
    """The differences between two recipes, both plain JSON, in what ``shaping`` takes of them (``changed_settings``).

    Both are read with today's schema, so a setting that the writer of one did not know has its default.
    """
    try:
        old, new = (parse_recipe(dict(values), where="the recipe") for values in (before, after))
    except RecipeError as error:
        return [f"{error}; another version of d2llm wrote it"]
    return changed_settings(shaping(old), shaping(new))


def changed_settings(before: Mapping[str, Any], after: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The differences between two mappings of settings, both plain JSON, each as "section.key (was 1, is 2)".

    A key that only one of them has is reported as "section.key (was not set, is 2)"; a whole section, as "is set".
    """
    changes: list[str] = []
    for key in before.keys() | after.keys():
        old, new = before.get(key, _NOT_SET), after.get(key, _NOT_SET)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            sections = cast("Mapping[str, Any]", old), cast("Mapping[str, Any]", new)
            changes += changed_settings(*sections, f"{prefix}{key}.")
        elif old != new:
            was, now = ("set" if isinstance(value, Mapping) else value for value in (old, new))
            changes.append(f"{prefix}{key} (was {was}, is {now})")
    return sorted(changes)
