"""The manifest of an index: its student, task and vector format, which stay, and how documents are chunked.

The chunking is chosen when the first documents come, and the student's errors against teachers are measured at any
time. They are in the manifest, so that they cannot be lost alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from d2llm.core.errors import DamagedFileError, DataFormatError
from d2llm.core.files import MANIFEST_NAME
from d2llm.core.manifest import package_versions, read_any_manifest, read_manifest
from d2llm.store.checksums import read_checked, write_checked
from d2llm.store.index_spec import StoredSpec

KIND = "index"
FORMAT_VERSION = 6
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
    write_checked(folder / MANIFEST_NAME, head | {CHUNKING: None} | dict(content) | head)


def require_index(folder: Path) -> None:
    """Check that a folder holds an index, sharded or not, by its manifest.

    Raises:
        DataFormatError: it does not, or the manifest of an index that is not sharded is damaged.
    """
    if read_any_manifest(folder, KIND).get("kind") != SHARDED_KIND:
        read_index_manifest(folder)


def read_index_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an index, without what may change: its chunking, and the errors of its student.

    Raises:
        DataFormatError: it is missing, damaged, or has another format.
    """
    if read_any_manifest(folder, KIND).get("kind") == SHARDED_KIND:
        problem = "is a sharded index, but one that is not sharded is needed here; give that, or one of its shards"
        raise DataFormatError(folder, problem)
    read_manifest(folder, KIND, FORMAT_VERSION)
    manifest = _read(folder)
    kinds = {"student": str, "task": str, "dim": int, "vector_format": str}
    wrong = [key for key, kind in kinds.items() if not isinstance(manifest.get(key), kind)]
    if manifest.get("vector_copies") not in get_args(VectorCopies):
        wrong.append("vector_copies")
    wrong += [name for name in (*INDEX_FIELDS, "snapshot", CHUNKING) if name not in {*manifest, *wrong}]
    if wrong:
        raise DataFormatError(folder / MANIFEST_NAME, f"has no valid {', '.join(wrong)}; restore it from a copy")
    return without_notes(manifest)


def _read(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST_NAME
    try:
        return read_checked(path)
    except (OSError, ValueError) as error:
        raise DamagedFileError(
            path, f"is damaged ({error}); put it back from a copy, or index the corpus again"
        ) from error


def change_manifest(folder: Path, copy: Path | None = None, **changes: Any) -> None:
    """Replace entries of an index's manifest, or of a copy in another folder, atomically; requires the write lock."""
    write_checked((copy or folder) / MANIFEST_NAME, _read(folder) | changes)


CHUNKING = "chunking"
"""Entry of a manifest: how documents are chunked into passages, so that the next writer chunks them the same way."""
_ERRORS = "student_errors"
"""Entry of a manifest: errors of the student against teachers (``retrieval.calibrate``), if some were measured."""
CHUNK_TOKENS = 128
"""Default tokens of a passage: the best on long articles (docs/index.md) for students that read this many."""


@dataclass(frozen=True, slots=True)
class Chunking:
    """How documents are chunked into passages.

    Attributes:
        chunk_tokens: maximum tokens (of the student) per passage, including its title; None makes each document one
            passage, and text beyond the student's limit is not searchable.
        chunk_overlap: maximum tokens repeated from the previous passage, in whole sentences or words.
        late: make late chunks (``models.late_chunking``).
        late_window: tokens of a document that are read at once for late chunks; None: as many as the backbone allows.
    """

    chunk_tokens: int | None = CHUNK_TOKENS
    chunk_overlap: int = 0
    late: bool = False
    late_window: int | None = None

    def __str__(self) -> str:
        """The settings in words."""
        if self.chunk_tokens is None:
            return "whole texts, one passage each"
        words = f"{'late chunks' if self.late else 'passages'} of at most {self.chunk_tokens} tokens"
        if self.chunk_overlap:
            words += f", {self.chunk_overlap} of them repeated"
        if self.late:
            words += f", read in windows of {self.late_window or 'any number of'} tokens"
        return words


def read_chunking(folder: Path) -> Chunking | None:
    """How the index in a folder, sharded or not, chunks documents; None if this is not decided yet.

    Raises:
        DamagedFileError: the manifest is damaged.
    """
    content = _read(folder)[CHUNKING]
    return None if content is None else Chunking(**content)


def write_chunking(folder: Path, chunking: Chunking | None) -> None:
    """Store the chunking; None lets the next writer choose it. Requires the write lock."""
    entry: Any = None if chunking is None else asdict(chunking)
    change_manifest(folder, **{CHUNKING: entry})


def read_errors(folder: Path) -> dict[str, Any]:
    """The errors of the student of an index, sharded or not; empty if none were measured.

    Raises:
        DamagedFileError: the manifest is damaged.
    """
    return _read(folder).get(_ERRORS, {})


def write_errors(folder: Path, errors: Mapping[str, Any]) -> None:
    """Add errors to those that are known. Requires the lock."""
    entry: Any = {**read_errors(folder), **errors}
    change_manifest(folder, **{_ERRORS: entry})


def without_notes(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """A manifest without what may change."""
    return {name: value for name, value in manifest.items() if name not in (CHUNKING, _ERRORS)}


def copy_notes(source: Path, target: Path) -> None:
    """Copy what may change from the manifest of an index to that of another one with the same passages."""
    write_chunking(target, read_chunking(source))
    if errors := read_errors(source):
        write_errors(target, errors)


def repeats_text(folder: Path) -> bool:
    """Whether passages of the index in a folder may begin with text that repeats the end of the one before."""
    chunking = read_chunking(folder)
    return chunking is not None and chunking.chunk_overlap > 0
