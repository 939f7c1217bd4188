"""File helpers and connections of the store, and conversion of errors of writing."""

from __future__ import annotations

import logging
import os
import shutil
import sqlite3
from collections.abc import Generator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from d2llm.core.errors import DamagedFileError, IndexLockedError, InputError, StorageError
from d2llm.core.sqlite import HELD, is_locked

LOCK_NAME = "write.lock"
REMEDY = "`d2llm index ... verify --repair` rebuilds what can be read, and takes the rest from snapshots"
_log = logging.getLogger(__name__)
_BUSY_S = 60.0  # wait for a checkpoint of another process, or another program that holds the file
_UNAVAILABLE = ("unable to open database file", "out of memory")  # of SQLite's messages
_OPENING = "allow this process more open files, or access to the folder, and try again"
_CACHE_KIB = 16_384
_MOUNTS = Path("/proc/self/mountinfo")
_OVER_A_NETWORK = frozenset(
    {
        "9p",
        "afs",
        "ceph",
        "cifs",
        "fuse.glusterfs",
        "fuse.s3fs",
        "fuse.sshfs",
        "glusterfs",
        "lustre",
        "nfs",
        "nfs4",
        "smb3",
    }
)


def link_or_copy(source: str | Path, target: str | Path) -> None:
    """Hard-link a file, or copy it if the file system does not support links."""
    try:
        Path(target).hardlink_to(source)
    except OSError:
        shutil.copy2(source, target)


@contextmanager
def storage_errors(folder: Path) -> Generator[None]:
    """Convert errors of writing a store into ``StorageError``, or ``IndexLockedError`` of a table that is locked."""
    try:
        yield
    except (InputError, StorageError):
        raise
    except (OSError, ValueError, RuntimeError, sqlite3.Error) as error:
        if is_locked(error):
            raise IndexLockedError(
                f"{folder}: nothing was written, as its table cannot be ({error}): {HELD}"
            ) from error
        raise StorageError(
            f"{folder}: the index cannot be written ({first_line(error)}). What was committed before is kept; free "
            "disk space or grant write permission, then run the same command again"
        ) from error


def unreadable(path: Path, error: Exception) -> DamagedFileError | StorageError:
    """What an error of reading a table means; a repair must not take for damage what passes."""
    if is_locked(error):
        return IndexLockedError(f"{path}: cannot be read now ({error}), which is no damage: {HELD}")
    if any(sign in str(error) for sign in _UNAVAILABLE):
        return StorageError(f"{path}: cannot be read now ({error}), which is no damage; {_OPENING}")
    return DamagedFileError(path, f"cannot be read ({error}); {REMEDY}")


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


@cache
def warn_of_network(folder: Path) -> None:
    """Log a warning, once, if a folder is on a file system that other machines share.

    SQLite coordinates readers and a writer by memory that the processes of one machine share, and by locks that such
    file systems may not keep (https://sqlite.org/wal.html).
    """
    kind = file_system(folder)
    if kind in _OVER_A_NETWORK:
        _log.warning(
            "%s is on a network file system (%s): an index there may be damaged if several machines use it, or if its "
            "locks fail. Keep it on a disk of this machine; to serve it elsewhere, copy a snapshot",
            folder,
            kind,
        )


def file_system(folder: Path) -> str | None:
    """The type of the file system of a folder, as Linux names it; None on other systems."""
    try:
        lines = _MOUNTS.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return None
    wanted = os.path.realpath(folder)
    best, kind = "", None
    for line in lines:
        before, _, after = line.partition(" - ")
        mounted = before.split(" ")[4].replace("\\040", " ")
        is_inside = wanted == mounted or wanted.startswith(mounted.rstrip("/") + "/")
        if is_inside and len(mounted) >= len(best):  # the last of several at one place hides the others
            best, kind = mounted, after.split(" ")[0]
    return kind


def connect(path: Path, mode: str) -> sqlite3.Connection:
    """A connection to a database of SQLite, with what the store asks of one."""
    address = f"{path.resolve().as_uri()}?mode={mode}"
    connection = sqlite3.connect(
        address, timeout=_BUSY_S, isolation_level=None, check_same_thread=False, cached_statements=256, uri=True
    )
    for pragma in ("synchronous=FULL", "case_sensitive_like=ON", f"cache_size=-{_CACHE_KIB}", "trusted_schema=OFF"):
        connection.execute(f"PRAGMA {pragma}")
    return connection


def open_to_read(path: Path) -> sqlite3.Connection:
    """Opened for reading and writing; where the folder cannot be written, as a file that nobody changes."""
    try:
        connection = connect(path, "rw")
        connection.execute("SELECT version FROM versions LIMIT 1").fetchone()
        return connection
    except sqlite3.OperationalError as error:
        if is_locked(error):
            raise
        wal = path.with_name(f"{path.name}-wal")
        if wal.exists() and wal.stat().st_size:
            raise  # a killed writer's last commits are in it, and only one who may write can put them into the file
    connection = connect(path, "ro&immutable=1")
    connection.execute("SELECT version FROM versions LIMIT 1").fetchone()
    return connection
