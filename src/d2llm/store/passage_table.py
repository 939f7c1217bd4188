"""The passages of an index in SQLite: ids, texts, metadata and row numbers, with versions.

INDEX/passages.db has four tables. ``passages`` has a row for each passage and each change of it: what is looked up and
filtered by, and the version in which it appeared (born) and the one in which it was replaced or deleted (died). So a
version is a condition: readers keep theirs while others write, and a deletion writes one number. ``bodies`` has what is
read only with a passage: its text, the words added to it, and its vector if the index keeps two copies. ``fields`` has
the metadata fields, ``versions`` the versions that can be opened.

Columns of a passage: id, title, text, document_id, position; the user's metadata; and d2_row (its row in the vector
file, with the generation in the upper bits), d2_hash (``blocks.row_hash``, of what the user gave), d2_truncated (the
student truncated it), d2_words, d2_vector. SQLite does not check the bytes that it reads. So d2_hash is compared
whenever a passage is read, and ``d2_seal``, a hash of the other columns, whenever ``verify`` or a copy reads the row.

Writing is in a WAL: readers never block a writer, nor it them. A commit is on disk when it returns
(``synchronous=FULL``).
"""

from __future__ import annotations

import sqlite3
import time
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from itertools import chain
from pathlib import Path
from threading import RLock
from typing import Any
from weakref import finalize

import numpy as np
from numpy.typing import NDArray

from d2llm.core.batches import batched
from d2llm.core.errors import D2LLMError, DamagedFileError, DataFormatError, InputError
from d2llm.core.files import folder_bytes
from d2llm.core.inputs import check_count
from d2llm.core.names import counted
from d2llm.core.types import Passage, is_text
from d2llm.store.blocks import (
    GENERATION_SHIFT,
    INTERNAL_COLUMNS,
    ROW_MASK,
    WRONG_TYPES,
    codes_of,
    is_intact,
    pack_text,
    read_words,
    rows_of,
    seal_of,
    unpack_text,
)
from d2llm.store.schema import FieldType, MetadataSchema, microseconds_of, moment_of
from d2llm.store.storage import REMEDY, connect, open_to_read, storage_errors, unreadable

NAME = "passages.db"
PAGE_SIZE = 100
"""Default number of ids per page of a list."""
Record = dict[str, Any]
"""A passage by column name, as far as the columns were asked for."""

_FOREVER = (1 << 63) - 1  # died of a passage that lives
_ASKED_AT_ONCE = 4_096  # values in one statement
_SPANS_AT_ONCE = 256  # spans in one statement; SQLite allows a depth of 1,000
_SCANNED_AT_ONCE = 8_192
_PAGE_BYTES = 8_192

_SCHEMA = """
CREATE TABLE passages (
    key INTEGER PRIMARY KEY, id TEXT NOT NULL, title TEXT NOT NULL, document_id TEXT NOT NULL,
    position INTEGER NOT NULL, d2_row INTEGER NOT NULL, d2_hash TEXT NOT NULL, d2_truncated INTEGER NOT NULL,
    born INTEGER NOT NULL, died INTEGER NOT NULL, d2_seal INTEGER NOT NULL{fields}) STRICT;
CREATE TABLE bodies (key INTEGER PRIMARY KEY, text ANY NOT NULL, d2_words ANY NOT NULL, d2_vector BLOB) STRICT;
CREATE TABLE fields (name TEXT PRIMARY KEY, kind TEXT NOT NULL, born INTEGER NOT NULL) STRICT;
CREATE TABLE versions (version INTEGER PRIMARY KEY, seconds REAL NOT NULL, num_passages INTEGER NOT NULL) STRICT;
CREATE INDEX by_id ON passages(id);
CREATE INDEX by_row ON passages(d2_row);
CREATE INDEX found ON passages(document_id, position) WHERE document_id <> '';
CREATE INDEX by_death ON passages(died) WHERE died < 9223372036854775807;
"""
_DOCUMENT = "CASE document_id WHEN '' THEN id ELSE document_id END"
"""The document of a passage; one without a document is its own."""
_NOTHING: Mapping[str, Any] = {}
_LATEST = "SELECT max(version), num_passages, (SELECT ifnull(max(key), 0) FROM passages) FROM versions"
_DIED = "FROM passages WHERE died < 9223372036854775807 AND died"  # as the condition of an index says it
_GROWTH = f"SELECT (SELECT count(*) FROM passages WHERE key > ?) - (SELECT count(*) {_DIED} = ?)"
_LIVES = "born <= :version AND died > :version"
_OWN = ("id", "title", "document_id", "position", "d2_row", "d2_hash", "d2_truncated", "born", "died", "d2_seal")
_BODY = ("text", "d2_words", "d2_vector")
_OF_DOCUMENT = ("document_id <> '' AND document_id", "id")  # both have an index
_TYPES: Mapping[FieldType, str] = {
    "string": "TEXT",
    "integer": "INTEGER",
    "number": "REAL",
    "boolean": "INTEGER",
    "timestamp": "INTEGER",
}


@dataclass(frozen=True, slots=True)
class ListedDocument:
    """A document of an index and its number of passages."""

    id: str
    num_passages: int


class PassageTable:
    """One version of the passages, opened for reading; methods that write require the write lock.

    After a write, the object is at the new version.
    """

    def __init__(self, folder: Path, connection: sqlite3.Connection, version: int) -> None:
        self.folder = folder
        self.version = version
        self._connection = connection
        self._lock = RLock()
        finalize(self, connection.close)
        self._load()

    @classmethod
    def create(cls, folder: Path, metadata: MetadataSchema, version: int = 1) -> PassageTable:
        """A new table without passages, of this version."""
        with storage_errors(folder):
            connection = connect(folder / NAME, "rwc")
            connection.execute(f"PRAGMA page_size={_PAGE_BYTES}")
            connection.execute("PRAGMA auto_vacuum=INCREMENTAL")
            connection.execute("PRAGMA journal_mode=WAL")
            fields = "".join(f", `{name}` {_TYPES[kind]}" for name, kind in metadata.fields.items())
            connection.executescript("BEGIN;" + _SCHEMA.format(fields=fields))
            rows = [(name, kind, version) for name, kind in metadata.fields.items()]
            connection.executemany("INSERT INTO fields VALUES (?, ?, ?)", rows)
            connection.execute("INSERT INTO versions VALUES (?, ?, 0)", (version, time.time()))
            connection.execute("COMMIT")
        return cls(folder, connection, version)

    @classmethod
    def open(cls, folder: Path, version: int | None = None) -> PassageTable:
        """The table at a version, the latest by default. It stays at that version, even if new ones are written.

        Raises:
            DataFormatError: there is no table, it is damaged, or it no longer has this version.
            StorageError: it cannot be opened now.
            IndexLockedError: another program holds it locked.
        """
        path = folder / NAME
        if not path.is_file():
            raise DamagedFileError(path, "is missing; restore it from a copy or a snapshot, or index the corpus again")
        try:
            connection = open_to_read(path)
            wanted = "SELECT max(version) FROM versions WHERE version = coalesce(?, version)"
            found = connection.execute(wanted, (version,)).fetchone()[0]
        except sqlite3.Error as error:
            raise unreadable(path, error) from error
        if found is None:
            subject = "its table" if version is None else f"version {version} of its table"
            raise DataFormatError(folder, f"{subject} cannot be opened (there is no such version any more)")
        return cls(folder, connection, found)

    def _load(self) -> None:
        with self._reading() as run:
            rows = run("SELECT name, kind FROM fields WHERE born <= :version ORDER BY rowid").fetchall()
            found = run("SELECT num_passages, seconds FROM versions WHERE version = :version").fetchone()
            if found is None:
                raise self._gone()
            self._len, self.written = int(found[0]), float(found[1])
            self.metadata = MetadataSchema(dict(rows))

    def __len__(self) -> int:
        return self._len

    @property
    def path(self) -> Path:
        """The file."""
        return self.folder / NAME

    @property
    def num_bytes(self) -> int:
        """Size of the file, without what is only in its WAL."""
        return self.path.stat().st_size

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of all columns of a passage, those of metadata included."""
        return "id", "title", "text", "document_id", "position", *self.metadata.fields, *INTERNAL_COLUMNS

    # Reading -------------------------------------------------------------------------------------------------------

    def rows(self) -> NDArray[np.int64]:
        """The row number (d2_row) of every passage, in order."""
        return np.sort(self.matching("TRUE", _NOTHING))

    def last_row(self) -> int | None:
        """The highest row number (d2_row); None if there are no passages."""
        with self._reading() as run:
            return run(f"SELECT max(d2_row) FROM passages WHERE {_LIVES}").fetchone()[0]

    def has_row_between(self, first: int, end: int) -> bool:
        """Whether any version that is kept has a passage with a row number (d2_row) from ``first`` to below ``end``."""
        with self._reading() as run:
            statement = "SELECT EXISTS (SELECT 1 FROM passages WHERE d2_row >= ? AND d2_row < ?)"
            return bool(run(statement, (first, end)).fetchone()[0])

    def matching(self, condition: str, values: Mapping[str, Any]) -> NDArray[np.int64]:
        """The row numbers (d2_row) of the passages that satisfy a condition in SQL (``filters``), in no order."""
        with self._reading() as run:
            found = run(f"SELECT d2_row FROM passages WHERE {_LIVES} AND ({condition})", values)
            return np.fromiter(chain.from_iterable(found), np.int64)

    def count_values(self, name: str, condition: str, values: Mapping[str, Any]) -> dict[Any, int]:
        """Number of passages that satisfy a condition in SQL (``filters``), by their value of a metadata field."""
        with self._reading() as run:
            statement = f"SELECT `{name}`, count(*) FROM passages WHERE {_LIVES} AND ({condition}) GROUP BY 1"
            counts = dict(run(statement, values).fetchall())
        read = _READERS.get(self.metadata.fields[name])
        return counts if read is None else {None if one is None else read(one): counts[one] for one in counts}

    def num_truncated(self) -> int:
        """Number of passages that the student truncated."""
        with self._reading() as run:
            return int(run(f"SELECT count(*) FROM passages WHERE {_LIVES} AND d2_truncated").fetchone()[0])

    def batches(self, names: Sequence[str] | None = None) -> Iterator[list[Record]]:
        """Some columns (all by default) of all passages, a few thousand at a time, in the order of writing."""
        wanted, last = tuple(names or self.columns), 0
        while True:  # no read transaction is open between two batches, so that writers can empty the WAL
            where = f"{_LIVES} AND key > :last ORDER BY key LIMIT {_SCANNED_AT_ONCE}"
            records = self._select(("key", *wanted), where, {"last": last})
            if not records:
                return
            last = records[-1]["key"]
            yield [{name: record[name] for name in wanted} for record in records]

    def intact_batches(self) -> Iterator[list[Record]]:
        """``batches`` with all columns, each compared with its hashes.

        Raises:
            DamagedFileError: a passage is not what was written.
        """
        for records in self.batches((*self.columns, "d2_seal")):
            changed = [record["id"] for record in records if not is_intact(record)]
            if changed:
                problem = f"{counted(len(changed), 'damaged passage')}, the first is {changed[0]!r}"
                raise DamagedFileError(self.path, f"{problem}; {REMEDY}")
            yield [{name: record[name] for name in self.columns} for record in records]

    def problems(self) -> Iterator[str]:
        """Read everything, earlier versions included, and report damage."""
        with self._reading() as run:
            yield from (line for (line,) in run("PRAGMA integrity_check(20)") if line != "ok")
            with self._connection:  # else a version that another process writes now would seem to lack its passages
                run("BEGIN", ())
                lives = np.array(run("SELECT born, died FROM passages").fetchall(), np.int64).reshape(-1, 2)
                versions = run("SELECT version, num_passages FROM versions").fetchall()
        for version, count in versions:
            found = int(np.count_nonzero((lives[:, 0] <= version) & (lives[:, 1] > version)))
            if found != count:
                yield f"version {version} has {counted(found, 'passage')}, but {count:,} were written"
        rows, ids = list[int](), list[str]()
        changed: list[str] = []
        for records in self.batches((*self.columns, "d2_seal")):
            for record in records:
                if is_intact(record):
                    rows.append(record["d2_row"])
                    ids.append(record["id"])
                else:
                    changed.append(record["id"])
        if changed:
            yield f"{counted(len(changed), 'damaged passage')}, the first is {changed[0]!r}"
        if len(set(ids)) != len(ids):
            yield f"{counted(len(ids) - len(set(ids)), 'id occurs', 'ids occur')} twice"
        if len(set(rows)) != len(rows) or len({row >> GENERATION_SHIFT for row in rows}) > 1:
            yield "row numbers are not distinct, or belong to several generations"

    def last_key(self) -> int:
        """The highest key of a passage of any version; where the end is damaged, a generous guess."""
        keys = [0]
        guess = "(SELECT 2 * (ifnull(min(key), 0) + (SELECT max(num_passages) FROM versions)) AS key FROM passages)"
        for source in ("passages", "passages INDEXED BY by_row", "bodies", guess):
            if source != guess or len(keys) == 1:
                with suppress(DataFormatError), self._reading() as run:
                    keys.append(int(run(f"SELECT max(key) FROM {source}").fetchone()[0] or 0))
        return max(keys)

    def between(self, first: int, end: int) -> list[Record]:
        """All columns, and the seal, of the passages with keys from ``first`` to ``end``."""
        where = f"{_LIVES} AND key >= :first AND key < :end"
        return self._select((*self.columns, "d2_seal"), where, {"first": first, "end": end})

    def listed_ids(self) -> set[str]:
        """The ids of the passages, as far as they can be read when titles or texts cannot; empty if they cannot."""
        with suppress(DataFormatError), self._reading() as run:
            return {name for (name,) in run(f"SELECT id FROM passages WHERE {_LIVES}")}
        return set()

    def codes(self, code_size: int) -> NDArray[np.uint8]:
        """The codes of all vectors by row [largest row + 1, code_size]; zeros for rows that this version lacks."""
        last = self.last_row()
        codes = np.zeros((0 if last is None else (last & ROW_MASK) + 1, code_size), np.uint8)
        for batch in self.batches(["d2_row", "d2_vector"]):
            codes[rows_of(batch)] = codes_of(batch, code_size)
        return codes

    def by_ids(self, ids: Sequence[str], names: Sequence[str]) -> list[Record]:
        """Columns of the passages with these ids, in no order; missing ids are left out."""
        return self._where_in("id", list(dict.fromkeys(ids)), names)

    def by_rows(self, rows: Sequence[int], names: Sequence[str]) -> list[Record]:
        """Columns of the passages with these row numbers (d2_row), in their order.

        Raises:
            DataFormatError: a row is missing.
        """
        records = self._where_in("d2_row", list(dict.fromkeys(map(int, rows))), ["d2_row", *names])
        found = {record["d2_row"]: record for record in records}
        if missing := sum(row not in found for row in rows):
            raise DataFormatError(self.folder, f"its table lacks {missing} of {len(rows)} requested rows")
        return [{name: found[row][name] for name in names} for row in map(int, rows)]

    def around(self, positions: Sequence[tuple[str, int]], distance: int, names: Sequence[str]) -> list[Record]:
        """Columns of the passages at most ``distance`` positions from a (document_id, position), in no order."""
        found: dict[int, Record] = {}  # spans may overlap
        for batch in batched(list(dict.fromkeys(positions)), _SPANS_AT_ONCE):
            values, spans = dict[str, Any](), list[str]()
            for index, (document, position) in enumerate(batch):
                values |= {f"d{index}": document, f"a{index}": position - distance, f"b{index}": position + distance}
                spans.append(f"(document_id = :d{index} AND position BETWEEN :a{index} AND :b{index})")
            where = f"{_LIVES} AND document_id <> '' AND ({' OR '.join(spans)})"
            records = self._select(("key", *names), where, values)
            found |= {record.pop("key"): record for record in records}
        return list(found.values())

    def positions_of(self, documents: Sequence[str]) -> list[tuple[str, str, int]]:
        """(id, document_id, position) of passages whose document_id or id is one of ``documents``, in no order."""
        names = ("id", "document_id", "position")
        wanted = list(dict.fromkeys(documents))
        found = {record["id"]: record for column in _OF_DOCUMENT for record in self._where_in(column, wanted, names)}
        return [(record["id"], record["document_id"], record["position"]) for record in found.values()]

    def pieces_of(self, documents: Sequence[str]) -> dict[str, list[str]]:
        """Document id -> ids of its passages, ordered by position; missing documents are left out.

        Raises:
            InputError: a document id is not valid text.
        """
        for name in documents:
            _check_id(name)
        requested, found = set(documents), dict[str, list[tuple[int, str]]]()
        for passage_id, document_id, position in self.positions_of(list(requested)):
            if (document := document_id or passage_id) in requested:
                found.setdefault(document, []).append((position, passage_id))
        return {name: [passage_id for _, passage_id in sorted(found[name])] for name in documents if name in found}

    def ids_after(self, cursor: str, limit: int) -> list[str]:
        """The first ``limit`` passage ids after ``cursor``, in code point order.

        Raises:
            InputError: ``cursor`` is not valid text, or ``limit`` is below 1.
        """
        _check_page(cursor, limit)
        where = f"{_LIVES} AND id > :cursor ORDER BY id LIMIT :limit"
        return [record["id"] for record in self._select(("id",), where, {"cursor": cursor, "limit": limit})]

    def documents_after(self, cursor: str, limit: int) -> list[ListedDocument]:
        """Like ``ids_after``, for documents; a passage without a document counts as its own document."""
        _check_page(cursor, limit)
        with self._reading() as run:
            found = run(
                f"SELECT {_DOCUMENT}, count(*) FROM passages WHERE {_LIVES} AND {_DOCUMENT} > :cursor "
                f"GROUP BY {_DOCUMENT} ORDER BY {_DOCUMENT} LIMIT :limit",
                {"cursor": cursor, "limit": limit},
            ).fetchall()
        return [ListedDocument(name, count) for name, count in found]

    def texts(self, first: int, end: int) -> Iterator[str]:
        """The full texts of the rows (d2_row) from ``first`` to ``end``; "" for rows without a passage."""
        for record in self._span(first, end, ("title", "text")):
            yield Passage("", record["text"], record["title"]).full_text if record else ""

    def added_words(self, first: int, end: int) -> Iterator[dict[str, float]]:
        """The words added to the rows (d2_row) from ``first`` to ``end``, with their counts."""
        for record in self._span(first, end, ("d2_words",)):
            yield read_words(record["d2_words"]) if record else {}

    def _span(self, first: int, end: int, names: Sequence[str]) -> Iterator[Record | None]:
        """Columns of the rows (d2_row) from ``first`` to ``end``; None for rows without a passage."""
        for start in range(first, end, _SCANNED_AT_ONCE):
            stop = min(start + _SCANNED_AT_ONCE, end)
            where = f"{_LIVES} AND d2_row >= :start AND d2_row < :stop"
            records = self._select(("d2_row", *names), where, {"start": start, "stop": stop})
            found = {record["d2_row"]: record for record in records}
            yield from (found.get(row) for row in range(start, stop))

    def code_size(self) -> int | None:
        """Bytes of the vector of a passage; None if the table has no vectors, or no passages."""
        with self._reading() as run:
            found = run("SELECT length(d2_vector) FROM bodies LIMIT 1").fetchone()
        return None if found is None else found[0]

    def versions(self) -> list[int]:
        """The versions that can still be opened."""
        with self._reading() as run:
            return [version for (version,) in run("SELECT version FROM versions ORDER BY version")]

    # Writing -------------------------------------------------------------------------------------------------------

    def put(self, records: Iterable[Record]) -> None:
        """Add passages, with all columns, in one commit; present ones with the same ids are replaced."""
        with self._change() as (execute, version):
            self._insert(execute, version, records, replaces=True)

    def delete(self, ids: Sequence[str]) -> int:
        """Delete the passages with these ids in one commit; returns their number."""
        before = len(self)
        with self._change() as (execute, version):
            for batch in batched(ids, _ASKED_AT_ONCE):
                self._bury(execute, version, f"id IN ({', '.join('?' * len(batch))})", batch)
        return before - len(self)

    def add_fields(self, fields: MetadataSchema) -> None:
        """Add metadata fields; they are empty in present passages."""
        with self._change() as (execute, version):
            for name, kind in fields.fields.items():
                execute(f"ALTER TABLE passages ADD COLUMN `{name}` {_TYPES[kind]}", ())
                execute("INSERT INTO fields VALUES (?, ?, ?)", (name, kind, version))

    def replace_all(self, metadata: MetadataSchema, batches: Iterable[Sequence[Record]]) -> None:
        """Replace all passages in one commit. Earlier versions stay readable."""
        with self._change() as (execute, version):
            self._bury(execute, version, "TRUE", ())
            known = self.metadata.fields
            for name, kind in metadata.fields.items():
                if name not in known:
                    execute(f"ALTER TABLE passages ADD COLUMN `{name}` {_TYPES[kind]}", ())
                    execute("INSERT INTO fields VALUES (?, ?, ?)", (name, kind, version))
            self.metadata = metadata
            for batch in batches:
                self._insert(execute, version, batch, replaces=False)

    def remove_older(self, keep: timedelta) -> None:
        """Remove versions older than ``keep``, apart from this one, and passages that no other version has."""
        with storage_errors(self.folder), self._transaction() as execute:
            limit = time.time() - keep.total_seconds()
            execute("DELETE FROM versions WHERE version < ? AND seconds <= ?", (self.version, limit))
            oldest = execute("SELECT min(version) FROM versions", ()).fetchone()[0]
            execute(f"DELETE FROM bodies WHERE key IN (SELECT key {_DIED} <= ?)", (oldest,))
            execute(f"DELETE {_DIED} <= ?", (oldest,))
        with storage_errors(self.folder), self._lock:
            self._connection.executescript("PRAGMA incremental_vacuum")  # ``execute`` would free one page
            self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    def copy_to(self, folder: Path) -> None:
        """Write this version, under its number and without others, as a table of its own into a folder.

        Raises:
            DamagedFileError: a passage is not what was written: its copy would get matching hashes.
        """
        target = PassageTable.create(folder, self.metadata, self.version - 1)
        target.replace_all(self.metadata, self.intact_batches())
        target.remove_older(timedelta(0))
        target.close()

    def flush(self) -> int:
        """Move what only the WAL has into the file, as far as nobody reads it; returns the bytes of the file."""
        with self._lock, suppress(sqlite3.Error):  # where the folder cannot be written, there is nothing to move
            self._connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
        return self.num_bytes

    def close(self) -> None:
        """Close the file; the last to close it empties the WAL."""
        with self._lock:
            self._connection.close()

    def _insert(self, execute: _Execute, version: int, records: Iterable[Record], *, replaces: bool) -> None:
        names = [*_OWN, *self.metadata.fields]
        put = (
            f"INSERT INTO passages ({', '.join(f'`{name}`' for name in names)}) VALUES ({', '.join('?' * len(names))})"
        )
        for batch in batched(list(records), _ASKED_AT_ONCE):
            if replaces:
                ids = [record["id"] for record in batch]
                self._bury(execute, version, f"id IN ({', '.join('?' * len(ids))})", ids)
            for record in batch:
                values = record | {"born": version, "died": _FOREVER, "d2_seal": seal_of(record)}
                values |= {name: _stored(kind, record[name]) for name, kind in self.metadata.fields.items()}
                key = execute(put, [values[name] for name in names]).lastrowid
                body = (key, *map(pack_text, (record["text"], record.get("d2_words", ""))), record.get("d2_vector"))
                execute("INSERT INTO bodies VALUES (?, ?, ?, ?)", body)

    def _bury(self, execute: _Execute, version: int, condition: str, values: Sequence[Any]) -> None:
        execute(f"UPDATE passages SET died = ? WHERE died = {_FOREVER} AND {condition}", (version, *values))

    @contextmanager
    def _change(self) -> Generator[tuple[_Execute, int]]:
        """A change of the latest version: what executes statements, and the new version, committed at the end."""
        with storage_errors(self.folder), self._transaction() as execute:
            latest, count, last = execute(_LATEST, ()).fetchone()
            yield execute, latest + 1
            growth = execute(_GROWTH, (last, latest + 1)).fetchone()[0]  # counting all of a million would take longer
            execute("INSERT INTO versions VALUES (?, ?, ?)", (latest + 1, time.time(), count + growth))
        self.version = latest + 1
        self._load()

    @contextmanager
    def _transaction(self) -> Generator[_Execute]:
        with self._lock:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection.execute
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    def _where_in(self, column: str, values: Sequence[Any], names: Sequence[str]) -> list[Record]:
        records: list[Record] = []
        for batch in batched(values, _ASKED_AT_ONCE):
            marks = ", ".join("?" * len(batch))
            where = f"{column} IN ({marks}) AND born <= ? AND died > ?"
            records += self._select(names, where, [*batch, self.version, self.version])
        return records

    def _select(self, names: Sequence[str], where: str, values: Mapping[str, Any] | Sequence[Any]) -> list[Record]:
        """Columns of the passages that satisfy a condition, as they were given."""
        listed = ", ".join(f"{'bodies' if name in _BODY else 'passages'}.`{name}`" for name in names)
        source = "passages JOIN bodies USING (key)" if set(names) & set(_BODY) else "passages"
        with self._reading() as run:
            found = run(f"SELECT {listed} FROM {source} WHERE {where}", values).fetchall()
            kinds: dict[str, str] = {**_KINDS, **self.metadata.fields}
            readers = [_READERS.get(kinds.get(name, "")) for name in names]
            if not any(readers):
                return [dict(zip(names, row, strict=True)) for row in found]
            return [
                {
                    name: value if read is None or value is None else read(value)
                    for name, value, read in zip(names, row, readers, strict=True)
                }
                for row in found
            ]

    @contextmanager
    def _reading(self) -> Generator[Callable[..., sqlite3.Cursor]]:
        """What runs a statement of this version; errors become ``DataFormatError``."""

        def run(statement: str, values: Mapping[str, Any] | Sequence[Any] = _NOTHING) -> sqlite3.Cursor:
            named = {"version": self.version, **values} if isinstance(values, Mapping) else values
            return self._connection.execute(statement, named)

        with self._lock:
            try:
                yield run
                if run("SELECT 1 FROM versions WHERE version = :version").fetchone() is None:  # removed while reading
                    raise self._gone()
            except D2LLMError:
                raise
            except (sqlite3.Error, zlib.error, *WRONG_TYPES) as error:
                raise unreadable(self.path, error) from error

    def _gone(self) -> DataFormatError:
        problem = f"version {self.version} of its table cannot be read (it was removed)"
        return DataFormatError(self.folder, f"{problem}; refresh or open it again")


_Execute = Callable[[str, Sequence[Any]], sqlite3.Cursor]
_KINDS = {"d2_truncated": "boolean", "text": "packed text", "d2_words": "packed text"}


def bytes_at_rest(folder: Path) -> int:
    """Bytes of all files of an index, without SQLite's own, which are there only while a process has it open."""
    return folder_bytes(folder) - sum(path.stat().st_size for path in folder.glob(f"{NAME}-*"))


def _stored(kind: FieldType, value: Any) -> Any:
    """A metadata value as SQLite stores it."""
    return value if value is None or kind != "timestamp" else microseconds_of(value)


_READERS: Mapping[str, Callable[[Any], Any]] = {"boolean": bool, "timestamp": moment_of, "packed text": unpack_text}


def _check_id(name: str) -> None:
    if not is_text(name):
        raise InputError(f"{name!r} cannot be an id; give a string of valid Unicode")


def _check_page(cursor: str, limit: int) -> None:
    _check_id(cursor)
    check_count(limit, "limit")
