"""The manifest of an index: its student, task and vector format; written once at creation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from d2llm.core.errors import DamagedFileError, DataFormatError
from d2llm.core.files import MANIFEST_NAME
from d2llm.core.manifest import package_versions, read_any_manifest, read_manifest
from d2llm.store.checksums import read_checked, write_checked
from d2llm.store.index_spec import StoredSpec

KIND = "index"
FORMAT_VERSION = 5
SHARDED_KIND = "sharded index"
"""Kind of a folder with several indexes (``shards``)."""
FIT_KIND, INDEX_OF_FIT = "search", "index"
"""Kind of a folder that ``fit`` makes, and the name of the index in it."""
INDEX_FIELDS = tuple(StoredSpec.model_fields)
"""What a manifest says about an index; all shards of a sharded index, and its own manifest, agree in it."""


def find_index(path: Path) -> Path:
    """The folder of an index: ``path`` itself or, if that is the folder of a fit, the index in it."""
    try:
        manifest = read_any_manifest(path)
    except DataFormatError:  # for whoever opens the index to report
        return path
    return path / INDEX_OF_FIT if manifest.get("kind") == FIT_KIND else path


VectorCopies = Literal[1, 2]
"""How often the vectors are stored (``store/stored_vectors.py``)."""


def write_index_manifest(folder: Path, content: Mapping[str, Any]) -> None:
    """Write the manifest of an index, atomically, with a checksum."""
    head = {"kind": KIND, "format_version": FORMAT_VERSION, "packages": package_versions()}
    write_checked(folder / MANIFEST_NAME, head | dict(content) | head)


def require_index(folder: Path) -> None:
    """Check that a folder holds an index, sharded or not, by its manifest.

    Raises:
        DataFormatError: it does not, or the manifest of an index that is not sharded is damaged.
    """
    if read_any_manifest(folder, KIND).get("kind") != SHARDED_KIND:
        read_index_manifest(folder)


def read_index_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an index.

    Raises:
        DataFormatError: it is missing, damaged, or has another format.
    """
    if read_any_manifest(folder, KIND).get("kind") == SHARDED_KIND:
        problem = "is a sharded index, but one that is not sharded is needed here; give that, or one of its shards"
        raise DataFormatError(folder, problem)
    read_manifest(folder, KIND, FORMAT_VERSION)
    path = folder / MANIFEST_NAME
    try:
        manifest: dict[str, Any] = read_checked(path)
    except (OSError, ValueError) as error:
        raise DamagedFileError(
            path, f"is damaged ({error}); put it back from a copy, or index the corpus again"
        ) from error
    kinds = {"student": str, "task": str, "dim": int, "vector_format": str}
    wrong = [key for key, kind in kinds.items() if not isinstance(manifest.get(key), kind)]
    if manifest.get("vector_copies") not in get_args(VectorCopies):
        wrong.append("vector_copies")
    wrong += [name for name in (*INDEX_FIELDS, "snapshot") if name not in {*manifest, *wrong}]
    if wrong:
        raise DataFormatError(folder / MANIFEST_NAME, f"has no valid {', '.join(wrong)}; restore it from a copy")
    return manifest
