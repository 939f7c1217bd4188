"""Checksums: of files block by block, of small JSON files, and the record of those of an index's table.

A flipped bit in a number would otherwise be read as another number.

FileSums           size and checksums of a file, so that parts of it can be compared without reading all of it
write_checked      a JSON file that carries a checksum of its own content
checksums.json     what is known of the files of an index's table, and of which version they are (``Record``)
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from d2llm.core.files import MANIFEST_NAME, write_json
from d2llm.store.lance_manifest import manifest_names

BLOCK_BYTES = 1 << 18
_SAMPLED_BLOCKS = 32
_DIGITS = 16  # of a block's checksum: xxh3, 64 bits
_KEY = "own_checksum"
RECORD_NAME = "checksums.json"
TABLE_FOLDER = "passages.lance"

FileState = tuple[int, ...]
"""Device, inode, size and time of the last change: another state means that a file must be looked at again."""


class FileSums(NamedTuple):
    """Size of a file and the checksums of its blocks, one behind the other."""

    num_bytes: int
    checksums: str

    @property
    def num_blocks(self) -> int:
        """How many blocks it has, at least one."""
        return len(self.checksums) // _DIGITS


def state_of(path: Path) -> FileState:
    """The state of a file."""
    stat = path.stat()
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


def take_sums(path: Path) -> FileSums:
    """The checksums of a file as it is now."""
    with path.open("rb", buffering=0) as file:
        num_bytes = os.fstat(file.fileno()).st_size
        return FileSums(num_bytes, "".join(_block_sums(file, range(max(1, -(-num_bytes // BLOCK_BYTES))))))


def problem_of(path: Path, sums: FileSums, blocks: Collection[int] | None = None) -> str | None:
    """What is wrong with a file, as far as some blocks tell (all by default); None where nothing is."""
    chosen = range(sums.num_blocks) if blocks is None else sorted(blocks)
    try:
        with path.open("rb", buffering=0) as file:
            num_bytes = os.fstat(file.fileno()).st_size
            if num_bytes != sums.num_bytes:
                return f"has {num_bytes:,} bytes where {sums.num_bytes:,} were written"
            for block, checksum in zip(chosen, _block_sums(file, chosen), strict=True):
                if checksum != sums.checksums[block * _DIGITS : (block + 1) * _DIGITS]:
                    return f"is not what was written (in the {BLOCK_BYTES:,} bytes from {block * BLOCK_BYTES:,} on)"
    except OSError as error:
        return unreadable(error)
    return None


def sample_blocks(files: Mapping[str, FileSums]) -> dict[str, list[int]]:
    """The last block of each file, where Lance keeps what it needs to read the rest, and others of all at random."""
    blocks = {path: [sums.num_blocks - 1] for path, sums in files.items()}
    others = [(path, block) for path, sums in files.items() for block in range(sums.num_blocks - 1)]
    for path, block in random.sample(others, min(_SAMPLED_BLOCKS, len(others))):
        blocks[path].append(block)
    return blocks


def unreadable(error: OSError) -> str:
    """What to say of a file that cannot be read."""
    return "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror or error})"


def _block_sums(file: Any, blocks: Iterable[int]) -> Iterator[str]:
    # Read, not mapped, though that is slower: a disk that fails must not end the process.
    buffer = memoryview(bytearray(BLOCK_BYTES))
    for block in blocks:
        file.seek(block * BLOCK_BYTES)
        length = 0
        while length < BLOCK_BYTES and (more := file.readinto(buffer[length:])):
            length += more
        yield xxhash.xxh3_64_hexdigest(buffer[:length])


def write_checked(path: Path, value: dict[str, Any]) -> None:
    """Write an object as JSON, atomically, with its checksum."""
    write_json(path, {_KEY: _json_checksum(value), **value})


def read_checked(path: Path, *, required: bool = False, compare: bool = True) -> Any:
    """What ``write_checked`` wrote, or any JSON without a checksum.

    Args:
        path: of the file.
        required: refuse JSON without a checksum.
        compare: False reads a file that may be damaged, for a caller with other means to tell.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no JSON, or not what was written.
    """
    value = json.loads(path.read_bytes().decode("utf-8"))
    if not isinstance(value, dict) or _KEY not in value:
        if required:
            raise ValueError(f"{path.name} is not what was written")
        return value
    if value.pop(_KEY) != _json_checksum(value) and compare:
        raise ValueError(f"{path.name} is not what was written")
    return value


def _json_checksum(value: dict[str, Any]) -> str:
    content = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return xxhash.xxh3_64_hexdigest(content.encode(errors="surrogatepass"))


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
        return "`d2llm index ... verify --repair` rebuilds it from the table"
    return (
        "`d2llm index ... verify --repair` takes it from a snapshot that has it whole, with --go-back it returns to "
        "the last version that is whole; else restore a snapshot, or index the corpus again"
    )
