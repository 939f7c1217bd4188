"""What is fitted to a student after its training, each part with a file of its own in the student's folder.

A file names the student that it was fitted to, by fingerprint, and is refused beside another one. Vectors do not depend
on these parts, so an index is valid for the student with or without them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from d2llm.core.errors import DataFormatError
from d2llm.core.files import write_json
from d2llm.core.manifest import check_format_version
from d2llm.core.problems import describe_errors

FORMAT_VERSION = 1
_Part = TypeVar("_Part", bound="FittedPart")


class Widths(NamedTuple):
    """Widths of a student's arrays: of the vectors of texts, and of the backbone's states of tokens."""

    vectors: int
    states: int


class FittedValues(BaseModel):
    """Plain fitted values."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class FittedPart(FittedValues):
    """A part whose values are kept as JSON, beside its kind, the format, and the fingerprint of the student."""

    kind: ClassVar[str]
    file_name: ClassVar[str]
    without: ClassVar[str]
    """What the student does without it, for errors: "search without score features"."""

    @classmethod
    def read(cls: type[_Part], folder: Path, student: str, widths: Widths | None = None) -> _Part | None:
        """The part in the folder of the student with this fingerprint; None if there is no file.

        Raises:
            DataFormatError: the file is damaged, of another format version, another student's, or does not fit its
                widths.
        """
        path = folder / cls.file_name
        if not path.is_file():
            return None
        remedy = f"restore the student's folder, or delete the file to {cls.without}"
        try:
            content: dict[str, Any] = json.loads(path.read_bytes())
            owner, version, kind = (content.pop(name) for name in ("student", "format_version", "kind"))
            if kind != cls.kind:
                raise ValueError(f"its kind is {kind!r}, not {cls.kind!r}")
            check_format_version(path, version, FORMAT_VERSION)
            part = cls.model_validate(content)
        except ValidationError as error:
            raise DataFormatError(path, f"cannot be read ({describe_errors(error, cls)}); {remedy}") from error
        except KeyError as error:
            raise DataFormatError(path, f"cannot be read (it lacks {error}); {remedy}") from error
        except (ValueError, TypeError, AttributeError) as error:
            raise DataFormatError(path, f"cannot be read ({error}); {remedy}") from error
        if owner != student:
            raise DataFormatError(path, f"was fitted to the student {owner}, but this one is {student}; {remedy}")
        if widths is not None and not part.fits(widths):
            raise DataFormatError(
                path, f"does not fit vectors of width {widths.vectors} and states of width {widths.states}; {remedy}"
            )
        return part

    def write(self, folder: Path, student: str) -> None:
        """Write the part into the folder of the student with this fingerprint, atomically."""
        head = {"format_version": FORMAT_VERSION, "student": student, "kind": self.kind}
        write_json(folder / self.file_name, head | self.model_dump(mode="json"))

    def fits(self, widths: Widths) -> bool:  # noqa: ARG002
        """Whether its arrays have the student's widths."""
        return True
