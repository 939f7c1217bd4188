"""Approximate candidates: FAISS IVF-SQ8 over the vectors of one generation, memory-mapped from its file.

ann-<generation>.faiss   rows in lists around centroids, 8 bits per dimension; the ids in it are row numbers
ann-<generation>.json    ``AnnRecord``: what it was built from, how many lists are probed, recall, a checksum

A row keeps its number permanently, so one file serves every later version of its generation: rows that are no longer
live are excluded from a search, and rows from ``covered`` on were added later and are scanned exactly. The file only
proposes candidates; their inner products are computed from the stored vectors, so scores are those of the exact scan,
and 8 bits cost no recall. The file is derived data and never trusted: if it does not fit, the exact scan is used.
"""

# pyright: reportUnknownParameterType=false, reportUnknownMemberType=false
# (faiss ships no types)

from __future__ import annotations

import logging
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
from d2llm.store.load_faiss import load_faiss
from d2llm.store.scan import IdsOf, RowScan
from d2llm.store.vector_file import ann_path_of
from d2llm.store.vector_formats import VectorFormat

_log = logging.getLogger(__name__)
_SPARE_ROWS = 32  # candidates beyond top_k (at least an eighth of it), because 8 bits do not rank rows exactly
_MAX_PROBED_FRACTION = 0.5  # probing more than this fraction of the rows takes as long as the exact scan (measured)
_READ_BYTES = 1 << 24


@dataclass(frozen=True, slots=True)
class Recall:
    """Fraction of the exact top ``depth`` that was found: mean over queries, and lower bound (95 %)."""

    depth: int
    num_probes: int
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
        covered: the live rows below this number are in the index; rows from it on are not.
        num_rows: number of rows in the index.
        num_lists: number of lists that the rows are in.
        probes: [depth, lists probed for it], ascending.
        target: the requested recall.
        queries: "given", or "passages" if passages of the index served as queries.
        num_queries: number of queries.
        recalls: measured recall by depth.
        num_bytes: size of the file.
        checksum: checksum of the file (xxh3, 64 bits).
    """

    student: str
    vector_format: str
    version: int
    since: int
    covered: int
    num_rows: int
    num_lists: int
    probes: list[list[int]]
    target: float
    queries: str
    num_queries: int
    recalls: list[dict[str, float]]
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

    def __init__(self, base: AnnBase, index: Any, record: AnnRecord) -> None:
        self.base = base
        self.record = record
        self.faiss_index = index
        depths, probes = np.array(record.probes, np.float64).T
        self._log_depths, self._log_probes = np.log(depths), np.log(probes)

    @classmethod
    def open(cls, base: AnnBase) -> AnnIndex | None:
        """The approximate index of these vectors, memory-mapped; None if there is none, or it is unusable (logged)."""
        if not base.path.with_suffix(".json").is_file():
            return None
        try:
            record = _read_record(base)
            faiss = load_faiss()
            return cls(base, faiss.read_index(os.fspath(base.path), faiss.IO_FLAG_MMAP_IFC), record)
        except (OSError, ValueError, LookupError, TypeError, RuntimeError, ImportError) as error:
            count_fallback("approximate index")
            _log.warning("%s: cannot be used (%s); the exact scan is used", base.path, error)
            return None

    def probes_for(self, depths: NDArray[np.float64]) -> NDArray[np.float64]:
        """Number of lists to probe for each depth; infinite beyond the deepest tuned depth."""
        logs = np.log(np.maximum(depths, 1))
        probes = np.ceil(np.exp(np.interp(logs, self._log_depths, self._log_probes)) - 1e-6)
        return np.where(logs > self._log_depths[-1] + 1e-9, np.inf, probes)

    @cached_property
    def list_of(self) -> NDArray[np.int32]:
        """[covered] the list of each row; -1 for rows that were not live."""
        faiss = load_faiss()
        lists, list_of = self.faiss_index.invlists, np.full(self.record.covered, -1, np.int32)
        for number in range(self.record.num_lists):
            size = lists.list_size(number)
            if size:
                list_of[faiss.rev_swig_ptr(lists.get_ids(number), size)] = number
        return list_of

    @cached_property
    def sizes(self) -> NDArray[np.int64]:
        """[num_lists] number of rows in each list."""
        return np.bincount(self.list_of[self.list_of >= 0], minlength=self.record.num_lists)

    @cached_property
    def centroids(self) -> NDArray[np.float32]:
        """[num_lists, dim]."""
        return self.faiss_index.quantizer.reconstruct_n(0, self.record.num_lists)

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
        covered = ann.record.covered
        num_tail = len(ann.base.codes) - covered
        self._head = ann.record.num_rows
        self._allowed: NDArray[np.int64] | None = None
        self._selector: Any = None
        self._tail_mask = None if mask is None else mask[covered:]
        self._tail = num_tail if mask is None else int(np.count_nonzero(mask[covered:]))
        if mask is not None and (head := np.flatnonzero(mask[:covered])).size < ann.record.num_rows:
            faiss = load_faiss()
            self._head = len(head)
            self._allowed = np.bincount(ann.list_of[head], minlength=ann.record.num_lists)
            self._selector = faiss.IDSelectorBitmap(np.packbits(mask[:covered], bitorder="little"))

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
        num_probes = self.num_probes(query, top_k)
        if num_probes is None:
            return None
        faiss = load_faiss()
        options = {} if self._selector is None else {"sel": self._selector}
        parameters = faiss.SearchParametersIVF(nprobe=num_probes, **options)
        take = min(num_taken(top_k), self._head)
        labels = ann.faiss_index.search(query[None], take, params=parameters)[1][0]
        rows = labels[labels >= 0]
        if len(rows) < min(top_k, self._head):
            return None
        scores = ann.base.scan.products(query, rows)
        if self._tail:
            later, later_scores = self._search_tail(query, top_k)
            rows, scores = np.concatenate((rows, later)), np.concatenate((scores, later_scores))
        best = top_rows(scores, top_k, lambda places: self._ids_of(rows[places]))
        return rows[best], scores[best]

    def num_probes(self, query: NDArray[np.float32], top_k: int) -> int | None:
        """Number of lists to probe; None if the exact scan is as fast.

        If a fraction s of the rows in the lists near the query is allowed, the best k allowed rows reach as deep as the
        best k/s rows overall, so as many lists are probed as for that depth.
        """
        if top_k > self._head:
            return None
        if self._allowed is None:
            num_probes = self._ann.probes_for(np.array([top_k], np.float64))[0]
            return int(num_probes) if num_probes <= _MAX_PROBED_FRACTION * self._ann.record.num_lists else None
        nearest = np.argsort(-(self._ann.centroids @ query), kind="stable")
        allowed = np.cumsum(self._allowed[nearest])
        with np.errstate(divide="ignore"):
            depths = top_k * np.cumsum(self._ann.sizes[nearest]) / allowed
        enough = np.arange(1, len(nearest) + 1) >= self._ann.probes_for(depths)
        first = int(np.argmax(enough))
        if not enough[first] or allowed[first] > _MAX_PROBED_FRACTION * self._head:
            return None
        return first + 1

    def _search_tail(self, query: NDArray[np.float32], top_k: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        covered = self._ann.record.covered

        def ids_of(rows: NDArray[np.int64]) -> Sequence[str]:
            return self._ids_of(rows + covered)

        rows, scores = self._ann.tail.search(query, top_k, self._tail_mask, ids_of=ids_of)
        return rows + covered, scores


def num_taken(top_k: int) -> int:
    """How many rows an approximate search for ``top_k`` takes from the lists, to compute their products exactly."""
    return top_k + max(_SPARE_ROWS, top_k // 8)


def ann_bytes(num_rows: int, num_lists: int, dim: int) -> int:
    """The size of the file of an approximate index, but for its header: codes, row numbers and centroids."""
    faiss = load_faiss()
    code_size: int = faiss.ScalarQuantizer(dim, faiss.ScalarQuantizer.QT_8bit).code_size
    return num_rows * (code_size + np.dtype(np.int64).itemsize) + num_lists * dim * np.dtype(np.float32).itemsize


def write_ann(ann: AnnIndex) -> AnnRecord:
    """Write an approximate index beside its vectors, replacing existing ones; requires the write lock.

    After a crash between file and record, the checksum shows that they do not belong together.
    """
    faiss = load_faiss()
    path = ann.base.path
    for left in path.parent.glob(".ann-*.new"):
        left.unlink()
    draft = path.with_name(f".{path.stem}.new")
    faiss.write_index(ann.faiss_index, os.fspath(draft))
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
