"""Vectors of parts of passages: of their windows (``ops.bm25_words.windows``) or of their tokens.

<kind>-vectors-<generation>   the codes of part 0, part 1, ..., those of a passage together (``vector_file``)
<kind>-places-<generation>    first part and number of parts of each row, two 64-bit integers

``kind`` is "window" or "token". A passage with a single window has none stored: its own vector stands for it. Parts are
written after the vectors of the same rows and before the commit that names these rows. What a crash leaves behind
belongs to rows that no version names; the places of a row are rewritten together with its vector. Parts are stored
once; damaged ones are encoded again by ``repair``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from d2llm.core.errors import DataFormatError
from d2llm.core.types import PartKind
from d2llm.ops.kernels import MAXSIM
from d2llm.ops.selection import ranges
from d2llm.store.scan import RowScan
from d2llm.store.vector_file import PART_EXTENTS, PART_VECTORS, IntactExtents, VectorFile
from d2llm.store.vector_formats import Multiplier, VectorFormat, make_format

_PLACE = np.dtype("<i8")
EXTENT_BYTES = 2 * _PLACE.itemsize
"""Bytes of a row's place, on disk and in memory."""
_PARTS_AT_ONCE = 4_096  # few enough to stay in the cache
_SAMPLED = 8  # rows
_NEVER = 1 << 62  # no sum of products is that large


class EncodedParts(NamedTuple):
    """The parts of some passages, of one kind.

    Attributes:
        vectors: [sum of counts, dim], passage after passage.
        counts: [n], number of parts of each passage; 0 windows if its own vector stands for them.
        num_tokens: tokens that were read for them, in addition to those of the passages.
    """

    vectors: NDArray[np.float32]
    counts: NDArray[np.int64]
    num_tokens: int = 0


EncodeParts = Callable[[PartKind, Sequence[str]], EncodedParts]
"""Encodes the parts of some passages, given as full texts; "" has no windows."""


class PartVectors:
    """The vectors of the parts of an index's rows, of one kind, at one version."""

    def __init__(
        self,
        extents: NDArray[np.int64],
        codes: NDArray[np.uint8],
        vector_format: VectorFormat,
    ) -> None:
        """Args: ``extents`` [rows, 2], first part and number of parts of each row; ``codes`` [parts, bytes]."""
        self._extents = extents
        self._format = vector_format
        self._largest_square: int | None = None
        self.codes = codes

    @classmethod
    def of_texts(
        cls, vectors: NDArray[np.float32], counts: NDArray[np.int64], vector_format: VectorFormat | None = None
    ) -> PartVectors:
        """The parts of texts that are in no index; row i is text i.

        ``vectors`` [sum of counts, dim] are text after text; ``vector_format`` stores them, by default as they are.
        """
        stored = vector_format or make_format("float32", vectors.shape[1])
        extents = np.stack([np.cumsum(counts) - counts, counts], axis=1)
        return cls(
            extents, stored.encode(vectors, [str(row) for row in np.repeat(np.arange(len(counts)), counts)]), stored
        )

    @cached_property
    def _scan(self) -> RowScan:
        return RowScan(self.codes, self._format)

    @property
    def num_bytes(self) -> int:
        """Size of codes and places."""
        return self.codes.nbytes + self._extents.nbytes

    def counts(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Number of parts of some rows [n]."""
        return self._extents[rows, 1]

    def best(self, query: NDArray[np.float32], rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """The highest inner product of a query [dim] with a part of each row [n]; -inf for rows without parts.

        Each product is summed in a fixed order, whichever other rows are requested (``RowScan.products``).
        """
        starts, counts = self._extents[rows].T
        scores = np.full(len(rows), -np.inf, np.float32)
        nonempty = np.flatnonzero(counts)
        if len(nonempty):
            products = self._scan.products(query, ranges(starts[nonempty], counts[nonempty]))
            firsts = np.cumsum(counts[nonempty]) - counts[nonempty]
            scores[nonempty] = np.maximum.reduceat(products, firsts)
        return scores

    def sum_of_best(
        self, queries: NDArray[np.float32], rows: NDArray[np.int64], needed: NDArray[np.float64] | None = None
    ) -> NDArray[np.float32]:
        """The sum, over queries [m, dim], of the highest inner product with a part of each row [n].

        This is the late interaction of ColBERT (Khattab and Zaharia, SIGIR 2020) if the queries are the tokens of a
        query. 0 for rows without parts. The sums are the same whichever other rows are requested.

        Of rows whose sum is below ``needed`` [n], the result may be any number between: then most of them are left
        after their products with a few queries, since no product of two vectors is above that of their norms.
        """
        scores = np.zeros(len(rows), np.float32)
        if not len(queries):
            return scores
        starts, counts = np.ascontiguousarray(self._extents[rows].T)
        nonempty = np.flatnonzero(counts)
        starts, counts = starts[nonempty], counts[nonempty]
        multiplier = self._format.multiplier(queries)
        kernels = None if multiplier.whole is None else MAXSIM.get(len(self.codes))
        if kernels is not None and len(nonempty):
            least = None if needed is None else (needed[nonempty] - multiplier.shift.sum()) / multiplier.scale
            best = self._best_by_loop(kernels, multiplier, starts, counts, least)
            scores[nonempty] = multiplier.scale * best + multiplier.shift.sum()
            return scores
        for block in _blocks(counts):
            sums = self._highest(multiplier, starts[block], counts[block]).sum(axis=1, dtype=np.float64)
            scores[nonempty[block]] = multiplier.scale * sums + multiplier.shift.sum()
        return scores

    def _highest(
        self, multiplier: Multiplier, starts: NDArray[np.int64], counts: NDArray[np.int64]
    ) -> NDArray[np.floating[Any]]:
        """The highest product of each query with a part of each of some rows with parts [n, m], before its scale."""
        products = multiplier.multiply(self.codes[ranges(starts, counts)])
        return np.maximum.reduceat(products, np.cumsum(counts) - counts, axis=0)

    def _best_by_loop(
        self,
        kernels: Any,
        multiplier: Multiplier,
        starts: NDArray[np.int64],
        counts: NDArray[np.int64],
        needed: NDArray[np.float64] | None,
    ) -> NDArray[np.int64]:
        """``sum_of_best`` in whole numbers, of rows with parts."""
        whole, bits = multiplier.whole, multiplier.bits
        assert whole is not None
        left = least = np.zeros(0, np.int64)
        if needed is not None:
            norms = np.linalg.norm(whole.astype(np.float64), axis=1)
            most = norms * self._largest_norm(kernels, bits) + (2**bits - 1) / 2 * whole.sum(axis=1, dtype=np.int64)
            # First those that add least to most rows, of which some stand for all.
            some = slice(None, None, -(-len(starts) // _SAMPLED))
            order = np.argsort(self._highest(multiplier, starts[some], counts[some]).mean(axis=0) - most, kind="stable")
            whole, most = whole[order], np.ceil(most[order] + 1).astype(np.int64)
            by_block = np.add.reduceat(most, np.arange(0, len(most), kernels.LANES))
            left = np.append(np.cumsum(by_block[::-1])[::-1], 0)
            least = np.clip(np.floor(needed), -_NEVER, _NEVER).astype(np.int64)
        best = np.empty(len(starts), np.int64)
        kernels.sum_of_best(self.codes, starts, counts, kernels.arranged(whole, bits), bits, left, least, best)
        return best

    def _largest_norm(self, kernels: Any, bits: int) -> float:
        """That of a vector, in steps of its format."""
        if self._largest_square is None:
            self._largest_square = int(kernels.largest_square(self.codes, bits))
        return 0.5 * math.sqrt(self._largest_square)

    def take(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """The codes of the parts of some rows, row after row, and the number of parts of each row."""
        starts, counts = self._extents[rows].T
        return np.asarray(self.codes[ranges(starts, counts)]), counts


def best_windows(
    windows: PartVectors, scan: RowScan, query: NDArray[np.float32], rows: NDArray[np.int64]
) -> NDArray[np.float32]:
    """The highest inner product of a query [dim] with a window of each row [n] (``PartVectors.best``).

    For a row with a single window, which is not stored, it is the product with its own vector, which ``scan`` has.
    """
    scores = windows.best(query, rows)
    alone = np.flatnonzero(np.isneginf(scores))
    if len(alone):
        scores[alone] = scan.products(query, rows[alone])
    return scores


def _blocks(counts: NDArray[np.int64]) -> Iterator[slice]:
    """Consecutive rows whose parts are multiplied together: at most ``_PARTS_AT_ONCE``, or a single row."""
    ends = np.cumsum(counts)
    start = 0
    while start < len(counts):
        before = int(ends[start - 1]) if start else 0
        end = max(start + 1, int(np.searchsorted(ends, before + _PARTS_AT_ONCE, side="right")))
        yield slice(start, end)
        start = end


def create_parts(folder: Path, generation: int, kind: PartKind, vector_format: VectorFormat, *, since: int = 0) -> None:
    """Create the files of a kind of parts, without rows."""
    VectorFile.create(folder, generation, vector_format.code_size, since=since, name=PART_VECTORS[kind])
    VectorFile.create(folder, generation, EXTENT_BYTES, since=since, name=PART_EXTENTS[kind])


def append_parts(
    folder: Path,
    generation: int,
    kind: PartKind,
    vector_format: VectorFormat,
    first: int,
    codes: NDArray[np.uint8],
    counts: NDArray[np.int64],
) -> None:
    """Write the parts of the rows from ``first`` on, durably, replacing existing ones of these and later rows.

    Raises:
        DataFormatError: the existing files cannot be used.
        OSError: the files cannot be written.
    """
    vectors = VectorFile.open(folder, generation, vector_format.code_size, name=PART_VECTORS[kind])
    extents = VectorFile.open(folder, generation, EXTENT_BYTES, name=PART_EXTENTS[kind])
    start = vectors.append(codes) if len(codes) else vectors.capacity
    new_extents = _packed_extents(start, counts)
    if extents.capacity <= first:
        extents.append(
            np.concatenate([_packed_extents(start, np.zeros(first - extents.capacity, np.int64)), new_extents])
        )
        return
    # Row numbers that no version names are reused after a vector file was rewritten.
    kept = np.array(extents.codes()[:first])
    draft = VectorFile.begin(folder, generation, EXTENT_BYTES, since=extents.since, name=PART_EXTENTS[kind])
    draft.append(np.concatenate([kept, new_extents]))
    draft.take_place(folder)


def open_parts(
    folder: Path,
    generation: int,
    kind: PartKind,
    vector_format: VectorFormat,
    *,
    num_rows: int,
    capacity: int,
    version: int,
    intact: IntactExtents,
) -> PartVectors:
    """The parts of a version of the table, of one kind; the checksums of all that is not yet ``intact`` are compared.

    The parts of the first ``num_rows`` rows, up to the last that the version names, must exist. Of the ``capacity``
    rows that may be read, the others, left by a crash, may have none.

    Raises:
        DataFormatError: they are missing or damaged.
    """
    if not num_rows:
        return PartVectors(
            np.zeros((capacity, 2), np.int64), np.zeros((0, vector_format.code_size), np.uint8), vector_format
        )
    opened: list[tuple[VectorFile, NDArray[np.uint8]]] = []
    for name, code_size in ((PART_VECTORS[kind], vector_format.code_size), (PART_EXTENTS[kind], EXTENT_BYTES)):
        file = VectorFile.open(folder, generation, code_size, name=name)
        codes = file.codes()
        problem = None
        if file.since > version:
            problem = f"belongs to a later version than {version}; refresh or open the index again"
        elif intact.damaged(file, codes) or (name == PART_EXTENTS[kind] and len(codes) < num_rows):
            problem = "is not what was written; `d2llm index ... verify --repair` encodes them again"
        if problem is not None:
            raise DataFormatError(file.path, problem)
        opened.append((file, codes))
    (_, codes), (_, stored) = opened
    extents = np.zeros((capacity, 2), np.int64)
    written = np.ascontiguousarray(stored[:capacity]).view(_PLACE).reshape(-1, 2)
    extents[: len(written)] = written
    if (extents < 0).any() or (extents.sum(axis=1) > len(codes)).any():
        problem = f"names {kind}s that do not exist; `d2llm index ... verify --repair` encodes them again"
        raise DataFormatError(folder / f"{PART_EXTENTS[kind]}-{generation}.bin", problem)
    return PartVectors(extents, codes, vector_format)


def replace_parts(
    folder: Path,
    generation: int,
    kind: PartKind,
    vector_format: VectorFormat,
    blocks: Iterator[tuple[NDArray[np.uint8], NDArray[np.int64]]],
    *,
    since: int,
) -> None:
    """Replace the files of a kind of parts by the parts of all rows, in blocks of rows: their codes and counts.

    Raises:
        OSError: they cannot be written; the existing files are kept.
    """
    vectors = VectorFile.begin(folder, generation, vector_format.code_size, since=since, name=PART_VECTORS[kind])
    extents = VectorFile.begin(folder, generation, EXTENT_BYTES, since=since, name=PART_EXTENTS[kind])
    for codes, counts in blocks:
        start = vectors.append(codes) if len(codes) else vectors.capacity
        if len(counts):
            extents.append(_packed_extents(start, counts))
    vectors.take_place(folder)
    extents.take_place(folder)


def _packed_extents(start: int, counts: NDArray[np.int64]) -> NDArray[np.uint8]:
    """The places of rows with these numbers of parts, whose first part is ``start``, as bytes."""
    extents = np.stack([start + np.cumsum(counts) - counts, counts], axis=1).astype(_PLACE)
    return extents.view(np.uint8).reshape(len(counts), EXTENT_BYTES)
