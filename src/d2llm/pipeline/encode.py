"""The verb ``encode``: a corpus becomes a folder index."""

from __future__ import annotations

import io
import logging
import shutil
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from d2llm.core.errors import InputError
from d2llm.core.files import write_bytes
from d2llm.core.fingerprint import fingerprint_json
from d2llm.core.types import LateChunk, Passage, Task
from d2llm.data.beir import read_corpus
from d2llm.data.indexed_corpus import corpus_file
from d2llm.index.folder import FORMAT_VERSION, FolderIndex, check_passages, check_target, content_hash
from d2llm.index.vectors import VectorDtype, check_dtype, compress, expand
from d2llm.pipeline.progress import Advance, progress_bar
from d2llm.pipeline.protocols import TextEncoder

_log = logging.getLogger(__name__)
BLOCK_PASSAGES = 2_048
"""Passages between two savings: what an interruption can cost at most."""


@dataclass(frozen=True, slots=True)
class EncodeReport:
    """What ``encode`` did.

    ``num_resumed`` passages were taken over from an interrupted run; ``seconds`` and ``passages_per_second`` are of
    this run alone. Tokens are counted without padding. Bytes are those of one stored vector, and of the texts on
    average.
    """

    folder: Path
    num_passages: int
    num_resumed: int
    num_truncated: int
    num_tokens: int
    seconds: float
    passages_per_second: float
    vector_bytes_per_passage: int
    text_bytes_per_passage: float

    def to_json(self) -> dict[str, Any]:
        """The report as plain values."""
        return asdict(self) | {"folder": str(self.folder)}


@dataclass(frozen=True, slots=True)
class _Block:
    """A finished block in the work folder: stored vectors, and counts (truncated passages, tokens)."""

    vectors: NDArray[Any]
    counts: tuple[int, int]

    def save(self, path: Path) -> None:
        buffer = io.BytesIO()
        np.savez(buffer, vectors=self.vectors, counts=np.array(self.counts))
        write_bytes(path, buffer.getvalue())

    @classmethod
    def load(cls, path: Path) -> _Block:
        with np.load(path, allow_pickle=False) as arrays:
            num_truncated, num_tokens = arrays["counts"].tolist()
            return cls(arrays["vectors"], (num_truncated, num_tokens))


def encode(
    corpus: Path | Iterable[Passage],
    student: TextEncoder,
    folder: Path,
    *,
    task: Task = "asymmetric",
    dtype: VectorDtype = "bfloat16",
    student_source: str | None = None,
    overwrite: bool = False,
    show_progress: bool | None = None,
) -> EncodeReport:
    """Encode a corpus into an index at ``folder``. An interrupted run goes on where it stopped when called again.

    Args:
        corpus: a ``corpus.jsonl[.gz]`` file, a BEIR folder that holds one, or the passages themselves.
        student: makes the vectors.
        folder: where the index goes. Until it is complete, finished blocks lie in a hidden folder beside it.
        task: what a search on this index does unless told otherwise.
        dtype: how the vectors are stored.
        student_source: the folder or name that the student was loaded from, kept so that a search can find it again.
        overwrite: allow an index at ``folder`` to be replaced.
        show_progress: None means: if standard error is a terminal.

    Raises:
        InputError: no passages, late chunks, ``folder`` in the way, or a vector is not finite.
        DataFormatError: the corpus file is missing or malformed (names file and line).
        DuplicateIdError: two passages share an id.
    """
    folder = Path(folder)
    check_target(folder, overwrite=overwrite)
    check_dtype(dtype)
    passages = list(read_corpus(corpus_file(Path(corpus))).values() if isinstance(corpus, str | Path) else corpus)
    check_passages(passages, where=Path(corpus) if isinstance(corpus, str | Path) else folder)
    if any(isinstance(passage, LateChunk) for passage in passages):
        raise InputError(f"{folder}: only an index that changes reads late chunks; use Index.upsert, or chunk early")
    work = _work_folder(folder, student, passages, dtype)
    starts = range(0, len(passages), BLOCK_PASSAGES)
    finished = [start for start in starts if _block_path(work, start).is_file()]
    num_resumed = sum(len(passages[start : start + BLOCK_PASSAGES]) for start in finished)
    if num_resumed:
        _log.info("%s: going on after %d of %d passages", folder, num_resumed, len(passages))
    begin = time.perf_counter()
    with progress_bar("encoding passages", len(passages), show=show_progress) as advance:
        advance(num_resumed)
        for start in sorted(set(starts) - set(finished)):
            block = _encode_block(student, passages[start : start + BLOCK_PASSAGES], dtype, advance)
            block.save(_block_path(work, start))
    seconds = time.perf_counter() - begin
    num_truncated, num_tokens = np.sum([_Block.load(_block_path(work, start)).counts for start in starts], 0).tolist()
    index = FolderIndex.write(
        folder,
        passages,
        (expand(_Block.load(_block_path(work, start)).vectors, dtype) for start in starts),
        student_fingerprint=student.fingerprint,
        student_config=student.config.model_dump(mode="json"),
        student_source=student_source,
        task=task,
        dtype=dtype,
        num_truncated=num_truncated,
        overwrite=overwrite,
    )
    shutil.rmtree(work, ignore_errors=True)
    return EncodeReport(
        folder=folder,
        num_passages=len(passages),
        num_resumed=num_resumed,
        num_truncated=num_truncated,
        num_tokens=num_tokens,
        seconds=seconds,
        passages_per_second=(len(passages) - num_resumed) / max(seconds, 1e-9),
        vector_bytes_per_passage=index.vector_bytes_per_passage,
        text_bytes_per_passage=float(index.manifest["bytes_per_passage"]["texts"]),
    )


def _encode_block(student: TextEncoder, passages: list[Passage], dtype: VectorDtype, advance: Advance) -> _Block:
    encoded = student.encode_passages([passage.full_text for passage in passages], advance=advance)
    stored = compress(encoded.vectors, dtype, [passage.id for passage in passages])
    return _Block(stored, (encoded.num_truncated, encoded.num_tokens))


def _work_folder(folder: Path, student: TextEncoder, passages: list[Passage], dtype: VectorDtype) -> Path:
    """Another student, corpus or storage gets another folder, so blocks of different runs never mix."""
    key = fingerprint_json([FORMAT_VERSION, student.fingerprint, content_hash(passages), dtype, BLOCK_PASSAGES])
    return folder.parent / f".{folder.name}.work-{key}"


def _block_path(work: Path, start: int) -> Path:
    return work / f"{start:012d}.npz"
