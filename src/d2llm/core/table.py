"""Tables for a terminal, Markdown and HTML. Every table that d2llm shows is one of these."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from html import escape as escape_html
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
    from rich.text import Text

ABSENT = "–"
"""Shown where a value is None."""
_MARKDOWN_SIGNS = re.compile(r"([\\`*_{}\[\]<>#|~&!])")

Value = str | float | None
Style = Literal["", "bold", "dim", "cyan", "green", "yellow", "bold red"]


@dataclass(frozen=True, slots=True)
class Column:
    """A column of numbers (``format`` as for Python's ``format``), or of text if ``align`` is left.

    ``max_width`` is in terminal characters; longer texts are wrapped there.
    """

    heading: str
    format: str = ""
    align: Literal["left", "right"] = "right"
    max_width: int | None = None

    def text(self, value: Value) -> str:
        """Format a value of this column."""
        if value is None:
            return ABSENT
        return value if isinstance(value, str) else format(value, self.format)


@dataclass(frozen=True, slots=True)
class Cell:
    """A value, optionally with a style, a mark directly after it (``*``), or a note in smaller type below it.

    Markdown and HTML support only the style bold.
    """

    value: Value
    style: Style = ""
    mark: str = ""
    note: str = ""


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a table; HTML shows a highlighted row in the colour of the report's subject."""

    cells: tuple[Cell, ...]
    highlighted: bool = False


@dataclass(slots=True)
class Section:
    """Rows that belong together; the title, if any, stands above them."""

    title: str
    rows: list[Row]


class Table:
    """Columns, rows in sections, a title and a caption. Every text is shown verbatim, including markup characters.

    A heading given as a string makes a left-aligned column of text. A table can be printed with Rich and inserted into
    a Jinja template directly.
    """

    def __init__(self, *columns: Column | str, title: str = "", caption: str = "", framed: bool = True) -> None:
        self.columns = tuple(Column(column, align="left") if isinstance(column, str) else column for column in columns)
        self.title = title
        self.caption = caption
        self.framed = framed
        self.sections: list[Section] = [Section("", [])]

    @property
    def rows(self) -> list[Row]:
        """The rows of all sections."""
        return [row for section in self.sections for row in section.rows]

    def add_section(self, title: str = "") -> None:
        """Start a new section for the rows that follow."""
        if not self.sections[-1].rows:
            self.sections.pop()
        self.sections.append(Section(title, []))

    def add_row(self, *values: Value | Cell, highlighted: bool = False) -> None:
        """Add a row to the last section.

        Raises:
            ValueError: there are more or fewer values than columns.
        """
        if len(values) != len(self.columns):
            raise ValueError(f"{len(values)} values for {len(self.columns)} columns")
        cells = tuple(value if isinstance(value, Cell) else Cell(value) for value in values)
        self.sections[-1].rows.append(Row(cells, highlighted))

    def texts(self) -> list[list[str]]:
        """The text of each cell, row by row, with its mark and its note."""
        return [_texts(self._pairs(row)) for row in self.rows]

    def to_terminal(self) -> RenderableType:
        """For a Rich console: title, grid and caption."""
        from rich import box
        from rich.console import Group
        from rich.table import Table as Grid
        from rich.text import Text

        headings = [column.heading for column in self.columns]
        grid = Grid(box=box.HEAVY_HEAD if self.framed else None, show_header=any(headings), header_style="bold")
        for index, column in enumerate(self.columns):
            width = column.max_width
            if column.align == "right":  # no wider than its figures and the words of its heading
                lines = [line for row in self.rows for line in _lines(column, row.cells[index])]
                needed = max(map(len, [*lines, *column.heading.split()]), default=0)
                width = min(needed, width or needed)
            grid.add_column(Text(column.heading), justify=column.align, max_width=width, overflow="fold")
        for section in self.sections:
            grid.add_section()
            if section.title:
                grid.add_row(Text(section.title, style="dim"))
            for row in section.rows:
                grid.add_row(*(_terminal_cell(column, cell) for column, cell in self._pairs(row)))
        title = [Text(self.title, style="bold")] if self.title else []
        caption = [Text(self.caption, style="dim")] if self.caption else []
        return Group(*title, grid, *caption)

    def to_markdown(self) -> str:
        """The table in GitHub's Markdown, without title and caption, which belong in the surrounding text."""
        lines = [
            [escape_markdown(column.heading) for column in self.columns],
            ["---" if column.align == "left" else "---:" for column in self.columns],
        ]
        for section in self.sections:
            if section.title:
                lines.append([f"**{escape_markdown(section.title)}**", *("" for _ in self.columns[1:])])
            lines += [[_markdown_cell(column, cell) for column, cell in self._pairs(row)] for row in section.rows]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def to_html(self) -> str:
        """The table in HTML; it scrolls if the page is too narrow, and its accessible name is the title."""
        return "\n".join(
            [
                f'<div class="scroll" tabindex="0" role="region" aria-label="{escape_html(self.title)}">',
                "<table>",
                f"<thead><tr>{''.join(self._html_headings())}</tr></thead>",
                "<tbody>",
                *self._html_rows(),
                "</tbody>",
                "</table>",
                "</div>",
            ]
        )

    def to_plain_text(self) -> str:
        """For a file or another program: a line for each row, with a tab between its cells."""
        headings = [column.heading for column in self.columns]
        lines = [[self.title], headings if any(headings) else [""]]
        for section in self.sections:
            lines += [[section.title], *(_texts(self._pairs(row)) for row in section.rows)]
        return "".join(
            "\t".join(" ".join(text.split()) for text in line) + "\n" for line in [*lines, [self.caption]] if any(line)
        )

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Aligned in a terminal, else as plain text."""
        from rich.segment import Segment

        is_aligned = options.is_terminal or console.is_jupyter
        yield self.to_terminal() if is_aligned else Segment(self.to_plain_text())

    __html__ = to_html

    def _pairs(self, row: Row) -> Iterator[tuple[Column, Cell]]:
        return zip(self.columns, row.cells, strict=True)

    def _html_headings(self) -> Iterator[str]:
        for column in self.columns:
            yield f'<th scope="col"{_html_class(column)}><bdi>{escape_html(column.heading)}</bdi></th>'

    def _html_rows(self) -> Iterator[str]:
        for section in self.sections:
            if section.title:
                yield (
                    f'<tr class="group"><th scope="rowgroup" colspan="{len(self.columns)}">'
                    f"<bdi>{escape_html(section.title)}</bdi></th></tr>"
                )
            for row in section.rows:
                (_, first), *others = self._pairs(row)
                cells = [f'<th scope="row">{_html_text(self.columns[0], first)}</th>']
                cells += [f"<td{_html_class(column)}>{_html_text(column, cell)}</td>" for column, cell in others]
                opening = '<tr class="subject">' if row.highlighted else "<tr>"
                yield f"{opening}{''.join(cells)}</tr>"


def escape_markdown(text: str) -> str:
    """Text on one line with Markdown's inline syntax escaped; at the start of a line it can still start a list."""
    return _MARKDOWN_SIGNS.sub(r"\\\1", " ".join(text.split()))


def _texts(cells: Iterable[tuple[Column, Cell]]) -> list[str]:
    return [f"{column.text(cell.value)}{cell.mark} {cell.note}".rstrip() for column, cell in cells]


def _lines(column: Column, cell: Cell) -> list[str]:
    return [*(column.text(cell.value) + cell.mark).splitlines(), cell.note]


def _terminal_cell(column: Column, cell: Cell) -> Text:
    from rich.text import Text

    text = Text(column.text(cell.value) + cell.mark, style=cell.style)
    return text.append(f"\n{cell.note}", style="dim") if cell.note else text


def _markdown_cell(column: Column, cell: Cell) -> str:
    text = escape_markdown(column.text(cell.value))
    if cell.style == "bold" and text:
        text = f"**{text}**"
    return " ".join(part for part in (text, escape_markdown(cell.mark), escape_markdown(cell.note)) if part)


def _html_class(column: Column) -> str:
    return ' class="text"' if column.align == "left" else ""


def _html_text(column: Column, cell: Cell) -> str:
    text = escape_html(column.text(cell.value))
    # A figure may have two lines; <bdi> isolates the text direction of a name.
    text = f"<bdi>{text}</bdi>" if column.align == "left" else text.replace("\n", "<br>")
    if cell.style == "bold":
        text = f"<strong>{text}</strong>"
    if cell.mark:
        text += f'<span class="mark-sign">{escape_html(cell.mark)}</span>'
    return text + (f" <small>{escape_html(cell.note)}</small>" if cell.note else "")
