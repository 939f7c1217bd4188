"""Passage vectors in a memory-mapped file: memory holds one block of texts, and an interrupted run goes on."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from d2llm.core.errors import ModelError
from d2llm.core.files import write_json
from d2llm.core.fingerprint import fingerprint_json, fingerprint_passages
from d2llm.core.progress import progress_bar
from d2llm.core.types import Passage
from d2llm.retrieval.protocols import TextEncoder

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
        show_progress: None means: if standard error is a terminal.

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
