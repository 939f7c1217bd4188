"""Reads workbooks (SpreadsheetML): the tables of each sheet, then its comments, shapes and charts.

A sheet is read row by row, because it can have a million. What a cell shows follows its format.

Dates are written as ISO does, and numbers without marks between thousands, which mean different things in different
countries; what a format adds to a number (a currency, a percent sign, a unit, leading zeros) is kept.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from decimal import Decimal
from functools import lru_cache
from pathlib import Path

from d2llm.data.contents import FileContents, SectionWriter, markdown_table
from d2llm.data.office_archives import Archive, Element, Relation, chart_text, drawing_text, local_name

GENERAL = "General"
BUILT_IN = {
    1: "0", 2: "0.00", 3: "#,##0", 4: "#,##0.00", 9: "0%", 10: "0.00%", 11: "0.00E+00", 14: "m/d/yyyy", 15: "d-mmm-yy",
    16: "d-mmm", 17: "mmm-yy", 18: "h:mm AM/PM", 19: "h:mm:ss AM/PM", 20: "h:mm", 21: "h:mm:ss", 22: "m/d/yyyy h:mm",
    37: "#,##0;(#,##0)", 38: "#,##0;(#,##0)", 39: "#,##0.00;(#,##0.00)", 40: "#,##0.00;(#,##0.00)", 45: "mm:ss",
    46: "[h]:mm:ss", 47: "mm:ss.0", 48: "0.0E+0",
    **dict.fromkeys([*range(27, 32), 36, *range(50, 59)], "yyyy/m/d"), **dict.fromkeys(range(32, 36), "h:mm:ss"),
}  # fmt: skip
"""The formats that a workbook need not define, by number; those of East Asian versions differ only in signs."""
_LITERAL = re.compile(r'"([^"]*)"|\\(.)|_.|\*.|\[\$([^\]-]*)[^\]]*\]|\[[^\]]*\]')
_DIGIT_CODES = re.compile(r"[0#?][0#?,]*(?:\.[0#?]*)?|\.[0#?]+")
_PLAIN = re.compile(r"-?(?:0|[1-9]\d*)(?:\.\d*[1-9])?")
_MAX_DIGITS = 15  # of a number, as in Excel
_MORE_DECIMALS = 3  # more than a format shows are what somebody entered; longer ones were computed
_LEAP_DAY_OF_1900 = 60  # which Excel counts, though there was none
_LONGEST_TIME = 366.0  # days; a larger number that is shown as a time has a date, too


@lru_cache(maxsize=65_536)  # a column's values are often few
def shown(value: str, code: str, *, starts_1904: bool = False) -> str:
    """A number, as a workbook stores it, in a format; as it is stored if it is no number."""
    try:
        amount = float(value)
        plain = plain_number(value)
    except (ValueError, ArithmeticError):
        return value
    if code == GENERAL:
        return plain
    sections = _sections(code)
    kind = _time_kind(sections[0])
    if kind:
        return _shown_time(amount + (1462 if starts_1904 and kind != "elapsed" and amount >= 1 else 0), kind) or plain
    section, is_own = _section_of(sections, amount)
    return _shown_number(plain, section, is_own=is_own)


def plain_number(value: str) -> str:
    """A number with up to 15 digits, without an exponent unless it is very large or small."""
    if len(value) <= _MAX_DIGITS and re.fullmatch(_PLAIN, value):
        return value
    decimal = Decimal(f"{float(value):.{_MAX_DIGITS}g}")
    if not decimal.is_finite() or (decimal and not -10 < decimal.adjusted() < 21):
        return f"{float(value):.{_MAX_DIGITS}g}".upper()
    text = f"{decimal:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


@lru_cache(maxsize=256)
def _sections(code: str) -> tuple[str, ...]:
    """The parts of a format for positive and negative numbers, zero and text."""
    pieces = re.findall(r'(?:"[^"]*"|\\.|\[[^\]]*\]|[^;])+|(?<=;)(?=;|$)|^(?=;)', code)
    return tuple(pieces or [GENERAL])


@lru_cache(maxsize=256)
def _time_kind(section: str) -> str:
    """What a format shows: "date", "time" (of day), "elapsed" time, or "" for a number."""
    if re.search(r"\[(h+|m+|s+)\]", section, flags=re.IGNORECASE):
        return "elapsed"
    tokens = re.sub(r"general", "", re.sub(_LITERAL, "", section), flags=re.IGNORECASE).lower()
    if re.search(r"[yd]|mmm|g{1,3}e|(?<![0#?.])e(?![+-])", tokens) or re.fullmatch(r"\W*m+\W*", tokens):
        return "date"
    return "time" if re.search(r"[hs]", tokens) else ""


def _section_of(sections: tuple[str, ...], amount: float) -> tuple[str, bool]:
    """The part of a format for a number, and whether that part is for negative numbers alone."""
    positive, negative, zero, *_ = (*sections, "", "", "")
    if amount < 0 and len(sections) > 1:
        return negative, True
    return (zero if amount == 0 and len(sections) > 2 else positive), False


def _shown_number(plain: str, section: str, *, is_own: bool) -> str:
    bare = re.sub(_LITERAL, lambda match: "\0" * len(match[0]), section)  # signs within literals are no digits
    digits = list(re.finditer(_DIGIT_CODES, bare))
    if re.sub(r"\0", "", bare).strip().lower() in ("general", "@", "") or "E" in plain:
        before, _, after = section.partition("General")
        return f"{_literal(before)}{plain}{_literal(after)}" if "General" in section else (_literal(section) or plain)
    is_scaled = any(match[0].endswith(",") for match in digits)
    if not digits or is_scaled or "/" in bare or re.search(r"[eE][+-]", bare):
        return plain
    sign = "-" if plain.startswith("-") and not (is_own and re.search(r"[-(]", section)) else ""
    value = Decimal(plain).copy_abs()
    start, end = digits[0].start(), digits[-1].end()
    is_percent = "%" in bare
    value = value * 100 if is_percent else value
    before, after = _literal(section[:start]), _literal(section[end:])
    formatted = _with_literals(value, section[start:end]) if len(digits) > 1 else _with_decimals(value, digits[0][0])
    return f"{sign}{before}{formatted}{after}".strip()


def _with_decimals(value: Decimal, pattern: str) -> str:
    """A number with at least the digits that a pattern ("000.00") asks for."""
    whole, _, part = pattern.partition(".")
    least, most = part.count("0"), len(part)
    text = f"{value:f}"
    decimals = len(text.partition(".")[2].rstrip("0"))
    if decimals > most + _MORE_DECIMALS:
        text = f"{value:.{most}f}"
        decimals = len(text.partition(".")[2].rstrip("0"))
    text = f"{value:.{max(least, decimals)}f}"
    digits, _, rest = text.partition(".")
    return digits.zfill(whole.count("0")) + (f".{rest}" if rest else "")


def _with_literals(value: Decimal, pattern: str) -> str:
    """A whole number in a pattern with signs between its digits, such as a telephone number's."""
    digits = f"{value:f}".partition(".")[0] if value == int(value) else ""
    if not digits:
        return f"{value:f}"
    result = ""
    for piece in reversed(re.findall(r'"[^"]*"|\\.|\[[^\]]*\]|.', pattern)):
        if piece in "0#?":
            result = (digits[-1:] or ("0" if piece == "0" else "")) + result
            digits = digits[:-1]
        elif piece != ",":
            result = _literal(piece) + result
    return digits + result


def _literal(text: str) -> str:
    """What a part of a format adds to a number."""

    def written(match: re.Match[str]) -> str:
        return next((group for group in match.groups() if group is not None), " " if match[0].startswith("_") else "")

    return re.sub(_LITERAL, written, text)


def _shown_time(days: float, kind: str) -> str:
    """A date (ISO), a time of day or a duration (hours:minutes:seconds); "" if it is beyond the calendar."""
    if kind == "elapsed" or (kind == "time" and 1 <= abs(days) < _LONGEST_TIME) or days < 0:
        milliseconds = round(abs(days) * 86_400_000)
        seconds, rest = divmod(milliseconds, 1000)
        text = f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"
        return ("-" if days < 0 else "") + text + (f".{rest:03}".rstrip("0") if rest else "")
    start = datetime(1899, 12, 31) if days < _LEAP_DAY_OF_1900 else datetime(1899, 12, 30)
    try:
        moment = start + timedelta(milliseconds=round(days * 86_400_000))
    except OverflowError:
        return ""
    time = moment.strftime("%H:%M:%S" if moment.second or moment.microsecond else "%H:%M")
    if moment.microsecond:
        time += f".{moment.microsecond // 1000:03}".rstrip("0")
    if kind == "time" and days < 1:
        return time
    date = f"{moment.year:04}-{moment.month:02}-{moment.day:02}"
    return (
        date
        if kind == "date" and not (moment.hour or moment.minute or moment.second or moment.microsecond)
        else f"{date} {time}"
    )


_LONGEST_REPEATED_CELL = 100  # characters; a cell over several rows is repeated in each
_DIGITS = "0123456789"
_THREAD = "[Threaded comment]"  # begins what older programs show in place of a conversation
_STRING_TYPES = frozenset({"s", "str", "inlineStr"})


@dataclass(frozen=True, slots=True)
class _Cell:
    """What a cell shows, and whether that is text."""

    text: str
    is_text: bool


_Row = dict[int, _Cell]  # by column, from 0


@dataclass
class _Sheet:
    """The rows of a sheet that are not empty, by number from 1."""

    rows: dict[int, _Row] = field(default_factory=dict[int, _Row])
    num_uncomputed: int = 0


def read_sheets(path: Path) -> FileContents:
    """Title and sections of a workbook; each sheet is a section under its name, hidden ones too.

    Raises:
        UnreadableFileError: it cannot be read.
    """
    with Archive(path) as archive:
        return _Workbook(archive).read()


class _Workbook:
    """A workbook that is being read."""

    def __init__(self, archive: Archive) -> None:
        self._archive = archive
        self._main = archive.main_part("xl/workbook.xml")
        self._root = archive.xml(self._main)
        self._links = archive.relations(self._main)
        self._writer = SectionWriter()
        properties = self._root.find("{*}workbookPr")
        self._starts_1904 = properties is not None and properties.get("date1904") in ("1", "true")
        self._strings = list(self._read_strings())
        self._formats = self._read_formats()

    def read(self) -> FileContents:
        for sheet_number, sheet in enumerate(self._root.iterfind("{*}sheets/{*}sheet"), start=1):
            name = " ".join(sheet.get("name", f"Sheet{sheet_number}").split())
            relation = next((self._links[value] for value in sheet.values() if value in self._links), None)
            if relation is None or self._archive.find(relation.target) is None:
                self._archive.skip(f"sheet {name}", "it is missing")
            else:
                self._write_sheet(name, relation.target)
        self._archive.skip_embedded(self._links)
        return FileContents(self._archive.title(), tuple(self._writer.finish()), skipped=tuple(self._archive.skipped))

    def _related(self, kind: str) -> Element | None:
        name = next((relation.target for relation in self._links.values() if relation.kind == kind), "")
        return self._archive.optional_xml(name) if name else None

    def _read_strings(self) -> Iterator[str]:
        name = next((relation.target for relation in self._links.values() if relation.kind == "sharedStrings"), "")
        if self._archive.find(name):
            yield from map(_string, self._archive.elements(name, "si"))

    def _read_formats(self) -> list[str]:
        """The code of each style of cells."""
        root = self._related("styles")
        if root is None:
            return []
        codes = {
            int(number_format.get("numFmtId", 0)): number_format.get("formatCode", GENERAL)
            for number_format in root.iterfind("{*}numFmts/{*}numFmt")
        }
        styles = root.iterfind("{*}cellXfs/{*}xf")
        numbers = (int(style.get("numFmtId", 0)) for style in styles)
        return [codes.get(format_id) or BUILT_IN.get(format_id, GENERAL) for format_id in numbers]

    def _write_sheet(self, name: str, part: str) -> None:
        sheet = self._read_sheet(part)
        if sheet.num_uncomputed:
            count = (
                f"{sheet.num_uncomputed:,} formula{'s have' if sheet.num_uncomputed > 1 else ' has'} no stored value"
            )
            self._archive.skip(f"sheet {name}", f"{count}; save it once with a program that computes them")
        self._writer.part(name)
        for text in _tables(sheet.rows):
            self._writer.block(text)
        links = self._archive.relations(part)
        drawings = [relation for relation in links.values() if relation.kind == "drawing" and relation.target]
        for drawing in drawings:
            for text in self._drawing_texts(drawing):
                self._writer.block(text)
        comments = list(self._comments(links))
        if comments:
            self._writer.part(name, "Comments")
            for cells, text in comments:
                self._writer.block(f"{cells}: {text}")
        self._archive.skip_embedded(links)

    def _drawing_texts(self, drawing: Relation) -> Iterator[str]:
        root = self._archive.optional_xml(drawing.target)
        if root is not None:
            yield drawing_text(root)
        for relation in self._archive.relations(drawing.target).values():
            chart = self._archive.optional_xml(relation.target) if relation.kind == "chart" else None
            if chart is not None:
                yield chart_text(chart)

    def _comments(self, links: dict[str, Relation]) -> Iterator[tuple[str, str]]:
        """The places and texts of comments and conversations."""
        threads = [relation for relation in links.values() if relation.kind == "threadedComment"]
        for relation in threads:
            root = self._archive.optional_xml(relation.target)
            for comment in root if root is not None else ():
                if text := (comment.findtext("{*}text") or "").strip():
                    yield comment.get("ref", ""), text
        for relation in links.values():
            root = self._archive.optional_xml(relation.target) if relation.kind == "comments" else None
            for comment in root.iter("{*}comment") if root is not None else ():
                texts = comment.find("{*}text")
                text = _string(texts).strip() if texts is not None else ""
                if text.startswith(_THREAD):
                    text = "" if threads else text.partition("Comment:")[2].strip()
                if text:
                    yield comment.get("ref", ""), text

    def _read_sheet(self, part: str) -> _Sheet:
        sheet = _Sheet()
        row_number = 0
        merged: list[str] = []
        for element in self._archive.elements(part, "row", "mergeCell"):
            if local_name(element) == "mergeCell":
                merged.append(element.get("ref", ""))
                continue
            row_number = int(element.get("r") or row_number + 1)
            row = self._read_row(element, sheet)
            if row:
                sheet.rows[row_number] = row
        for cells in merged:
            _repeat(sheet.rows, cells)
        return sheet

    def _read_row(self, element: Element, sheet: _Sheet) -> _Row:
        row: _Row = {}
        column = -1
        for cell in element:
            cells = cell.get("r")
            column = _column(cells.rstrip(_DIGITS)) if cells else column + 1
            kind = cell.get("t", "n")
            value, has_formula = "", False
            for child in cell:
                name = local_name(child)
                value = child.text or "" if name == "v" else value
                has_formula = has_formula or name == "f"
            if has_formula and not value and kind != "str":
                sheet.num_uncomputed += 1
            text = self._text(cell, kind, value)
            if text.strip():
                row[column] = _Cell(text, kind in _STRING_TYPES)
        return row

    def _text(self, cell: Element, kind: str, value: str) -> str:
        match kind:
            case "s":
                index = int(value) if value.strip().isdigit() else -1
                return self._strings[index] if 0 <= index < len(self._strings) else ""
            case "inlineStr":
                inside = cell.find("{*}is")
                return _string(inside) if inside is not None else ""
            case "str":
                return _unescaped(value)
            case "b":
                return {"1": "TRUE", "0": "FALSE"}.get(value.strip(), value)
            case "d":
                return value.removesuffix("T00:00:00").replace("T", " ")
            case "e":
                return value
            case _:
                style = cell.get("s", "0")
                index = int(style) if style.isdigit() else 0
                code = self._formats[index] if index < len(self._formats) else GENERAL
                return shown(value, code, starts_1904=self._starts_1904) if value else ""


def _string(item: Element) -> str:
    """The text of a string, without what tells how its signs are pronounced."""
    texts = (
        run
        for child in item
        for run in ([child] if local_name(child) == "t" else child.iterfind("{*}t") if local_name(child) == "r" else ())
    )
    return _unescaped("".join(run.text or "" for run in texts))


def _unescaped(text: str) -> str:
    """A string without the escapes that stand for characters which XML cannot hold."""
    if "_x" not in text:
        return text
    return re.sub(r"_x([0-9A-Fa-f]{4})_", lambda match: _character(int(match[1], 16)), text)


def _character(code: int) -> str:
    return "\n" if code == 0x0D else chr(code) if code >= 0x20 and not 0xD800 <= code < 0xE000 else " "


@lru_cache(maxsize=16_384)
def _column(letters: str) -> int:
    """The number of a column, from 0, by its letters ("AB")."""
    column = 0
    for letter in letters.upper():
        column = 26 * column + ord(letter) - 64
    return column - 1


def _repeat(rows: dict[int, _Row], cells: str) -> None:
    """Write a short cell that is merged over several rows into each that is not empty."""
    match = re.fullmatch(r"\$?([A-Z]+)\$?(\d+):\$?([A-Z]+)\$?(\d+)", cells)
    if match is None:
        return
    column, first, last = _column(match[1]), int(match[2]), int(match[4])
    cell = rows.get(first, {}).get(column)
    if cell is None or len(cell.text) > _LONGEST_REPEATED_CELL or last - first >= len(rows):
        return
    for row_number in range(first + 1, last + 1):
        if row_number in rows:
            rows[row_number].setdefault(column, cell)


def _tables(rows: dict[int, _Row]) -> Iterator[str]:
    """The paragraphs and tables of a sheet, of which empty rows are the ends."""
    block: list[_Row] = []
    blocks: list[list[_Row]] = []
    previous = 0
    for row_number in sorted(rows):
        if block and row_number > previous + 1:
            blocks.append(block)
            block = []
        block.append(rows[row_number])
        previous = row_number
    blocks.append(block)
    table: list[_Row] = []
    for part in blocks:
        if table and _continues(table, part):
            table += part
            continue
        yield from _block_texts(table)
        table = part
    yield from _block_texts(table)


def _continues(table: Sequence[_Row], rows: Sequence[_Row]) -> bool:
    """Whether rows after an empty one belong to the table above: they have no header of their own."""
    header, first = table[0], rows[0]
    if len(header) < 2 or not set(first) <= set(header):
        return False
    return not all(cell.is_text for cell in first.values())


def _block_texts(rows: Sequence[_Row]) -> Iterator[str]:
    """A table, after the lines above its header that have one cell each."""
    start = 0
    while start < len(rows) and len(rows[start]) == 1:
        start += 1
    if start == len(rows):
        start = 0 if len(rows) > 1 and not all(cell.is_text for row in rows for cell in row.values()) else len(rows)
    for row in rows[:start]:
        yield from (cell.text for cell in row.values())
    columns = sorted({column for row in rows[start:] for column in row})
    empty = _Cell("", is_text=True)
    yield markdown_table([row.get(column, empty).text for column in columns] for row in rows[start:])
