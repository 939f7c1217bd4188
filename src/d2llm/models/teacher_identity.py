"""Which teacher, asked what: the key of its labels, found without loading the model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from d2llm.core.fingerprint import fingerprint_json
from d2llm.core.manifest import FILE_NAME, read_manifest
from d2llm.core.recipe import TeacherConfig
from d2llm.core.shipped import shipped_models
from d2llm.core.types import Task
from d2llm.models.prompts import load_prompt
from d2llm.models.sources import find_model_file, fingerprint_model, locate_model

TEACHER_KIND = "teacher"
TEACHER_FORMAT_VERSION = 1
LOCAL_KINDS = frozenset({"causal", "seq2seq", "classifier"})
_OTHER_KINDS = frozenset({"remote", "cosine", "stack"})


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


def find_kind(config: TeacherConfig) -> str:
    """The kind of teacher that ``config`` names; for ``auto``, what its folder says.

    A tuned teacher is of the kind it was tuned as, a student stands for its cosine; of pretrained weights config.json
    names the architecture.

    Raises:
        ModelNotFoundError: no usable weights there.
    """
    if config.kind != "auto":
        return config.kind
    folder = find_tuned_teacher(config.model)
    if folder is not None:
        manifest = json.loads((folder / FILE_NAME).read_text(encoding="utf-8"))
        kind = str(manifest.get("kind"))
        if kind != TEACHER_KIND:
            return {"student": "cosine"}.get(kind, kind if kind in _OTHER_KINDS else "causal")
        config = TeacherConfig.model_validate(manifest["config"])
        return config.kind if config.kind != "auto" else "causal"
    config_file = find_model_file(locate_model(config.model), "config.json")
    if config_file is None:
        return "causal"
    settings = json.loads(config_file.read_text(encoding="utf-8"))
    architecture = str((settings.get("architectures") or [""])[0])
    if architecture.endswith("ForSequenceClassification"):
        return "classifier"
    return "seq2seq" if settings.get("is_encoder_decoder") else "causal"


def identify_local_teacher(config: TeacherConfig) -> TeacherIdentity:
    """The identity that a teacher of local weights (``LOCAL_KINDS``) loaded from ``config`` has.

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


identify_causal_teacher = identify_local_teacher


def fingerprint_prompt(config: TeacherConfig, task: Task) -> str:
    """Identity of the question put for ``task``; the length limit is part of it, since it decides what is read."""
    return fingerprint_json([load_prompt(config.prompt, task).fingerprint, config.max_tokens])
