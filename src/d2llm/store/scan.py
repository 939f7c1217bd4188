"""Exact search for the rows with the highest inner products with a query, without copying the stored rows.

FAISS scans the rows in place: an empty index of the right type is pointed at them, memory-mapped or not. Its float32
sums are good enough to propose candidates, but not to rank them: their last bits depend on the processor and on how
rows are blocked. So more rows than requested are taken, their products are summed again in float64 in a fixed order,
and the search is widened until, by a bound on the float32 error, no other row can be among the best. Ranking and scores
thus depend neither on FAISS nor on its threads; without FAISS, numpy gives the same result.

For several queries, numpy proposes the candidates: a block of rows is decoded once for all queries, and one matrix
product replaces many reads of the same rows. The candidates are ranked as above, so the result of a query does not
depend on the other queries.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from d2llm.core.errors import InputError
from d2llm.core.fallbacks import fell_back
from d2llm.core.inputs import check_count
from d2llm.ops.selection import nth_highest, top_rows
from d2llm.store.vector_formats import VectorFormat

IdsOf = Callable[[NDArray[np.int64]], Sequence[str]]
"""The ids of some rows, in their order."""

_FLOAT32_ERROR = 2.0**-24
_BFLOAT16_ERROR = 2.0**-8  # of a number that is cut off; half of it if it is rounded to the nearest
_SPARE_ROWS = 128  # candidates beyond top_k (at least an eighth of it): reading all rows twice takes much longer
_WIDEN = 4
_BLOCK_ROWS = 1_024  # rows that numpy decodes at a time: they stay in the cache
_PRODUCT_ROWS = 256  # summed in float64 at a time: larger arrays need new memory pages, which takes 4 times as long
_MIN_TOGETHER = 8  # fewer are as fast one by one
_GATHER_ROWS = 65_536  # allowed rows that are copied together for an index that cannot exclude rows,
_FEW_LEFT_OUT = 4_096  # unless it is faster to search for this many more and drop the rows that are not allowed


class RowScan:
    """A scan of the rows ``codes`` [capacity, code_size], C-contiguous, memory-mapped or not; they are not copied."""

    def __init__(self, codes: NDArray[np.uint8], vector_format: VectorFormat, *, use_faiss: bool = True) -> None:
        self._codes = codes
        self._format = vector_format
        self._faiss: Any = _import_faiss() if use_faiss else None
        self._index = self._index_over(codes)
        self._rounding = _BFLOAT16_ERROR if self._index is not None and self._rounds_queries() else 0.0

    @property
    def faiss_index(self) -> Any:
        """FAISS' index that has these rows as its codes, in place; None if there is none."""
        return self._index

    def search(
        self,
        query: NDArray[np.float32],
        top_k: int,
        mask: NDArray[np.bool_] | None = None,
        *,
        ids_of: IdsOf,
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """The rows with the highest inner products, best first; equal products in the order of their ids.

        Args:
            query: [dim].
            top_k: how many, at least 1.
            mask: [capacity], the rows that may be returned; None means all.
            ids_of: returns the ids of some rows; called only for rows whose product is not unique among the best.

        Returns:
            Rows int64 [k] and their products float32 [k]; k is ``top_k``, or the number of allowed rows if less.

        Raises:
            InputError: ``top_k`` < 1, or the query has another width or is not finite.
        """
        self.check(query, top_k)
        query = np.ascontiguousarray(query, np.float32)
        num_allowed = len(self._codes) if mask is None else int(np.count_nonzero(mask))
        if num_allowed == 0:
            return np.zeros(0, np.int64), np.zeros(0, np.float32)
        take = top_k + max(_SPARE_ROWS, top_k // 8)
        while True:
            with one_thread(self._faiss):
                rows, lowest = self._propose(query, min(take, num_allowed), mask)
            scores = self.products(query, rows)
            if take >= num_allowed or self._is_enough(query, scores, lowest, top_k):
                break
            take *= _WIDEN
        best = top_rows(scores, top_k, lambda positions: ids_of(rows[positions]))
        return rows[best], scores[best]

    def search_together(
        self,
        queries: NDArray[np.float32],
        top_k: int,
        mask: NDArray[np.bool_] | None = None,
        *,
        ids_of: IdsOf,
    ) -> list[tuple[NDArray[np.int64], NDArray[np.float32]]]:
        """``search`` for several queries [q, dim], with identical results but faster than one by one.

        Besides the results, it needs memory for the candidates of all these queries; more than 256 are hardly faster.

        Raises:
            InputError: as for ``search``.
        """
        for query in queries:
            self.check(query, top_k)
        num_allowed = len(self._codes) if mask is None else int(np.count_nonzero(mask))
        if len(queries) < _MIN_TOGETHER or not num_allowed:
            return [self.search(query, top_k, mask, ids_of=ids_of) for query in queries]
        results: list[tuple[NDArray[np.int64], NDArray[np.float32]]] = []
        take = min(top_k + max(_SPARE_ROWS, top_k // 8), num_allowed)
        batch = np.ascontiguousarray(queries, np.float32)
        for query, (rows, lowest) in zip(batch, self._propose_together(batch, take, mask), strict=True):
            scores = self.products(query, rows)
            if len(rows) < num_allowed and not self._is_enough(query, scores, lowest, top_k):
                results.append(self.search(query, top_k, mask, ids_of=ids_of))
                continue
            best = top_rows(scores, top_k, lambda positions, rows=rows: ids_of(rows[positions]))
            results.append((rows[best], scores[best]))
        return results

    def products(self, query: NDArray[np.float32], rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Inner products of a query [dim] with some rows, summed in float64 in a fixed order, as float32."""
        turned = self._format.turn(query)
        scores = np.empty(len(rows), np.float32)
        for start in range(0, len(rows), _PRODUCT_ROWS):
            levels = self._format.levels(self._codes[rows[start : start + _PRODUCT_ROWS]])
            # Not a matrix product: the order of summation in BLAS depends on the number of rows.
            scores[start : start + len(levels)] = np.einsum("ij,j->i", levels.astype(np.float64), turned)
        return scores

    def check(self, query: NDArray[np.float32], top_k: int) -> None:
        """Refuse a query of another width or with infinite numbers, and ``top_k`` < 1 (``InputError``)."""
        if query.shape != (self._format.dim,) or not np.isfinite(query).all():
            expected = f"{self._format.dim} finite numbers"
            raise InputError(f"the query vector must be {expected}, but has the shape {query.shape}")
        check_count(top_k, "top_k")

    def _is_enough(self, query: NDArray[np.float32], scores: NDArray[np.float32], lowest: float, top_k: int) -> bool:
        """Whether the best ``top_k`` are certain: other rows have proposal products of at most ``lowest``."""
        if len(scores) < top_k:
            return False
        return bool(lowest + self._error(query) < nth_highest(scores, top_k))

    def _error(self, query: NDArray[np.float32]) -> float:
        """Upper bound of the error of a proposal product (Higham, "Accuracy and Stability", section 3.1).

        The sum of n float32 products, in any order, is off by at most n 2^-24 |query| |row|, to first order; the rest
        covers the rounding of query, levels and final score. Some levels of FAISS round the query more coarsely.
        """
        norm = float(np.linalg.norm(query.astype(np.float64)))
        return ((2 * self._format.dim + 64) * _FLOAT32_ERROR + self._rounding) * norm * self._largest_norm

    def _rounds_queries(self) -> bool:
        """Whether this FAISS rounds queries to bfloat16 where rows are bfloat16 (``store.scan``)."""
        if self._format.kind != "bfloat16":
            return False
        dim, query = self._format.dim, np.float32(1 + 2.0**-12)
        ones = np.full((1, dim), 0x3F80, "<u2").view(np.uint8)  # 1 in bfloat16
        scores, _ = self._index_over(ones).search(np.full((1, dim), query), 1)
        return bool(abs(scores[0, 0] - dim * query) > dim * 2.0**-14)

    @cached_property
    def _largest_norm(self) -> float:
        return self._format.largest_norm(self._codes)

    def _propose(
        self, query: NDArray[np.float32], take: int, mask: NDArray[np.bool_] | None
    ) -> tuple[NDArray[np.int64], float]:
        """At least the best ``take`` rows by float32 products, and a product that no other allowed row exceeds."""
        if self._index is None:
            return self._propose_with_numpy(query, take, mask)
        faiss_query = self._format.faiss_query(query)
        if mask is None:
            scores, rows = self._index.search(faiss_query, take)
        elif self._format.selects:
            allowed = self._faiss.IDSelectorBitmap(np.packbits(mask, bitorder="little"))
            parameters = self._faiss.SearchParameters(sel=allowed)
            scores, rows = self._index.search(faiss_query, take, params=parameters)
        else:
            allowed = np.flatnonzero(mask)
            num_left_out = len(mask) - len(allowed)
            if num_left_out > _FEW_LEFT_OUT:
                return self._propose_gathered(faiss_query, take, allowed)
            scores, rows = self._index.search(faiss_query, take + num_left_out)
            return rows[0][mask[rows[0]]], float(scores[0, -1])
        return rows[0], float(scores[0, -1])

    def _propose_gathered(
        self, faiss_query: NDArray[np.float32], take: int, allowed: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], float]:
        rows, scores = np.zeros(0, np.int64), np.zeros(0, np.float32)
        for start in range(0, len(allowed), _GATHER_ROWS):
            part = allowed[start : start + _GATHER_ROWS]
            whole = part[-1] - part[0] + 1 == len(part)
            codes = self._codes[part[0] : part[-1] + 1] if whole else self._codes[part]
            part_scores, positions = self._index_over(codes).search(faiss_query, min(take, len(part)))
            rows, scores = np.concatenate((rows, part[positions[0]])), np.concatenate((scores, part_scores[0]))
            if len(scores) > take:
                best = np.argpartition(scores, len(scores) - take)[len(scores) - take :]
                rows, scores = rows[best], scores[best]
        return rows, float(scores.min())

    def _propose_with_numpy(
        self, query: NDArray[np.float32], take: int, mask: NDArray[np.bool_] | None
    ) -> tuple[NDArray[np.int64], float]:
        turned = self._format.turn(query).astype(np.float32)
        scores = np.empty(len(self._codes), np.float32)
        for start in range(0, len(scores), _BLOCK_ROWS):
            end = start + _BLOCK_ROWS
            scores[start:end] = self._format.levels(np.asarray(self._codes[start:end])) @ turned
        if mask is not None:
            scores[~mask] = -np.inf
        rows = np.argpartition(scores, len(scores) - take)[len(scores) - take :]
        return rows, float(scores[rows].min())

    def _propose_together(
        self, queries: NDArray[np.float32], take: int, mask: NDArray[np.bool_] | None
    ) -> list[tuple[NDArray[np.int64], float]]:
        """``_propose`` for several queries [q, dim] in one pass over the rows."""
        best = _BestOfEach(len(queries), take)
        turned = np.stack([self._format.turn(query).astype(np.float32) for query in queries], axis=1)
        for start in range(0, len(self._codes), _BLOCK_ROWS):
            rows = np.arange(start, min(start + _BLOCK_ROWS, len(self._codes)))
            codes = self._codes[start : start + _BLOCK_ROWS]
            if mask is not None and not mask[start : start + _BLOCK_ROWS].all():
                rows = start + np.flatnonzero(mask[start : start + _BLOCK_ROWS])
                codes = self._codes[rows]
            if len(rows):
                best.add(rows, self._format.levels(codes) @ turned)
        return best.rows()

    def _index_over(self, codes: NDArray[np.uint8]) -> Any:
        """A FAISS index that uses this array as its codes; the array must outlive it. None if FAISS cannot do this."""
        if self._faiss is None:
            return None
        try:
            index = self._format.empty_faiss_index(self._faiss)
            view = index.codes
            pointer = self._faiss.swig_ptr(codes.reshape(-1))
            # Same as MaybeOwnedVector::create_view, which cannot be called from Python (it needs a shared_ptr).
            view.is_owned = False
            view.view_data = view.c_ptr = pointer
            view.view_size = view.c_size = codes.size
            index.ntotal = len(codes)
        except AttributeError as error:  # this FAISS is too old for this index type or for such views
            fell_back("scan by FAISS", f"this FAISS cannot use codes in place ({error}); numpy scans")
            return None
        return index


class _BestOfEach:
    """Collects the rows with the highest products for each query, from blocks of rows."""

    def __init__(self, num_queries: int, take: int) -> None:
        self._take = take
        self._lowest = np.full(num_queries, -np.inf, np.float32)  # rows with lower products are not among the best
        self._rows = [np.zeros(0, np.int64)]
        self._queries = [np.zeros(0, np.int16)]
        self._scores = [np.zeros(0, np.float32)]
        self._num = 0

    def add(self, rows: NDArray[np.int64], scores: NDArray[np.float32]) -> None:
        """Add new rows [n] with their products [n, queries]."""
        flat = np.flatnonzero(scores > self._lowest)
        above, queries = np.divmod(flat, len(self._lowest))
        self._rows.append(rows[above])
        self._queries.append(queries.astype(np.int16))
        self._scores.append(scores.reshape(-1)[flat])
        self._num += len(flat)
        if self._num > 2 * len(self._lowest) * max(self._take, _BLOCK_ROWS):
            self._drop()

    def rows(self) -> list[tuple[NDArray[np.int64], float]]:
        """For each query, the ``take`` best rows (all if there are fewer), and the lowest of their products."""
        self._drop()
        ends = np.cumsum(np.bincount(self._queries[0], minlength=len(self._lowest)))[:-1]
        return list(zip(np.split(self._rows[0], ends), self._lowest.tolist(), strict=True))

    def _drop(self) -> None:
        """Drop rows that are not among the best of their query; sort by query."""
        queries = np.concatenate(self._queries)
        order = np.argsort(queries, kind="stable")
        rows, scores = np.concatenate(self._rows)[order], np.concatenate(self._scores)[order]
        ends = np.cumsum(np.bincount(queries, minlength=len(self._lowest)))
        kept: list[NDArray[np.int64]] = []
        for query, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
            positions = np.arange(start, end)
            if len(positions) > self._take:
                positions = start + np.argpartition(scores[start:end], len(positions) - self._take)[-self._take :]
            if len(positions) == self._take:
                self._lowest[query] = scores[positions].min()
            kept.append(positions)
        positions = np.concatenate(kept)
        self._rows, self._queries, self._scores = [rows[positions]], [queries[order][positions]], [scores[positions]]
        self._num = len(positions)


@contextmanager
def one_thread(faiss: Any) -> Generator[None]:
    """FAISS parallelises over queries, not rows: for one query, other threads only spin (measured: twice the time)."""
    if faiss is None:
        yield
        return
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)  # for this thread alone, and not for torch, which has its own threads
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def _import_faiss() -> Any:
    try:
        return load_faiss()
    except ImportError as error:
        fell_back("scan by FAISS", f"FAISS cannot be loaded ({error}); numpy scans")
        return None


_LEVEL = "FAISS_SIMD_LEVEL"


def load_faiss() -> Any:
    """The module ``faiss``, which is slow to import and has no types.

    On CPUs with AVX512-FP16 (its level ``AVX512_SPR``) it rounds a query to bfloat16 where rows are bfloat16: too
    coarsely to prove that a search is exact within few candidates. So the level is AVX512 instead, for the whole
    process, unless ``FAISS_SIMD_LEVEL`` chooses one. A FAISS whose level cannot be set while it runs stays as it is.

    Raises:
        ImportError: it is not installed, or cannot be loaded.
    """
    faiss = importlib.import_module("faiss")
    levels = getattr(faiss, "SIMDConfig", None)
    if levels is not None and _LEVEL not in os.environ and levels.get_level() == faiss.SIMDLevel_AVX512_SPR:
        levels.set_level(faiss.SIMDLevel_AVX512)
    return faiss
