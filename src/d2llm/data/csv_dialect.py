"""How a file of values is separated: found by reading its first rows in several ways and comparing their widths.

``csv.Sniffer`` counts characters, without regard to quotes, and is wrong about a third of the files in the tests.
"""

from __future__ import annotations

import csv
import io
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

_DELIMITERS = "\t;|,"
_SAMPLE_CHARACTERS = 1 << 16
_SAMPLE_ROWS = 200
_MAX_TITLE_ROWS = 10
_COST_OF_TITLES = 0.15  # a delimiter that the first row lacks must fit the others better
_NUMBER = re.compile(r"[-+−(]?\s*[$€£¥]?\s*\d[\d\s.,'_]*(?:[eE][-+]?\d+)?\s*[%€$)]?")
_DATE = re.compile(r"\d{1,4}[-/.]\d{1,2}[-/.]\d{1,4}([T ].*)?|\d{1,2}:\d{2}(:\d{2})?")
_YEAR = re.compile(r"(18|19|20|21)\d\d")

_Rows = list[list[str]]


@dataclass(frozen=True, slots=True)
class Dialect:
    """How values are separated and quoted. ``width`` is how many columns most rows have."""

    delimiter: str
    escape: str | None = None
    has_quotes: bool = True
    width: int = 1

    def rows(self, text: str) -> Iterator[list[str]]:
        """The rows of a text, without those in which nothing is written.

        Raises:
            csv.Error: it cannot be parsed.
        """
        csv.field_size_limit(sys.maxsize)
        reader = csv.reader(
            io.StringIO(text, newline=""),
            delimiter=self.delimiter,
            escapechar=self.escape,
            doublequote=self.escape is None,
            quoting=csv.QUOTE_MINIMAL if self.has_quotes else csv.QUOTE_NONE,
            skipinitialspace=self.delimiter != "\t",
        )
        return (row for row in reader if any(map(str.strip, row)))


def table_rows(text: str, *, delimiter: str | None = None) -> tuple[list[str], list[str], Iterator[list[str]]]:
    """The lines above a table, the names of its columns (none if it has no header), and its rows.

    Args:
        text: its lines end in line feeds; the first may be Excel's ``sep=;``.
        delimiter: what separates the values, if that is known.

    Raises:
        csv.Error: it cannot be parsed.
    """
    given = re.match(r"\s*\"?sep=(.)\"?[^\S\n]*\n", text)
    if given:
        text, delimiter = text[given.end() :], given[1]
    dialect = find_dialect(text, delimiter)
    rows = dialect.rows(text)
    first = list(islice(rows, _SAMPLE_ROWS))
    num_titles = _num_title_rows(first, dialect.width)
    titles = ["".join(value.strip() for value in row) for row in first[:num_titles]]
    table = first[num_titles:]
    names = table.pop(0) if table and _has_header(table) else []
    return titles, [name.strip() for name in names], _joined(table, rows)


def find_dialect(text: str, delimiter: str | None = None) -> Dialect:
    """The dialect in which most of the first rows have the same number of columns, and most columns."""
    sample = text[:_SAMPLE_CHARACTERS]
    is_cut = len(text) > len(sample)
    candidates = [Dialect(character, escape) for character in delimiter or _DELIMITERS for escape in (None, "\\")]
    if '\\"' not in sample:
        candidates = candidates[::2]
    if sample.count('"') % 2:  # one of them is no quote
        candidates += [Dialect(character, has_quotes=False) for character in delimiter or _DELIMITERS]
    best, best_score = Dialect(delimiter or ","), (0.0, 0.0, 0)
    for candidate in candidates:
        try:
            rows = list(islice(candidate.rows(sample), _SAMPLE_ROWS))
        except csv.Error:
            continue
        rows = rows[: -1 if is_cut and len(rows) > 1 and len(rows) < _SAMPLE_ROWS else None]
        width, score = _consistency(rows)
        # Quotes that are read as such are the rule: without them, rows must fit much better.
        quality = score + (0.1 if candidate.has_quotes else 0.0) + (0.05 if candidate.escape else 0.0)
        decimals = _fraction_of_decimals(rows, candidate.delimiter)
        if width > 1 and (quality, decimals, width) > best_score:
            best = Dialect(candidate.delimiter, candidate.escape, candidate.has_quotes, width)
            best_score = (quality, decimals, width)
    return best


def _consistency(rows: _Rows) -> tuple[int, float]:
    """The most frequent width above 1, and the fraction of the rows below titles that have it."""
    widths = Counter(len(row) for row in rows if len(row) > 1)
    if not widths:
        return 1, 0.0
    width = max(widths, key=lambda size: (widths[size], size))
    num_titles = _num_title_rows(rows, width)
    table = rows[num_titles:]
    return width, sum(len(row) == width for row in table) / len(table) - _COST_OF_TITLES * (num_titles > 0)


def _fraction_of_decimals(rows: _Rows, delimiter: str) -> float:
    """The fraction of values that are numbers with decimal commas, which a comma as delimiter would divide."""
    if delimiter == ",":
        return 0.0
    values = [value for row in rows for value in row]
    return sum(re.fullmatch(r"-?\d+,\d+", value.strip()) is not None for value in values) / max(len(values), 1)


def _num_title_rows(rows: Sequence[Sequence[str]], width: int) -> int:
    """How many rows at the top are no rows of the table: with one value, where others have several."""
    number = 0
    while number < min(len(rows) - 1, _MAX_TITLE_ROWS):
        row = rows[number]
        is_alone = len(row) == 1 < width or (width > 2 and sum(bool(value.strip()) for value in row) == 1)
        if not is_alone:
            break
        number += 1
    return number if number < len(rows) and len(rows[number]) > 1 else 0


def _has_header(rows: _Rows) -> bool:
    """Whether the first row has names: not if it has a number or a date where the rows below have them."""
    below = rows[1:_SAMPLE_ROWS]
    first = [value.strip() for value in rows[0]]
    if not below or all(re.fullmatch(_YEAR, value) for value in first if _is_number(value)):
        return True
    for column, value in enumerate(first):
        others = [row[column] for row in below if column < len(row) and row[column].strip()]
        if others and sum(map(_is_number, others)) > 0.8 * len(others) and value and not _is_number(value):
            return True
    return not any(map(_is_number, first))


def _is_number(value: str) -> bool:
    value = value.strip()
    return bool(re.fullmatch(_NUMBER, value) or re.fullmatch(_DATE, value))


def _joined(first: _Rows, rest: Iterator[list[str]]) -> Iterator[list[str]]:
    yield from first
    yield from rest
