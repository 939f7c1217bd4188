"""The checksums of a file, block by block, so that parts of it can be compared without reading all of it."""

from __future__ import annotations

import os
import random
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

BLOCK_BYTES = 1 << 18
_SAMPLED_BLOCKS = 32
_DIGITS = 16  # of a block's checksum: xxh3, 64 bits

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
