"""The manifest of an index: what it is of, written once with it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from d2llm.core.errors import DataFormatError
from d2llm.core.files import MANIFEST_NAME
from d2llm.core.manifest import read_manifest, write_manifest

KIND = "index"
FORMAT_VERSION = 3
"""The newest format that is read."""
FORMATS: dict[int, int] = {2: 2, 1: 3}
"""By copies of the vectors, so that d2llm before 3 reads what it can."""


def write_index_manifest(folder: Path, vector_copies: int, content: Mapping[str, Any]) -> None:
    """Write the manifest of an index whose table gets checksums (``table_files``)."""
    write_manifest(folder, KIND, FORMATS[vector_copies], {**content, "checksums": 1})


def read_index_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an index.

    Raises:
        DataFormatError: there is none, or it is damaged or of another format.
    """
    manifest = read_manifest(folder, KIND, FORMAT_VERSION)
    kinds = {"student": str, "task": str, "dim": int, "vector_format": str}
    wrong = [key for key, kind in kinds.items() if not isinstance(manifest.get(key), kind)]
    if manifest.get("vector_copies", 2) not in (1, 2):
        wrong.append("vector_copies")
    if wrong:
        raise DataFormatError(folder / MANIFEST_NAME, f"has no valid {', '.join(wrong)}; restore it from a copy")
    return manifest
