"""The identity of a teacher and its prompt, which is the key of its labels, computed without loading the model."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from d2llm.core.errors import DataFormatError, MismatchError
from d2llm.core.fingerprint import fingerprint_json
from d2llm.core.json_values import read_model_json
from d2llm.core.manifest import FILE_NAME, read_any_manifest, read_manifest
from d2llm.core.types import TASKS, Task
from d2llm.models.downloads import find_saved
from d2llm.models.sources import find_model, find_model_file, fingerprint_model
from d2llm.models.teachers.prompts import load_prompt
from d2llm.recipe import (
    AutoTeacherConfig,
    ClassifierTeacherConfig,
    LocalTeacherConfig,
    PromptedTeacherConfig,
    Quantization,
    TeacherConfig,
    TeacherIdentity,
    VllmTeacherConfig,
)

_log = logging.getLogger(__name__)

TEACHER_KIND = "teacher"
TEACHER_FORMAT_VERSION = 1
ADAPTER_FILE = "adapter.safetensors"


def find_kind(config: TeacherConfig) -> str:
    """The kind of teacher that ``config`` names; for ``auto``, it is detected from the model's files.

    A tuned teacher keeps the kind that it was tuned as, and a student is used as a cosine teacher. Any other folder
    with a manifest is of the kind of teacher that the manifest names, such as ``ensemble``. For pretrained weights, the
    kind follows from the architecture in config.json.

    Raises:
        ModelNotFoundError: there are no usable weights.
        ModelError: config.json is damaged.
        DataFormatError: the manifest of a tuned teacher is damaged.
    """
    if not isinstance(config, AutoTeacherConfig):
        return config.kind
    folder = find_saved(config.model, "teachers")
    if folder is not None:
        manifest = read_any_manifest(folder, TEACHER_KIND)
        kind = str(manifest.get("kind"))
        if kind != TEACHER_KIND:
            return {"student": "cosine"}.get(kind, kind if kind in TeacherConfig.kinds.kinds else "causal")
        return _config(folder, manifest).kind
    config_file = find_model_file(find_model(config.model), "config.json")
    if config_file is None:
        return "causal"
    settings = read_model_json(config_file)
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
    config: LocalTeacherConfig
    fingerprint: str
    base_fingerprint: str | None


def read_tuned_teacher(config: TeacherConfig) -> TunedTeacher | None:
    """The tuned teacher that ``config.model`` names, or None if it names something else.

    Raises:
        DataFormatError: the folder's manifest cannot be read, or is not that of a teacher.
    """
    folder = find_saved(config.model, "teachers")
    if folder is None:
        return None
    manifest = read_manifest(folder, TEACHER_KIND, TEACHER_FORMAT_VERSION)
    tuned_config = _config(folder, manifest)
    if manifest["holds"] == "model":
        tuned_config = tuned_config.model_copy(update={"model": str(folder)})
        return TunedTeacher(folder, tuned_config, str(manifest["fingerprint"]), None)
    return TunedTeacher(folder, tuned_config, str(manifest["fingerprint"]), str(manifest["base_fingerprint"]))


def _config(folder: Path, manifest: Mapping[str, Any]) -> LocalTeacherConfig:
    problem = DataFormatError(folder / FILE_NAME, "has no readable teacher configuration; restore the folder")
    try:
        config = TeacherConfig.model_validate(manifest.get("config"))
    except ValidationError as error:
        raise problem from error
    if not isinstance(config, LocalTeacherConfig) or isinstance(config, AutoTeacherConfig):
        raise problem
    return config


def config_of(config: TeacherConfig, tuned: TunedTeacher | None) -> TeacherConfig:
    """The settings of a teacher's question: its own, or those of its tuning, with a warning if others are requested."""
    if tuned is None:
        return config
    tuned_config = tuned.config
    requested = config.model_fields_set & {"prompt", "max_tokens"}  # defaults do not count as requests
    for name in sorted(requested):
        value, requested_value = getattr(tuned_config, name, None), getattr(config, name)
        if value != requested_value:
            _log.warning(
                "%s was tuned with %s %s, not %s, which is ignored", tuned.folder, name, value, requested_value
            )
    return tuned_config


def require_same_base(tuned: TunedTeacher | None, fingerprint: str, name: str) -> None:
    """Raise a ``MismatchError`` if a tuned adapter belongs to other weights than those of its base model here."""
    if tuned and tuned.base_fingerprint not in (None, fingerprint):
        raise MismatchError(
            f"{tuned.folder}: the teacher was tuned on weights {tuned.base_fingerprint} of '{name}', but here that "
            f"name resolves to {fingerprint}; use the same weights"
        )


def identify_local_teacher(config: LocalTeacherConfig | VllmTeacherConfig) -> TeacherIdentity:
    """The identity of a teacher with local weights loaded from ``config``.

    A causal model that vLLM runs is the same teacher, unless one of them quantises the weights.

    Raises:
        ModelNotFoundError: there are no usable weights.
        InputError: there is no such prompt set.
    """
    tuned = read_tuned_teacher(config)
    fingerprint = tuned.fingerprint if tuned else fingerprint_model(find_model(config.model))
    if isinstance(config, VllmTeacherConfig):
        stored = config.quantization or "none"
    else:
        stored = chosen_quantization(config, tuned)
    question_config = tuned.config if tuned else config
    return TeacherIdentity(
        with_quantization(fingerprint, stored), {task: fingerprint_prompt(question_config, task) for task in TASKS}
    )


def chosen_quantization(config: LocalTeacherConfig, tuned: TunedTeacher | None) -> Quantization:
    """How the weights of a teacher are to be stored: as requested, by default as they were when it was tuned."""
    if tuned is None or "quantization" in config.model_fields_set:
        return config.quantization
    return tuned.config.quantization


def with_quantization(fingerprint: str, quantization: str) -> str:
    """The fingerprint of weights that are quantised in this way; unchanged for "none"."""
    return fingerprint if quantization == "none" else fingerprint_json([fingerprint, quantization])


def fingerprint_prompt(config: LocalTeacherConfig | VllmTeacherConfig, task: Task) -> str:
    """Identity of the question for ``task``. It includes the length limit, which affects the text that is read.

    A classifier has no question: the class that means yes takes its place.
    """
    if isinstance(config, PromptedTeacherConfig):
        return fingerprint_json([load_prompt(config.prompt, task).fingerprint, config.max_tokens])
    label = config.positive_label if isinstance(config, ClassifierTeacherConfig) else None
    return fingerprint_json(["classifier", label, config.max_tokens])
