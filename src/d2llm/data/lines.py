"""Reads numbered lines and JSON objects of text files, and rows of Parquet files; every error names the file."""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from d2llm.core.errors import DataFormatError, DuplicateIdError
from d2llm.core.files import is_stream
from d2llm.core.json_values import parse_json

_NUM_SHOWN = 5
_BATCH_ROWS = 1024
_TYPE_NAMES: dict[type, str] = {
    dict: "an object",
    list: "a list",
    str: "a string",
    int: "a number",
    float: "a number",
    bool: "a boolean",
}

Fields = Mapping[str, Any]
"""The named fields of one line or row."""


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines (from 1) without line ends; a byte order mark is dropped, ``.gz`` is decompressed on the fly.

    Raises:
        DataFormatError: the file is missing, cannot be read, is not UTF-8, or is damaged gzip.
    """
    if not path.is_file():
        problem = "no such file; check the path"
        if is_stream(path):
            problem = "a pipe or device is no file; write it to a file (the command line does so itself, also for -)"
        raise DataFormatError(path, problem)
    line_number = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            for line_number, raw in enumerate(file, start=1):
                text = raw.decode("utf-8-sig" if line_number == 1 else "utf-8")
                yield line_number, text.rstrip("\r\n")
    except UnicodeDecodeError as error:
        with path.open("rb") as file:
            is_gzip = path.suffix != ".gz" and file.read(2) == b"\x1f\x8b"
        if is_gzip:
            raise DataFormatError(path, "is compressed with gzip; name it .gz, or unpack it") from error
        raise DataFormatError(
            path,
            f"not valid UTF-8 ({error.reason} at byte {error.start} of the line); save the file as UTF-8",
            line=line_number,
        ) from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataFormatError(
            path, f"damaged or truncated gzip ({error}); fetch or write the file again", line=line_number + 1
        ) from error
    except OSError as error:
        raise DataFormatError(path, f"cannot be read ({error.strerror}); check its rights and the disk") from error


def read_records(path: Path) -> Iterator[tuple[int, Fields]]:
    """Numbered JSON objects of a jsonl file; blank lines are skipped.

    Raises:
        DataFormatError: as for ``read_lines``, or a line is not a JSON object.
    """
    for line, text in read_lines(path):
        if not text.strip():
            continue
        try:
            record: object = parse_json(text)
        except ValueError as error:
            raise DataFormatError(
                path, f"not valid JSON ({error}); one object per line is needed", line=line
            ) from error
        if not isinstance(record, dict):
            raise DataFormatError(path, f"must be a JSON object, found {type_name(record)}", line=line)
        yield line, cast("Fields", record)


def string_field(path: Path, line: int, record: Fields, field: str) -> str:
    """The text of a field; ``DataFormatError`` if it is missing, not a string, or has an unpaired surrogate."""
    if field not in record:
        keys = ", ".join(f"'{key}'" for key in list(record)[:8]) or "none"
        raise DataFormatError(path, f"field '{field}' is missing; fields found: {keys}", line=line)
    value = record[field]
    if not isinstance(value, str):
        raise wrong_type(path, line, field, value)
    try:
        value.encode()
    except UnicodeEncodeError as error:  # valid JSON, but cannot be tokenized or written
        raise DataFormatError(
            path, f"field '{field}' has an unpaired surrogate (\\uD800 to \\uDFFF); repair the text", line=line
        ) from error
    return value


def whole_number(path: Path, line: int, name: str, text: str) -> int:
    """A whole number in a text file, ``1.0`` included: tables that hold numbers with decimals write all of them so."""
    try:
        return int(re.sub(r"\.0*$", "", text))
    except ValueError as error:
        raise DataFormatError(path, f"{name} must be a whole number, found {text!r}", line=line) from error


def wrong_type(path: Path, line: int, field: str, value: object) -> DataFormatError:
    """The error for a field that should be a string."""
    return DataFormatError(path, f"field '{field}' must be a string, found {type_name(value)}", line=line)


def type_name(value: object) -> str:
    """JSON's name for the type of ``value``, for messages."""
    return "null" if value is None else _TYPE_NAMES.get(type(value), type(value).__name__)


def refuse_duplicate(path: Path, line: int, identifier: str, first_lines: dict[str, int]) -> None:
    """Record the line of an id in ``first_lines``; ``DuplicateIdError`` if an earlier line has it."""
    first = first_lines.setdefault(identifier, line)
    if first != line:
        raise DuplicateIdError(
            path, f"id '{identifier}' was already used in line {first}; ids must be unique", line=line
        )


def first_few(identifiers: Sequence[str]) -> str:
    """The first distinct ids, for messages."""
    distinct = list(dict.fromkeys(identifiers))
    return f"first {min(len(distinct), _NUM_SHOWN)}: {', '.join(distinct[:_NUM_SHOWN])}"


def parquet_rows(paths: Sequence[Path]) -> Iterator[tuple[int, Fields]]:
    """Numbered rows of Parquet files, counted from 1 across all files; ``DataFormatError`` for a damaged file."""
    import pyarrow as pa  # slow to import
    import pyarrow.parquet as pq

    row_number = 0
    for path in paths:
        try:
            with pq.ParquetFile(path) as file:
                for batch in file.iter_batches(batch_size=_BATCH_ROWS):
                    for row in batch.to_pylist():
                        row_number += 1
                        yield row_number, cast("Fields", row)
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise DataFormatError(path, f"cannot be read as Parquet ({error}); write the file again") from error
