"""Which teacher, asked what: the key of its labels, found without loading the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from d2llm.core.fingerprint import fingerprint_json
from d2llm.core.manifest import FILE_NAME, read_manifest
from d2llm.core.recipe import TeacherConfig
from d2llm.core.shipped import shipped_models
from d2llm.core.types import Task
from d2llm.models.prompts import load_prompt
from d2llm.models.sources import fingerprint_model, locate_model

TEACHER_KIND = "teacher"
TEACHER_FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True)
class TeacherIdentity:
    """Fingerprint of a teacher's weights, and of the question it is asked for each task."""

    fingerprint: str
    prompts: Mapping[Task, str]


def find_tuned_teacher(model: str) -> Path | None:
    """The folder of a tuned teacher: a folder that ``Teacher.save`` wrote, or a shipped teacher by its name."""
    if (Path(model) / FILE_NAME).is_file():
        return Path(model)
    return shipped_models("teachers").get(model)


def identify_causal_teacher(config: TeacherConfig) -> TeacherIdentity:
    """The identity that a ``Teacher`` loaded from ``config`` has.

    Raises:
        ModelNotFoundError: no usable weights there.
        InputError: no such prompt set.
    """
    folder = find_tuned_teacher(config.model)
    if folder is not None:
        manifest = read_manifest(folder, TEACHER_KIND, TEACHER_FORMAT_VERSION)
        config, fingerprint = TeacherConfig.model_validate(manifest["config"]), str(manifest["fingerprint"])
    else:
        fingerprint = fingerprint_model(locate_model(config.model))
    return TeacherIdentity(
        fingerprint,
        {
            "symmetric": fingerprint_prompt(config, "symmetric"),
            "asymmetric": fingerprint_prompt(config, "asymmetric"),
        },
    )


def fingerprint_prompt(config: TeacherConfig, task: Task) -> str:
    """Identity of the question put for ``task``; the length limit is part of it, since it decides what is read."""
    return fingerprint_json([load_prompt(config.prompt, task).fingerprint, config.max_tokens])
