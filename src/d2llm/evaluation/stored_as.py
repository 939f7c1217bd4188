"""An index with its vectors in fewer bits, to measure what that costs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from d2llm.core.types import Passage, Task, Ties
from d2llm.store.bm25 import WordIndex
from d2llm.store.scan import RowScan
from d2llm.store.vector_formats import make_format
from d2llm.store.view import CandidateRows, PassageView
from d2llm.store.window_vectors import WindowVectors

_BLOCK = 8_192


class StoredAs:
    """An index without deleted rows, with its vectors in another format, in memory; all else is the index's."""

    live = None
    version = None

    def __init__(self, index: PassageView, vector_format: str) -> None:
        self._index = index
        self.format = make_format(vector_format, index.dim)
        ids = index.ids(np.arange(len(index)))
        codes = np.empty((len(index), self.format.code_size), np.uint8)
        for start in range(0, len(index), _BLOCK):
            block = index.block(start, start + _BLOCK)
            codes[start : start + len(block)] = self.format.encode(block, ids[start : start + len(block)])
        self._codes = codes
        self._scan = RowScan(codes, self.format)

    def __len__(self) -> int:
        return len(self._index)

    @property
    def capacity(self) -> int:
        """Rows; every one is a passage."""
        return len(self._index)

    @property
    def task(self) -> Task:
        """The task of a search that does not name one."""
        return self._index.task

    def check_student(self, fingerprint: str) -> None:
        """As the index does."""
        self._index.check_student(fingerprint)

    def ids(self, rows: NDArray[np.int64]) -> list[str]:
        """The ids of some rows."""
        return self._index.ids(rows)

    def passages(self, rows: NDArray[np.int64]) -> list[Passage]:
        """The passages of some rows."""
        return self._index.passages(rows)

    def documents(self, rows: NDArray[np.int64]) -> list[str]:
        """The documents of some rows."""
        return self._index.documents(rows)

    def neighbours(self, passages: Sequence[Passage], distance: int) -> list[Passage]:
        """As the index gives them."""
        return self._index.neighbours(passages, distance)

    def vectors(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """The stored vectors of some rows, float32 [len(rows), dim]."""
        return self.format.decode(self._codes[rows])

    def block(self, start: int, end: int) -> NDArray[np.float32]:
        """The stored vectors of the rows from ``start`` to ``end``, float32."""
        return self.format.decode(self._codes[start:end])

    def scan(self, query: NDArray[np.float32], top_k: int, allowed: NDArray[np.bool_] | None = None) -> CandidateRows:
        """The rows with the highest inner products, as the format stores them; ties by id."""
        rows, scores = self._scan.search(query, top_k, allowed, ids_of=self.ids)
        return CandidateRows(rows, scores)

    def scan_together(
        self, queries: NDArray[np.float32], top_k: int, allowed: NDArray[np.bool_] | None = None
    ) -> list[CandidateRows]:
        """``scan`` for each of several queries [q, dim], with the same answers."""
        return [CandidateRows(*found) for found in self._scan.search_together(queries, top_k, allowed, ids_of=self.ids)]

    def match(
        self,
        text: str,
        top_k: int,
        filter: str | None = None,  # noqa: A002
        *,
        ties: Ties = "ids",
    ) -> CandidateRows:
        """As the index does."""
        return self._index.match(text, top_k, filter, ties=ties)

    @property
    def words(self) -> WordIndex:
        """As the index does."""
        return self._index.words

    @property
    def windows(self) -> WindowVectors | None:
        """As the index does."""
        return self._index.windows

    def best_windows(self, query: NDArray[np.float32], rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """As the index does."""
        return self._index.best_windows(query, rows)

    def select(self, filter: str | None) -> NDArray[np.bool_] | None:  # noqa: A002
        """As the index does."""
        return self._index.select(filter)
