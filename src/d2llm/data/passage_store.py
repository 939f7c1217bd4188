"""Passages in a temporary file: a corpus takes 24 bytes of memory per passage, however long the texts are."""

from __future__ import annotations

import hashlib
import os
import struct
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Mapping, ValuesView
from pathlib import Path

import numpy as np

from d2llm.core.types import Passage

_LENGTHS = struct.Struct("<3I")  # of id, title and text, in bytes
_ENCODING = ("utf-8", "surrogatepass")  # a JSON file may hold half a surrogate pair
_READ_AT_ONCE = 1 << 20


class PassageStore(Mapping[str, Passage]):
    """Passages by id, in insertion order, read from a file on each access.

    The file is read, not memory-mapped: its pages are in the system's cache and do not count as memory of this process.
    It has no name and is deleted with the store. A store may be read from several threads and from forked processes.
    The ids must be distinct, which ``has_repeats`` checks. ``folder`` replaces the system's folder for temporary files.
    """

    def __init__(self, passages: Iterable[Passage], *, folder: Path | None = None) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed with the store
        offsets, keys = array("Q"), array("Q")
        offset = 0
        for passage in passages:
            offsets.append(offset)
            keys.append(_key(passage.id))
            offset += self._file.write(_record(passage))
        self._file.flush()
        offsets.append(offset)
        self._offsets = np.frombuffer(offsets, np.uint64)
        unsorted = np.frombuffer(keys, np.uint64)
        self._rows = np.argsort(unsorted, kind="stable").astype(np.uint32)
        self._keys = unsorted[self._rows]

    @property
    def has_repeats(self) -> bool:
        """Whether an id occurs twice (a lookup finds only the first passage with an id)."""
        alike = np.flatnonzero(self._keys[1:] == self._keys[:-1])
        groups = {int(self._keys[place]) for place in alike.tolist()}
        ids_of_groups = ([self._read(row).id for row in self._rows_of(np.uint64(key))] for key in groups)
        return any(len(set(ids)) < len(ids) for ids in ids_of_groups)

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, passage_id: str) -> Passage:
        for row in self._rows_of(np.uint64(_key(passage_id))):
            passage = self._read(row)
            if passage.id == passage_id:
                return passage
        raise KeyError(passage_id)

    def __contains__(self, passage_id: object) -> bool:
        return isinstance(passage_id, str) and self.get(passage_id) is not None

    def __iter__(self) -> Iterator[str]:
        return (passage.id for passage in self.read_all())

    def values(self) -> ValuesView[Passage]:
        """The passages in insertion order, read sequentially."""
        return _Values(self)

    def _rows_of(self, key: np.uint64) -> list[int]:
        """Rows with the hash of an id, in order; collisions are possible, though very rare."""
        start, end = (int(np.searchsorted(self._keys, key, side)) for side in ("left", "right"))
        return self._rows[start:end].tolist()

    def _read(self, row: int) -> Passage:
        start, end = int(self._offsets[row]), int(self._offsets[row + 1])
        return _passage(os.pread(self._file.fileno(), end - start, start))

    def read_all(self) -> Iterator[Passage]:
        """The passages in insertion order, read in large blocks."""
        row = 0
        while row < len(self):
            start = int(self._offsets[row])
            end_row = max(row + 1, int(np.searchsorted(self._offsets, start + _READ_AT_ONCE, "right")) - 1)
            block = os.pread(self._file.fileno(), int(self._offsets[end_row]) - start, start)
            for place in range(row, end_row):
                yield _passage(block[int(self._offsets[place]) - start : int(self._offsets[place + 1]) - start])
            row = end_row


class _Values(ValuesView[Passage]):
    """Reads in file order; the default ``ValuesView`` would look up every passage by its id."""

    def __init__(self, store: PassageStore) -> None:
        super().__init__(store)
        self._store = store

    def __iter__(self) -> Iterator[Passage]:
        return self._store.read_all()


def _key(passage_id: str) -> int:
    """A 64-bit hash of an id; collisions are resolved by the ids in the file."""
    return int.from_bytes(hashlib.blake2b(passage_id.encode(*_ENCODING), digest_size=8).digest(), "little")


def _record(passage: Passage) -> bytes:
    parts = [part.encode(*_ENCODING) for part in (passage.id, passage.title, passage.text)]
    return _LENGTHS.pack(*map(len, parts)) + b"".join(parts)


def _passage(record: bytes) -> Passage:
    num_id, num_title, num_text = _LENGTHS.unpack_from(record)
    title = _LENGTHS.size + num_id
    text = title + num_title
    return Passage(
        id=record[_LENGTHS.size : title].decode(*_ENCODING),
        title=record[title:text].decode(*_ENCODING),
        text=record[text : text + num_text].decode(*_ENCODING),
    )
