"""The verb ``search``: queries become rankings with texts."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from d2llm.core.errors import InputError, ModelError
from d2llm.core.types import Query, RankedPassage, Ranking, Task
from d2llm.index.folder import FolderIndex
from d2llm.ops.selection import top_rows
from d2llm.pipeline.progress import progress_bar
from d2llm.pipeline.protocols import SearchStudent

_ENCODED_AT_ONCE = 256  # queries: enough for full batches, few enough that the progress bar moves


def search(
    index: FolderIndex,
    student: SearchStudent,
    queries: Sequence[Query] | Sequence[str],
    *,
    task: Task | None = None,
    top_k: int = 10,
    num_candidates: int = 1000,
    exact: bool = False,
    show_progress: bool | None = False,
) -> list[Ranking]:
    """Rank the passages of an index for each query: inner-product candidates, then the student's full score (IEM).

    Args:
        index: made by this student.
        student: encodes the queries and scores.
        queries: texts, or queries with ids; texts get the ids "1", "2", ...
        task: which branch of the IEM; by default the index's own.
        top_k: length of a ranking; every passage when it is beyond the corpus.
        num_candidates: passages that get the full score; when it is below ``top_k``, ``top_k`` passages get it.
        exact: give every passage the full score. So does a head without an inner-product part ("paper").
        show_progress: None means: if standard error is a terminal.

    Returns:
        One ranking per query, best first, ties by passage id. ``seconds`` holds "encode" (the mean over queries encoded
        together), "candidates" and "score".

    Raises:
        InputError: ``top_k`` or ``num_candidates`` below 1, or a query without text.
        IndexMismatchError: the index was made by another student.
        ModelError: the student gave a score that is not a number.
    """
    searcher = Searcher(index, student, task=task, top_k=top_k, num_candidates=num_candidates, exact=exact)
    return searcher.rank(queries, show_progress=show_progress)


class Searcher:
    """``search`` for many calls: what does not depend on the queries is checked once. Arguments as there."""

    def __init__(
        self,
        index: FolderIndex,
        student: SearchStudent,
        *,
        task: Task | None = None,
        top_k: int = 10,
        num_candidates: int = 1000,
        exact: bool = False,
    ) -> None:
        if top_k < 1 or num_candidates < 1:
            raise InputError(f"top_k is {top_k} and num_candidates is {num_candidates}; both must be at least 1")
        index.check_student(student.fingerprint)
        self._index = index
        self._student = student
        self._task: Task = task or index.task
        self._top_k = top_k
        self._num_candidates = max(num_candidates, top_k)
        self._scan_all = exact or not student.has_anchor

    def rank(
        self,
        queries: Sequence[Query] | Sequence[str],
        *,
        show_progress: bool | None = False,
        title: str = "searching",
    ) -> list[Ranking]:
        """Rank the passages for each query; ``title`` is the progress bar's."""
        asked = _as_queries(queries)
        rankings: list[Ranking] = []
        with progress_bar(title, len(asked), show=show_progress) as advance:
            for start in range(0, len(asked), _ENCODED_AT_ONCE):
                block = asked[start : start + _ENCODED_AT_ONCE]
                begin = time.perf_counter()
                vectors = self._student.encode_queries([query.text for query in block]).vectors
                anchors = self._anchors(vectors)
                seconds = (time.perf_counter() - begin) / len(block)
                for query, vector, anchor in zip(block, vectors, anchors, strict=True):
                    rankings.append(self._rank_one(query, vector, anchor, seconds))
                    advance(1)
        return rankings

    def _anchors(self, vectors: NDArray[np.float32]) -> Sequence[NDArray[np.float32] | None]:
        if not self._student.has_anchor:
            return [None] * len(vectors)
        return list(self._student.anchor_queries(vectors, self._task))

    def _rank_one(
        self, query: Query, vector: NDArray[np.float32], anchor: NDArray[np.float32] | None, encode_seconds: float
    ) -> Ranking:
        index = self._index
        begin = time.perf_counter()
        candidates = np.arange(len(index))
        if anchor is not None and not self._scan_all:
            # In the rows' order the vectors are read from the disk in one direction; the final order is made below.
            candidates = np.sort(index.candidates(anchor, self._num_candidates).rows)
        proposed = time.perf_counter()
        scores = self._score(vector, candidates)
        _refuse_nan(scores, query)
        places = top_rows(scores, self._top_k, lambda places: [index.id(int(row)) for row in candidates[places]])
        rows = candidates[places]
        anchor_scores = [None] * len(rows) if anchor is None else (index.vectors(rows) @ anchor).tolist()
        found = zip(index.passages(rows), scores[places].tolist(), anchor_scores, strict=True)
        passages = tuple(RankedPassage(rank, *values) for rank, values in enumerate(found, start=1))
        seconds = {
            "encode": encode_seconds,
            "candidates": proposed - begin,
            "score": time.perf_counter() - proposed,
        }
        return Ranking(query, passages, len(candidates), seconds)

    def _score(self, vector: NDArray[np.float32], candidates: NDArray[np.int64]) -> NDArray[np.float32]:
        if len(candidates) < len(self._index):
            return self._student.score(vector, self._index.vectors(candidates), self._task)
        blocks = self._index.blocks()
        return np.concatenate([self._student.score(vector, block, self._task) for block in blocks])


def _as_queries(queries: Sequence[Query] | Sequence[str]) -> list[Query]:
    if isinstance(queries, str):
        raise InputError("queries is one string; give a list of texts or queries")
    asked = [Query(str(n), query) if isinstance(query, str) else query for n, query in enumerate(queries, start=1)]
    for query in asked:
        if not query.text.strip():
            raise InputError(f"query {query.id!r} has no text; remove it or write one")
    return asked


def _refuse_nan(scores: NDArray[np.float32], query: Query) -> None:
    num_wrong = int(np.isnan(scores).sum())
    if num_wrong:
        raise ModelError(
            f"query {query.id!r}: {num_wrong} of {len(scores)} scores are NaN and cannot be ranked; check the student"
        )
