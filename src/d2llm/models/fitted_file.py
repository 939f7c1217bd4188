"""Files in a student's folder with values fitted to its scores after training."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from d2llm.core.errors import DataFormatError
from d2llm.core.manifest import check_format_version

FORMAT_VERSION = 1


class FittedPart(BaseModel):
    """Plain fitted values."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class FittedFile(FittedPart):
    """The content of one file; ``student`` is the fingerprint of the student it belongs to."""

    format_version: int = FORMAT_VERSION
    student: str


_File = TypeVar("_File", bound=FittedFile)


def read_fitted(path: Path, kind: type[_File], student: str, *, remedy: str) -> _File | None:
    """Read the file; None if there is none. ``remedy`` tells the user what to do if it cannot be used.

    Raises:
        DataFormatError: the file is damaged, of another format version, or another student's.
    """
    if not path.is_file():
        return None
    try:
        content = kind.model_validate_json(path.read_bytes())
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise DataFormatError(path, f"cannot be read ({problems}); {remedy}") from error
    check_format_version(path, content.format_version, FORMAT_VERSION)
    if content.student != student:
        raise DataFormatError(path, f"was fitted to the student {content.student}, but this one is {student}; {remedy}")
    return content
