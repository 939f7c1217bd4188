"""Approximate candidates: a graph of neighbours (HNSW) over the vectors of one generation.

ann-<generation>.faiss   FAISS' graph without vectors: the neighbours of each row, on several levels
ann-<generation>.json    ``AnnRecord``: what it was built from, how far it is searched, recall, a checksum

The graph is searched over the stored vectors, in place, so it takes some 150 bytes a row and no second copy of them. A
row keeps its number permanently, so one file serves every later version of its generation: rows from ``covered`` on
were added later and are scanned exactly. Rows that are no longer live, or that a filter leaves out, remain in the graph
and are dropped from what was found; if too few are left, it is searched deeper, and where that would take as long, the
exact scan answers. Inner products are computed as by the exact scan. The file is derived data and never trusted: if it
does not fit, the exact scan is used.

Source: Malkov and Yashunin, Efficient and robust approximate nearest neighbor search using hierarchical navigable small
world graphs, IEEE TPAMI 2020.
"""

# pyright: reportUnknownParameterType=false, reportUnknownMemberType=false
# (faiss ships no types)

from __future__ import annotations

import logging
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from d2llm.core.fallbacks import count_fallback
from d2llm.ops.selection import top_rows
from d2llm.store.checksums import read_checked, write_checked
from d2llm.store.scan import IdsOf, RowScan, load_faiss, one_thread
from d2llm.store.vector_file import ann_path_of
from d2llm.store.vector_formats import VectorFormat

_log = logging.getLogger(__name__)
NEIGHBOURS = 16
"""Of a row, on each level above the lowest; there it has twice as many."""
MAX_EFFORT = 1 / 32
"""With an effort of more than this fraction of the rows, a search takes as long as the exact scan (measured)."""
_MIN_FRACTION = 1 / 8  # if fewer of the rows may be returned, the exact scan reads only them
_DEEPER = 3  # factor for the depth, if too few of the rows that were found may be returned
_BYTES_PER_ROW = 2 * NEIGHBOURS * 4 + 4 + 8 + NEIGHBOURS * 4 / 15  # lowest level, its number, its place; higher levels
_READ_BYTES = 1 << 24


@dataclass(frozen=True, slots=True)
class Recall:
    """Fraction of the exact top ``depth`` that was found: mean over queries, and lower bound (95 %)."""

    depth: int
    effort: int
    recall: float
    at_least: float


@dataclass(frozen=True, slots=True)
class AnnRecord:
    """What an approximate index was built from and how it is searched.

    Attributes:
        student: fingerprint of the student that made the vectors.
        vector_format: format of the stored vectors.
        version: version of the table; earlier versions have rows that it lacks.
        since: ``since`` of the vector file (``vector_file``); another value means that rows may have been renumbered.
        covered: the rows below this number are in the graph; rows from it on are not.
        num_rows: number of the live ones among them.
        efforts: [depth, rows that are kept in view while it is searched for (efSearch)], ascending.
        target: the requested recall.
        queries: "given", or "passages" if passages of the index served as queries.
        num_queries: number of queries.
        recalls: measured recall by depth.
        first_ten: the fraction of the first ten passages of an exact search that a search by default ranks there.
        num_bytes: size of the file.
        checksum: checksum of the file (xxh3, 64 bits).
    """

    student: str
    vector_format: str
    version: int
    since: int
    covered: int
    num_rows: int
    efforts: list[list[int]]
    target: float
    queries: str
    num_queries: int
    recalls: list[dict[str, float]]
    first_ten: float = 0.0
    num_bytes: int = 0
    checksum: str = ""


@dataclass(frozen=True, slots=True)
class AnnBase:
    """The vectors of all rows of one version of a store, over which an approximate index is built."""

    folder: Path
    student: str
    generation: int
    version: int
    since: int
    format: VectorFormat
    codes: NDArray[np.uint8]
    scan: RowScan

    @property
    def path(self) -> Path:
        """Path of the approximate index."""
        return ann_path_of(self.folder, self.generation)


class AnnIndex:
    """An approximate index of the vectors of ``base``."""

    def __init__(self, base: AnnBase, graph: Any, record: AnnRecord) -> None:
        """Args: ``graph``, FAISS' index, whose own vectors, if it has any, are not used any more."""
        if base.scan.faiss_index is None:
            raise ValueError("this FAISS cannot search the stored vectors in place")
        self.base = base
        self.record = record
        self.graph = graph
        if graph.own_fields and graph.storage is not None:
            graph.storage.this.own(True)  # frees the copy with which the graph was built
        graph.own_fields, graph.storage = False, base.scan.faiss_index
        graph.d = base.scan.faiss_index.d  # that of a query as the format has it
        depths, efforts = np.array(record.efforts, np.float64).T
        self._log_depths, self._log_efforts = np.log(depths), np.log(efforts)

    @classmethod
    def open(cls, base: AnnBase) -> AnnIndex | None:
        """The approximate index of these vectors; None if there is none, or it is unusable (logged)."""
        if not base.path.with_suffix(".json").is_file():
            return None
        try:
            record = _read_record(base)
            graph = load_faiss().read_index(os.fspath(base.path))
            if graph.ntotal != record.covered:
                raise ValueError(f"it has {graph.ntotal} rows, but {record.covered} are recorded; build it again")
            return cls(base, graph, record)
        except (OSError, ValueError, LookupError, TypeError, RuntimeError, AttributeError, ImportError) as error:
            count_fallback("approximate index")
            _log.warning("%s: cannot be used (%s); the exact scan is used", base.path, error)
            return None

    def effort_for(self, depth: float) -> int | None:
        """The effort of a search for the best ``depth`` rows; None if the exact scan is as fast."""
        log_depth = np.log(max(depth, 1))
        if log_depth > self._log_depths[-1] + 1e-9:
            return None
        effort = int(np.ceil(np.exp(np.interp(log_depth, self._log_depths, self._log_efforts)) - 1e-6))
        return effort if effort <= MAX_EFFORT * self.record.covered else None

    def nearest(self, query: NDArray[np.float32], depth: int, effort: int) -> NDArray[np.int64]:
        """Rows of the graph with nearly the highest inner products with a query [dim], at most ``depth``."""
        faiss = load_faiss()
        parameters = faiss.SearchParametersHNSW(efSearch=effort)
        with one_thread(faiss):
            labels = self.graph.search(self.base.format.faiss_query(query), depth, params=parameters)[1][0]
        return labels[labels >= 0]

    @cached_property
    def tail(self) -> RowScan:
        """The exact scan of the rows that were added later."""
        return RowScan(self.base.codes[self.record.covered :], self.base.format)


class AnnSearch:
    """Searches an approximate index among the rows of one mask."""

    def __init__(self, ann: AnnIndex, mask: NDArray[np.bool_] | None, ids_of: IdsOf) -> None:
        """Args: ``mask`` [capacity], the rows that may be returned, all of them live; None means all rows."""
        self._ann = ann
        self._ids_of = ids_of
        self._mask = mask
        covered = ann.record.covered
        self._num_head = covered if mask is None else int(np.count_nonzero(mask[:covered]))
        self._num_tail = len(ann.base.codes) - covered if mask is None else int(np.count_nonzero(mask[covered:]))

    def search(self, query: NDArray[np.float32], top_k: int) -> tuple[NDArray[np.int64], NDArray[np.float32]] | None:
        """Approximately the rows with the highest inner products with ``query`` [dim], best first, ties by id.

        Returns rows int64 [k] and products float32 [k], which are exact for the stored vectors; k is ``top_k``. Returns
        None if the exact scan is as fast or required: few rows near the query are allowed, or ``top_k`` is beyond the
        tuned depths.

        Raises:
            InputError: the query has another width or is not finite.
        """
        ann, query = self._ann, np.ascontiguousarray(query, np.float32)
        ann.base.scan.check(query, top_k)
        rows = self._search_head(query, top_k)
        if rows is None:
            return None
        scores = ann.base.scan.products(query, rows)
        if self._num_tail:
            later, later_scores = self._search_tail(query, top_k)
            rows, scores = np.concatenate((rows, later)), np.concatenate((scores, later_scores))
        best = top_rows(scores, top_k, lambda positions: self._ids_of(rows[positions]))
        return rows[best], scores[best]

    def _search_head(self, query: NDArray[np.float32], top_k: int) -> NDArray[np.int64] | None:
        """The rows of the graph, at least ``top_k`` that may be returned; None if the exact scan is as fast.

        If a fraction f of the rows near the query may be returned, the best k of these reach as deep as the best k/f of
        all, so that many are searched for.
        """
        covered = self._ann.record.covered
        fraction = self._num_head / max(covered, 1)
        if top_k > self._num_head or fraction < _MIN_FRACTION:
            return None
        depth = math.ceil(top_k / fraction)
        while (effort := self._ann.effort_for(depth)) is not None:
            rows = self._ann.nearest(query, min(depth, covered), effort)
            allowed = rows if self._mask is None else rows[self._mask[rows]]
            if len(allowed) >= top_k:
                return allowed
            depth *= _DEEPER
        return None

    def _search_tail(self, query: NDArray[np.float32], top_k: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        covered = self._ann.record.covered

        def ids_of(rows: NDArray[np.int64]) -> Sequence[str]:
            return self._ids_of(rows + covered)

        mask = None if self._mask is None else self._mask[covered:]
        rows, scores = self._ann.tail.search(query, top_k, mask, ids_of=ids_of)
        return rows + covered, scores


def ann_bytes(num_rows: int) -> int:
    """The size of the file of an approximate index, nearly."""
    return math.ceil(num_rows * _BYTES_PER_ROW)


def write_ann(ann: AnnIndex) -> AnnRecord:
    """Write an approximate index beside its vectors, replacing existing ones; requires the write lock.

    After a crash between file and record, the checksum shows that they do not belong together.
    """
    faiss = load_faiss()
    path = ann.base.path
    for left in path.parent.glob(".ann-*.new"):
        left.unlink()
    draft = path.with_name(f".{path.stem}.new")
    faiss.write_index(ann.graph, os.fspath(draft), faiss.IO_FLAG_SKIP_STORAGE)
    with draft.open("rb+") as file:
        os.fsync(file.fileno())
    record = replace(ann.record, num_bytes=draft.stat().st_size, checksum=_checksum(draft))
    draft.replace(path)
    write_checked(path.with_suffix(".json"), asdict(record))
    remove_other_anns(path.parent, ann.base.generation)
    return record


def remove_other_anns(folder: Path, generation: int) -> None:
    """Remove the approximate indices of other generations; a reader that has mapped one can still use it."""
    for path in folder.glob("ann-*"):
        if path.suffix in (".faiss", ".json") and path.stem != ann_path_of(folder, generation).stem:
            path.unlink()


def _read_record(base: AnnBase) -> AnnRecord:
    """The record, after checking that it and the file fit these vectors; if not, a ``ValueError`` says why."""
    record = read_ann_record(base.path)
    if (record.student, record.vector_format, record.since) != (base.student, base.format.kind, base.since):
        raise ValueError("it was built over other vectors; build it again")
    if record.covered > len(base.codes) or record.version > base.version:
        raise ValueError(f"it was built over version {record.version}, but this is version {base.version}")
    check_file(base.path, record)
    return record


def read_ann_record(path: Path) -> AnnRecord:
    """The record beside the file of an approximate index; ``OSError`` or ``ValueError`` if it cannot be read."""
    values = read_checked(path.with_suffix(".json"))
    if not isinstance(values, dict) or values.keys() != {field.name for field in fields(AnnRecord)}:
        raise ValueError("its record has other fields than this version of d2llm writes; build it again")
    return AnnRecord(**values)


def check_file(path: Path, record: AnnRecord) -> None:
    """Raise an ``OSError`` or ``ValueError`` if the file is missing or damaged."""
    if path.stat().st_size != record.num_bytes or _checksum(path) != record.checksum:
        raise ValueError("the file is not what was written; build it again")


def _checksum(path: Path) -> str:
    digest = xxhash.xxh3_64()
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()
