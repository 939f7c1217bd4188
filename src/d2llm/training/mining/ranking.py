"""The lists that hard negatives come from: BM25, and what an encoder or a student finds nearest.

Vectors of passages lie in a memory-mapped file: memory holds one block of texts, and an interrupted run goes on.
"""

from __future__ import annotations

import json
import time
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from d2llm.core.errors import ModelError
from d2llm.core.files import write_json
from d2llm.core.fingerprint import fingerprint_json, fingerprint_passages
from d2llm.core.progress import progress_bar
from d2llm.core.types import Passage, Query, Task
from d2llm.ops.selection import ids_at, top_rows
from d2llm.retrieval.protocols import SearchStudent, TextEncoder
from d2llm.store.bm25 import WordIndex, rank_passages

_BLOCK_NUMBERS = 1 << 23  # inner products held at a time: 32 MB of float32
_RESCORED = 4  # candidates by inner product for each place of a list by the full score
_MIN_RESCORED = 200

Lists = list[list[str]]
"""For each query the ids of its passages, best first."""


def bm25_lists(
    passages: Mapping[str, Passage],
    ids: Sequence[str],
    queries: Sequence[Query],
    top_k: int,
    show: bool | None,
    *,
    title: str = "BM25",
) -> Lists:
    """The best of BM25; passages that share no term with a query are left out. The index is dropped at the end.

    ``title`` is that of the progress bar, which counts passages and queries.
    """
    lists: Lists = []
    with progress_bar(title, len(ids) + len(queries), show=show) as advance:
        texts = (passage.full_text for passage in PassageSequence(passages, ids))
        index = WordIndex.from_texts(texts, advance=advance)
        for candidates in rank_passages(index, ids, (query.text for query in queries), top_k):
            lists.append([candidate.passage_id for candidate in candidates])
            advance(1)
    return lists


class EncoderRanking:
    """A student's scores of a corpus, from vectors in a memory-mapped file.

    Args:
        student: a student, or ``CosineStudent(encoder)`` for the cosine of an encoder.
        passages: by id.
        ids: those to rank, in ascending order.
        queries: those that rank.
        task: which branch of the student's interaction.
        folder: where the file of vectors goes.
        resumable: see ``encode_to_file``.
        show_progress: None shows progress if standard error is a terminal.

    Raises:
        ModelError: a vector is not finite.
    """

    def __init__(
        self,
        student: SearchStudent,
        passages: Mapping[str, Passage],
        ids: Sequence[str],
        queries: Sequence[Query],
        *,
        task: Task,
        folder: Path,
        resumable: bool,
        show_progress: bool | None,
    ) -> None:
        begin = time.perf_counter()
        self._student = student
        self._ids = ids
        self._task: Task = task
        self._show = show_progress
        self._vectors = encode_to_file(student, passages, ids, folder, resumable=resumable, show_progress=show_progress)
        with progress_bar("encoding queries", len(queries), show=show_progress) as advance:
            encoded = student.encode_queries([query.text for query in queries], advance=advance)
        self._queries = finite(encoded.vectors, "query", [query.id for query in queries])
        self.encoding_seconds = time.perf_counter() - begin

    def lists(self, top_k: int) -> Lists:
        """The ``top_k`` passages of each query by the full score, ties by id.

        With an inner-product part (anchor) only the best by that are scored in full, four times ``top_k``, at
        least 200; without one, of every passage.
        """
        num_rescored = max(_RESCORED * top_k, _MIN_RESCORED)
        lists: Lists = []
        with progress_bar("ranking", len(self._queries), show=self._show) as advance:
            for query, rows in zip(self._queries, self._candidates(num_rescored), strict=True):
                scores = self._student.score(query, self._vectors[rows], self._task)
                lists.append(self._best_ids(rows, scores, top_k))
                advance(1)
        return lists

    def scores(self, query: int, passage_ids: Sequence[str]) -> NDArray[np.float32]:
        """The full score [n] of passages for the query at this place."""
        rows = [bisect_left(self._ids, passage_id) for passage_id in passage_ids]
        return self._student.score(self._queries[query], self._vectors[rows], self._task)

    def _best_ids(self, rows: NDArray[np.int64], scores: NDArray[np.float32], top_k: int) -> list[str]:
        places = top_rows(scores, top_k, lambda places: ids_at(self._ids, rows[places]))
        return [self._ids[int(rows[place])] for place in places]

    def _candidates(self, top_k: int) -> list[NDArray[np.int64]]:
        if not self._student.has_anchor:
            return [np.arange(len(self._ids))] * len(self._queries)
        anchors = self._student.anchor_queries(self._queries, self._task)
        # In the rows' order the vectors are read from the file in one direction.
        return [np.sort(rows) for rows in nearest_rows(anchors, self._vectors, self._ids, top_k)]


def nearest_rows(
    queries: NDArray[np.float32],
    passages: NDArray[np.float32],
    ids: Sequence[str],
    top_k: int,
    *,
    block_numbers: int = _BLOCK_NUMBERS,
) -> list[NDArray[np.int64]]:
    """Passages with the largest inner products, best first, equal ones by id; exact, in blocks of queries.

    Args:
        queries: [q, d].
        passages: [n, d].
        ids: of the n passages.
        top_k: how many per query; all n when there are fewer.
        block_numbers: inner products held at a time; at least one query's n are.

    Returns:
        q arrays of min(top_k, n) row numbers.
    """
    num_queries = max(1, block_numbers // max(1, len(passages)))
    rows: list[NDArray[np.int64]] = []
    for start in range(0, len(queries), num_queries):
        scores = queries[start : start + num_queries] @ passages.T
        rows += [top_rows(of_query, top_k, partial(ids_at, ids)) for of_query in scores]
    return rows


BLOCK_PASSAGES = 2_048
"""Passages encoded at a time: what an interruption can cost at most."""


def encode_to_file(
    encoder: TextEncoder,
    passages: Mapping[str, Passage],
    ids: Sequence[str],
    folder: Path,
    *,
    resumable: bool = True,
    show_progress: bool | None = None,
) -> NDArray[np.float32]:
    """Encode passages into a file in ``folder``, going on where an earlier run stopped.

    Args:
        encoder: gives the vectors.
        passages: by id.
        ids: which of them, in the rows' order.
        folder: an existing one. The file's name holds a fingerprint of encoder and texts, so that vectors of another
            encoder or corpus are never taken for these.
        resumable: False spares that fingerprint, for a folder that is deleted anyway.
        show_progress: None shows progress if standard error is a terminal.

    Returns:
        [len(ids), dim], mapped from the file.

    Raises:
        ModelError: a vector is not finite.
    """
    texts = (passages[passage_id] for passage_id in ids)
    key = fingerprint_json([encoder.fingerprint, fingerprint_passages(texts)]) if resumable else "once"
    path, state = folder / f"vectors-{key}.npy", folder / f"vectors-{key}.json"
    finished = int(json.loads(state.read_text(encoding="utf-8"))["rows"]) if state.is_file() else 0
    target: Any = np.load(path, mmap_mode="r+") if finished else None
    with progress_bar("encoding passages", len(ids), show=show_progress) as advance:
        advance(finished)
        for start in range(finished, len(ids), BLOCK_PASSAGES):
            block = ids[start : start + BLOCK_PASSAGES]
            encoded = encoder.encode_passages([passages[passage_id].full_text for passage_id in block], advance=advance)
            vectors = finite(encoded.vectors, "passage", block)
            if target is None:
                shape = (len(ids), vectors.shape[1])
                target = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
            target[start : start + len(block)] = vectors
            target.flush()
            if resumable:
                write_json(state, {"rows": start + len(block)})
    del target
    # "c" (copy on write) never changes the file and spares torch's warning about arrays it must not write to.
    return np.load(path, mmap_mode="c")


def finite(vectors: NDArray[np.float32], kind: str, ids: Sequence[str]) -> NDArray[np.float32]:
    """The vectors [n, dim] themselves.

    Raises:
        ModelError: one is not finite; the first is named by its id.
    """
    wrong = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if len(wrong):
        raise ModelError(
            f"{len(wrong)} {kind} vectors are not finite, the first is that of '{ids[wrong[0]]}'; check the encoder"
        )
    return vectors


class PassageSequence(Sequence[Passage]):
    """Passages by place, fetched one by one: for readers that go through them once and must not hold them all."""

    def __init__(self, passages: Mapping[str, Passage], ids: Sequence[str]) -> None:
        self._passages = passages
        self._ids = ids

    def __len__(self) -> int:
        return len(self._ids)

    @overload
    def __getitem__(self, place: int) -> Passage: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[Passage]: ...
    def __getitem__(self, place: int | slice) -> Passage | Sequence[Passage]:
        if isinstance(place, slice):
            return PassageSequence(self._passages, self._ids[place])
        return self._passages[self._ids[place]]

    def __iter__(self) -> Iterator[Passage]:
        return (self._passages[passage_id] for passage_id in self._ids)
