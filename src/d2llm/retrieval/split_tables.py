"""Splitting tables in texts, written as in Markdown, so that each piece names the columns of its values."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from d2llm.core.types import Span

_DELIMITER = re.compile(r"\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*")
_HEADER_OF_ROOM = 2  # a header is repeated if it takes at most one part in so many of a piece
_LABEL_OF_ROOM = 4  # the first value of a long row is, too
_LEAD_OF_ROOM = 4  # a text before a table that takes at most one part in so many is in the table's first piece

Split = Callable[[str, int], list[tuple[int, str]]]
Count = Callable[[Sequence[str]], list[int]]


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a text with its place there; its own text may begin with the header of its table."""

    text: str
    span: Span


@dataclass(frozen=True, slots=True)
class _Table:
    """A table in a text: the places of its header with the row of hyphens, and of its rows."""

    header: Span
    rows: tuple[Span, ...]

    @property
    def span(self) -> Span:
        return self.header[0], self.rows[-1][1]


class TableSplitter:
    """Splits texts into pieces with a maximum number of tokens; each piece of a table names the columns of its values.

    What is no table, and tables that fit into a piece with their surroundings, are split as other text. Each piece of
    another table begins with the table's header; where this takes more than half of the room, or a row is too long, the
    row is written as lines of ``name: value``, and each piece of it has its first value. A short text right before a
    table begins its first piece.
    """

    def __init__(self, room: int, split: Split, count: Count) -> None:
        """Take what splits plain text.

        Args:
            room: tokens of a piece.
            split: splits a text into pieces of at most so many tokens; gives their places and texts.
            count: the numbers of tokens of texts.
        """
        self._room, self._split, self._count = room, split, count

    def split(self, text: str) -> list[Piece]:
        """The pieces of a text, in order."""
        pieces = self._split(text, self._room)
        tables = [] if len(pieces) < 2 else [table for table in _tables(text) if _is_cut(table, pieces)]
        if not tables:
            return [Piece(part, (start, start + len(part))) for start, part in pieces]
        result: list[Piece] = []
        at = 0
        for table in tables:
            start, end = table.span
            before = self._plain_pieces(text, (at, start))
            is_short = bool(before) and self._count([before[-1].text])[0] <= self._room // _LEAD_OF_ROOM
            lead = before.pop() if is_short else None
            result += before
            result += self._table_pieces(text, table, lead)
            at = end
        return result + self._plain_pieces(text, (at, len(text)))

    def _plain_pieces(self, text: str, span: Span) -> list[Piece]:
        start, end = span
        part = text[start:end]
        pieces = self._split(part, self._room) if part.strip() else []
        return [Piece(piece, (start + place, start + place + len(piece))) for place, piece in pieces]

    def _table_pieces(self, text: str, table: _Table, lead: Piece | None) -> Iterator[Piece]:
        header = text[slice(*table.header)]
        rows = [text[slice(*span)] for span in table.rows]
        names = _names(header)
        records = [_record(names, row) for row in rows]
        in_header, *in_rows = self._count([f"{row}\n" for row in (header, *rows)])
        repeats_header = in_header <= self._room // _HEADER_OF_ROOM
        parts = rows if repeats_header else records
        sizes = in_rows if repeats_header else self._count([f"{record}\n\n" for record in records])
        always = in_header if repeats_header else 0
        separator = "\n" if repeats_header else "\n\n"
        begun: list[str] = []
        first = taken = 0  # of the piece that has begun: its first row, and its tokens

        def finish(end: int) -> Iterator[Piece]:
            nonlocal lead
            if not begun and lead is None:
                return
            start = lead.span[0] if lead else table.rows[first][0] if first else table.header[0]
            body = separator.join([*([header] if repeats_header and begun else []), *begun])
            stop = table.rows[end - 1][1] if begun else lead.span[1] if lead else start
            yield Piece("\n\n".join([*([lead.text] if lead else []), *([body] if body else [])]), (start, stop))
            begun.clear()
            lead = None

        for number, size in enumerate(sizes):
            if begun and taken + size > self._room:
                yield from finish(number)
            if always + size > self._room:
                yield from finish(number)
                yield from self._record_pieces(records[number], table.rows[number])
                continue
            in_lead = self._count([lead.text])[0] if lead and not begun else 0
            if in_lead + always + size > self._room:
                yield from finish(number)
                in_lead = 0
            if not begun:
                first, taken = number, in_lead + always
            begun.append(parts[number])
            taken += size
        yield from finish(len(rows))

    def _record_pieces(self, record: str, span: Span) -> Iterator[Piece]:
        """The pieces of a long row, each with the row's first value and the name of the column that goes on."""
        label, _, rest = record.partition("\n")
        sizes = self._count([f"{label}\n", *(f"{line.partition(': ')[0]}: " for line in rest.split("\n"))])
        if not rest or sizes[0] > self._room // _LABEL_OF_ROOM:
            label, rest = "", record
        in_name = max(sizes[1:], default=0)
        in_name = in_name if in_name <= self._room // _LABEL_OF_ROOM else 0
        room = self._room - (sizes[0] if label else 0) - in_name
        for place, piece in self._split(rest, room):
            before = rest[:place].rpartition("\n")[2]
            name = before.partition(": ")[0] if in_name else ""
            goes_on = f"{name}: {piece}" if name and len(name) < len(before) else piece
            yield Piece(f"{label}\n{goes_on}" if label else goes_on, span)


def _tables(text: str) -> Iterator[_Table]:
    lines: list[Span] = []
    start = 0
    for line in text.split("\n"):
        lines.append((start, start + len(line)))
        start += len(line) + 1
    number = 1
    while number < len(lines):
        line = text[slice(*lines[number])]
        if "-" not in line or "|" not in line or not re.fullmatch(_DELIMITER, line):
            number += 1
            continue
        first = number - 1
        if "|" not in text[slice(*lines[first])]:
            number += 1
            continue
        while first and text[slice(*lines[first - 1])].startswith("|"):  # a header of several rows
            first -= 1
        end = number + 1
        while end < len(lines) and "|" in text[slice(*lines[end])]:
            end += 1
        if end > number + 1:
            yield _Table((lines[first][0], lines[number][1]), tuple(lines[number + 1 : end]))
        number = end


def _is_cut(table: _Table, pieces: Sequence[tuple[int, str]]) -> bool:
    start, end = table.span
    following = bisect_right(pieces, start, key=lambda piece: piece[0])
    return following < len(pieces) and pieces[following][0] < end


def _names(header: str) -> list[str]:
    """The names of the columns; those of a header of several rows are joined."""
    rows = [_cells(line) for line in header.split("\n")[:-1]]
    width = max(map(len, rows))
    columns = zip(*([*row, *[""] * (width - len(row))] for row in rows), strict=True)
    return [" ".join(dict.fromkeys(filter(None, column))) for column in columns]


def _record(names: Sequence[str], row: str) -> str:
    """A row as lines of ``name: value``, or as it is if it has more cells than the table has columns."""
    cells = _cells(row)
    if len(cells) > len(names):
        return row
    pairs = zip(names, cells, strict=False)
    return "\n".join(f"{name}: {cell}" if name else cell for name, cell in pairs if cell)


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip().removeprefix("|").removesuffix("|"))]
