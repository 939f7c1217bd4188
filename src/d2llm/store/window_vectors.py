"""Vectors of the windows of passages (``ops.bm25_words.windows``), encoded separately from the passages.

window-vectors-<generation>   the codes of window 0, window 1, ..., those of a passage together (``vector_file``)
window-places-<generation>    first window and number of windows of each row, two 64-bit integers

A passage with a single window has none stored: its own vector stands for it. Windows are written after the vectors of
the same rows and before the commit that names these rows. What a crash leaves behind belongs to rows that no version
names; the places of a row are rewritten together with its vector. Windows are stored once; damaged ones are encoded
again by ``repair``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from d2llm.core.errors import DataFormatError
from d2llm.ops.selection import ranges
from d2llm.store.scan import RowScan
from d2llm.store.vector_file import WINDOW_PLACES, WINDOWS, VectorFile
from d2llm.store.vector_formats import VectorFormat

_PLACE = np.dtype("<i8")
_PLACE_BYTES = 2 * _PLACE.itemsize


class ReadWindows(NamedTuple):
    """The windows of some passages.

    Attributes:
        vectors: [sum of counts, dim], passage after passage.
        counts: [n], number of windows of each passage; 0 if its own vector stands for it.
        num_tokens: tokens that were read for them.
    """

    vectors: NDArray[np.float32]
    counts: NDArray[np.int64]
    num_tokens: int


EncodeWindows = Callable[[Sequence[str]], ReadWindows]
"""Encodes the windows of some passages, given as full texts; "" has none."""


class WindowVectors:
    """The window vectors of the rows of an index at one version."""

    def __init__(self, places: NDArray[np.int64], codes: NDArray[np.uint8], vector_format: VectorFormat) -> None:
        """Args: ``places`` [rows, 2], first window and number of windows of each row; ``codes`` [windows, bytes]."""
        self._places = places
        self._scan = RowScan(codes, vector_format)
        self.codes = codes

    @property
    def num_bytes(self) -> int:
        """Size of codes and places."""
        return self.codes.nbytes + self._places.nbytes

    def counts(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Number of windows of some rows [n]."""
        return self._places[rows, 1]

    def best(self, query: NDArray[np.float32], rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """The highest inner product of a query [dim] with a window of each row [n]; -inf for rows without windows.

        Each product is summed in a fixed order, whichever other rows are requested (``RowScan.products``).
        """
        starts, counts = self._places[rows].T
        scores = np.full(len(rows), -np.inf, np.float32)
        nonempty = np.flatnonzero(counts)
        if len(nonempty):
            products = self._scan.products(query, ranges(starts[nonempty], counts[nonempty]))
            firsts = np.cumsum(counts[nonempty]) - counts[nonempty]
            scores[nonempty] = np.maximum.reduceat(products, firsts)
        return scores

    def take(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """The codes of the windows of some rows, row after row, and the number of windows of each row."""
        starts, counts = self._places[rows].T
        return np.asarray(self.codes[ranges(starts, counts)]), counts


def create_windows(folder: Path, generation: int, vector_format: VectorFormat, *, since: int = 0) -> None:
    """Create window files without rows."""
    VectorFile.create(folder, generation, vector_format.code_size, since=since, name=WINDOWS)
    VectorFile.create(folder, generation, _PLACE_BYTES, since=since, name=WINDOW_PLACES)


def append_windows(
    folder: Path,
    generation: int,
    vector_format: VectorFormat,
    first: int,
    codes: NDArray[np.uint8],
    counts: NDArray[np.int64],
) -> None:
    """Write the windows of the rows from ``first`` on, durably, replacing existing ones of these and later rows.

    Raises:
        DataFormatError: the existing files cannot be used.
        OSError: the files cannot be written.
    """
    windows = VectorFile.open(folder, generation, vector_format.code_size, name=WINDOWS)
    places = VectorFile.open(folder, generation, _PLACE_BYTES, name=WINDOW_PLACES)
    start = windows.append(codes) if len(codes) else windows.capacity
    own = _places(start, counts)
    if places.capacity <= first:
        places.append(np.concatenate([_places(start, np.zeros(first - places.capacity, np.int64)), own]))
        return
    # Row numbers that no version names are reused after a vector file was rewritten.
    kept = np.array(places.codes()[:first])
    draft = VectorFile.begin(folder, generation, _PLACE_BYTES, since=places.since, name=WINDOW_PLACES)
    draft.append(np.concatenate([kept, own]))
    draft.take_place(folder)


def open_windows(
    folder: Path, generation: int, vector_format: VectorFormat, *, num_rows: int, capacity: int, version: int
) -> WindowVectors:
    """The windows of a version of the table, after comparing all their checksums.

    The windows of the first ``num_rows`` rows, up to the last that the version names, must exist. Of the ``capacity``
    rows that may be read, the others, left by a crash, may have none.

    Raises:
        DataFormatError: they are missing or damaged.
    """
    if not num_rows:
        return WindowVectors(
            np.zeros((capacity, 2), np.int64), np.zeros((0, vector_format.code_size), np.uint8), vector_format
        )
    opened: list[NDArray[np.uint8]] = []
    for name, code_size in ((WINDOWS, vector_format.code_size), (WINDOW_PLACES, _PLACE_BYTES)):
        file = VectorFile.open(folder, generation, code_size, name=name)
        codes = file.codes()
        problem = None
        if file.since > version:
            problem = f"belongs to a later version than {version}; refresh or open the index again"
        elif file.damaged(codes) or (name == WINDOW_PLACES and len(codes) < num_rows):
            problem = "is not what was written; `d2llm index ... verify --repair` encodes the windows again"
        if problem is not None:
            raise DataFormatError(file.path, problem)
        opened.append(codes)
    codes, stored = opened
    places = np.zeros((capacity, 2), np.int64)
    written = np.ascontiguousarray(stored[:capacity]).view(_PLACE).reshape(-1, 2)
    places[: len(written)] = written
    if (places < 0).any() or (places.sum(axis=1) > len(codes)).any():
        problem = "names windows that do not exist; `d2llm index ... verify --repair` encodes the windows again"
        raise DataFormatError(folder / f"{WINDOW_PLACES}-{generation}.bin", problem)
    return WindowVectors(places, codes, vector_format)


def replace_windows(
    folder: Path,
    generation: int,
    vector_format: VectorFormat,
    blocks: Iterator[tuple[NDArray[np.uint8], NDArray[np.int64]]],
    *,
    since: int,
) -> None:
    """Replace the window files by the windows of all rows, given as codes and counts of consecutive blocks of rows.

    Raises:
        OSError: they cannot be written; the existing files are kept.
    """
    windows = VectorFile.begin(folder, generation, vector_format.code_size, since=since, name=WINDOWS)
    places = VectorFile.begin(folder, generation, _PLACE_BYTES, since=since, name=WINDOW_PLACES)
    for codes, counts in blocks:
        start = windows.append(codes) if len(codes) else windows.capacity
        if len(counts):
            places.append(_places(start, counts))
    windows.take_place(folder)
    places.take_place(folder)


def _places(start: int, counts: NDArray[np.int64]) -> NDArray[np.uint8]:
    """The places of rows with these window counts, whose first window is ``start``, as bytes."""
    places = np.stack([start + np.cumsum(counts) - counts, counts], axis=1).astype(_PLACE)
    return places.view(np.uint8).reshape(len(counts), _PLACE_BYTES)
