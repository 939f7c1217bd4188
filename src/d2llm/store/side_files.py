"""Small files beside the table of an index, which snapshots take along; among them, how its documents are cut."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from d2llm.core.errors import DataFormatError
from d2llm.store.checksums import read_checked, write_checked

ERRORS_FILE = "student-errors.json"
"""Of ``retrieval.calibrate``."""
CHUNKING_FILE = "chunking.json"
"""How documents are cut into passages, so that the next writer cuts them the same way."""
CHUNK_TOKENS = 128
"""Of a passage by default: the best on long articles (docs/index.md), in students that read so many."""


@dataclass(frozen=True, slots=True)
class Chunking:
    """How documents become passages.

    Attributes:
        chunk_tokens: at most so many of the student's tokens in a passage, with its title; None: each document is one
            passage, and what the student does not read of it is not found.
        chunk_overlap: at most so many tokens of the passage before are repeated, in whole sentences or words.
        late: make late chunks (``models.late_chunking``).
        late_window: tokens of a document that are read at once for late chunks; None: as many as the backbone can.
    """

    chunk_tokens: int | None = CHUNK_TOKENS
    chunk_overlap: int = 0
    late: bool = False
    late_window: int | None = None

    def __str__(self) -> str:
        """In words."""
        if self.chunk_tokens is None:
            return "whole texts, one passage each"
        words = f"{'late chunks' if self.late else 'passages'} of at most {self.chunk_tokens} tokens"
        if self.chunk_overlap:
            words += f", {self.chunk_overlap} of them repeated"
        if self.late:
            words += f", read in windows of {self.late_window or 'any number of'} tokens"
        return words


def side_files(folder: Path) -> list[Path]:
    """Those of the index in a folder, whether they are there or not."""
    return [folder / name for name in (ERRORS_FILE, CHUNKING_FILE)]


def read_chunking(folder: Path) -> Chunking | None:
    """How the index in a folder cuts documents; None where it has none so far.

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
        problem = f"does not say how documents were cut ({error}); restore it from a copy or a snapshot"
        raise DataFormatError(path, problem) from error


def write_chunking(folder: Path, chunking: Chunking) -> None:
    """Keep it; for the holder of the write lock."""
    write_checked(folder / CHUNKING_FILE, asdict(chunking))


def forget_chunking(folder: Path) -> None:
    """Leave open again how documents are cut; for the holder of the write lock."""
    (folder / CHUNKING_FILE).unlink(missing_ok=True)
