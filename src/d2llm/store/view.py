"""A read-only view of one version of a store, which concurrent writes do not affect."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from d2llm.core.errors import DamagedFileError, DataFormatError, InputError
from d2llm.core.inputs import check_count
from d2llm.core.names import counted
from d2llm.core.types import PartKind, Passage, Task, Ties, is_text
from d2llm.ops.selection import top_rows
from d2llm.store.ann import AnnBase, AnnIndex
from d2llm.store.blocks import GENERATION_SHIFT, ROW_MASK, is_as_written
from d2llm.store.bm25 import WordIndex
from d2llm.store.filter_indexes import filtered
from d2llm.store.index_store import IndexStore
from d2llm.store.part_vectors import PartVectors, best_windows
from d2llm.store.passage_table import PAGE_SIZE, ListedDocument, Record
from d2llm.store.scan import RowScan
from d2llm.store.schema import TEXT_COLUMNS, MetadataSchema
from d2llm.store.vector_file import VectorFile, VectorRows
from d2llm.store.vector_formats import make_format
from d2llm.store.word_segment import QueryWords, WordStatistics

_View = TypeVar("_View", bound="PassageView")
_log = logging.getLogger(__name__)
_KEPT_FILTERS = 16  # each a byte for each row
_STORED_ROWS = 8_192  # rows encoded at a time for a view in another format


class CandidateRows(NamedTuple):
    """Candidate passages of a query, best first: rows int64 [k] and scores float32 [k]."""

    rows: NDArray[np.int64]
    scores: NDArray[np.float32]


class PassageView:
    """One version of a store. A row is a passage's position in the vector file; ``live`` marks rows that are passages.

    ``capacity`` counts the rows, ``len`` the passages. ``live`` is a mask [capacity], or None if every row is live.
    ``version`` is that of the table; another ``generation`` of the vectors numbers the rows differently. ``dim`` is the
    width of a vector, ``task`` the default task of a search, ``student_fingerprint`` that of the student that made the
    vectors.
    """

    def __init__(
        self, store: IndexStore, version: int | None = None, *, corpus: Callable[[], WordStatistics] | None = None
    ) -> None:
        """Open a version, the latest by default.

        ``corpus`` gives the statistics that BM25 uses if these passages are a part of a corpus (``WordIndex.within``).

        Raises:
            IndexMismatchError: another index has taken the place of the store's, as when something is first read later.
        """
        self.store = store
        self._corpus = corpus
        self.format = store.format
        with store.reading():
            self._table = store.table(version)
            stored_rows = self._table.rows()
            self._vectors = store.vectors.read(self._table, stored_rows)
        self.version = self._table.version
        self.dim: int = store.manifest["dim"]
        self.task: Task = store.manifest["task"]
        self.student_fingerprint: str = store.manifest["student"]
        self.generation = int(stored_rows[0]) >> GENERATION_SHIFT if len(stored_rows) else 0
        self._len = len(stored_rows)
        self.capacity = len(self._vectors.codes)
        live = np.zeros(self.capacity, np.bool_)
        live[stored_rows & ROW_MASK] = True
        if np.count_nonzero(live) < self._len or (self._len and np.ptp(stored_rows >> GENERATION_SHIFT)):
            problem = "two passages of its table have the same row, or rows from two generations"
            raise DataFormatError(store.folder, f"{problem}; restore a snapshot, or index the corpus again")
        self.live: NDArray[np.bool_] | None = live if self._len < self.capacity else None
        self._scan: RowScan | None = None
        self._selected: dict[str, NDArray[np.bool_]] = {}  # by filter: a version never changes
        self._counts: dict[tuple[str, str | None], Mapping[Any, int]] = {}  # by field and filter

    @property
    def folder(self) -> Path:
        """The folder of the index."""
        return self.store.folder

    def __len__(self) -> int:
        return self._len

    def stored_as(self: _View, vector_format: str) -> _View:
        """The same version with its vectors in another format, in memory, to measure the cost of fewer bits.

        Raises:
            InputError: there is no such format, or it cannot hold the vectors.
        """
        view = copy.copy(self)
        for name in ("ann_base", "ann"):  # derived from the stored vectors
            view.__dict__.pop(name, None)
        view.format = make_format(vector_format, self.dim)
        codes = np.zeros((self.capacity, view.format.code_size), np.uint8)
        rows = self.live_rows()
        for start in range(0, len(rows), _STORED_ROWS):
            block = rows[start : start + _STORED_ROWS]
            codes[block] = view.format.encode(self.vectors(block), self.ids(block))
        view._vectors = VectorRows(codes, None)
        view._scan = RowScan(codes, view.format)
        return view

    def with_ann(self: _View, ann: AnnIndex) -> _View:
        """The same version, searched with an approximate index that is not on disk yet."""
        view = copy.copy(self)
        view.__dict__["ann"] = ann
        return view

    @property
    def metadata(self) -> MetadataSchema:
        """The metadata fields that a filter may name."""
        return self._table.metadata

    def check_student(self, fingerprint: str) -> None:
        """Raise an ``IndexMismatchError`` unless the student with this fingerprint made the vectors."""
        self.store.check_student(fingerprint)

    def ids(self, rows: NDArray[np.int64]) -> list[str]:
        """Ids of the passages in the given rows, in the same order."""
        return [record["id"] for record in self._take(rows, ["id"])]

    def rows(self, ids: Sequence[str]) -> NDArray[np.int64]:
        """Rows of the given ids, in the same order.

        Raises:
            InputError: a passage is missing.
        """
        return rows_in_order(self.rows_of(ids), ids, self.store.folder)

    def rows_of(self, ids: Sequence[str]) -> dict[str, int]:
        """Rows of the given ids; missing ids are skipped."""
        return {record["id"]: record["d2_row"] & ROW_MASK for record in self._table.by_ids(ids, ["id", "d2_row"])}

    def passages(self, rows: NDArray[np.int64]) -> list[Passage]:
        """Passages in the given rows, in the same order; empty metadata fields are left out."""
        return self._as_passages(self._take(rows, self._columns))

    def get(self, ids: Sequence[str]) -> list[Passage]:
        """Passages with the given ids, in the same order; missing ids are skipped."""
        distinct = list(dict.fromkeys(ids))
        passages = {passage.id: passage for passage in self._as_passages(self._table.by_ids(distinct, self._columns))}
        return [passages[passage_id] for passage_id in distinct if passage_id in passages]

    def document(self, document_id: str) -> list[Passage]:
        """The passages of a document, by position; empty if the document is missing."""
        return self.get(self._table.pieces_of([document_id]).get(document_id, []))

    def list_passages(self, cursor: str = "", limit: int = PAGE_SIZE) -> list[str]:
        """The first ``limit`` passage ids after ``cursor``, in order."""
        return self._table.ids_after(cursor, limit)

    def list_documents(self, cursor: str = "", limit: int = PAGE_SIZE) -> list[ListedDocument]:
        """Like ``list_passages``, for documents; a passage without a document counts as its own document."""
        return self._table.documents_after(cursor, limit)

    def documents(self, rows: NDArray[np.int64]) -> list[str]:
        """Document of the passage in each row: its document_id, or its id if it has none."""
        return [record["document_id"] or record["id"] for record in self._take(rows, ["id", "document_id"])]

    def neighbours(self, passages: Sequence[Passage], distance: int) -> list[Passage]:
        """The passages of the same documents at most ``distance`` positions away, by document and position.

        The given passages are included. A passage without a document_id has no neighbours.
        """
        positions = [(passage.document_id, passage.position) for passage in passages if passage.document_id]
        nearby = self._as_passages(self._table.around(positions, distance, self._columns))
        return sorted(nearby, key=lambda passage: (passage.document_id, passage.position, passage.id))

    @cached_property
    def _columns(self) -> list[str]:
        return [*TEXT_COLUMNS, *self.metadata.fields, "d2_hash"]

    def vectors(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Vectors of the given rows, float32 [len(rows), dim]."""
        self._check()
        return self.format.decode(self._vectors.codes[rows])

    def block(self, start: int, end: int) -> NDArray[np.float32]:
        """The vectors of the rows from ``start`` to ``end``, including dead rows, float32 [end - start, dim]."""
        self._check()
        return self.format.decode(np.asarray(self._vectors.codes[start:end]))

    def scan(self, query: NDArray[np.float32], top_k: int, allowed: NDArray[np.bool_] | None = None) -> CandidateRows:
        """The live rows with the highest inner products with ``query`` [dim], ties by id. Exact for the stored vectors.

        Raises:
            InputError: as for ``RowScan.search``.
        """
        return CandidateRows(*self._check().search(query, top_k, self.mask(allowed), ids_of=self.ids))

    def scan_together(
        self, queries: NDArray[np.float32], top_k: int, allowed: NDArray[np.bool_] | None = None
    ) -> list[CandidateRows]:
        """``scan`` for several queries [q, dim], with identical results but faster than one by one."""
        results = self._check().search_together(queries, top_k, self.mask(allowed), ids_of=self.ids)
        return [CandidateRows(rows, scores) for rows, scores in results]

    @cached_property
    def ann_base(self) -> AnnBase | None:
        """The vectors for an approximate index of this version; None if they are only in memory."""
        scan, file = self._check(), self.vector_file
        if file is None:
            return None
        return AnnBase(
            self.store.folder,
            self.student_fingerprint,
            self.generation,
            self.version,
            file.since,
            self.format,
            self._vectors.codes,
            scan,
        )

    @cached_property
    def ann(self) -> AnnIndex | None:
        """The approximate index that fits this version, if one was built."""
        return None if self.ann_base is None else AnnIndex.open(self.ann_base)

    @property
    def vector_file(self) -> VectorFile | None:
        """The file of the vectors; None if they are only in memory."""
        self._check()
        return self._vectors.file

    def match(
        self,
        text: str,
        top_k: int,
        filter: str | None = None,  # noqa: A002
        *,
        ties: Ties = "ids",
        query_words: QueryWords | None = None,
    ) -> CandidateRows:
        """The best passages of a query text by BM25, best first, among those that pass the filter.

        ``ties`` says how equal scores are ordered. All passages may be tied, and looking up their ids takes time.
        ``query_words`` are the words of the text if they were weighted already.

        Raises:
            InputError: ``top_k`` < 1, or the text is not valid Unicode; or as for ``select``.
        """
        check_count(top_k, "top_k")
        if not is_text(text):
            raise InputError(f"the query {text!r} is not valid Unicode text")
        allowed = self.select(filter)
        words = self.words
        if allowed is not None:
            allowed = np.append(allowed, np.zeros(len(words) - len(allowed), np.bool_))
        try:
            rows, scores = words.best(query_words or words.query(text), top_k, allowed=allowed)
        except (IndexError, ValueError) as error:  # damage that the samples on opening missed
            problem = f"its words are damaged ({error}); `d2llm index ... verify --repair` reads them again"
            raise DamagedFileError(self.store.folder, problem) from error

        def ids_of(positions: NDArray[np.int64]) -> list[str]:
            return self.ids(rows[positions])

        best = top_rows(scores, min(top_k, len(rows)), ids_of if ties == "ids" else None)
        return CandidateRows(rows[best], scores[best])

    @cached_property
    def words(self) -> WordIndex:
        """BM25 of this version's passages, by row; there may be rows beyond ``capacity``, which do not count."""
        return self.own_words if self._corpus is None else self.own_words.within(self._corpus())

    @cached_property
    def own_words(self) -> WordIndex:
        """``words``, scored by the statistics of these passages alone."""
        with self.store.reading():
            words, problems = self.store.words(self._table, self.capacity)
        if problems:
            remedy = "`d2llm index ... compact` or `verify --repair` writes them" if len(self) else ""
            _log.warning("%s: %s; %s", self.store.folder, "; ".join(problems), remedy)
        return words.only(np.ones(self.capacity, np.bool_) if self.live is None else self.live)

    @cached_property
    def windows(self) -> PartVectors | None:
        """The window vectors of this version's passages, by row; None if the index stores none (``open_parts``)."""
        return self._part_vectors("window")

    @cached_property
    def tokens(self) -> PartVectors | None:
        """The token vectors of this version's passages, by row; None if the index stores none (``open_parts``)."""
        return self._part_vectors("token")

    def _part_vectors(self, kind: PartKind) -> PartVectors | None:
        if kind not in self.store.part_formats:
            return None
        with self.store.reading():
            return self.store.parts(self._table, kind, self.capacity)

    def best_windows(self, query: NDArray[np.float32], rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """The highest inner product of a query [dim] with a window of each row [n] (``part_vectors.best_windows``)."""
        assert self.windows is not None, "this index stores no window vectors"
        return best_windows(self.windows, self._check(), query, rows)

    def best_tokens(
        self, queries: NDArray[np.float32], rows: NDArray[np.int64], needed: NDArray[np.float64] | None = None
    ) -> NDArray[np.float32]:
        """The sum of the highest products of a query's tokens [m, dim] with tokens of each row [n]."""
        assert self.tokens is not None, "this index stores no token embeddings"
        return self.tokens.sum_of_best(queries, rows, needed)

    def select(self, filter: str | None) -> NDArray[np.bool_] | None:  # noqa: A002
        """The rows that a filter allows, as a read-only mask [capacity]; None without a filter.

        Raises:
            FilterError: the filter cannot be parsed, or does not fit the metadata.
        """
        if filter is None:
            return None
        if (kept := self._selected.get(filter)) is not None:
            return kept
        from d2llm.store.filters import parse_filter  # imports sqlglot, which most searches do not need

        condition = parse_filter(filter, self.metadata)
        allowed = np.zeros(self.capacity, np.bool_)
        find = partial(self._table.matching, condition.sql, condition.values)
        allowed[filtered(find, self._table.path, condition.fields, len(self._table)) & ROW_MASK] = True
        allowed.flags.writeable = False
        _keep(self._selected, filter, allowed)
        return allowed

    def count_values(self, name: str, filter: str | None) -> Mapping[Any, int]:  # noqa: A002
        """Number of passages that a filter allows, by their value of a metadata field, or None.

        Raises:
            FilterError: the filter cannot be parsed, or does not fit the metadata.
        """
        if (counts := self._counts.get((name, filter))) is None:
            condition, values = "TRUE", dict[str, Any]()
            if filter is not None:
                from d2llm.store.filters import parse_filter

                parsed = parse_filter(filter, self.metadata)
                condition, values = parsed.sql, dict(parsed.values)
            counts = self._table.count_values(name, condition, values)
            _keep(self._counts, (name, filter), counts)
        return counts

    def field_values(self, rows: NDArray[np.int64], name: str) -> list[Any]:
        """The value of a metadata field in each row; None where there is none."""
        return [record[name] for record in self._take(rows, [name])]

    def live_rows(self, allowed: NDArray[np.bool_] | None = None) -> NDArray[np.int64]:
        """Live rows in ascending order, among the allowed ones if any are given."""
        mask = self.mask(allowed)
        return np.arange(self.capacity, dtype=np.int64) if mask is None else np.flatnonzero(mask)

    def mask(self, allowed: NDArray[np.bool_] | None) -> NDArray[np.bool_] | None:
        """Mask of the rows that are live and allowed; None if all are."""
        if allowed is None or self.live is None:
            return self.live if allowed is None else allowed
        return allowed & self.live

    def _take(self, rows: NDArray[np.int64], names: Sequence[str]) -> list[Record]:
        requested = np.asarray(rows, np.int64)
        num_outside = int(np.count_nonzero((requested < 0) | (requested >= self.capacity)))
        if num_outside:
            problem = f"its table lacks {num_outside} of {len(requested)} requested rows"
            raise DataFormatError(self.store.folder, problem)
        return self._table.by_rows((requested | self.generation << GENERATION_SHIFT).tolist(), names)

    def _as_passages(self, records: Sequence[Record]) -> list[Passage]:
        """Rows of the table as passages. Their hashes reveal damage: SQLite does not check the bytes that it reads."""
        changed = [record["id"] for record in records if not is_as_written(record)]
        if changed:
            problem = f"{counted(len(changed), 'damaged passage')} in its table, the first is {changed[0]!r}"
            raise DamagedFileError(self.store.folder, f"{problem}; `d2llm index ... verify` gives details")
        return list(map(as_passage, records))

    def _check(self) -> RowScan:
        """Compare the vectors with their checksums before the first use; damaged ones are recovered if possible."""
        if self._scan is None:
            codes, file = self._vectors
            if file is not None and self.store.intact.damaged(file, codes):
                self._vectors = self.store.vectors.recover(self._table, f"{file.path.name} is damaged")
            self._scan = RowScan(self._vectors.codes, self.format)
        return self._scan


def _keep(kept: dict[Any, Any], key: Any, value: Any) -> None:
    """Add what was computed for a filter; of too many, the oldest go."""
    for oldest in list(kept)[: 1 - _KEPT_FILTERS]:
        kept.pop(oldest, None)
    kept[key] = value


def as_passage(record: dict[str, Any]) -> Passage:
    """A row of the table as a passage."""
    values = {name: record[name] for name in TEXT_COLUMNS}
    others = (*TEXT_COLUMNS, "d2_hash")
    metadata = {name: value for name, value in record.items() if name not in others and value is not None}
    return Passage(**values, metadata=metadata)


def rows_in_order(row_of: Mapping[str, int], ids: Sequence[str], folder: Path) -> NDArray[np.int64]:
    """The rows of passages in the order of ``ids``; an ``InputError`` that names ``folder`` if one is missing."""
    missing = [passage_id for passage_id in ids if passage_id not in row_of]
    if missing:
        raise InputError(
            f"{folder}: {len(missing)} of {len(ids)} passages are not in the index, the first is {missing[0]!r}"
        )
    return np.array([row_of[passage_id] for passage_id in ids], np.int64)
