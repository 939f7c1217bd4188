"""Reading a data set in the BEIR layout: ``corpus.jsonl``, ``queries.jsonl`` (or ``.gz``) and ``qrels/<split>.tsv``."""

from __future__ import annotations

import gzip
import json
import logging
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from d2llm.core.errors import DataFormatError, DuplicateIdError
from d2llm.core.types import Passage, Qrels, Query

_log = logging.getLogger(__name__)
_QRELS_HEADER = ("query-id", "corpus-id", "score")
_NUM_SHOWN = 5
_TYPE_NAMES: dict[type, str] = {
    dict: "an object",
    list: "a list",
    str: "a string",
    int: "a number",
    float: "a number",
    bool: "a boolean",
}


@dataclass(frozen=True)
class Dataset:
    """Passages, queries and relevance judgements of one data set.

    ``passages`` and ``queries`` keep the order of their files; ``qrels`` maps split -> query_id -> passage_id -> grade,
    as the files give them. ``issues`` says what was odd but not wrong, counted.
    """

    name: str
    path: Path
    passages: dict[str, Passage]
    queries: dict[str, Query]
    qrels: dict[str, dict[str, dict[str, int]]]
    issues: tuple[str, ...] = ()

    def positives(self, split: str) -> dict[str, tuple[str, ...]]:
        """Relevant passages (grade above 0, in the corpus) of each known query of ``split``, in the file's order.

        A query all of whose judgements fall away keeps an empty tuple. Unknown queries are left out.

        Raises:
            DataFormatError: the data set was read without that split.
        """
        if split not in self.qrels:
            known = ", ".join(self.qrels) or "none"
            raise DataFormatError(self.path / "qrels", f"split '{split}' was not read; read: {known}")
        return {
            query_id: tuple(
                passage_id for passage_id, grade in grades.items() if grade > 0 and passage_id in self.passages
            )
            for query_id, grades in self.qrels[split].items()
            if query_id in self.queries
        }


def read_beir(folder: Path, *, splits: Sequence[str] | None = None) -> Dataset:
    """Read a BEIR-layout folder; ``splits=None`` reads every ``qrels/*.tsv``.

    Judgements of unknown queries or passages and empty passages are counted in ``issues`` and logged, not refused.

    Raises:
        DataFormatError: a file is missing, empty or malformed (names file and line).
        DuplicateIdError: an id, or a judged pair, occurs twice.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataFormatError(
            folder, "no such folder; looked for corpus.jsonl[.gz], queries.jsonl[.gz] and qrels/*.tsv in it"
        )
    passages = read_corpus(_find(folder, "corpus.jsonl"))
    queries = read_queries(_find(folder, "queries.jsonl"))
    qrels = {path.stem: _read_qrels(path) for path in _qrels_files(folder, splits)}
    issues = (*_empty_passages(passages), *_strays(qrels, queries, passages))
    for issue in issues:
        _log.warning("%s: %s", folder, issue)
    return Dataset(folder.resolve().name, folder, passages, queries, qrels, issues)


def read_corpus(path: Path) -> dict[str, Passage]:
    """Read the passages of a ``corpus.jsonl[.gz]`` file by id, in the file's order. An empty text is allowed.

    Raises:
        DataFormatError: the file is missing, has no passages, or a line is malformed.
        DuplicateIdError: an id occurs twice.
    """
    passages: dict[str, Passage] = {}
    first_lines: dict[str, int] = {}
    for line, record in _records(path):
        title = record.get("title")
        if title is not None and not isinstance(title, str):
            raise _wrong_type(path, line, "title", title)
        passage = Passage(_identifier(path, line, record), _string(path, line, record, "text"), title or "")
        _refuse_duplicate(path, line, passage.id, first_lines)
        passages[passage.id] = passage
    if not passages:
        raise DataFormatError(path, 'holds no passages; each line must be {"_id": ..., "title": ..., "text": ...}')
    return passages


def read_queries(path: Path) -> dict[str, Query]:
    """Read the queries of a ``queries.jsonl[.gz]`` file by id, in the file's order.

    Raises:
        DataFormatError: the file is missing, has no queries, or a line is malformed.
        DuplicateIdError: an id occurs twice.
    """
    queries: dict[str, Query] = {}
    first_lines: dict[str, int] = {}
    for line, record in _records(path):
        query = Query(_identifier(path, line, record), _string(path, line, record, "text"))
        _refuse_duplicate(path, line, query.id, first_lines)
        queries[query.id] = query
    if not queries:
        raise DataFormatError(path, 'holds no queries; each line must be {"_id": ..., "text": ...}')
    return queries


def _read_qrels(path: Path) -> dict[str, dict[str, int]]:
    qrels: dict[str, dict[str, int]] = {}
    number = 0
    for number, text in _lines(path):
        fields = tuple(field.strip() for field in text.split("\t"))
        if number == 1:
            if fields != _QRELS_HEADER:
                raise DataFormatError(
                    path,
                    f"the first line must be the header {'<TAB>'.join(_QRELS_HEADER)}, found {text[:80]!r}",
                    line=1,
                )
            continue
        if not text.strip():
            continue
        if len(fields) != len(_QRELS_HEADER):
            raise DataFormatError(
                path,
                f"expected 3 columns separated by tabs ({', '.join(_QRELS_HEADER)}), found {len(fields)}",
                line=number,
            )
        query_id, passage_id, grade = fields
        try:
            value = int(grade)
        except ValueError as error:
            raise DataFormatError(path, f"the score must be a whole number, found {grade!r}", line=number) from error
        if passage_id in qrels.setdefault(query_id, {}):
            raise DuplicateIdError(
                path, f"passage '{passage_id}' is judged twice for query '{query_id}'; keep one line", line=number
            )
        qrels[query_id][passage_id] = value
    if number == 0:
        raise DataFormatError(
            path, f"is empty; even without judgements it needs the header {'<TAB>'.join(_QRELS_HEADER)}"
        )
    return qrels


def _find(folder: Path, name: str) -> Path:
    for candidate in (folder / name, folder / f"{name}.gz"):
        if candidate.is_file():
            return candidate
    raise DataFormatError(folder, f"looked for {name} or {name}.gz and found neither")


def _qrels_files(folder: Path, splits: Sequence[str] | None) -> list[Path]:
    if splits is None:
        files = sorted((folder / "qrels").glob("*.tsv"))
        if not files:
            raise DataFormatError(folder, "looked for qrels/*.tsv (train.tsv, dev.tsv, test.tsv) and found none")
        return files
    files = [folder / "qrels" / f"{split}.tsv" for split in splits]
    for file in files:
        if not file.is_file():
            found = ", ".join(sorted(path.name for path in (folder / "qrels").glob("*.tsv"))) or "none"
            raise DataFormatError(file, f"no such file; qrels found in this folder: {found}")
    return files


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines (from 1) without their ends; a byte order mark is dropped."""
    if not path.is_file():
        raise DataFormatError(path, "no such file; check the path")
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
                yield number, text.rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise DataFormatError(
            path,
            f"not valid UTF-8 ({error.reason} at byte {error.start} of the line); save the file as UTF-8",
            line=number,
        ) from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataFormatError(
            path, f"damaged or truncated gzip ({error}); fetch or write the file again", line=number + 1
        ) from error


def _records(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Numbered JSON objects of a jsonl file; blank lines are passed over."""
    for line, text in _lines(path):
        if not text.strip():
            continue
        try:
            record: object = json.loads(text)
        except ValueError as error:
            raise DataFormatError(
                path, f"not valid JSON ({error}); one object per line is needed", line=line
            ) from error
        if not isinstance(record, dict):
            raise DataFormatError(path, f"must be a JSON object, found {_type_name(record)}", line=line)
        yield line, cast("Mapping[str, Any]", record)


def _string(path: Path, line: int, record: Mapping[str, Any], field: str) -> str:
    if field not in record:
        keys = ", ".join(f"'{key}'" for key in list(record)[:8]) or "none"
        raise DataFormatError(path, f"field '{field}' is missing; fields found: {keys}", line=line)
    value = record[field]
    if not isinstance(value, str):
        raise _wrong_type(path, line, field, value)
    try:
        value.encode()
    except UnicodeEncodeError as error:  # valid JSON, but no tokenizer and no file can take it
        raise DataFormatError(
            path, f"field '{field}' has half a character (an unpaired \\u surrogate); repair the text", line=line
        ) from error
    return value


def _identifier(path: Path, line: int, record: Mapping[str, Any]) -> str:
    identifier = _string(path, line, record, "_id")
    if not identifier:
        raise DataFormatError(path, "field '_id' is empty; every line needs an id of its own", line=line)
    return identifier


def _wrong_type(path: Path, line: int, field: str, value: object) -> DataFormatError:
    return DataFormatError(path, f"field '{field}' must be a string, found {_type_name(value)}", line=line)


def _type_name(value: object) -> str:
    return "null" if value is None else _TYPE_NAMES.get(type(value), type(value).__name__)


def _refuse_duplicate(path: Path, line: int, identifier: str, first_lines: dict[str, int]) -> None:
    first = first_lines.setdefault(identifier, line)
    if first != line:
        raise DuplicateIdError(
            path, f"id '{identifier}' was already used in line {first}; ids must be unique", line=line
        )


def _empty_passages(passages: Mapping[str, Passage]) -> tuple[str, ...]:
    empty = [passage.id for passage in passages.values() if not passage.text.strip()]
    return (f"{len(empty)} passages have an empty text, {_first(empty)}",) if empty else ()


def _strays(qrels: Mapping[str, Qrels], queries: Collection[str], passages: Collection[str]) -> tuple[str, ...]:
    """What the judgements point to that is not there."""
    issues: list[str] = []
    for split, judged in qrels.items():
        pairs = [(query_id, passage_id) for query_id, grades in judged.items() for passage_id in grades]
        lost_queries = [query_id for query_id, _ in pairs if query_id not in queries]
        lost_passages = [passage_id for _, passage_id in pairs if passage_id not in passages]
        for kind, lost in (("queries", lost_queries), ("passages", lost_passages)):
            if lost:
                issues.append(f"{split}: {len(lost)} judgements point to unknown {kind}, {_first(lost)}")
    return tuple(issues)


def _first(identifiers: Sequence[str]) -> str:
    distinct = list(dict.fromkeys(identifiers))
    return f"first {min(len(distinct), _NUM_SHOWN)}: {', '.join(distinct[:_NUM_SHOWN])}"
