"""Tables as documents: each row of a CSV, TSV, JSON lines or Parquet file is a document.

A row's text has a line ``name: value`` for each value, as it is written in the file. If the rows have an id (``_id`` or
``id``) and a ``text``, the file is a corpus, whose rows have these ids and texts, and their other fields are metadata.

``csv.Sniffer`` counts characters, without regard to quotes, and is wrong about a third of the files in the tests.
"""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, cast

from d2llm.core.errors import DataFormatError
from d2llm.core.plain_values import plain_value
from d2llm.core.types import Passage
from d2llm.data.python_records import corpus_passages

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
    return titles, [name.strip() for name in names], chain(table, rows)


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
    num_rows = 0
    while num_rows < min(len(rows) - 1, _MAX_TITLE_ROWS):
        row = rows[num_rows]
        is_alone = len(row) == 1 < width or (width > 2 and sum(bool(value.strip()) for value in row) == 1)
        if not is_alone:
            break
        num_rows += 1
    return num_rows if num_rows < len(rows) and len(rows[num_rows]) > 1 else 0


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


class TableError(ValueError):
    """A table that cannot be read; the message says where and why."""


class Written(str):
    """A number of a JSON text as it is written there."""

    __slots__ = ()


class Pairs(list[tuple[str, Any]]):
    """The names and values of a JSON object, as often as they occur."""


def is_corpus_record(record: Mapping[str, Any] | Sequence[str]) -> bool:
    """Whether a record, or these names of columns, are those of a corpus: with an id and a text."""
    return "text" in record and ("_id" in record or "id" in record)


def csv_records(text: str, delimiter: str | None = None) -> tuple[str, Iterator[tuple[int, Pairs]]]:
    """The title of a table, and its numbered rows.

    Raises:
        TableError: it cannot be parsed.
    """
    try:
        titles, names, rows = table_rows(text, delimiter=delimiter)
    except csv.Error as error:
        raise TableError(f"it cannot be parsed ({error})") from error

    def records() -> Iterator[tuple[int, Pairs]]:
        row_number = 0
        try:
            for row_number, row in enumerate(rows, start=1):
                named = zip(names, row, strict=False)
                rest = (("", value) for value in row[len(names) :])
                yield row_number, Pairs((name, value) for name, value in chain(named, rest) if value)
        except csv.Error as error:
            raise TableError(f"row {row_number + 1}: it cannot be parsed ({error})") from error
        if not row_number and names:
            yield 1, Pairs(("", name) for name in names)

    return " ".join(titles), records()


def json_records(text: str) -> Iterator[tuple[int, Any]]:
    """The numbered values of JSON lines: objects as ``Pairs``, numbers as ``Written``.

    Raises:
        TableError: a line is not valid JSON.
    """
    decoder = json.JSONDecoder(object_pairs_hook=Pairs, parse_float=Written, parse_int=Written, parse_constant=Written)
    for line_number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield line_number, decoder.decode(line.strip())
            except (ValueError, RecursionError) as error:
                raise TableError(f"line {line_number}: it cannot be parsed: not valid JSON ({error})") from error


def parquet_records(path: Path) -> Iterator[tuple[int, Pairs]]:
    """The numbered rows of a Parquet file.

    Raises:
        TableError: it is damaged.
    """
    from d2llm.data.lines import parquet_rows

    try:
        for row_number, row in parquet_rows([path]):
            yield row_number, Pairs((name, value) for name, value in row.items() if plain_value(value) is not None)
    except (DataFormatError, ValueError) as error:
        problem = error.problem if isinstance(error, DataFormatError) else str(error)
        raise TableError(f"it cannot be parsed ({problem})") from error


def row_documents(records: Iterable[tuple[int, Any]], path: Path) -> tuple[bool, tuple[str, ...], list[Passage]]:
    """Whether the records are a corpus, the columns of the first, and a document for each.

    Without a corpus, the id of a document is the number of the row.

    Raises:
        TableError: a row cannot be read, or two have the same id.
    """
    records = iter(records)
    first = next(records, None)
    if first is None:
        return False, (), []
    records = chain([first], records)
    columns = tuple(name for name, _ in first[1]) if isinstance(first[1], Pairs) else ()
    if columns and is_corpus_record(dict(first[1])):
        return True, columns, _corpus(records, path)
    return False, columns, [_row(index, record) for index, (_, record) in enumerate(records, start=1)]


def _corpus(records: Iterable[tuple[int, Any]], path: Path) -> list[Passage]:
    def plain() -> Iterator[tuple[int, Mapping[str, Any]]]:
        for line, record in records:
            if not isinstance(record, Pairs):
                raise TableError(f"line {line}: must be an object with an id and a text, as the first one")
            yield line, {name: _plain_value(value) for name, value in record}

    passages: list[Passage] = []
    lines: dict[str, int] = {}
    try:
        for line, passage in corpus_passages(path, plain()):
            if (earlier := lines.setdefault(passage.id, line)) != line:
                raise TableError(f"line {line}: the id {passage.id!r} is that of line {earlier}, too; keep one of them")
            passages.append(passage)
    except DataFormatError as error:
        raise TableError(error.problem if error.line is None else f"line {error.line}: {error.problem}") from error
    return passages


def _row(row_number: int, record: Any) -> Passage:
    """A document of a row without an id of a corpus."""
    pairs = record if isinstance(record, Pairs) else Pairs([("", record)])
    pairs = [(name, value) for name, value in pairs if not (name.lower() == "title" and _is_missing(value))]
    titles = [_text(value) for name, value in pairs if name.lower() == "title"]
    title = " ".join(titles[0].split()) if len(titles) == 1 else ""
    lines = [_line(name, value) for name, value in pairs if not (title and name.lower() == "title")]
    text = "\n".join(line for line in lines if line) or title
    return Passage(str(row_number), _without_halves(text), _without_halves(title))


def _is_missing(value: Any) -> bool:
    return value == "NaN" if isinstance(value, Written) else plain_value(value) is None


def _line(name: str, value: Any) -> str:
    text = _text(value)
    return (f"{name}: {text}" if name else text) if text else ""


def _text(value: Any) -> str:
    """A value as its file has it, or as JSON has it if it is made of others."""
    if isinstance(value, str):
        return value
    if isinstance(value, Pairs | dict | list | tuple):
        return _json(value)
    return _scalar_text(value)


def _scalar_text(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    return _bytes_text(value) if isinstance(value, bytes) else str(value)


def _bytes_text(value: bytes) -> str:
    """Bytes as the text that they are, or in hexadecimal digits."""
    try:
        text = value.decode()
    except UnicodeDecodeError:
        return value.hex()
    return text if text.isprintable() or text.isspace() else value.hex()


def _json(value: Any) -> str:
    if isinstance(value, Written):
        return str(value)
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, Pairs | dict):
        pairs = value.items() if isinstance(value, dict) else value
        return "{" + ", ".join(f"{_json(str(name))}: {_json(item)}" for name, item in cast(Any, pairs)) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_json, cast("list[Any]", value))) + "]"
    text = _scalar_text(value)
    return text if value is None or isinstance(value, bool | int | float) else json.dumps(text, ensure_ascii=False)


def _plain_value(value: Any) -> Any:
    """A value of a JSON text as Python has it."""
    if isinstance(value, Written):
        return json.loads(value)
    if isinstance(value, Pairs):
        return {name: _plain_value(item) for name, item in value}
    return [_plain_value(item) for item in cast("list[Any]", value)] if isinstance(value, list) else value


def _without_halves(text: str) -> str:
    """JSON can hold halves of surrogate pairs, which no encoding can write: they become U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
