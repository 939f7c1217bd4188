"""Vectors from an endpoint on disk, so that each is asked for once."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from jaxtyping import Float32
from numpy.typing import NDArray

from d2llm.core.batches import batched
from d2llm.core.errors import StorageError

BLANK = 0
"""The id of the vector of a text without words, which is 0; SQLite numbers rows from 1."""
_ROWS_AT_ONCE = 500  # SQLite allows so many values in one statement, even in old versions
_BUSY_SECONDS = 60.0  # how long to wait for another process that writes to the cache


class VectorCache:
    """Vectors [dim] under keys, in one SQLite file that several threads and processes can use at a time.

    Vectors are only added. The file can be deleted whenever no program uses it.
    """

    def __init__(self, path: Path, dim: int) -> None:
        self.path = path
        self.dim = dim
        self._lock = Lock()
        self._connection: tuple[int, sqlite3.Connection] | None = None  # and the process that opened it

    def find(self, keys: Iterable[bytes]) -> dict[bytes, int]:
        """The ids of the vectors under those keys that are there.

        Raises:
            StorageError: the file cannot be read.
        """
        with self._transaction() as connection:
            return {
                key: vector_id
                for part in batched(keys, _ROWS_AT_ONCE)
                for key, vector_id in connection.execute(
                    f"SELECT key, id FROM vectors WHERE key IN ({_marks(part)})", part
                )
            }

    def add(self, rows: Iterable[tuple[bytes, NDArray[np.float32]]]) -> None:
        """Add vectors, all or none, durably; existing keys keep their vectors.

        Raises:
            StorageError: the file cannot be written.
        """
        values = [(key, vector.astype("<f4").tobytes()) for key, vector in rows]
        with self._transaction() as connection:
            connection.executemany("INSERT OR IGNORE INTO vectors (key, vector) VALUES (?, ?)", values)

    def read(self, ids: Sequence[int]) -> Float32[np.ndarray, "texts dim"]:
        """The vectors with these ids; that of id 0 is 0.

        Raises:
            StorageError: the file cannot be read, or lacks one of them.
        """
        blobs: dict[int, bytes] = {BLANK: bytes(4 * self.dim)}
        with self._transaction() as connection:
            for part in batched({*ids} - {BLANK}, _ROWS_AT_ONCE):
                blobs |= connection.execute(f"SELECT id, vector FROM vectors WHERE id IN ({_marks(part)})", part)
        if any(len(blobs.get(vector_id, b"")) != 4 * self.dim for vector_id in ids):
            raise StorageError(
                f"{self.path}: lacks a vector that was there, or is damaged; delete it, and run the command again: the "
                "vectors are asked for again"
            )
        content = b"".join(blobs[vector_id] for vector_id in ids)
        return np.frombuffer(content, "<f4").astype(np.float32).reshape(len(ids), self.dim)

    @contextmanager
    def _transaction(self) -> Generator[sqlite3.Connection]:
        with self._lock:
            try:
                with self._open() as connection:
                    yield connection
            except (sqlite3.Error, OSError) as error:
                advice = (
                    "check free space and write permission there, or set another cache folder in the environment "
                    "variable XDG_CACHE_HOME"
                )
                if not isinstance(error, (sqlite3.OperationalError, OSError)):
                    advice = "it is damaged, so delete it; the vectors are asked for again"
                raise StorageError(f"{self.path}: the cache of vectors cannot be used ({error}); {advice}") from error

    def _open(self) -> sqlite3.Connection:
        if self._connection is None or self._connection[0] != os.getpid():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            connection = sqlite3.connect(self.path, timeout=_BUSY_SECONDS, check_same_thread=False)
            connection.execute(
                "CREATE TABLE IF NOT EXISTS vectors (id INTEGER PRIMARY KEY, key BLOB NOT NULL UNIQUE, vector BLOB)"
            )
            self._connection = os.getpid(), connection
        return self._connection[1]

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy opens the file itself."""
        return VectorCache, (self.path, self.dim)


def _marks(values: Sequence[object]) -> str:
    return ",".join("?" * len(values))
