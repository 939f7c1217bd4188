"""File helpers of the store, and conversion of the many kinds of errors of LanceDB."""

from __future__ import annotations

import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from d2llm.core.errors import InputError, StorageError


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
    except BaseException as error:
        if not (isinstance(error, OSError | RuntimeError | ValueError) or is_panic(error)):
            raise
        raise StorageError(
            f"{folder}: the index cannot be written ({first_line(error)}). What was committed before is kept; free "
            "disk space or grant write permission, then run the same command again"
        ) from error


def is_panic(error: BaseException) -> bool:
    """Whether this is a panic of LanceDB's Rust code, which is not an ``Exception`` in Python."""
    return type(error).__name__ == "PanicException"


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
