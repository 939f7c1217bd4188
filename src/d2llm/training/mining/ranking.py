"""The lists that hard negatives come from: the top of BM25, and the nearest passages of an encoder or a student.

Passage vectors are kept in a memory-mapped file: memory holds one block of texts, and an interrupted run can continue.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from d2llm.core.errors import ModelError
from d2llm.core.files import write_json
from d2llm.core.fingerprint import fingerprint_json, fingerprint_passages
from d2llm.core.json_values import parse_json
from d2llm.core.names import counted
from d2llm.core.progress import progress_bar
from d2llm.core.types import Passage, Query, Task
from d2llm.models.protocols import SearchStudent, TextEncoder
from d2llm.models.tokens import EncodedTexts
from d2llm.ops.selection import ids_at, nearest_rows, top_rows
from d2llm.retrieval.reading import TextShard, encode_shard, encode_texts
from d2llm.retrieval.upserting import BLOCK_PASSAGES
from d2llm.runners.placement import HERE, Placement
from d2llm.runners.runner import LocalWorkers, Workers

_RESCORED = 4  # candidates by inner product per entry of a list by the full score
_MIN_RESCORED = 200

Lists = list[list[str]]
"""For each query, the ids of its passages, best first."""


class EncoderRanking:
    """A student's scores of the passages ``ids`` (in ascending order), from vectors in a memory-mapped file.

    ``placement`` says where texts are encoded; scores are computed here. See ``encode_to_file`` for ``folder``,
    ``resumable`` and errors.
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
        placement: Placement = HERE,
    ) -> None:
        begin = time.perf_counter()
        self._student = student
        self._ids = ids
        self._task: Task = task
        texts = [query.text for query in queries]
        with placement.workers(student, encode_shard) as workers:
            self._vectors = encode_to_file(student, passages, ids, folder, resumable=resumable, workers=workers)
            with progress_bar("encoding queries", len(queries)) as advance:
                encoded = encode_texts(workers, texts, "query", advance=advance)
        self._queries = finite(encoded.vectors, "query", [query.id for query in queries])
        self.encoding_seconds = time.perf_counter() - begin

    def lists(self, top_k: int) -> Lists:
        """The ``top_k`` passages of each query by the full score, ties by id.

        If the score has an inner-product part (dot), only the best four times ``top_k`` passages by that part, at
        least 200, are scored in full; otherwise all passages are.
        """
        num_rescored = max(_RESCORED * top_k, _MIN_RESCORED)
        lists: Lists = []
        with progress_bar("ranking", len(self._queries)) as advance:
            for query, rows in zip(self._queries, self._candidates(num_rescored), strict=True):
                scores = self._student.score(query, self._vectors[rows], self._task)
                best = top_rows(scores, top_k, lambda positions, rows=rows: ids_at(self._ids, rows[positions]))
                lists.append([self._ids[int(rows[index])] for index in best])
                advance(1)
        return lists

    def scores(self, query: int, passage_ids: Sequence[str]) -> NDArray[np.float32]:
        """The full scores [n] of passages for the query at position ``query``."""
        rows = [bisect_left(self._ids, passage_id) for passage_id in passage_ids]
        return self._student.score(self._queries[query], self._vectors[rows], self._task)

    def _candidates(self, top_k: int) -> list[NDArray[np.int64]]:
        if not self._student.has_dot:
            return [np.arange(len(self._ids))] * len(self._queries)
        dot_queries = self._student.query_vectors(self._queries, self._task)
        # Sorted rows, so that the vectors are read from the file sequentially.
        return [np.sort(rows) for rows in nearest_rows(dot_queries, self._vectors, top_k, self._ids)]


def encode_to_file(
    encoder: TextEncoder,
    passages: Mapping[str, Passage],
    ids: Sequence[str],
    folder: Path,
    *,
    resumable: bool = True,
    workers: Workers[TextShard, EncodedTexts] | None = None,
) -> NDArray[np.float32]:
    """Encode passages into a file in ``folder``, continuing where an earlier run stopped: [len(ids), dim], mapped.

    The file's name contains a fingerprint of encoder and texts, so that vectors of another encoder or corpus are never
    used by mistake. ``resumable=False`` skips computing it, for a folder that is deleted anyway. ``workers`` do
    ``encode_shard`` elsewhere, instead of ``encoder``.

    Raises:
        ModelError: a vector is not finite.
    """
    if resumable:
        path, state = _vector_files(encoder, passages, ids, folder)
    else:
        path, state = folder / "vectors-once.npy", folder / "vectors-once.json"
    finished = int(parse_json(state.read_text(encoding="utf-8"))["rows"]) if state.is_file() else 0
    target: Any = np.load(path, mmap_mode="r+") if finished else None
    with progress_bar("encoding passages", len(ids), done=finished) as advance:
        blocks = [ids[start : start + BLOCK_PASSAGES] for start in range(finished, len(ids), BLOCK_PASSAGES)]
        shards = (TextShard([passages[passage_id].full_text for passage_id in block], "passage") for block in blocks)
        encoders = workers or LocalWorkers(partial(encode_shard, encoder))
        start = finished
        for block, encoded in zip(blocks, encoders.map(shards, advance), strict=True):
            vectors = finite(encoded.vectors, "passage", block)
            if target is None:
                shape = (len(ids), vectors.shape[1])
                target = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
            target[start : start + len(block)] = vectors
            target.flush()
            if resumable:
                write_json(state, {"rows": start + len(block)})
            start += len(block)
    del target
    # "c" (copy on write) never changes the file, and avoids torch's warning about read-only arrays.
    return np.load(path, mmap_mode="c")


def put_vectors(
    encoder: TextEncoder,
    passages: Mapping[str, Passage],
    ids: Sequence[str],
    folder: Path,
    vectors_of: Callable[[Sequence[str]], NDArray[np.float32]],
) -> None:
    """Put vectors that ``encoder`` made earlier, such as those of an index, where ``encode_to_file`` looks for them.

    ``vectors_of`` gets ids of at most ``BLOCK_PASSAGES`` passages, and returns their vectors [n, dim].
    """
    path, state = _vector_files(encoder, passages, ids, folder)
    if state.is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    target = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(len(ids), encoder.vector_dim))
    for start in range(0, len(ids), BLOCK_PASSAGES):
        block = ids[start : start + BLOCK_PASSAGES]
        target[start : start + len(block)] = vectors_of(block)
    target.flush()
    write_json(state, {"rows": len(ids)})


def _vector_files(
    encoder: TextEncoder, passages: Mapping[str, Passage], ids: Sequence[str], folder: Path
) -> tuple[Path, Path]:
    """Where the passages' vectors are, and how many of them."""
    texts = (passages[passage_id] for passage_id in ids)
    key = fingerprint_json([encoder.fingerprint, fingerprint_passages(texts)])
    return folder / f"vectors-{key}.npy", folder / f"vectors-{key}.json"


def finite(vectors: NDArray[np.float32], kind: str, ids: Sequence[str]) -> NDArray[np.float32]:
    """The vectors [n, dim]; ``ModelError`` with the id of the first that is not finite."""
    not_finite = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if len(not_finite):
        bad, first = counted(len(not_finite), f"{kind} vector"), ids[not_finite[0]]
        raise ModelError(f"{bad} not finite, the first is that of '{first}'; check the encoder")
    return vectors
