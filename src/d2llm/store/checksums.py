"""Checksums of files, block by block, and of small JSON files.

Without them, a flipped bit in a number would silently be read as another number.

FileSums           size and checksums of a file, so that parts of it can be compared without reading all of it
write_checked      writes a JSON file with a checksum of its content
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from d2llm.core.files import write_json
from d2llm.core.json_values import parse_json

BLOCK_BYTES = 1 << 18
_SAMPLED_BLOCKS = 32
_DIGITS = 16  # of a block's checksum: xxh3, 64 bits
_KEY = "own_checksum"


class FileSums(NamedTuple):
    """Size of a file and the concatenated checksums of its blocks."""

    num_bytes: int
    checksums: str

    @property
    def num_blocks(self) -> int:
        """Number of blocks, at least one."""
        return len(self.checksums) // _DIGITS


def take_sums(path: Path) -> FileSums:
    """Compute the checksums of a file."""
    with path.open("rb", buffering=0) as file:
        num_bytes = os.fstat(file.fileno()).st_size
        return FileSums(num_bytes, "".join(_block_sums(file, range(max(1, -(-num_bytes // BLOCK_BYTES))))))


def problem_of(path: Path, sums: FileSums, blocks: Collection[int] | None = None) -> str | None:
    """Compare a file with its checksums; returns what is wrong, or None. ``blocks`` limits the check to some blocks."""
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
    """Blocks to check: the last of each file and a random sample of all others."""
    blocks = {path: [sums.num_blocks - 1] for path, sums in files.items()}
    others = [(path, block) for path, sums in files.items() for block in range(sums.num_blocks - 1)]
    for path, block in random.sample(others, min(_SAMPLED_BLOCKS, len(others))):
        blocks[path].append(block)
    return blocks


def unreadable(error: OSError) -> str:
    """The problem text for a file that cannot be read."""
    return "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror or error})"


def _block_sums(file: Any, blocks: Iterable[int]) -> Iterator[str]:
    # Read, not memory-mapped, although that is slower: a failing disk must not kill the process.
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


def read_checked(path: Path, *, compare: bool = True) -> Any:
    """Read a file written by ``write_checked``.

    Args:
        path: path of the file.
        compare: if false, a file without a checksum, or a damaged one, is read too, for callers that have other checks.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is not JSON, or is not what was written.
    """
    value = parse_json(path.read_bytes().decode("utf-8"))
    stored = value.pop(_KEY, None) if isinstance(value, dict) else None
    if compare and (stored is None or stored != _json_checksum(value)):
        raise ValueError(f"{path.name} is not what was written")
    return value


def _json_checksum(value: dict[str, Any]) -> str:
    content = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return xxhash.xxh3_64_hexdigest(content.encode(errors="surrogatepass"))
