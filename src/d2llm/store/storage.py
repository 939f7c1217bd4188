"""File helpers of the store, and conversion of errors of writing."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from d2llm.core.errors import InputError, StorageError

LOCK_NAME = "write.lock"


def link_or_copy(source: str | Path, target: str | Path) -> None:
    """Hard-link a file, or copy it if the file system does not support links."""
    try:
        Path(target).hardlink_to(source)
    except OSError:
        shutil.copy2(source, target)


@contextmanager
def storage_errors(folder: Path) -> Generator[None]:
    """Convert errors of writing a store into ``StorageError``."""
    try:
        yield
    except (InputError, StorageError):
        raise
    except (OSError, ValueError, RuntimeError, sqlite3.Error) as error:
        raise StorageError(
            f"{folder}: the index cannot be written ({first_line(error)}). What was committed before is kept; free "
            "disk space or grant write permission, then run the same command again"
        ) from error


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
