"""What a store does with files and with the errors of LanceDB, which come in many kinds."""

from __future__ import annotations

import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from d2llm.core.errors import InputError, StorageError


def link_or_copy(source: str | Path, target: str | Path) -> None:
    """Another name for a file; its content again where the file system has no links."""
    try:
        Path(target).hardlink_to(source)
    except OSError:
        shutil.copy2(source, target)


@contextmanager
def storage_errors(folder: Path) -> Generator[None]:
    """What a store says when it cannot write, as an error of d2llm."""
    try:
        yield
    except (InputError, StorageError):
        raise
    except BaseException as error:
        if not (isinstance(error, OSError | RuntimeError | ValueError) or is_panic(error)):
            raise
        raise StorageError(
            f"{folder}: the index cannot be written ({first_line(error)}). What was committed before is kept; make "
            "room or give the right to write, then give the same command again"
        ) from error


def is_panic(error: BaseException) -> bool:
    """Whether this is a panic of LanceDB's Rust, which is no ``Exception`` in Python."""
    return type(error).__name__ == "PanicException"


def first_line(error: BaseException) -> str:
    """What an error says, at most one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
