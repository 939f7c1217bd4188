"""An append-only file of vectors, memory-mapped for reading.

vectors-<generation>.bin    the codes of row 0, row 1, ... (``code_size`` bytes each)
vectors-<generation>.json   code_size; since: the first version of the table that the file serves; extents: which rows
                            were written together, with a checksum of their bytes; a checksum of this JSON

Vectors of parts are in files of the same format under other names (``part_vectors``).

A row is written once and never changed, so one file serves every version of the table: a version is a set of live rows.
The extents are written after the bytes and before the table's commit. A crash in between leaves rows that no table
names; the next writer appends after them. A file that was rewritten (``stored_vectors``) lacks the rows that only
earlier versions have, which is why it records ``since``.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from d2llm.core.errors import DataFormatError
from d2llm.core.fallbacks import fell_back
from d2llm.core.types import PART_KINDS, PartKind
from d2llm.store import word_files
from d2llm.store.checksums import read_checked, write_checked

NAME = "vectors"
PART_VECTORS: dict[PartKind, str] = {kind: f"{kind}-vectors" for kind in PART_KINDS}
PART_EXTENTS: dict[PartKind, str] = {kind: f"{kind}-places" for kind in PART_KINDS}
_REMEDIES = {
    NAME: "`d2llm index ... verify --repair` rebuilds them",
    **dict.fromkeys(
        (*PART_VECTORS.values(), *PART_EXTENTS.values()), "`d2llm index ... verify --repair` encodes them again"
    ),
}
_JOINED_ROWS = 16_384  # small additions share an extent of up to this many rows, to keep the list of extents short


@dataclass(frozen=True, slots=True)
class Extent:
    """Rows ``start`` to ``start + count`` and the checksum (xxh3, 64 bits) of their codes."""

    start: int
    count: int
    checksum: str

    @property
    def end(self) -> int:
        """The row after the last."""
        return self.start + self.count


class IntactExtents:
    """Extents whose checksums were compared already, so that a later version of an index compares only what it adds.

    Not kept on disk: what a process opens for the first time is compared in full.
    """

    def __init__(self) -> None:
        self._files: dict[Path, _ComparedFile] = {}

    def damaged(self, file: VectorFile, codes: NDArray[np.uint8]) -> list[Extent]:
        """The damaged extents of ``codes`` (all rows of ``file``), among those that were not compared before."""
        self._files = {path: known for path, known in self._files.items() if path.exists()}
        known = self._files.get(file.path)
        intact = known.extents if known is not None and known.inode == file.inode else set[Extent]()
        damaged = file.damaged(codes, skip=intact)
        self._files[file.path] = _ComparedFile(file.inode, codes, intact | {*file.extents} - {*damaged})
        return damaged


class _ComparedFile(NamedTuple):
    """What is intact of a file; while ``codes`` are mapped, no other file can get its inode."""

    inode: tuple[int, int]
    codes: NDArray[np.uint8]
    extents: set[Extent]


class VectorRows(NamedTuple):
    """Codes [capacity, code_size] of all rows, and the file that they are mapped from (None: they are in memory)."""

    codes: NDArray[np.uint8]
    file: VectorFile | None


class Salvage(NamedTuple):
    """The usable part of a file: codes as far as there are bytes, a mask [n] of the intact rows, and the problem."""

    codes: NDArray[np.uint8]
    whole: NDArray[np.bool_]
    problem: str | None
    is_later: bool = False
    """The file is not damaged, but was written for a later version."""


class VectorFile:
    """The vectors of one generation of an index. ``append`` requires the index's write lock."""

    def __init__(
        self,
        path: Path,
        code_size: int,
        extents: list[Extent],
        since: int = 0,
    ) -> None:
        self.path = path
        self.code_size = code_size
        self.extents = extents
        self.since = since
        self.inode = (0, 0)
        """Device and number of the file that ``codes`` mapped."""

    @classmethod
    def create(cls, folder: Path, generation: int, code_size: int, *, since: int = 0, name: str = NAME) -> VectorFile:
        """A new file without rows; an existing one (left by a crash) is replaced."""
        file = cls(path_of(folder, generation, name), code_size, [], since)
        file.path.unlink(missing_ok=True)  # not truncated: a snapshot or a reader may have it under another name
        file._write_extents()  # first, because a generation counts as soon as its .bin exists
        with file.path.open("wb") as stream:
            stream.flush()
            os.fsync(stream.fileno())
        return file

    @classmethod
    def replace(cls, folder: Path, generation: int, codes: NDArray[np.uint8], *, since: int) -> VectorFile:
        """Replace a missing or damaged file by one with these rows."""
        try:
            file = cls.begin(folder, generation, codes.shape[1], since=since)
            if len(codes):
                file.append(codes)
            return file.take_place(folder)
        finally:
            shutil.rmtree(_draft_of(folder, generation), ignore_errors=True)

    @classmethod
    def begin(
        cls, folder: Path, generation: int, code_size: int, *, since: int, purpose: str = "", name: str = NAME
    ) -> VectorFile:
        """A draft file, in a hidden folder, that replaces another (``take_place``) once its rows have been appended.

        ``since`` is the first version that it serves. A draft that an interrupted replacement left for the same
        ``purpose`` is continued, if one is given.
        """
        draft = _draft_of(folder, generation, purpose, name)
        if purpose:
            try:
                left = cls.open(draft, generation, code_size, name=name)
                if left.since == since and not left.damaged(left.codes()):
                    return left
            except DataFormatError as error:
                if draft.is_dir():  # otherwise there was no draft
                    fell_back("interrupted replacement", f"{error}; it starts again", level=logging.INFO)
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir()
        return cls.create(draft, generation, code_size, since=since, name=name)

    def take_place(self, folder: Path) -> VectorFile:
        """Move a draft made by ``begin`` to the place of its generation's file."""
        # After a crash between the two moves, the checksums show that the parts do not belong together.
        for path in (self.path, self.path.with_suffix(".json")):
            path.replace(folder / path.name)
        shutil.rmtree(self.path.parent, ignore_errors=True)
        return VectorFile(folder / self.path.name, self.code_size, self.extents, self.since)

    @classmethod
    def open(cls, folder: Path, generation: int, code_size: int, *, name: str = NAME) -> VectorFile:
        """The file that a list of extents describes; checksums are not compared.

        Raises:
            DataFormatError: a part is missing, is too short, or does not fit ``code_size``.
        """
        file = cls._described(folder, generation, code_size, name)
        try:
            if file.path.stat().st_size < file.num_bytes:
                raise ValueError(f"{file.path.name} is shorter than its list of extents says")
        except (OSError, ValueError) as error:
            raise _unusable(file.path, name, error) from error
        return file

    @classmethod
    def _described(
        cls, folder: Path, generation: int, code_size: int, name: str = NAME, *, compare: bool = True
    ) -> VectorFile:
        """The file that a list of extents describes; its rows may be missing."""
        path = path_of(folder, generation, name)
        try:
            record = read_checked(path.with_suffix(".json"), compare=compare)
            extents = [Extent(*extent) for extent in record["extents"]]
            size, since = record["code_size"], record["since"]
            if size != code_size or {type(size), type(since)} != {int} or size < 1 or not _fit(extents):
                raise ValueError(f"{path.stem}.json does not describe these vectors")
            return cls(path, size, extents, since)
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise _unusable(path, name, error) from error

    @property
    def capacity(self) -> int:
        """Number of rows, including dead ones."""
        return self.extents[-1].end if self.extents else 0

    @property
    def num_bytes(self) -> int:
        """Size of the rows in bytes."""
        return self.capacity * self.code_size

    def append(self, codes: NDArray[np.uint8]) -> int:
        """Append codes [n, code_size], durably; returns the number of the first new row."""
        first = self.capacity
        content = np.ascontiguousarray(codes)
        with self.path.open("r+b") as stream:
            stream.seek(first * self.code_size)
            stream.write(content.data)
            stream.flush()
            os.fsync(stream.fileno())
        self._extend(content)
        self._write_extents()
        return first

    def codes(self) -> NDArray[np.uint8]:
        """All rows [capacity, code_size], memory-mapped and read-only."""
        shape = (self.capacity, self.code_size)
        if not self.capacity:
            return np.zeros(shape, np.uint8)  # an empty file cannot be mapped
        with self.path.open("rb") as stream:
            status = os.fstat(stream.fileno())
            self.inode = status.st_dev, status.st_ino
            return np.memmap(stream, np.uint8, "r", shape=shape)

    def damaged(self, codes: NDArray[np.uint8], *, skip: Collection[Extent] = ()) -> list[Extent]:
        """The extents that are damaged in ``codes`` (all rows); those to ``skip`` are not compared."""
        return [
            extent
            for extent in self.extents
            if extent not in skip and _checksum(codes[extent.start : extent.end]) != extent.checksum
        ]

    def _extend(self, content: NDArray[np.uint8]) -> None:
        last = self.extents[-1] if self.extents else None
        if last is not None and last.count + len(content) <= _JOINED_ROWS:
            before = np.fromfile(self.path, np.uint8, last.count * self.code_size, offset=last.start * self.code_size)
            digest = xxhash.xxh3_64(before.tobytes())
            if digest.hexdigest() == last.checksum:  # otherwise a joint checksum would hide the damage
                digest.update(content.tobytes())
                self.extents[-1] = Extent(last.start, last.count + len(content), digest.hexdigest())
                return
        self.extents.append(Extent(self.capacity, len(content), _checksum(content)))

    def _write_extents(self) -> None:
        extents = [[extent.start, extent.count, extent.checksum] for extent in self.extents]
        record = {"code_size": self.code_size, "since": self.since, "extents": extents}
        write_checked(self.path.with_suffix(".json"), record)


def salvage(folder: Path, generation: int, code_size: int, *, version: int) -> Salvage:
    """The part of a file that a version of the table can use; the file may be damaged, too short or missing."""
    described, problem = VectorFile._described, None  # pyright: ignore[reportPrivateUsage]
    try:
        try:
            file = described(folder, generation, code_size)
        except DataFormatError as error:  # some extents may still be right: their checksums show which
            file, problem = described(folder, generation, code_size, compare=False), str(error)
        num_rows = min(file.path.stat().st_size // code_size, file.capacity)
    except (DataFormatError, OSError) as error:
        return Salvage(np.zeros((0, code_size), np.uint8), np.zeros(0, np.bool_), str(error))
    shape, whole = (num_rows, code_size), np.zeros(num_rows, np.bool_)
    codes = np.memmap(file.path, np.uint8, "r", shape=shape) if num_rows else np.zeros(shape, np.uint8)
    if file.since > version and problem is None:
        return Salvage(codes, whole, f"{file.path.name} belongs to a later version", is_later=True)
    num_damaged = 0
    for extent in file.extents:
        if extent.end <= num_rows and _checksum(codes[extent.start : extent.end]) == extent.checksum:
            whole[extent.start : extent.end] = True
        else:
            num_damaged += 1
    damage = f"{file.path.name}: {num_damaged} of {len(file.extents)} parts are not what was written"
    return Salvage(codes, whole, problem or (damage if num_damaged else None))


def path_of(folder: Path, generation: int, name: str = NAME) -> Path:
    """The path of the vectors of a generation, or of another file of its rows."""
    return folder / f"{name}-{generation}.bin"


def ann_path_of(folder: Path, generation: int) -> Path:
    """The path of the approximate index of a generation (``ann``); its record is beside it."""
    return folder / f"ann-{generation}.faiss"


def generations(folder: Path) -> Iterator[int]:
    """The generations that have files."""
    for path in folder.glob("vectors-*.bin"):
        generation = path.stem.removeprefix("vectors-")
        if generation.isdecimal():
            yield int(generation)


def files_of(folder: Path, generation: int) -> list[Path]:
    """The files of a generation: vectors, those of parts, the approximate index (``ann``) and words."""
    names = (NAME, *PART_VECTORS.values(), *PART_EXTENTS.values())
    files = (*(path_of(folder, generation, name) for name in names), ann_path_of(folder, generation))
    named = [part for path in files for part in (path, path.with_suffix(".json")) if part.is_file()]
    return [*named, *word_files.files_of(folder, generation)]


def remove(folder: Path, generation: int) -> int:
    """Remove the files of a generation; returns the number of bytes freed.

    A reader that has mapped them can still use them.
    """
    freed = 0
    for path in files_of(folder, generation):
        freed += path.stat().st_size
        path.unlink()
    return freed


def _draft_of(folder: Path, generation: int, purpose: str = "", name: str = NAME) -> Path:
    return folder / f".{name}-{generation}.new{purpose}"


def _unusable(path: Path, name: str, error: Exception) -> DataFormatError:
    return DataFormatError(path, f"its {name} cannot be used ({error}); {_REMEDIES[name]}")


def _fit(extents: list[Extent]) -> bool:
    """Whether these extents are contiguous from row 0 on."""
    start = 0
    for extent in extents:
        if type(extent.start) is not int or type(extent.count) is not int or extent.start != start or extent.count < 1:
            return False
        start = extent.end
    return True


def _checksum(codes: NDArray[Any]) -> str:
    return xxhash.xxh3_64_hexdigest(np.ascontiguousarray(codes).data)
