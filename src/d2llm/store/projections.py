"""Stored projections: W_p b of every row, the passage's part of the interaction's first layer, beside the vectors.

projections-<generation>.bin/json   a ``VectorFile`` of [rows, hidden] bfloat16, with the row numbers of the vectors

Scoring then needs no product of a passage's vector with the first layer. W_p is the same for both tasks, so one file
serves both. A row is written once and never changes, so one file serves every version of its generation; later rows are
computed from their vectors by the scorer. The file is derived data and never trusted: if it is damaged, or belongs to
other vectors or another student, it is ignored.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from d2llm.core.errors import DataFormatError
from d2llm.core.fallbacks import count_fallback
from d2llm.store.vector_file import DERIVED, VectorFile, path_of

if TYPE_CHECKING:
    from jaxtyping import BFloat16
    from torch import Tensor

_log = logging.getLogger(__name__)
_NUMBER_BYTES = 2
_REMEDY = "`d2llm index ... project` rebuilds it"


class StoredProjections:
    """The projections of the first ``num_rows`` rows of a vector file, memory-mapped."""

    def __init__(self, file: VectorFile) -> None:
        self.file = file
        self._codes = file.codes()

    @classmethod
    def open(cls, vectors: VectorFile, generation: int, made_of: str) -> StoredProjections | None:
        """The projections of these vectors, or None if there are none or they do not fit (which is logged)."""
        if not path_of(vectors.path.parent, generation, DERIVED).is_file():
            return None
        try:
            return cls.load(vectors, generation, made_of)
        except (DataFormatError, OSError, ValueError) as error:  # the last two: replaced while it was opened
            count_fallback("stored projections")
            _log.warning("%s; passages are scored from their vectors", error)
            return None

    @classmethod
    def load(cls, vectors: VectorFile, generation: int, made_of: str) -> StoredProjections:
        """The projections of these vectors (``open_file``), after comparing all of them with their checksums."""
        stored = cls(open_file(vectors, generation, made_of))
        if damaged := stored.file.damaged(stored._codes):
            problem = f"{len(damaged)} of {len(stored.file.extents)} parts are not what was written"
            raise DataFormatError(stored.file.path, f"{problem}; {_REMEDY}")
        return stored

    @property
    def num_rows(self) -> int:
        """Number of rows in the file."""
        return len(self._codes)

    @property
    def width(self) -> int:
        """Numbers per row: the width of the hidden layer."""
        return self.file.code_size // _NUMBER_BYTES

    def read(self, rows: NDArray[np.int64]) -> BFloat16[Tensor, "rows hidden"]:
        """The projections of some rows, all below ``num_rows``, as a bfloat16 copy."""
        import torch

        return torch.from_numpy(self._codes[rows]).view(torch.bfloat16)


def projections_of(student: str, vector_format: str) -> str:
    """The origin of projections: the student's fingerprint and the vector format."""
    return f"{student} {vector_format}"


def open_file(vectors: VectorFile, generation: int, made_of: str) -> VectorFile:
    """The file of projections that belongs to these vectors; its checksums are not compared.

    Raises:
        DataFormatError: it is missing, truncated, or made from something else.
    """
    file = VectorFile.open(vectors.path.parent, generation, None, name=DERIVED)
    if (file.made_of, file.since) != (made_of, vectors.since):
        raise DataFormatError(file.path, f"was made of other vectors; {_REMEDY}")
    if file.code_size % _NUMBER_BYTES:
        raise DataFormatError(file.path, f"does not hold bfloat16 numbers; {_REMEDY}")
    return file


def create_file(vectors: VectorFile, generation: int, made_of: str, width: int) -> VectorFile:
    """An empty file of projections of these vectors, replacing any existing one."""
    folder, size = vectors.path.parent, width * _NUMBER_BYTES
    return VectorFile.create(folder, generation, size, since=vectors.since, name=DERIVED, made_of=made_of)


def as_codes(projections: BFloat16[Tensor, "rows hidden"]) -> NDArray[np.uint8]:
    """Projections as rows of the file, [rows, 2 * hidden]."""
    import torch

    return projections.contiguous().view(torch.uint8).numpy()


def remove_file(folder: Path, generation: int) -> None:
    """Remove the file of projections of a generation; a reader that has it mapped keeps it."""
    path = path_of(folder, generation, DERIVED)
    for part in (path, path.with_suffix(".json")):
        part.unlink(missing_ok=True)
