"""The identity of a teacher and its prompt, which is the key of its labels, computed without loading the model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from d2llm.core.errors import DataFormatError, ModelError
from d2llm.core.fingerprint import fingerprint_json
from d2llm.core.manifest import FILE_NAME, read_any_manifest, read_manifest
from d2llm.core.recipe import TeacherConfig
from d2llm.core.shipped import find_tuned
from d2llm.core.types import TASKS, Task
from d2llm.models.sources import find_model, find_model_file, fingerprint_model
from d2llm.models.teachers.prompts import load_prompt

TEACHER_KIND = "teacher"
TEACHER_FORMAT_VERSION = 1
LOCAL_KINDS = frozenset({"causal", "seq2seq", "classifier"})
_OTHER_KINDS = frozenset({"remote", "cosine", "stack"})


@dataclass(frozen=True, slots=True)
class TeacherIdentity:
    """Fingerprints of a teacher's weights and of its question for each task."""

    fingerprint: str
    prompts: Mapping[Task, str]


def find_tuned_teacher(model: str) -> Path | None:
    """The folder of a tuned teacher (``CausalTeacher.save``) or of a shipped teacher; None if it is neither."""
    return find_tuned(model, "teachers")


def find_kind(config: TeacherConfig) -> str:
    """The kind of teacher that ``config`` names; for ``auto``, it is detected from the model's files.

    A tuned teacher keeps the kind that it was tuned as, and a student is used as a cosine teacher. For pretrained
    weights, the kind follows from the architecture in config.json.

    Raises:
        ModelNotFoundError: there are no usable weights.
        ModelError: config.json is damaged.
        DataFormatError: the manifest of a tuned teacher is damaged.
    """
    if config.kind != "auto":
        return config.kind
    folder = find_tuned_teacher(config.model)
    if folder is not None:
        manifest = read_any_manifest(folder, TEACHER_KIND)
        kind = str(manifest.get("kind"))
        if kind != TEACHER_KIND:
            return {"student": "cosine"}.get(kind, kind if kind in _OTHER_KINDS else "causal")
        config = _config(folder, manifest)
        return config.kind if config.kind != "auto" else "causal"
    config_file = find_model_file(find_model(config.model), "config.json")
    if config_file is None:
        return "causal"
    try:
        settings = dict(json.loads(config_file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ModelError(f"{config_file}: is not a model's configuration ({error}); fetch or restore it") from error
    architecture = str((settings.get("architectures") or [""])[0])
    if architecture.endswith("ForSequenceClassification"):
        return "classifier"
    return "seq2seq" if settings.get("is_encoder_decoder") else "causal"


@dataclass(frozen=True, slots=True)
class TunedTeacher:
    """The content of a tuned teacher's manifest.

    ``base_fingerprint`` is that of the weights that its adapter belongs to; None if the folder holds the whole model
    (``config.model`` is then that folder).
    """

    folder: Path
    config: TeacherConfig
    fingerprint: str
    base_fingerprint: str | None


def read_tuned_teacher(config: TeacherConfig) -> TunedTeacher | None:
    """The tuned teacher that ``config.model`` names, or None if it names something else.

    Raises:
        DataFormatError: the folder's manifest cannot be read, or is not that of a teacher.
    """
    folder = find_tuned_teacher(config.model)
    if folder is None:
        return None
    manifest = read_manifest(folder, TEACHER_KIND, TEACHER_FORMAT_VERSION)
    own = _config(folder, manifest)
    if manifest.get("holds") == "model":
        own = own.model_copy(update={"model": str(folder)})
        return TunedTeacher(folder, own, str(manifest["fingerprint"]), None)
    return TunedTeacher(folder, own, str(manifest["fingerprint"]), str(manifest["base_fingerprint"]))


def _config(folder: Path, manifest: Mapping[str, Any]) -> TeacherConfig:
    try:
        return TeacherConfig.model_validate(manifest.get("config"))
    except ValidationError as error:
        raise DataFormatError(
            folder / FILE_NAME, "has no readable teacher configuration; restore the folder"
        ) from error


def identify_local_teacher(config: TeacherConfig) -> TeacherIdentity:
    """The identity of a teacher with local weights (``LOCAL_KINDS``) loaded from ``config``.

    Raises:
        ModelNotFoundError: there are no usable weights.
        InputError: there is no such prompt set.
    """
    kind = find_kind(config)
    tuned = read_tuned_teacher(config)
    fingerprint = tuned.fingerprint if tuned else fingerprint_model(find_model(config.model))
    own = tuned.config if tuned else config
    return TeacherIdentity(fingerprint, {task: fingerprint_prompt(own, task, kind=kind) for task in TASKS})


def fingerprint_prompt(config: TeacherConfig, task: Task, *, kind: str = "causal") -> str:
    """Identity of the question for ``task``. It includes the length limit, which affects the text that is read.

    A classifier has no question: the class that means yes takes its place.
    """
    if kind == "classifier":
        return fingerprint_json([kind, config.positive_label, config.max_tokens])
    return fingerprint_json([load_prompt(config.prompt, task).fingerprint, config.max_tokens])
