"""The manifest of an index: its student, task and vector format; written once at creation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from d2llm.core.errors import DataFormatError
from d2llm.core.files import MANIFEST_NAME
from d2llm.core.manifest import read_manifest, write_manifest

KIND = "index"
FORMAT_VERSION = 3
"""The newest format that can be read."""
FORMATS: dict[int, int] = {2: 2, 1: 3}
"""Number of vector copies -> format version, so that versions of d2llm before format 3 read what they can."""


def write_index_manifest(folder: Path, vector_copies: int, content: Mapping[str, Any]) -> None:
    """Write the manifest of an index with checksums of its table (``table_files``)."""
    write_manifest(folder, KIND, FORMATS[vector_copies], {**content, "checksums": 1})


def read_index_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an index.

    Raises:
        DataFormatError: it is missing, damaged, or has another format.
    """
    manifest = read_manifest(folder, KIND, FORMAT_VERSION)
    kinds = {"student": str, "task": str, "dim": int, "vector_format": str}
    wrong = [key for key, kind in kinds.items() if not isinstance(manifest.get(key), kind)]
    if manifest.get("vector_copies", 2) not in (1, 2):
        wrong.append("vector_copies")
    if wrong:
        raise DataFormatError(folder / MANIFEST_NAME, f"has no valid {', '.join(wrong)}; restore it from a copy")
    return manifest
