"""What is known of the files of an index's table, and of which version they are: ``checksums.json``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from d2llm.core.files import MANIFEST_NAME
from d2llm.store.checked_json import read_checked, write_checked
from d2llm.store.file_sums import BLOCK_BYTES, FileSums
from d2llm.store.lance_manifest import manifest_names

RECORD_NAME = "checksums.json"
TABLE_FOLDER = "passages.lance"


class Record(NamedTuple):
    """The version committed last, and the checksums of the files by their paths in the index's folder."""

    version: int
    files: Mapping[str, FileSums]

    def manifest_of(self, version: int) -> str | None:
        """The path of the manifest of a version of the table, if it has a checksum."""
        paths = (f"{TABLE_FOLDER}/{name}" for name in manifest_names(version))
        return next((path for path in paths if path in self.files), None)


class Damage(NamedTuple):
    """A file that is not what was written, what is wrong with it, and the versions that need it (none: all do)."""

    path: str
    problem: str
    versions: list[int]


def read_record(folder: Path) -> Record:
    """The record in the folder of an index.

    Raises:
        OSError, ValueError, LookupError, TypeError: there is none, or it cannot be used.
    """
    value: Any = read_checked(folder / RECORD_NAME, required=True)
    if value["block_bytes"] != BLOCK_BYTES:
        raise ValueError(f"its blocks have {value['block_bytes']} bytes; update d2llm")
    return Record(value["version"], {path: FileSums(*sums) for path, sums in value["files"].items()})


def write_record(folder: Path, record: Record) -> None:
    """Put a record into the folder of an index, atomically."""
    files = {path: [sums.num_bytes, sums.checksums] for path, sums in sorted(record.files.items())}
    write_checked(folder / RECORD_NAME, {"version": record.version, "block_bytes": BLOCK_BYTES, "files": files})


def remedy_for(path: str) -> str:
    """What to do about a damaged file of an index."""
    if path == MANIFEST_NAME:
        return "put it back from a copy, or index the corpus again"
    if path == RECORD_NAME or "/_indices/" in path:
        return "`d2llm index ... verify --repair` makes it anew from the table"
    return (
        "`d2llm index ... verify --repair` takes it from a snapshot that has it whole, with --go-back it returns to "
        "the last version that is whole; else restore a snapshot, or index the corpus again"
    )
