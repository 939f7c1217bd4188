"""The files in a student's folder, and checks that they are complete and undamaged."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from d2llm.core.errors import DataFormatError, MismatchError, ModelError
from d2llm.core.fingerprint import fingerprint_json
from d2llm.core.manifest import FILE_NAME as MANIFEST
from d2llm.core.manifest import read_manifest
from d2llm.core.problems import describe_errors
from d2llm.core.types import TASKS, Task
from d2llm.models.sources import load_tensors
from d2llm.recipe import CustomBackbone, Pooling, StudentConfig, shaping_student_settings

if TYPE_CHECKING:  # importing torch takes seconds, and a wrong name should be reported without it
    from torch import Tensor, nn

    from d2llm.models.backbone import Backbone
    from d2llm.models.engines.lean_bert import LeanBert

KIND = "student"
FORMAT_VERSION = 4
HEAD_FILE, ADAPTER_FILE, BACKBONE_FOLDER = "head.safetensors", "adapter_model.safetensors", "backbone"
ADAPTER_CONFIG_FILE, CARD_FILE, MODULES_FILE = "adapter_config.json", "README.md", "modules.json"
ADAPTER_FILES = (ADAPTER_FILE, ADAPTER_CONFIG_FILE)
CONTENT_HASH = "sha256"  # in the manifest: ``content_sha256`` when it was written
FILES = "files"  # in the manifest: ``saved_files`` when it was written
_SAVED = (".safetensors", ".json")
RESTORE = "restore the student's folder"


def read_student_manifest(folder: Path) -> tuple[dict[str, Any], StudentConfig]:
    """Read the manifest of a student's folder, and the configuration in it.

    Raises:
        DataFormatError: there is no manifest, it belongs to another kind of artifact, or it lacks a field; the
            folder has a pipe or device.
    """
    for path in folder.rglob("*"):
        if not path.is_file() and not path.is_dir():  # a pipe would be waited for, a device has no end
            raise DataFormatError(path, f"is no file, but a pipe, a device or a broken link; {RESTORE}")
    manifest = read_manifest(folder, KIND, FORMAT_VERSION)
    missing = {"config", "fingerprint", "base_fingerprint", "pooling", CONTENT_HASH} - manifest.keys()
    if missing:
        raise DataFormatError(folder / MANIFEST, f"lacks {', '.join(sorted(missing))}; {RESTORE}")
    if lost := [name for name in manifest.get(FILES, ()) if not (folder / name).is_file()]:
        remedy = f'{RESTORE}, or take what is to be missing out of "{FILES}" in {MANIFEST}'
        raise DataFormatError(folder, f"lacks {', '.join(lost)}, saved with the student; {remedy}")
    try:
        config = StudentConfig.model_validate(manifest["config"])  # says which package a pooling may lack
    except ValidationError as error:
        problems = describe_errors(error, StudentConfig, "config")
        remedy = "update d2llm, install the package that has what is missing, or restore the folder"
        raise DataFormatError(folder / MANIFEST, f"its configuration cannot be read ({problems}); {remedy}") from error
    if manifest["pooling"] not in Pooling.kinds.kinds:
        raise DataFormatError(
            folder / MANIFEST, f"has the pooling {manifest['pooling']!r:.60}, which is none; {RESTORE}"
        )
    return manifest, config


def saved_files(folder: Path) -> list[str]:
    """The names of the files of weights and settings below a student's folder, but for its manifest."""
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.suffix in _SAVED)
    return sorted(name for name in names if name != MANIFEST)


def trained_tasks(manifest: Mapping[str, Any]) -> tuple[Task, ...]:
    """The tasks of the data that a student was trained on; empty if its manifest names none."""
    return tuple(task for task in TASKS if task in manifest.get("tasks", ()))


def head_tensors(modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """The weights of a student's parts other than the backbone, named ``<part>.<weight>``."""
    return {
        f"{part}.{name}": tensor.detach().cpu().contiguous()
        for part, module in modules.items()
        for name, tensor in module.state_dict().items()
    }


def load_head(folder: Path, modules: Mapping[str, nn.Module]) -> None:
    """Load the weights in a student's folder into its parts other than the backbone.

    Raises:
        ModelError: the weights cannot be read, or do not fit.
    """
    state = load_tensors(folder / HEAD_FILE, remedy=RESTORE)
    try:
        for part, module in modules.items():
            prefix = part + "."
            module.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
    except RuntimeError as error:
        raise ModelError(
            f"{folder / HEAD_FILE} does not fit the student's configuration ({' '.join(str(error).split())}); {RESTORE}"
        ) from error


def require_same_base(folder: Path, manifest: dict[str, Any], backbone: Backbone | LeanBert) -> None:
    """Raise a ``MismatchError`` unless the loaded backbone has the weights that the student was trained on."""
    fingerprint = backbone.fingerprint_base()
    if fingerprint != manifest["base_fingerprint"] and isinstance(backbone.config, CustomBackbone):
        raise MismatchError(
            f"{folder / MANIFEST}: the settings of the {backbone.config.kind} backbone are not those that the student "
            "was trained with, so its vectors would be others; restore config.backbone, or train again"
        )
    if fingerprint != manifest["base_fingerprint"]:
        raise MismatchError(
            f"{folder}: the student was trained on backbone weights {manifest['base_fingerprint']} of "
            f"'{manifest['config']['backbone']['model']}', but here that name resolves to {fingerprint}; install "
            "the same weights"
        )


def fingerprint_student(config: Mapping[str, Any], base_fingerprint: str, tensors: Mapping[str, Tensor]) -> str:
    """Content hash of a student: its configuration, the head's tensors, and those that tuning changed, on the CPU.

    ``base_fingerprint``, that of the pretrained backbone, replaces the backbone's name in the configuration.
    """
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    shaping = shaping_student_settings(config)
    named = {**shaping, "backbone": {**shaping["backbone"], "model": base_fingerprint}}
    return fingerprint_json([named, digest.hexdigest()])


def content_sha256(folder: Path, manifest: Mapping[str, Any]) -> str:
    """SHA-256 of what is to stay as it was saved: a student's identity, its configuration, and the files of weights."""
    identity = [manifest[name] for name in ("fingerprint", "base_fingerprint", "pooling")]
    saved = json.dumps([*identity, shaping_student_settings(manifest["config"])], sort_keys=True)
    digest = hashlib.sha256(saved.encode())
    paths = (folder / HEAD_FILE, folder / ADAPTER_FILE, *sorted((folder / BACKBONE_FOLDER).glob("*.safetensors")))
    for path in paths:
        if path.is_file():
            digest.update(path.name.encode())
            with path.open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
    return digest.hexdigest()


def check_content(folder: Path) -> None:
    """Check that a student's configuration and weights are as saved.

    Raises:
        DataFormatError: there is no manifest, or it is damaged.
        ModelError: they are not.
    """
    manifest, _ = read_student_manifest(folder)
    actual, expected = content_sha256(folder, manifest), manifest[CONTENT_HASH]
    if actual != expected:
        raise ModelError(
            f"{folder}: its configuration and weights have the hash {actual[:16]}, but the manifest says "
            f"{str(expected)[:16]}: they are damaged or belong to another student; fetch or restore the folder again"
        )
