"""The table of an index: ids, texts, metadata, vectors and row numbers in LanceDB, which versions every change.

LanceDB does not check that the bytes it reads are those that were written, so the files of a version are compared with
d2llm's own checksums (``table_files``) before LanceDB reads them.

Columns: id, title, text, document_id, position; the user's metadata; and d2_row (the passage's row in the vector file,
with its generation in the upper bits), d2_hash (hash of all user columns: ``blocks.row_hash``), d2_truncated (the
student truncated the passage), d2_words (words added to it; absent if the index adds none), d2_vector (code of the
vector, as in the vector file; absent if the index keeps its vectors once).
"""

# pyright: reportUnknownParameterType=false
# (pyarrow ships no types)

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from heapq import nsmallest
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from d2llm.core.batches import batched
from d2llm.core.errors import DataFormatError, InputError
from d2llm.core.types import Passage, is_text
from d2llm.store.blocks import INTERNAL_COLUMNS, ROW_MASK, codes_of, read_words
from d2llm.store.checksums import Record
from d2llm.store.lance_manifest import manifests
from d2llm.store.lancedb_import import import_lancedb
from d2llm.store.schema import TEXT_COLUMNS
from d2llm.store.storage import first_line, is_panic, storage_errors
from d2llm.store.table_files import TableFiles

NAME = "passages"
PAGE_SIZE = 100
"""Default number of ids per page of a list."""
_KEYS = ("id", "d2_row", "document_id")  # the columns that rows are looked up by
_ALL = (1 << 32) - 1  # LanceDB's default limit is 10
_ASKED_AT_ONCE = 4_096  # ids or rows in one IN list
_SPANS_AT_ONCE = 64  # spans in one condition
_DELETED_AT_ONCE = 10_000
_SCANNED_AT_ONCE = 16_384
_FOREVER = timedelta(days=36_500)
_FILE_FORMAT = "2.1"
"""The version of Lance's file format. In the next, 2.2, a column whose values are all equal (no titles, no documents)
is decoded as a whole to read one row: 13 ms for ten passages of a million."""


@dataclass(frozen=True, slots=True)
class ListedDocument:
    """A document of an index and its number of passages."""

    id: str
    num_passages: int


def quoted(value: str) -> str:
    """A string as an SQL literal."""
    return "'" + value.replace("'", "''") + "'"


class PassageTable:
    """One version of the table, opened for reading; methods that write require the write lock."""

    def __init__(self, folder: Path, table: Any, files: TableFiles) -> None:
        self.folder = folder
        self._table = table
        self._files = files
        self._compared: set[tuple[int, tuple[str, ...]]] = set()  # versions and columns with compared indices

    @classmethod
    def create(cls, folder: Path, schema: pa.Schema) -> PassageTable:
        """A new table without rows."""
        with storage_errors(folder):
            files = TableFiles(folder)
            files.replace(Record(0, {}))
            return cls(folder, _connect(folder).create_table(NAME, schema=schema), files)

    @classmethod
    def open(
        cls, folder: Path, version: int | None = None, files: TableFiles | None = None, *, whole: bool = False
    ) -> PassageTable:
        """The table at a version, the latest by default. It stays at that version, even if new ones are written.

        Files that ``files`` has already compared with their checksums are not compared again. ``whole``: compare them
        completely, not only samples.

        Raises:
            DamagedFileError: a file of the version is damaged.
            DataFormatError: there is no table, it is damaged, or it no longer has this version.
        """
        files = TableFiles(folder) if files is None else files
        number = files.ready(version, whole=whole)
        try:
            table = _connect(folder).open_table(NAME)
            table.checkout(table.version if number is None else number)
            table.count_rows()
        except BaseException as error:
            if not (isinstance(error, Exception) or is_panic(error)):
                raise
            subject = "its table" if version is None else f"version {version} of its table"
            raise DataFormatError(folder, f"{subject} cannot be opened ({first_line(error)})") from error
        return cls(folder, table, files)

    @property
    def version(self) -> int:
        """LanceDB's number of this version."""
        return cast(int, self._table.version)

    @property
    def schema(self) -> pa.Schema:
        """All columns."""
        return cast(pa.Schema, self._table.schema)

    @property
    def metadata_fields(self) -> list[pa.Field]:
        """The metadata columns."""
        return [field for field in self.schema if field.name not in (*TEXT_COLUMNS, *INTERNAL_COLUMNS)]

    def __len__(self) -> int:
        return cast(int, self._table.count_rows())

    def columns(self, names: Sequence[str], where: str | None = None) -> pa.Table:
        """Some columns of all rows, or of those that satisfy an SQL condition."""
        query = self._table.search().select(list(names)).limit(_ALL)
        if where:
            self._compare_indices(_KEYS)
        return self._read(query.where(where) if where else query)

    def any_row(self) -> int | None:
        """The row number (d2_row) of an arbitrary passage; None if there are no passages."""
        numbers = self._read(self._table.search().select(["d2_row"]).limit(1))["d2_row"].to_pylist()
        return cast(int, numbers[0]) if numbers else None

    def has_rows_from(self, row: int) -> bool:
        """Whether a passage has this row number (d2_row) or a higher one."""
        self._compare_indices(_KEYS)
        return len(self._read(self._table.search().select(["d2_row"]).where(f"d2_row >= {row}").limit(1))) > 0

    def batches(self, names: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
        """Some columns (all by default) of all rows, in batches of a few thousand rows."""
        query = self._table.search().select(list(names or self.schema.names)).limit(_ALL)
        with self._reading():
            yield from query.to_batches(_SCANNED_AT_ONCE)

    def codes(self) -> NDArray[np.uint8]:
        """The codes of all vectors by row [largest row + 1, code_size]; zeros for rows that this version lacks."""
        rows = np.asarray(self.columns(["d2_row"])["d2_row"]) & ROW_MASK
        size = self.schema.field("d2_vector").type.list_size
        codes = np.zeros((int(rows.max()) + 1 if len(rows) else 0, size), np.uint8)
        for batch in self.batches(["d2_row", "d2_vector"]):
            codes[np.asarray(batch.column("d2_row")) & ROW_MASK] = codes_of(batch)
        return codes

    def by_ids(self, ids: Sequence[str], names: Sequence[str]) -> pa.Table:
        """Columns of the rows with these ids, in no order; missing ids are ignored."""
        ids = ids if len(self) else []
        conditions = (f"id IN ({', '.join(map(quoted, batch))})" for batch in batched(ids, _ASKED_AT_ONCE))
        return self._join((self.columns(names, where) for where in conditions), names)

    def by_rows(self, rows: Sequence[int], names: Sequence[str]) -> pa.Table:
        """Columns of the passages with these row numbers (d2_row), in their order.

        Raises:
            DataFormatError: a row is missing.
        """
        conditions = (f"d2_row IN ({', '.join(map(str, batch))})" for batch in batched(rows, _ASKED_AT_ONCE))
        table = self._join((self.columns(["d2_row", *names], where) for where in conditions), ["d2_row", *names])
        place_of = {row: place for place, row in enumerate(table["d2_row"].to_pylist())}
        missing = sum(row not in place_of for row in rows)
        if missing:
            raise self._lacks(missing, len(rows))
        return table.take(np.array([place_of[row] for row in rows], np.int64)).select(list(names))

    def rows(self) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
        """The row number (d2_row) of every passage, and LanceDB's id of its row in this version, for ``take``."""
        table = self._read(self._table.search().select(["d2_row"]).with_row_id(True).limit(_ALL))
        return np.asarray(table["d2_row"], np.int64), np.asarray(table["_rowid"], np.uint64)

    def take(self, row_ids: NDArray[np.uint64], names: Sequence[str]) -> pa.Table:
        """Columns of the passages with these row ids (``rows``), in their order; fast, because it does not search.

        Raises:
            DataFormatError: a row is missing.
        """
        distinct, places = np.unique(row_ids, return_inverse=True)
        table = self._read(self._table.take_row_ids(distinct.tolist()).select(list(names)).with_row_id())
        taken = np.asarray(table["_rowid"], np.uint64)
        order = np.argsort(taken)
        if not np.array_equal(taken[order], distinct):
            raise self._lacks(len(distinct) - len(taken), len(distinct))
        return table.take(order[places]).select(list(names))

    def around(self, places: Sequence[tuple[str, int]], distance: int, names: Sequence[str]) -> pa.Table:
        """Columns of the passages at most ``distance`` positions from a (document_id, position), in no order."""
        low, high = -(1 << 31), (1 << 31) - 1  # range of the column; LanceDB refuses other numbers
        spans = [
            f"(document_id = {quoted(document)} AND position BETWEEN {max(position - distance, low)} AND "
            f"{min(position + distance, high)})"
            for document, position in dict.fromkeys(places)
        ]
        conditions = (" OR ".join(batch) for batch in batched(spans, _SPANS_AT_ONCE))
        table = self._join((self.columns(["d2_row", *names], where) for where in conditions), ["d2_row", *names])
        _, first = np.unique(np.asarray(table["d2_row"]), return_index=True)  # spans may overlap
        return table.take(first).select(list(names))

    def parts(self, documents: Sequence[str]) -> list[tuple[str, str, int]]:
        """(id, document_id, position) of passages whose document_id or id is one of ``documents``, in no order."""
        passages: list[tuple[str, str, int]] = []
        names = ["id", "document_id", "position"]
        for batch in batched(documents if len(self) else [], _ASKED_AT_ONCE):
            listed = ", ".join(map(quoted, batch))
            table = self.columns(names, f"document_id IN ({listed}) OR id IN ({listed})")
            passages += zip(*(table[name].to_pylist() for name in names), strict=True)
        return passages

    def pieces_of(self, documents: Sequence[str]) -> dict[str, list[str]]:
        """Document id -> ids of its passages, ordered by position; missing documents are left out.

        Raises:
            InputError: a document id is not valid text.
        """
        for name in documents:
            _check_id(name)
        requested, places = set(documents), dict[str, list[tuple[int, str]]]()
        for passage_id, document_id, position in self.parts(list(dict.fromkeys(documents))):
            if (document := document_id or passage_id) in requested:
                places.setdefault(document, []).append((position, passage_id))
        return {name: [passage_id for _, passage_id in sorted(places[name])] for name in documents if name in places}

    def ids_after(self, cursor: str, limit: int) -> list[str]:
        """The first ``limit`` passage ids after ``cursor``, in code point order.

        Raises:
            InputError: ``cursor`` is not valid text, or ``limit`` is below 1.
        """
        _check_page(cursor, limit)
        if not len(self):
            return []
        rows = self.columns(["id"], f"id > {quoted(cursor)}" if cursor else None)
        return nsmallest(limit, cast("list[str]", rows["id"].to_pylist()))

    def documents_after(self, cursor: str, limit: int) -> list[ListedDocument]:
        """Like ``ids_after``, for documents; a passage without a document counts as its own document."""
        _check_page(cursor, limit)
        if not len(self):
            return []
        where = f"document_id > {quoted(cursor)} OR (document_id = '' AND id > {quoted(cursor)})" if cursor else None
        columns = self.columns(["id", "document_id"], where)
        ids, names = (cast("list[str]", columns[name].to_pylist()) for name in ("id", "document_id"))
        counts = Counter(name or own for own, name in zip(ids, names, strict=True))
        return [ListedDocument(name, counts[name]) for name in nsmallest(limit, counts)]

    def texts(self, first: int, end: int) -> Iterator[str]:
        """The full texts of the rows (d2_row) from ``first`` to ``end``; "" for rows without a passage."""
        for title, text in self._values(first, end, ["title", "text"], ("", "")):
            yield Passage("", text, title).full_text

    def added_words(self, first: int, end: int) -> Iterator[dict[str, float]]:
        """The words added to the rows (d2_row) from ``first`` to ``end``, with their counts."""
        for (stored,) in self._values(first, end, ["d2_words"], ("",)):
            yield read_words(stored)

    def _values(self, first: int, end: int, names: list[str], missing: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
        """Columns of the rows (d2_row) from ``first`` to ``end``; ``missing`` for rows without a passage."""
        for start in range(first, end, _SCANNED_AT_ONCE):
            stop = min(start + _SCANNED_AT_ONCE, end)
            table = self.columns(["d2_row", *names], f"d2_row >= {start} AND d2_row < {stop}")
            values = dict(
                zip(
                    table["d2_row"].to_pylist(),
                    zip(*(table[name].to_pylist() for name in names), strict=True),
                    strict=True,
                )
            )
            for row in range(start, stop):
                yield values.get(row, missing)

    @property
    def indices(self) -> dict[str, int]:
        """Index name -> number of rows that the index does not cover yet."""
        self._compare_indices(_KEYS)
        statistics = {index.name: self._table.index_stats(index.name) for index in self._table.list_indices()}
        return {name: stats.num_unindexed_rows if stats else 0 for name, stats in statistics.items()}

    # Writing -------------------------------------------------------------------------------------------------------

    def put(self, rows: pa.Table, *, replaces: bool) -> None:
        """Add rows in one commit; with ``replaces``, existing rows with the same ids are removed in the same commit."""
        with self._change():
            if replaces:
                merge = self._table.merge_insert("id").when_matched_update_all().when_not_matched_insert_all()
                merge.execute(rows)
            else:
                self._table.add(rows)

    def delete(self, ids: Sequence[str]) -> int:
        """Delete the passages with these ids; returns their number. One commit deletes up to ten thousand ids."""
        before = 0
        with self._change():
            before = len(self)
            for batch in batched(ids, _DELETED_AT_ONCE):
                self._table.delete(f"id IN ({', '.join(map(quoted, batch))})")
        return before - len(self)

    def add_columns(self, fields: Sequence[pa.Field]) -> None:
        """Add metadata columns; they are null in existing rows."""
        with self._change():
            self._table.add_columns(pa.schema(fields))

    def replace_all(self, schema: pa.Schema, batches: Iterator[pa.RecordBatch]) -> None:
        """Replace all rows in one commit. Earlier versions stay readable."""
        failures: list[Exception] = []  # LanceDB reports errors of ``batches`` only as text

        def recording_failures() -> Iterator[pa.RecordBatch]:
            try:
                yield from batches
            except Exception as error:
                failures.append(error)
                raise

        with storage_errors(self.folder):
            reader = pa.RecordBatchReader.from_batches(schema, recording_failures())
            try:
                self._table = _connect(self.folder).create_table(NAME, reader, mode="overwrite")
            except RuntimeError as error:
                raise failures[0] if failures else error from None
            self._files.commit()

    def build_indices(self) -> None:
        """Build missing indices on id, row and document."""
        from lancedb.index import BTree

        with storage_errors(self.folder):
            self._table.checkout_latest()
            self._compare_indices(_KEYS)
            present = {index.name for index in self._table.list_indices()}
            missing = [name for name in _KEYS if f"{name}_idx" not in present]
        if missing:
            with self._change(copies=True):
                for name in missing:
                    self._table.create_index(name, config=BTree())

    def drop_indices(self, names: Collection[str]) -> None:
        """Drop the indices of these names, without reading them."""
        with self._change():
            for name in names:
                self._table.drop_index(name)

    def optimize(self, keep: timedelta) -> None:
        """Join small files, update the indices, and remove versions older than ``keep``."""
        with self._change(copies=True):
            self._table.optimize(cleanup_older_than=_FOREVER)
        with storage_errors(self.folder):
            self._files.remove_older(keep)

    def versions(self) -> list[int]:
        """The versions that can still be opened."""
        return sorted(manifests(self._files.table))

    @contextmanager
    def _change(self, *, copies: bool = False) -> Generator[None]:
        """A change of the latest version, committed at the end. ``copies``: it copies rows, so verify them first."""
        with storage_errors(self.folder):
            self._table.checkout_latest()
            if copies:
                self._files.check(self.version, whole=True)
            yield
            self._files.commit()

    def _compare_indices(self, columns: tuple[str, ...]) -> None:
        """Compare the indices of some columns completely with their checksums, before their first use."""
        use = (self.version, columns)
        if use not in self._compared:
            self._files.check_indices(self.version, [f"{name}_idx" for name in columns])
            self._compared.add(use)

    def _read(self, query: Any) -> pa.Table:
        with self._reading():
            return cast(pa.Table, query.to_arrow())

    def _lacks(self, num_missing: int, num_requested: int) -> DataFormatError:
        return DataFormatError(self.folder, f"its table lacks {num_missing} of {num_requested} requested rows")

    @contextmanager
    def _reading(self) -> Generator[None]:
        try:
            yield
        except BaseException as error:
            if not (isinstance(error, Exception) or is_panic(error)):
                raise
            problem = f"version {self.version} of its table cannot be read ({first_line(error)})"
            advice = "refresh or open it again, and run `d2llm index ... verify` if that does not help"
            raise DataFormatError(self.folder, f"{problem}; {advice}") from error

    def _join(self, tables: Iterator[pa.Table], names: Sequence[str]) -> pa.Table:
        parts = list(tables)
        return pa.concat_tables(parts) if parts else self.schema.empty_table().select(list(names))


def _check_id(name: str) -> None:
    if not is_text(name):
        raise InputError(f"{name!r} cannot be an id; give a string of valid Unicode")


def _check_page(cursor: str, limit: int) -> None:
    _check_id(cursor)
    if type(limit) is not int or limit < 1:
        raise InputError(f"limit is {limit}, but must be at least 1")


def _connect(folder: Path) -> Any:
    return import_lancedb().connect(folder, storage_options={"new_table_data_storage_version": _FILE_FORMAT})
