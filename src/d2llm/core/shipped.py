"""Recipes, students, tuned teachers and writers that ship inside the package, by name."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Literal

from d2llm.core.manifest import FILE_NAME, read_any_manifest

DEFAULT_STUDENT = "d2llm-minilm"
MULTILINGUAL_STUDENT = "d2llm-multilingual"
DEFAULT_WRITER = "smollm2-writer"
"""Writes the queries of a fit unless another writer is named."""


def shipped_recipes() -> dict[str, Path]:
    """Name -> TOML file, sorted by name."""
    return {path.stem: path for path in sorted((_package() / "recipes").glob("*.toml"))}


def shipped_models(kind: Literal["students", "teachers", "writers"]) -> dict[str, Path]:
    """Name -> folder, sorted by name."""
    return {path.parent.name: path.parent for path in sorted((_package() / kind).glob(f"*/{FILE_NAME}"))}


def find_tuned(model: str, kind: Literal["teachers", "writers"]) -> Path | None:
    """The folder of a tuned or shipped model of this kind; None if ``model`` names something else."""
    if (Path(model) / FILE_NAME).is_file():
        return Path(model)
    return shipped_models(kind).get(model)


def name_student(fingerprint: str, source: object = None) -> str:
    """Name of a student in messages, such as ``d2llm-minilm (1b2c...)``.

    The name is taken from ``source``, or else from the shipped student with this fingerprint.
    """
    if isinstance(source, str) and source:
        return f"{Path(source).name} ({fingerprint})"
    for name, folder in shipped_models("students").items():
        if read_any_manifest(folder).get("fingerprint") == fingerprint:
            return f"{name} ({fingerprint})"
    return fingerprint


def _package() -> Path:
    return Path(str(files("d2llm"))) / "shipped"
