"""Tables of HTML pages as lines of text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from turbohtml import Element

_LONGEST_REPEATED = 100  # characters; a longer cell over several rows or columns stands once
_MAX_COLUMNS = 1_000  # of one cell, as in browsers


@dataclass(frozen=True, slots=True)
class _Row:
    cells: Sequence[str]
    is_header: bool


def is_grid(table: Element) -> bool:
    """Whether a table is one of values; others arrange parts of a page, or have more in their cells than words."""
    if table.attrs.get("role") in ("presentation", "none") or table.select_one("table, h1, h2, h3, h4, h5, h6, pre"):
        return False
    rows = table.find_all("tr")
    return any(len(_cells(row)) > 1 for row in rows) or any(
        cell.tag == "th" for row in rows[:1] for cell in _cells(row)
    )


def grid_rows(table: Element, text_of: Callable[[Element], str]) -> list[_Row]:
    """The rows of a table of values; a cell over several rows or columns stands in each."""
    rows: list[_Row] = []
    below: dict[int, tuple[int, str]] = {}  # column -> rows that a cell above still takes, and its text
    for row in table.find_all("tr"):
        texts: list[str] = []

        def fill(texts: list[str] = texts) -> None:
            while len(texts) in below:
                num_rows, text = below.pop(len(texts))
                if num_rows > 1:
                    below[len(texts)] = (num_rows - 1, text)
                texts.append(text)

        cells = _cells(row)
        for cell in cells:
            fill()
            text = text_of(cell)
            repeated = text if len(text) <= _LONGEST_REPEATED else ""
            num_rows, num_columns = _span(cell, "rowspan"), _span(cell, "colspan")
            for column in range(num_columns):
                if num_rows > 1:
                    below[len(texts)] = (num_rows - 1, repeated)
                texts.append(repeated if column else text)
        fill()
        if any(texts):
            is_header = all(cell.tag == "th" for cell in cells) or (
                isinstance(row.parent, Element) and row.parent.tag == "thead"
            )
            rows.append(_Row(texts, is_header))
    return rows


def table_lines(rows: Sequence[_Row]) -> str:
    """A table in the form of Markdown; a row of hyphens ends its header, if it has one."""
    lines: list[str] = []
    for number, row in enumerate(rows):
        lines.append(f"| {' | '.join(row.cells)} |")
        is_last_header = row.is_header and (number + 1 == len(rows) or not rows[number + 1].is_header)
        if is_last_header and all(header_row.is_header for header_row in rows[:number]):
            lines.append("|" + " --- |" * len(row.cells))
    return "\n".join(lines)


def _cells(row: Element) -> list[Element]:
    return [cell for cell in row.children if isinstance(cell, Element) and cell.tag in ("td", "th")]


def _span(cell: Element, name: str) -> int:
    text = str(cell.attrs.get(name) or "1").strip()
    return max(1, min(int(text), _MAX_COLUMNS)) if text.isdecimal() and len(text) < 6 else 1
