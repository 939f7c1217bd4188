"""The table of an index: ids, texts, metadata, vectors and row numbers in LanceDB, which versions every change.

Columns: id, title, text, document_id, position; the user's metadata; and d2_row (the passage's row in the vector file,
its generation in the upper bits), d2_hash (of all that the user gave: ``blocks.row_hash``), d2_truncated (the student
read it in part), d2_vector (codes of the vector, as in the vector file; not where an index keeps its vectors once).
"""

# pyright: reportUnknownParameterType=false
# (pyarrow ships no types)

from __future__ import annotations

import shutil
import warnings
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from d2llm.core.errors import DataFormatError, InputError, StorageError
from d2llm.index.blocks import INTERNAL_COLUMNS, ROW_MASK, TEXT_COLUMNS, codes_of

NAME = "passages"
_WORDS = ("title", "text")  # the columns of words that are searched
_ALL = (1 << 32) - 1  # LanceDB's default limit is 10
_ASKED_AT_ONCE = 4_096  # ids or rows in one IN list
_SPANS_AT_ONCE = 64  # in one condition
_DELETED_AT_ONCE = 10_000
_SCANNED_AT_ONCE = 16_384


def quoted(value: str) -> str:
    """A string as an SQL literal."""
    return "'" + value.replace("'", "''") + "'"


class PassageTable:
    """One version of the table, opened for reading; the methods that write are for the holder of the write lock."""

    def __init__(self, folder: Path, table: Any) -> None:
        self.folder = folder
        self._table = table

    @classmethod
    def create(cls, folder: Path, schema: pa.Schema) -> PassageTable:
        """A new table without rows."""
        with storage_errors(folder):
            return cls(folder, _connect(folder).create_table(NAME, schema=schema))

    @classmethod
    def open(cls, folder: Path, version: int | None = None) -> PassageTable:
        """The table at a version, the latest by default. It stays there, whatever is written meanwhile.

        Raises:
            DataFormatError: there is no table, it is damaged, or it has no such version any more.
        """
        try:
            table = _connect(folder).open_table(NAME)
            table.checkout(table.version if version is None else version)
            table.count_rows()
        except Exception as error:
            what = "its table" if version is None else f"version {version} of its table"
            raise DataFormatError(folder, f"{what} cannot be opened ({_first_line(error)})") from error
        return cls(folder, table)

    @property
    def version(self) -> int:
        """The version that this is."""
        return cast(int, self._table.version)

    @property
    def schema(self) -> pa.Schema:
        """Its columns."""
        return cast(pa.Schema, self._table.schema)

    @property
    def metadata_fields(self) -> list[pa.Field]:
        """The user's columns."""
        return [field for field in self.schema if field.name not in (*TEXT_COLUMNS, *INTERNAL_COLUMNS)]

    def __len__(self) -> int:
        return cast(int, self._table.count_rows())

    def columns(self, names: Sequence[str], where: str | None = None) -> pa.Table:
        """Some columns of all rows, or of those that fit an SQL condition."""
        query = self._table.search().select(list(names)).limit(_ALL)
        return self._read(query.where(where) if where else query)

    def any_row(self) -> int | None:
        """The row number (d2_row) of some passage; None without passages."""
        found = self._read(self._table.search().select(["d2_row"]).limit(1))["d2_row"].to_pylist()
        return cast(int, found[0]) if found else None

    def has_rows_from(self, row: int) -> bool:
        """Whether a passage has this row number (d2_row) or a higher one."""
        return len(self._read(self._table.search().select(["d2_row"]).where(f"d2_row >= {row}").limit(1))) > 0

    def batches(self, names: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
        """Some columns (all by default) of all rows, a few thousand rows at a time."""
        query = self._table.search().select(list(names or self.schema.names)).limit(_ALL)
        try:
            yield from query.to_batches(_SCANNED_AT_ONCE)
        except Exception as error:
            raise self._unreadable(error) from error

    def codes(self) -> NDArray[np.uint8]:
        """The codes of all vectors by row [largest row + 1, code_size]; rows that this version lacks are zeros."""
        rows = np.asarray(self.columns(["d2_row"])["d2_row"]) & ROW_MASK
        size = self.schema.field("d2_vector").type.list_size
        codes = np.zeros((int(rows.max()) + 1 if len(rows) else 0, size), np.uint8)
        for batch in self.batches(["d2_row", "d2_vector"]):
            codes[np.asarray(batch.column("d2_row")) & ROW_MASK] = codes_of(batch)
        return codes

    def by_ids(self, ids: Sequence[str], names: Sequence[str]) -> pa.Table:
        """Columns of the rows with these ids, those that there are, in no order."""
        ids = ids if len(self) else []
        conditions = (f"id IN ({', '.join(map(quoted, some))})" for some in _parts(ids, _ASKED_AT_ONCE))
        return self._join((self.columns(names, where) for where in conditions), names)

    def by_rows(self, rows: Sequence[int], names: Sequence[str]) -> pa.Table:
        """Columns of the passages with these row numbers (d2_row), in their order.

        Raises:
            DataFormatError: one is not there.
        """
        conditions = (f"d2_row IN ({', '.join(map(str, some))})" for some in _parts(rows, _ASKED_AT_ONCE))
        found = self._join((self.columns(["d2_row", *names], where) for where in conditions), ["d2_row", *names])
        place_of = {row: place for place, row in enumerate(found["d2_row"].to_pylist())}
        missing = sum(row not in place_of for row in rows)
        if missing:
            raise self._lacks(missing, len(rows))
        return found.take(np.array([place_of[row] for row in rows], np.int64)).select(list(names))

    def rows(self) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
        """Of every passage its row number (d2_row), and LanceDB's id of its row in this version, for ``take``."""
        found = self._read(self._table.search().select(["d2_row"]).with_row_id(True).limit(_ALL))
        return np.asarray(found["d2_row"], np.int64), np.asarray(found["_rowid"], np.uint64)

    def take(self, row_ids: NDArray[np.uint64], names: Sequence[str]) -> pa.Table:
        """Columns of the passages with these ids of rows (``rows``), in their order: no search, hence quick.

        Raises:
            DataFormatError: one is not there.
        """
        wanted, places = np.unique(row_ids, return_inverse=True)
        found = self._read(self._table.take_row_ids(wanted.tolist()).select(list(names)).with_row_id())
        there = np.asarray(found["_rowid"], np.uint64)
        order = np.argsort(there)
        if not np.array_equal(there[order], wanted):
            raise self._lacks(len(wanted) - len(there), len(wanted))
        return found.take(order[places]).select(list(names))

    def around(self, places: Sequence[tuple[str, int]], distance: int, names: Sequence[str]) -> pa.Table:
        """Columns of the passages at most ``distance`` positions from a (document_id, position), in no order."""
        low, high = -(1 << 31), (1 << 31) - 1  # what the column holds; LanceDB refuses other numbers
        wanted = [
            f"(document_id = {quoted(document)} AND position BETWEEN {max(position - distance, low)} AND "
            f"{min(position + distance, high)})"
            for document, position in dict.fromkeys(places)
        ]
        conditions = (" OR ".join(some) for some in _parts(wanted, _SPANS_AT_ONCE))
        found = self._join((self.columns(["d2_row", *names], where) for where in conditions), ["d2_row", *names])
        _, first = np.unique(np.asarray(found["d2_row"]), return_index=True)  # spans may overlap
        return found.take(first).select(list(names))

    def parts(self, documents: Sequence[str]) -> list[tuple[str, str, int]]:
        """(id, document_id, position) of passages with one of these document_ids, or one of these as id; no order."""
        found: list[tuple[str, str, int]] = []
        names = ["id", "document_id", "position"]
        for some in _parts(documents if len(self) else [], _ASKED_AT_ONCE):
            listed = ", ".join(map(quoted, some))
            table = self.columns(names, f"document_id IN ({listed}) OR id IN ({listed})")
            found += zip(*(table[name].to_pylist() for name in names), strict=True)
        return found

    def match(self, text: str, top_k: int, where: str | None = None) -> pa.Table:
        """BM25: columns id, d2_row and _score of the best passages for a query; the filter comes first.

        Raises:
            DataFormatError: the indices of the words are not there (yet).
        """
        if not text.strip() or not len(self):
            return pa.table({"id": pa.array([], pa.string()), "d2_row": pa.array([], pa.int64()),
                             "_score": pa.array([], pa.float32())})  # fmt: skip
        queries: Any = import_module("lancedb.query")
        if any(f"{name}_idx" not in self._index_names for name in _WORDS):
            raise DataFormatError(
                self.folder,
                f"version {self.version} has no index of its words yet; open it again when the writer is done, or run "
                "`d2llm index ... compact` if a writer was interrupted",
            )
        asked = queries.MultiMatchQuery(text, list(_WORDS))
        query = self._table.search(asked, query_type="fts").select(["id", "d2_row", "_score"]).limit(top_k)
        return self._read(query.where(where, prefilter=True) if where else query)

    @property
    def indices(self) -> dict[str, int]:
        """Indices by name, with the number of rows that each does not yet cover."""
        found = {index.name: self._table.index_stats(index.name) for index in self._table.list_indices()}
        return {name: stats.num_unindexed_rows if stats else 0 for name, stats in found.items()}

    # Writing -------------------------------------------------------------------------------------------------------

    def put(self, rows: pa.Table, *, replaces: bool) -> None:
        """Add rows in one commit; with ``replaces``, rows of the same id go in the same commit."""
        with storage_errors(self.folder):
            self._table.checkout_latest()
            if replaces:
                merge = self._table.merge_insert("id").when_matched_update_all().when_not_matched_insert_all()
                merge.execute(rows)
            else:
                self._table.add(rows)

    def delete(self, ids: Sequence[str]) -> int:
        """Delete the passages with these ids; returns how many there were. Ten thousand go in one commit."""
        before = 0
        with storage_errors(self.folder):
            self._table.checkout_latest()
            before = len(self)
            for some in _parts(ids, _DELETED_AT_ONCE):
                self._table.delete(f"id IN ({', '.join(map(quoted, some))})")
        return before - len(self)

    def add_columns(self, fields: Sequence[pa.Field]) -> None:
        """Add metadata columns; they are null in the rows that are there."""
        with storage_errors(self.folder):
            self._table.checkout_latest()
            self._table.add_columns(pa.schema(fields))

    def replace_all(self, schema: pa.Schema, batches: Iterator[pa.RecordBatch]) -> None:
        """Put other rows in the place of all rows, in one commit. Earlier versions stay readable."""
        failures: list[Exception] = []  # what goes wrong in ``batches`` comes back as text alone

        def noted() -> Iterator[pa.RecordBatch]:
            try:
                yield from batches
            except Exception as error:
                failures.append(error)
                raise

        with storage_errors(self.folder):
            reader = pa.RecordBatchReader.from_batches(schema, noted())
            try:
                self._table = _connect(self.folder).create_table(NAME, reader, mode="overwrite")
            except RuntimeError as error:
                raise failures[0] if failures else error from None

    def build_indices(self) -> None:
        """Make the indices on id, row, document and texts that are missing."""
        from lancedb.index import FTS, BTree

        # ICU splits words in every script, Chinese and mixed text included. No stop words: titles are made of them.
        texts = FTS(base_tokenizer="icu", language="English", stem=True, remove_stop_words=False, max_token_length=None)
        with storage_errors(self.folder):
            self._table.checkout_latest()
            present = self.indices
            for name in ("id", "d2_row", "document_id", *_WORDS):
                if f"{name}_idx" not in present:
                    self._table.create_index(name, config=texts if name in _WORDS else BTree())

    def optimize(self, keep: timedelta) -> None:
        """Join small files, bring the indices up to date, and forget versions older than ``keep``."""
        with storage_errors(self.folder), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that a reader of a version forgotten now would fail
            self._table.checkout_latest()
            self._table.optimize(cleanup_older_than=keep)

    def versions(self) -> list[int]:
        """The versions that can still be opened."""
        return sorted(entry["version"] for entry in self._table.list_versions())

    @cached_property
    def _index_names(self) -> set[str]:
        return {index.name for index in self._table.list_indices()}  # of a version, so they do not change

    def _read(self, query: Any) -> pa.Table:
        try:
            return cast(pa.Table, query.to_arrow())
        except Exception as error:
            raise self._unreadable(error) from error

    def _lacks(self, num_missing: int, num_asked: int) -> DataFormatError:
        return DataFormatError(self.folder, f"its table lacks {num_missing} of {num_asked} rows asked for")

    def _unreadable(self, error: Exception) -> DataFormatError:
        return DataFormatError(
            self.folder,
            f"version {self.version} of its table cannot be read ({_first_line(error)}); refresh or open it again, and "
            "run `d2llm index ... verify` if that does not help",
        )

    def _join(self, tables: Iterator[pa.Table], names: Sequence[str]) -> pa.Table:
        found = list(tables)
        return pa.concat_tables(found) if found else self.schema.empty_table().select(list(names))


def link_table(source: Path, target: Path) -> None:
    """A copy of the latest version of a table in another folder, by hard links, which take no space.

    The files of a table never change, so the copy does not either. Where links are impossible, files are copied.
    """
    with storage_errors(target):
        shutil.copytree(source / f"{NAME}.lance", target / f"{NAME}.lance", copy_function=link_or_copy)
    copy = PassageTable(target, _connect(target).open_table(NAME))
    copy.optimize(timedelta(0))


def link_or_copy(source: str | Path, target: str | Path) -> None:
    """Another name for a file; its content again where the file system has no links."""
    try:
        Path(target).hardlink_to(source)
    except OSError:
        shutil.copy2(source, target)


@contextmanager
def storage_errors(folder: Path) -> Generator[None]:
    """What a store says when it cannot write, as an error of d2llm."""
    try:
        yield
    except (InputError, StorageError):
        raise
    except (OSError, RuntimeError, ValueError) as error:
        raise StorageError(
            f"{folder}: the index cannot be written ({_first_line(error)}). What was committed before is kept; make "
            "room or give the right to write, then give the same command again"
        ) from error


def _connect(folder: Path) -> Any:
    import lancedb

    return lancedb.connect(folder)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def _parts(values: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(values), size):
        yield values[start : start + size]
