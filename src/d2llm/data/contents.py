"""What the readers of files return: a title and sections, or why there are none."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from d2llm.core.errors import InputError
from d2llm.core.types import MetadataValue, Passage, Section


class UnreadableFileError(InputError):
    """A file from which no text can be read; the message is the reason alone."""


@dataclass(frozen=True, slots=True)
class SkippedPart:
    """A part of a file that could not be read (a chapter, an attached file), and why."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class FileContents:
    """What is in a file: the title that it gives itself ("" if none), and its sections, none of them blank.

    ``metadata`` are the fields of its front matter. A table has ``rows`` instead of sections: documents, whose ids are
    the numbers of the rows, or their own if the table ``is_corpus``. ``columns`` are those of its first row.
    ``skipped`` are parts that were left out. ``has_pictures``: some of its text is in pictures, whether or not it was
    recognised.
    """

    title: str
    sections: tuple[Section, ...]
    metadata: Mapping[str, MetadataValue] = field(default_factory=dict[str, MetadataValue])
    rows: tuple[Passage, ...] = ()
    is_corpus: bool = False
    columns: tuple[str, ...] = ()
    skipped: tuple[SkippedPart, ...] = ()
    has_pictures: bool = False


class SectionWriter:
    """Collects the blocks of a document, paragraphs and tables, into sections under headings."""

    def __init__(self) -> None:
        self.sections: list[Section] = []
        self._headings: list[tuple[int, str]] = []  # levels and texts, outermost first
        self._blocks: list[str] = []
        self._page: int | None = None
        self._is_leaf = False  # whether the last heading has nothing below it so far

    def heading(self, level: int, text: str) -> None:
        """Begin a section under a heading; a blank one is left out."""
        text = " ".join(text.split())
        if not text:
            return
        self._close(followed_by=level)
        self._headings = [*(heading for heading in self._headings if heading[0] < level), (level, text)]
        self._is_leaf = True

    def part(self, *headings: str, page: int | None = None, is_leaf: bool = False) -> None:
        """Begin a section under these headings alone, on a page; the last heading is text if it ``is_leaf``."""
        self._close()
        self._page = page
        self._headings = list(enumerate(filter(None, headings), start=1))
        self._is_leaf = is_leaf and bool(self._headings)

    def block(self, text: str, *, follows_closely: bool = False) -> None:
        """Add a paragraph or table, with no blank line before one that ``follows_closely``, as items of a list do."""
        if text.strip():
            if self._blocks:
                self._blocks.append("\n" if follows_closely else "\n\n")
            self._blocks.append(text.strip("\n"))

    def finish(self) -> list[Section]:
        """All sections. The text of a heading with nothing below it is the heading."""
        self._close()
        return self.sections

    def _close(self, followed_by: int = 0) -> None:
        text = "".join(self._blocks)
        names = tuple(name for _, name in self._headings)
        if not text and self._is_leaf and followed_by <= self._headings[-1][0]:
            text = names[-1]
        if text:
            self.sections.append(Section(text, names, self._page))
        self._blocks, self._is_leaf = [], False


def markdown_table(rows: Iterable[Iterable[str]]) -> str:
    """A table in Markdown, the first row being its header; white space in a cell becomes one space.

    Empty rows are left out, as are empty columns at the end.
    """
    cells = [[" ".join(cell.split()) for cell in row] for row in rows]
    cells = [row for row in cells if any(row)]
    width = max((n for row in cells for n, cell in enumerate(row, start=1) if cell), default=0)
    lines = ["| " + " | ".join([*row[:width], *[""] * (width - len(row))]) + " |" for row in cells]
    lines[1:1] = ["|" + " --- |" * width] if lines else []
    return "\n".join(lines)
