"""Encoding: passages for an index, each by itself or as a part of its document; and texts by workers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from d2llm.core.errors import InputError
from d2llm.core.progress import Advance, ignore, progress_bar
from d2llm.core.types import LateChunk, PartKind, Passage, Task, WholeText
from d2llm.models.protocols import SearchStudent, TextEncoder
from d2llm.models.row_features import score_by_query
from d2llm.models.text_scores import window_texts
from d2llm.models.tokens import EncodedTexts, TextKind, TokenVectors
from d2llm.recipe import StudentConfig
from d2llm.retrieval.cosine import CosineStudent
from d2llm.runners.placement import HERE, Load, Placement
from d2llm.runners.runner import Workers
from d2llm.store.part_vectors import EncodedParts

if TYPE_CHECKING:
    from d2llm.models.student import Student


_WINDOWS_AT_ONCE = 128  # passages whose windows are encoded together


@dataclass(frozen=True, slots=True)
class EncodedPassages:
    """Vectors [n, dim] of passages, places of truncated ones, and numbers of tokens and windows read.

    ``parts`` are the vectors of the passages' windows and tokens, and ``added`` the words that each of them lacks, if
    they were requested.
    """

    vectors: NDArray[np.float32]
    truncated: tuple[int, ...] = ()
    num_tokens: int = 0
    num_windows: int = 0
    parts: Mapping[PartKind, EncodedParts] = field(default_factory=dict[PartKind, EncodedParts])
    added: Sequence[Mapping[str, float]] | None = None


def read_passages(
    student: SearchStudent,
    passages: Sequence[Passage],
    advance: Advance | None = None,
    *,
    parts: Collection[PartKind] = (),
    expand: bool = False,
) -> EncodedPassages:
    """Encode passages, and the ``parts`` of them that are named.

    All late chunks of a document, wherever they are in the list, share one encoding of it. ``advance`` is called with
    the number of passages finished since the last call. With ``expand``, the result has the words that they lack.

    Raises:
        InputError: there are late chunks, but the student cannot encode them; or token embeddings or words that
            passages lack are wanted, but the student has none.
    """
    with_windows = "window" in parts
    read = _read_texts(student, passages, None if with_windows else advance, with_tokens="token" in parts)
    if expand:
        if (expansion := student.document_expansion) is None:
            raise InputError(f"this {type(student).__name__} knows no words that passages lack; use one that does")
        read = replace(read, added=expansion.words(read.vectors, [passage.full_text for passage in passages]))
    if not with_windows:
        return read
    return replace(read, parts={**read.parts, "window": _read_windows(student, passages, advance)})


def _read_texts(
    student: SearchStudent, passages: Sequence[Passage], advance: Advance | None, *, with_tokens: bool
) -> EncodedPassages:
    """The vectors of passages and, on request, of their tokens.

    Raises:
        InputError: there are late chunks, but the student cannot encode them; or token embeddings are wanted, but the
            student has none.
    """
    tokens: list[NDArray[np.float32]] = [np.zeros((0, 0), np.float32)] * len(passages)
    vectors = np.zeros((len(passages), student.vector_dim), np.float32)
    truncated: list[int] = []
    num_tokens = num_windows = 0
    alone = [index for index, passage in enumerate(passages) if not isinstance(passage, LateChunk)]
    if alone:
        texts = [passages[index].full_text for index in alone]
        if with_tokens:
            encoded = student.encode_with_tokens(texts, "passage", advance=advance)
            assert encoded.tokens is not None
            for index, embeddings in zip(alone, encoded.tokens.split(), strict=True):
                tokens[index] = embeddings
        else:
            encoded = student.encode_passages(texts, advance=advance)
        vectors[alone] = encoded.vectors
        truncated += [alone[index] for index in encoded.truncated]
        num_tokens += encoded.num_tokens
    chunks: dict[WholeText, list[tuple[int, LateChunk]]] = {}
    for index, passage in enumerate(passages):
        if isinstance(passage, LateChunk):
            chunks.setdefault(passage.whole, []).append((index, passage))
    if chunks:
        spans = ((whole, [(chunk.start, chunk.end) for _, chunk in members]) for whole, members in chunks.items())
        read = student.encode_chunks(spans, with_tokens=True) if with_tokens else student.encode_chunks(spans)
        positions = [index for members in chunks.values() for index, _ in members]
        vectors[positions] = read.vectors
        if read.tokens is not None:
            for index, embeddings in zip(positions, read.tokens.split(), strict=True):
                tokens[index] = embeddings
        truncated += [positions[index] for index in read.truncated]
        num_tokens += read.num_tokens
        num_windows = read.num_windows
        if advance is not None:
            advance(len(positions))
    read_parts: dict[PartKind, EncodedParts] = {}
    if with_tokens:
        read_parts["token"] = EncodedParts(*TokenVectors.join(tokens, student.token_dim or 0))
    return EncodedPassages(vectors, tuple(sorted(truncated)), num_tokens, num_windows, read_parts)


def read_tokens(student: SearchStudent, full_texts: Sequence[str], advance: Advance | None = None) -> EncodedParts:
    """The vectors of the tokens of passages; ``advance`` is called with the number of passages finished."""
    encoded = student.encode_with_tokens(full_texts, "passage", advance=advance)
    assert encoded.tokens is not None
    return EncodedParts(*encoded.tokens, num_tokens=encoded.num_tokens)


def _read_windows(student: SearchStudent, passages: Sequence[Passage], advance: Advance | None) -> EncodedParts:
    """Encode the windows of some passages at a time, to advance the progress bar, which counts passages."""
    encoded = [EncodedParts(np.zeros((0, student.vector_dim), np.float32), np.zeros(0, np.int64), 0)]
    for start in range(0, len(passages), _WINDOWS_AT_ONCE):
        block = passages[start : start + _WINDOWS_AT_ONCE]
        encoded.append(read_windows(student, [passage.full_text for passage in block]))
        if advance is not None:
            advance(len(block))
    vectors, counts, num_tokens = zip(*encoded, strict=True)
    return EncodedParts(np.concatenate(vectors), np.concatenate(counts), sum(num_tokens))


def read_windows(student: SearchStudent, full_texts: Sequence[str], advance: Advance | None = None) -> EncodedParts:
    """Encode each window of passages as a passage; a single-window passage gets none, as its own vector serves.

    ``advance`` is called with the number of windows finished since the last call.
    """
    texts, counts = window_texts(full_texts)
    if not texts:
        return EncodedParts(np.zeros((0, student.vector_dim), np.float32), counts, 0)
    encoded = student.encode_passages(texts, advance=advance)
    return EncodedParts(encoded.vectors, counts, encoded.num_tokens)


@dataclass(frozen=True, slots=True)
class EncodedPairs:
    """Pairs (query, passage) of texts, and the vectors of the distinct queries and passages, each in the order in
    which they first occur.
    """

    pairs: Sequence[tuple[str, str]]
    queries: EncodedTexts
    passages: EncodedTexts

    @property
    def num_truncated(self) -> int:
        """Number of texts longer than the limit."""
        return self.queries.num_truncated + self.passages.num_truncated

    def score(self, student: SearchStudent, task: Task) -> NDArray[np.float32]:
        """The logits [n] of a student that has encoded the texts, or has the same vectors."""
        query_texts, passage_texts = _distinct(self.pairs)
        query_vectors = dict(zip(query_texts, self.queries.vectors, strict=True))
        passage_vectors = dict(zip(passage_texts, self.passages.vectors, strict=True))
        return score_by_query(student, self.pairs, query_vectors, passage_vectors, task)


def encode_pairs(
    student: SearchStudent,
    pairs: Sequence[tuple[str, str]],
    description: str = "encoding texts",
    *,
    placement: Placement = HERE,
) -> EncodedPairs:
    """Encode the texts of (query, passage) pairs, each distinct text once.

    ``description`` is shown beside the progress bar; ``placement`` says where the texts are encoded.
    """
    query_texts, passage_texts = _distinct(pairs)
    bar = progress_bar(description, len(query_texts) + len(passage_texts))
    with bar as advance, placement.workers(student, encode_shard) as workers:
        queries = encode_texts(workers, query_texts, "query", advance=advance)
        passages = encode_texts(workers, passage_texts, "passage", advance=advance)
    return EncodedPairs(pairs, queries, passages)


def _distinct(pairs: Sequence[tuple[str, str]]) -> tuple[list[str], list[str]]:
    return list(dict.fromkeys(query for query, _ in pairs)), list(dict.fromkeys(passage for _, passage in pairs))


BLOCK_TEXTS = 2_048
"""Texts of a shard. Here too they are encoded in these blocks, because a text's last bits depend on its batch."""


@dataclass(frozen=True, slots=True)
class TextShard:
    """Queries or passages (title and text as one string) to encode in one call, ``with_tokens`` or without."""

    texts: Sequence[str]
    kind: TextKind
    with_tokens: bool = False

    def __len__(self) -> int:
        return len(self.texts)


def encode_shard(encoder: TextEncoder, shard: TextShard, advance: Advance) -> EncodedTexts:
    """Encode the texts of a shard; ``advance`` is called with the number of texts finished.

    Raises:
        InputError: token embeddings are requested of an encoder that has none.
    """
    if shard.with_tokens:
        return encoder.encode_with_tokens(shard.texts, shard.kind, advance=advance)
    encode = encoder.encode_queries if shard.kind == "query" else encoder.encode_passages
    return encode(shard.texts, advance=advance)


def encode_texts(
    workers: Workers[TextShard, EncodedTexts],
    texts: Sequence[str],
    kind: TextKind,
    *,
    with_tokens: bool = False,
    block: int = BLOCK_TEXTS,
    advance: Advance = ignore,
) -> EncodedTexts:
    """Encode texts block by block; the result is in their order.

    ``workers`` do ``encode_shard``. ``advance`` is called with the number of texts finished.
    """
    starts = range(0, max(1, len(texts)), block)
    shards = (TextShard(texts[start : start + block], kind, with_tokens=with_tokens) for start in starts)
    encoded = list(workers.map(shards, advance))
    return encoded[0] if len(encoded) == 1 else EncodedTexts.join(encoded, encoded[0].vectors.shape[1])


def encoder_loads(encoder: TextEncoder, load: Callable[[], TextEncoder]) -> dict[str, Load | None]:
    """How workers load an encoder, and its cosine, for a ``Placement``; ``load`` loads the encoder."""
    return {encoder.fingerprint: load, CosineStudent(encoder).fingerprint: _LoadCosine(load)}


def load_student(source: str | Path, **options: Any) -> Student:
    """``Student.load``, which cannot be sent to a worker as a method."""
    from d2llm.models.student import Student

    return Student.load(source, **options)


def create_student(config: StudentConfig, **options: Any) -> Student:
    """``Student.create``, which cannot be sent to a worker as a method."""
    from d2llm.models.student import Student

    return Student.create(config, **options)


@dataclass(frozen=True, slots=True)
class _LoadCosine:
    load: Callable[[], Any]

    def __call__(self) -> CosineStudent:
        return CosineStudent(self.load())
