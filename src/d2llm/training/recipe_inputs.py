"""Whether the models, students and files that a recipe names are on this machine, and can do what it asks of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import torch
from pydantic import BaseModel

from d2llm.core.errors import D2LLMError, InputError, ModelNotFoundError
from d2llm.core.types import TASKS
from d2llm.data.open_data import open_source
from d2llm.data.pairs import PairSource
from d2llm.models.backbone import open_backbone
from d2llm.models.downloads import find_saved
from d2llm.models.hub import find_student, is_on_hub
from d2llm.models.sources import locate_model
from d2llm.models.student import Student
from d2llm.models.teachers.pair_teacher import ranks_lists, scores_only_recorded
from d2llm.models.teachers.prompts import load_prompt
from d2llm.recipe import CosineTeacherConfig, PromptedTeacherConfig, Recipe, TeacherConfig
from d2llm.recipe.sections import Names
from d2llm.recipe.teacher import LocalTeacherConfig, VllmTeacherConfig
from d2llm.training.open_run import is_absent

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


def check_models(recipe: Recipe) -> None:
    """Make the untrained student without its weights, and have the losses and the pretraining check it, as training
    would after mining and labelling.

    Models that are not in a folder on this machine are left out.

    Raises:
        InputError: the backbone, or one to imitate, has fewer layers or components, reads fewer tokens, has another
            tokenizer, or lacks a token for masked text; or no loss learns from such data sets.
        ModelError: it lacks a part that the recipe needs.
    """
    if recipe.student.backbone.address is not None or not _is_here(recipe.student.backbone.model):
        return
    config, no_weights = recipe.student, torch.device("meta")
    try:
        backbone = open_backbone(config.backbone, config.pooling, device=no_weights, compute_dtype=torch.float32)
    except ModelNotFoundError:  # not a model's folder
        return
    student = Student(config, backbone)
    has_lists = _has_lists(recipe)
    for loss in recipe.losses.root.values():
        loss.check_student(student, has_lists=has_lists)
    for stage in recipe.training.pretraining:
        stage.require_mask(config.backbone.model, backbone.tokenizer)
        task = stage.task(backbone, recipe.seed)
        if all(_is_here(name) for _, what, name in _marked(stage, "") if what == "model"):
            task.check()


def check_asked(recipe: Recipe, teacher: TeacherConfig) -> None:
    """Refuse to add labels to lists that a teacher has ranked, and to ask for pairs that nobody has recorded."""
    training = recipe.training
    if not (recipe.losses.imitates and training.asks_teacher):
        return
    name = "in_batch_labels" if training.in_batch_labels else 'unjudged = "ask_teacher"'
    asks = f"training.{name} has the teacher score more passages of a query in training, but"
    if ranks_lists(teacher):
        raise InputError(
            f"{asks} one of kind listwise only orders those that it sees together, so its labels cannot be compared "
            "with those of the training set: use a teacher of another kind, such as graded, or delete the setting"
        )
    if scores_only_recorded(teacher):
        raise InputError(
            f"{asks} the grades of '{teacher.model}' were recorded, and other pairs would count as log-odds 0, more "
            "than most passages get: set teacher.recorded.unlisted, the grade of a passage that is in no list (such "
            "as 0), and label again; or delete the setting"
        )


def _has_lists(recipe: Recipe) -> bool:
    """Whether a data set has queries with lists, as far as the data sets are here, and not only labelled pairs."""
    here = [data.path for data in recipe.data if not is_absent(data) and not data.path.startswith("hf:/")]
    return len(here) < len(recipe.data) or not here or not all(isinstance(open_source(p), PairSource) for p in here)


def _is_here(name: str) -> bool:
    try:
        return Path(locate_model(name)).is_dir()
    except (D2LLMError, OSError):
        return False


def _named(recipe: Recipe) -> Iterator[tuple[str, str, _Find]]:
    backbone, teacher = recipe.student.backbone, recipe.teacher
    if backbone.address is None and "model" in type(backbone).model_fields:
        yield "student.backbone.model", backbone.model, _is_model_here
    finders: dict[str, _Find] = {"student": _is_student_here, "model": _is_backbone_here, "path": _is_path_here}
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
        elif isinstance(value, tuple) and all(isinstance(one, BaseModel) for one in value):
            for index, one in enumerate(value):
                yield from _marked(one, f"{setting}[{index}]")
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


def _is_backbone_here(name: str) -> bool:
    return find_saved(name, "students") is not None or _is_model_here(name)


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
