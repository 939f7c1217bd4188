"""Where an index's student was loaded from, so that a search finds it again."""

from __future__ import annotations

from pathlib import Path

from d2llm.core.errors import InputError


def find_source(source: object, folder: Path) -> str:
    """The student that an index remembers.

    Raises:
        InputError: it remembers none, or a folder that is not there any more.
    """
    if not isinstance(source, str):
        raise InputError(f"{folder}: the index does not know where its student is; name it with --student")
    if Path(source).is_absolute() and not Path(source).is_dir():
        raise InputError(f"{folder}: its student was in {source}, which is not there; name it with --student")
    return source


def source_of(student: str | Path) -> str:
    """What an index remembers of where its student was loaded from."""
    return str(Path(student).resolve()) if Path(student).is_dir() else str(student)
