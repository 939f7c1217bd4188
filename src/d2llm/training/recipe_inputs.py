"""Whether the models, students and files that a recipe names are on this machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel

from d2llm.core.errors import D2LLMError, InputError
from d2llm.core.types import TASKS
from d2llm.models.downloads import find_saved
from d2llm.models.hub import find_student, is_on_hub
from d2llm.models.length_limit import check_layers, check_limits
from d2llm.models.sources import locate_model
from d2llm.models.teachers.prompts import load_prompt
from d2llm.recipe import CosineTeacherConfig, PromptedTeacherConfig, Recipe
from d2llm.recipe.sections import Names
from d2llm.recipe.teacher import LocalTeacherConfig, VllmTeacherConfig

_Find = Callable[[str], bool]


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


def check_backbone(recipe: Recipe) -> None:
    """Raise an ``InputError`` if the backbone is on this machine, and has fewer layers or reads fewer tokens, or has no
    token for masked text, which pretraining needs.
    """
    from transformers import AutoConfig, AutoTokenizer

    backbone, masking = recipe.student.backbone, [one for one in recipe.training.pretraining if one.masks]
    tokenizer: Any = None
    try:
        config: Any = AutoConfig.from_pretrained(locate_model(backbone.model), local_files_only=True)
        if masking:
            tokenizer = AutoTokenizer.from_pretrained(locate_model(backbone.model), local_files_only=True)
    except (D2LLMError, OSError, ValueError):  # it is not here, or no model of transformers
        return
    if backbone.layers is not None:
        check_layers(backbone.layers, getattr(config, "num_hidden_layers", 0), name=backbone.model)
    limits = {"max_query_tokens": backbone.max_query_tokens, "max_passage_tokens": backbone.max_passage_tokens}
    check_limits(config, backbone.model, limits)
    for stage in masking:
        stage.require_mask(backbone.model, tokenizer)


def _named(recipe: Recipe) -> Iterator[tuple[str, str, _Find]]:
    backbone, teacher = recipe.student.backbone, recipe.teacher
    if backbone.address is None and "model" in type(backbone).model_fields:
        yield "student.backbone.model", backbone.model, _is_model_here
    finders: dict[str, _Find] = {"student": _is_student_here, "path": _is_path_here}
    losses = {f"losses.{kind}": loss for kind, loss in recipe.losses.root.items()}
    for path, section in {**dict(recipe), **losses}.items():
        if isinstance(section, BaseModel) and getattr(section, "writer", None) is None:  # a writer makes what is absent
            yield from ((setting, name, finders[what]) for setting, what, name in _marked(section, path))
    if not recipe.losses.imitates and recipe.mining.teacher_margin is None:
        return
    if isinstance(teacher, PromptedTeacherConfig):
        yield "teacher.prompt", teacher.prompt, _is_prompt_here
    if isinstance(teacher, CosineTeacherConfig):
        yield "teacher.model", teacher.model, _is_student_here
    elif isinstance(teacher, LocalTeacherConfig | VllmTeacherConfig):
        yield "teacher.model", teacher.model, _is_teacher_here


def _marked(section: BaseModel, path: str) -> Iterator[tuple[str, str, str]]:
    """What the settings of a section name, and of those within: path of the setting, what is named, its name."""
    for name, field in type(section).model_fields.items():
        value, setting = getattr(section, name), f"{path}.{name}"
        if isinstance(value, BaseModel):
            yield from _marked(value, setting)
        elif isinstance(value, tuple) and all(isinstance(each, BaseModel) for each in value):
            for number, each in enumerate(value):
                yield from _marked(each, f"{setting}[{number}]")
        elif value is not None:
            marks = (part for part in (*field.metadata, *_parts_of(field.annotation)) if isinstance(part, Names))
            if (mark := next(marks, None)) is not None:
                yield from ((setting, mark.what, one) for one in ([value] if isinstance(value, str) else value))


def _parts_of(kind: Any) -> Iterator[Any]:
    yield kind
    for part in get_args(kind):
        yield from _parts_of(part)


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
