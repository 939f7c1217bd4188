"""Tables as documents: each row of a CSV, TSV, JSON lines or Parquet file is a document.

A row's text has a line ``name: value`` for each value, as it is written in the file. If the rows have an id (``_id`` or
``id``) and a ``text``, the file is a corpus, whose rows have these ids and texts, and their other fields are metadata.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, cast

from d2llm.core.errors import DataFormatError
from d2llm.core.plain_values import plain_value
from d2llm.core.types import Passage
from d2llm.data.corpus_records import corpus_passages
from d2llm.data.csv_dialect import table_rows


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
        number = 0
        try:
            for number, row in enumerate(rows, start=1):
                named = zip(names, row, strict=False)
                rest = (("", value) for value in row[len(names) :])
                yield number, Pairs((name, value) for name, value in chain(named, rest) if value)
        except csv.Error as error:
            raise TableError(f"row {number + 1}: it cannot be parsed ({error})") from error
        if not number and names:
            yield 1, Pairs(("", name) for name in names)

    return " ".join(titles), records()


def json_records(text: str) -> Iterator[tuple[int, Any]]:
    """The numbered values of JSON lines: objects as ``Pairs``, numbers as ``Written``.

    Raises:
        TableError: a line is not valid JSON.
    """
    decoder = json.JSONDecoder(object_pairs_hook=Pairs, parse_float=Written, parse_int=Written, parse_constant=Written)
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield number, decoder.decode(line.strip())
            except (ValueError, RecursionError) as error:
                raise TableError(f"line {number}: it cannot be parsed: not valid JSON ({error})") from error


def parquet_records(path: Path) -> Iterator[tuple[int, Pairs]]:
    """The numbered rows of a Parquet file.

    Raises:
        TableError: it is damaged.
    """
    from d2llm.data.lines import parquet_rows

    try:
        for number, row in parquet_rows([path]):
            yield number, Pairs((name, value) for name, value in row.items() if plain_value(value) is not None)
    except (DataFormatError, ValueError) as error:
        problem = error.problem if isinstance(error, DataFormatError) else str(error)
        raise TableError(f"it cannot be parsed ({problem})") from error


def row_documents(records: Iterable[tuple[int, Any]], path: Path) -> tuple[bool, list[Passage]]:
    """Whether the records are a corpus, and a document for each; without a corpus, its id is the number of the row.

    Raises:
        TableError: a row cannot be read, or two have the same id.
    """
    records = iter(records)
    first = next(records, None)
    if first is None:
        return False, []
    records = chain([first], records)
    if isinstance(first[1], Pairs) and is_corpus_record(dict(first[1])):
        return True, _corpus(records, path)
    return False, [_row(place, record) for place, (_, record) in enumerate(records, start=1)]


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


def _row(number: int, record: Any) -> Passage:
    """A document of a row without an id of a corpus."""
    pairs = record if isinstance(record, Pairs) else Pairs([("", record)])
    pairs = [(name, value) for name, value in pairs if not (name.lower() == "title" and _is_missing(value))]
    titles = [_text(value) for name, value in pairs if name.lower() == "title"]
    title = " ".join(titles[0].split()) if len(titles) == 1 else ""
    lines = [_line(name, value) for name, value in pairs if not (title and name.lower() == "title")]
    text = "\n".join(line for line in lines if line) or title
    return Passage(str(number), _without_halves(text), _without_halves(title))


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
