"""Small files beside the table of an index, which snapshots include; one of them records how documents are chunked."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from d2llm.core.errors import DataFormatError
from d2llm.store.checksums import read_checked, write_checked

ERRORS_FILE = "student-errors.json"
"""Written by ``retrieval.calibrate``."""
CHUNKING_FILE = "chunking.json"
"""How documents are chunked into passages, so that the next writer chunks them the same way."""
CHUNK_TOKENS = 128
"""Default tokens of a passage: the best on long articles (docs/index.md) for students that read this many."""


@dataclass(frozen=True, slots=True)
class Chunking:
    """How documents are chunked into passages.

    Attributes:
        chunk_tokens: maximum tokens (of the student) per passage, including its title; None makes each document one
            passage, and text beyond the student's limit is not searchable.
        chunk_overlap: maximum tokens repeated from the previous passage, in whole sentences or words.
        late: make late chunks (``models.late_chunking``).
        late_window: tokens of a document that are read at once for late chunks; None: as many as the backbone allows.
    """

    chunk_tokens: int | None = CHUNK_TOKENS
    chunk_overlap: int = 0
    late: bool = False
    late_window: int | None = None

    def __str__(self) -> str:
        """The settings in words."""
        if self.chunk_tokens is None:
            return "whole texts, one passage each"
        words = f"{'late chunks' if self.late else 'passages'} of at most {self.chunk_tokens} tokens"
        if self.chunk_overlap:
            words += f", {self.chunk_overlap} of them repeated"
        if self.late:
            words += f", read in windows of {self.late_window or 'any number of'} tokens"
        return words


def side_files(folder: Path) -> list[Path]:
    """The paths of the side files of the index in a folder, whether they exist or not."""
    return [folder / name for name in (ERRORS_FILE, CHUNKING_FILE)]


def copy_side_files(source: Path, target: Path) -> None:
    """Copy the side files of an index, as far as they exist, to the folder of another."""
    for path in side_files(source):
        if path.is_file():
            shutil.copy2(path, target / path.name)


def read_chunking(folder: Path) -> Chunking | None:
    """How the index in a folder chunks documents; None if this is not decided yet.

    Raises:
        DataFormatError: the file is damaged.
    """
    path = folder / CHUNKING_FILE
    if not path.is_file():
        return None
    try:
        content: dict[str, Any] = read_checked(path)
        return Chunking(**content)
    except (ValueError, TypeError) as error:
        problem = f"does not say how documents were chunked ({error}); restore it from a copy or a snapshot"
        raise DataFormatError(path, problem) from error


def write_chunking(folder: Path, chunking: Chunking) -> None:
    """Store the chunking; requires the write lock."""
    write_checked(folder / CHUNKING_FILE, asdict(chunking))


def forget_chunking(folder: Path) -> None:
    """Remove the stored chunking, so that the next writer chooses it; requires the write lock."""
    (folder / CHUNKING_FILE).unlink(missing_ok=True)


def repeats_text(folder: Path) -> bool:
    """Whether passages of the index in a folder may begin with text that repeats the end of the one before."""
    chunking = read_chunking(folder)
    return chunking is not None and chunking.chunk_overlap > 0
