"""Encoding of texts by workers, for mining and evaluation; ``encode`` and ``index`` encode passages for an index."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from d2llm.core.progress import Advance, ignore
from d2llm.models.protocols import TextEncoder
from d2llm.models.tokens import EncodedTexts, TextKind
from d2llm.recipe import StudentConfig
from d2llm.retrieval.cosine import CosineStudent
from d2llm.runners.placement import Load
from d2llm.runners.runner import Workers

if TYPE_CHECKING:
    from d2llm.models.student import Student

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
