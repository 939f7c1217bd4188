"""Reads data sets in the BEIR layout: ``corpus.jsonl``, ``queries.jsonl`` (or ``.gz``) and ``qrels/<split>.tsv``.

Passages are in a temporary file: a corpus takes 24 bytes of memory per passage, however long the texts are.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import struct
import tempfile
from array import array
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, ValuesView
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import numpy as np

from d2llm.core.errors import DataFormatError, DuplicateIdError
from d2llm.core.inputs import strings_of
from d2llm.core.names import counted
from d2llm.core.plain_values import plain_value
from d2llm.core.types import Passage, Qrels, Query
from d2llm.data.lines import (
    Fields,
    first_few,
    read_lines,
    read_records,
    refuse_duplicate,
    string_field,
    whole_number,
    wrong_type,
)
from d2llm.data.same_text import OwnPassages, find_own_passages

_LENGTHS = struct.Struct("<3I")  # of id, title and text, in bytes
_ENCODING = ("utf-8", "surrogatepass")  # a JSON file may hold half a surrogate pair
_READ_AT_ONCE = 1 << 20


class PassageStore(Mapping[str, Passage]):
    """Passages by id, in insertion order, read from a file on each access.

    The file is read, not memory-mapped: its pages are in the system's cache and do not count as memory of this process.
    It has no name and is deleted with the store. A store may be read from several threads and from forked processes.
    The ids must be distinct, which ``has_repeats`` checks. ``folder`` replaces the system's folder for temporary files.
    """

    def __init__(self, passages: Iterable[Passage], *, folder: Path | None = None) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed with the store
        offsets, keys = array("Q"), array("Q")
        offset = 0
        for passage in passages:
            offsets.append(offset)
            keys.append(_key(passage.id))
            offset += self._file.write(_record(passage))
        self._file.flush()
        offsets.append(offset)
        self._offsets = np.frombuffer(offsets, np.uint64)
        unsorted = np.frombuffer(keys, np.uint64)
        self._rows = np.argsort(unsorted, kind="stable").astype(np.uint32)
        self._keys = unsorted[self._rows]

    @property
    def has_repeats(self) -> bool:
        """Whether an id occurs twice (a lookup finds only the first passage with an id)."""
        alike = np.flatnonzero(self._keys[1:] == self._keys[:-1])
        groups = {int(self._keys[index]) for index in alike.tolist()}
        ids_of_groups = ([self._read(row).id for row in self._rows_of(np.uint64(key))] for key in groups)
        return any(len(set(ids)) < len(ids) for ids in ids_of_groups)

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, passage_id: str) -> Passage:
        for row in self._rows_of(np.uint64(_key(passage_id))):
            passage = self._read(row)
            if passage.id == passage_id:
                return passage
        raise KeyError(passage_id)

    def __contains__(self, passage_id: object) -> bool:
        return isinstance(passage_id, str) and self.get(passage_id) is not None

    def __iter__(self) -> Iterator[str]:
        return (passage.id for passage in self.read_all())

    def values(self) -> ValuesView[Passage]:
        """The passages in insertion order, read sequentially."""
        return _Values(self)

    def _rows_of(self, key: np.uint64) -> list[int]:
        """Rows with the hash of an id, in order; collisions are possible, though very rare."""
        start, end = (int(np.searchsorted(self._keys, key, side)) for side in ("left", "right"))
        return self._rows[start:end].tolist()

    def _read(self, row: int) -> Passage:
        start, end = int(self._offsets[row]), int(self._offsets[row + 1])
        return _passage(os.pread(self._file.fileno(), end - start, start))

    def read_all(self) -> Iterator[Passage]:
        """The passages in insertion order, read in large blocks."""
        row = 0
        while row < len(self):
            start = int(self._offsets[row])
            end_row = max(row + 1, int(np.searchsorted(self._offsets, start + _READ_AT_ONCE, "right")) - 1)
            block = os.pread(self._file.fileno(), int(self._offsets[end_row]) - start, start)
            for index in range(row, end_row):
                yield _passage(block[int(self._offsets[index]) - start : int(self._offsets[index + 1]) - start])
            row = end_row


class _Values(ValuesView[Passage]):
    """Reads in file order; the default ``ValuesView`` would look up every passage by its id."""

    def __init__(self, store: PassageStore) -> None:
        super().__init__(store)
        self._store = store

    def __iter__(self) -> Iterator[Passage]:
        return self._store.read_all()


def _key(passage_id: str) -> int:
    """A 64-bit hash of an id; collisions are resolved by the ids in the file."""
    return int.from_bytes(hashlib.blake2b(passage_id.encode(*_ENCODING), digest_size=8).digest(), "little")


def _record(passage: Passage) -> bytes:
    fields = [part.encode(*_ENCODING) for part in (passage.id, passage.title, passage.text)]
    return _LENGTHS.pack(*map(len, fields)) + b"".join(fields)


def _passage(record: bytes) -> Passage:
    num_id, num_title, num_text = _LENGTHS.unpack_from(record)
    title = _LENGTHS.size + num_id
    text = title + num_title
    return Passage(
        id=record[_LENGTHS.size : title].decode(*_ENCODING),
        title=record[title:text].decode(*_ENCODING),
        text=record[text : text + num_text].decode(*_ENCODING),
    )


_log = logging.getLogger(__name__)
_LARGE_CORPUS_BYTES = 1 << 26  # 64 MiB: some 100,000 short passages; in memory they would take about twice that
_QRELS_HEADER = ("query-id", "corpus-id", "score")
_TREC_LINE = re.compile(r"\s*\S+\s+\S+\s+\S+\s+-?\d+(\.0*)?\s*")  # query-id 0 corpus-id score
_Item = TypeVar("_Item", Passage, Query)

Rows = Iterable[tuple[int, Fields]]
"""Numbered rows (from 1) with named fields."""


@dataclass(frozen=True)
class Dataset:
    """Passages, queries and relevance judgements of one data set.

    ``passages`` and ``queries`` keep the order of their files; ``qrels`` maps split -> query_id -> passage_id -> grade,
    as in the files. The passages of a large corpus are kept in a temporary file (``PassageStore``). ``issues`` lists
    irregularities that are not errors, with counts.

    Example:
        >>> from d2llm import Dataset, open_data
        >>> dataset = open_data("DATA")
        >>> isinstance(dataset, Dataset)  # and not pairs
        True
        >>> sorted(dataset.qrels)
        ['dev', 'test', 'train']
    """

    name: str
    path: Path
    passages: Mapping[str, Passage]
    queries: dict[str, Query]
    qrels: dict[str, dict[str, dict[str, int]]]
    issues: tuple[str, ...] = ()

    def __repr__(self) -> str:
        """What it is, in one line."""
        counts = f"{counted(len(self.passages), 'passage')}, {counted(len(self.queries), 'query')}"
        return f"Dataset({self.name!r}: {counts}, splits {', '.join(self.qrels) or 'none'})"

    def positives(self, split: str) -> dict[str, tuple[str, ...]]:
        """Relevant passages (grade above 0, in the corpus) of each known query of ``split``, in file order.

        A query without any relevant passage gets an empty tuple. Unknown queries are left out.

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

    def unshared_positives(self, split: str, others: Iterable[str] | str = ()) -> dict[str, tuple[str, ...]]:
        """``positives`` of the queries of ``split`` that have some, but share none with a query of ``others``.

        So that passages of dev and test queries have never been positives in training.
        """
        reserved = self.relevant_passages(strings_of(others, "others"))
        judged = self.positives(split)
        return {query_id: ids for query_id, ids in judged.items() if ids and reserved.isdisjoint(ids)}

    @cached_property
    def own_passages(self) -> OwnPassages:
        """The passages that are a query itself (``data.same_text``), found when they are first asked for."""
        return find_own_passages(self.passages, self.queries, self.qrels)

    def relevant_passages(self, splits: Iterable[str] | str) -> set[str]:
        """Passages that are relevant to any query of these splits; errors as for ``positives``."""
        judged = (positives for split in strings_of(splits, "splits") for positives in self.positives(split).values())
        return {passage_id for positives in judged for passage_id in positives}


@dataclass(frozen=True)
class RetrievalSource:
    """Where the rows of a retrieval set come from. Each call reads them again and keeps nothing.

    ``qrels`` returns the judgements of each split; ``corpus_path`` and ``queries_path`` are the paths named in errors.
    """

    name: str
    path: Path
    corpus_path: Path
    queries_path: Path
    corpus: Callable[[], Rows]
    queries: Callable[[], Rows]
    qrels: Callable[[], dict[str, dict[str, dict[str, int]]]]

    def iter_passages(self) -> Iterator[tuple[int, Passage]]:
        """Numbered passages. An empty text is allowed; the caller must check that ids are unique."""
        return iter_passages(self.corpus_path, self.corpus())

    def iter_queries(self) -> Iterator[tuple[int, Query]]:
        """Numbered queries; the caller must check that ids are unique."""
        return iter_queries(self.queries_path, self.queries())

    def load(self) -> Dataset:
        """The whole data set, large corpora in a temporary file; irregularities are counted in ``issues`` and logged.

        Errors as for ``read_beir``.
        """
        passages = self._passages()
        queries = _by_id(self.queries_path, self.iter_queries())
        qrels = self.qrels()
        issues = unknown_id_issues(qrels, queries, passages)
        if empty := [passage.id for passage in passages.values() if not passage.text.strip()]:
            issues = (f"{counted(len(empty), 'passage')} without text, {first_few(empty)}", *issues)
        for issue in issues:
            _log.warning("%s: %s", self.path, issue)
        return Dataset(self.name, self.path, passages, queries, qrels, issues)

    def _passages(self) -> Mapping[str, Passage]:
        large = self.corpus_path.is_file() and self.corpus_path.stat().st_size >= _LARGE_CORPUS_BYTES
        if large and hasattr(os, "pread"):  # not available on Windows
            store = PassageStore(passage for _, passage in self.iter_passages())
            if not store.has_repeats:
                return store
        return _by_id(self.corpus_path, self.iter_passages())  # reports where an id occurs twice


def read_beir(folder: str | Path, *, splits: Sequence[str] | str | None = None) -> Dataset:
    """Read a BEIR-layout folder; ``splits=None`` reads every ``qrels/*.tsv``.

    Judgements of unknown queries or passages, and empty passages, are not errors: ``issues`` counts them.

    Raises:
        DataFormatError: a file is missing, empty or malformed (the message names file and line).
        DuplicateIdError: an id, or a judged pair, occurs twice.
    """
    return beir_source(Path(folder), splits=splits).load()


def beir_source(folder: Path, *, splits: Sequence[str] | str | None = None) -> RetrievalSource:
    """The rows of a BEIR-layout folder, read one by one; ``DataFormatError`` if a file is missing.

    ``splits=None`` means every ``qrels/*.tsv``.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataFormatError(
            folder, "no such folder; looked for corpus.jsonl[.gz], queries.jsonl[.gz] and qrels/*.tsv in it"
        )
    corpus, queries = _find(folder, "corpus.jsonl"), _find(folder, "queries.jsonl")
    return RetrievalSource(
        folder.resolve().name,
        folder,
        corpus,
        queries,
        lambda: read_records(corpus),
        lambda: read_records(queries),
        lambda: {path.stem: read_qrels(path) for path in _qrels_files(folder, splits)},
    )


def read_queries(path: Path) -> dict[str, Query]:
    """The queries of a ``queries.jsonl[.gz]`` file by id, in the file's order; errors as for ``read_beir``."""
    return _by_id(path, iter_queries(path, read_records(path)))


def iter_passages(path: Path, rows: Rows) -> Iterator[tuple[int, Passage]]:
    """Numbered passages from rows with ``_id``, ``text`` and optionally ``title``; errors name ``path``."""
    line = 0
    for line, record in rows:
        title = plain_value(record.get("title"))  # NaN is what pandas and polars write for a missing one
        if title is not None and not isinstance(title, str):
            raise wrong_type(path, line, "title", title)
        yield line, Passage(_identifier(path, line, record), string_field(path, line, record, "text"), title or "")
    if line == 0:
        raise DataFormatError(path, 'holds no passages; each line must be {"_id": ..., "title": ..., "text": ...}')


def iter_queries(path: Path, rows: Rows) -> Iterator[tuple[int, Query]]:
    """Numbered queries from rows with ``_id``, ``text`` and optionally ``instruction``; errors name ``path``."""
    line = 0
    for line, record in rows:
        has_instruction = plain_value(record.get("instruction")) is not None
        instruction = string_field(path, line, record, "instruction") if has_instruction else None
        yield line, Query(_identifier(path, line, record), string_field(path, line, record, "text"), instruction)
    if line == 0:
        raise DataFormatError(path, 'holds no queries; each line must be {"_id": ..., "text": ...}')


def read_qrels(path: Path) -> dict[str, dict[str, int]]:
    """Read a ``qrels/<split>.tsv`` file: query_id -> passage_id -> grade; errors as for ``read_beir``."""
    return collect_judgements(path, _qrels_lines(path))


def collect_judgements(path: Path, rows: Iterable[tuple[int, tuple[str, str, int]]]) -> dict[str, dict[str, int]]:
    """Judgements by query and passage; a pair judged twice is a ``DuplicateIdError`` that names ``path`` and line."""
    qrels: dict[str, dict[str, int]] = {}
    for line, (query_id, passage_id, grade) in rows:
        if passage_id in qrels.setdefault(query_id, {}):
            raise DuplicateIdError(
                path, f"passage '{passage_id}' is judged twice for query '{query_id}'; keep one line", line=line
            )
        qrels[query_id][passage_id] = grade
    return qrels


def _qrels_lines(path: Path) -> Iterator[tuple[int, tuple[str, str, int]]]:
    line_number, of_trec = 0, False
    for line_number, text in read_lines(path):
        fields = tuple(field.strip() for field in text.split("\t"))
        if line_number == 1:
            of_trec = _TREC_LINE.fullmatch(text) is not None
            if fields == _QRELS_HEADER:
                continue
            if not of_trec:
                raise DataFormatError(
                    path,
                    f"the first line must be the header {'<TAB>'.join(_QRELS_HEADER)}, found {text[:80]!r}; only the "
                    "four columns of TREC (query-id 0 corpus-id score) have none",
                    line=1,
                )
        if not text.strip():
            continue
        if of_trec:
            fields = tuple(text.split())
        if len(fields) != (4 if of_trec else 3):
            columns = "4 columns of TREC" if of_trec else f"3 columns separated by tabs ({', '.join(_QRELS_HEADER)})"
            raise DataFormatError(path, f"expected {columns}, found {len(fields)}", line=line_number)
        query_id, passage_id, grade = fields[0], *fields[-2:]
        yield line_number, (query_id, passage_id, whole_number(path, line_number, "the score", grade))
    if line_number == 0:
        raise DataFormatError(
            path, f"is empty; even without judgements it needs the header {'<TAB>'.join(_QRELS_HEADER)}"
        )


def _by_id(path: Path, items: Iterable[tuple[int, _Item]]) -> dict[str, _Item]:
    items_by_id: dict[str, _Item] = {}
    first_lines: dict[str, int] = {}
    for line, item in items:
        refuse_duplicate(path, line, item.id, first_lines)
        items_by_id[item.id] = item
    return items_by_id


def _find(folder: Path, name: str) -> Path:
    for candidate in (folder / name, folder / f"{name}.gz"):
        if candidate.is_file():
            return candidate
    raise DataFormatError(folder, f"looked for {name} or {name}.gz and found neither")


def _qrels_files(folder: Path, splits: Sequence[str] | str | None) -> list[Path]:
    if splits is None:
        files = sorted((folder / "qrels").glob("*.tsv"))
        if not files:
            raise DataFormatError(folder, "looked for qrels/*.tsv (train.tsv, dev.tsv, test.tsv) and found none")
        return files
    files = [folder / "qrels" / f"{split}.tsv" for split in strings_of(splits, "splits")]
    for file in files:
        if not file.is_file():
            names = ", ".join(sorted(path.name for path in (folder / "qrels").glob("*.tsv"))) or "none"
            raise DataFormatError(file, f"no such file; qrels found in this folder: {names}")
    return files


def _identifier(path: Path, line: int, record: Fields) -> str:
    """``_id``, or ``id`` if there is no ``_id``; whole numbers are converted to text."""
    field = "_id" if "_id" in record else "id"
    value = record.get(field)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    identifier = string_field(path, line, record, field)
    if not identifier:
        raise DataFormatError(path, f"field '{field}' is empty; give each its own id", line=line)
    return identifier


def unknown_id_issues(
    qrels: Mapping[str, Qrels], queries: Collection[str], passages: Collection[str]
) -> tuple[str, ...]:
    """Issues for judgements of queries or passages that do not exist."""
    issues: list[str] = []
    for split, judged in qrels.items():
        pairs = [(query_id, passage_id) for query_id, grades in judged.items() for passage_id in grades]
        lost_queries = [query_id for query_id, _ in pairs if query_id not in queries]
        lost_passages = [passage_id for _, passage_id in pairs if passage_id not in passages]
        for kind, lost in (("queries", lost_queries), ("passages", lost_passages)):
            if lost:
                unknown = counted(len(lost), "judgement")
                issues.append(f"{split}: {unknown} of unknown {kind} not counted, {first_few(lost)}")
    return tuple(issues)
