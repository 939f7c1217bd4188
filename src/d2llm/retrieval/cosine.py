"""Students without the interaction: what the IEM has to beat, searched in just the same way."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from d2llm.core.recipe import InteractionConfig, PoolingConfig, StudentConfig
from d2llm.core.types import Task
from d2llm.models.encoded_texts import EncodedTexts
from d2llm.retrieval.protocols import Describable, EncodedBatch, SearchStudent, TextEncoder


def untuned_config(config: StudentConfig) -> StudentConfig:
    """A student's backbone as it was before training, pooled as it was pretrained to be: the baseline beside it."""
    return StudentConfig(
        backbone=config.backbone.model_copy(update={"tuning": "frozen"}),
        pooling=PoolingConfig(method="backbone"),
        interaction=InteractionConfig(head="cosine"),
    )


class CosineStudent:
    """An encoder whose score is the cosine of its vectors."""

    has_anchor = True

    def __init__(self, encoder: TextEncoder) -> None:
        self._encoder = encoder

    @property
    def fingerprint(self) -> str:
        """The encoder's, marked, because the stored vectors have length one."""
        return f"{self._encoder.fingerprint}-cosine"

    @property
    def config(self) -> Describable:
        """The encoder's."""
        return self._encoder.config

    @property
    def vector_dim(self) -> int:
        """The encoder's."""
        return self._encoder.vector_dim

    def encode_queries(self, texts: Sequence[str], *, advance: Callable[[int], None] | None = None) -> EncodedBatch:
        """Query vectors of length one."""
        return _unit(self._encoder.encode_queries(texts, advance=advance))

    def encode_passages(self, texts: Sequence[str], *, advance: Callable[[int], None] | None = None) -> EncodedBatch:
        """Passage vectors of length one."""
        return _unit(self._encoder.encode_passages(texts, advance=advance))

    def anchor_queries(
        self,
        query_vectors: NDArray[np.float32],
        task: Task,  # noqa: ARG002 - part of the protocol
    ) -> NDArray[np.float32]:
        """The vectors themselves."""
        return query_vectors

    def score(
        self,
        query_vector: NDArray[np.float32],
        passage_vectors: NDArray[np.float32],
        task: Task,  # noqa: ARG002 - part of the protocol
    ) -> NDArray[np.float32]:
        """[dim], [n, dim] -> cosines [n]; the task plays no part."""
        return passage_vectors @ query_vector


class AnchorStudent:
    """A D2LLM student whose score is its inner-product part alone. It shares the student's index."""

    has_anchor = True

    def __init__(self, student: SearchStudent) -> None:
        self._student = student

    @property
    def fingerprint(self) -> str:
        """The student's."""
        return self._student.fingerprint

    @property
    def config(self) -> Describable:
        """The student's."""
        return self._student.config

    @property
    def vector_dim(self) -> int:
        """The student's."""
        return self._student.vector_dim

    def encode_queries(self, texts: Sequence[str], *, advance: Callable[[int], None] | None = None) -> EncodedBatch:
        """The student's query vectors."""
        return self._student.encode_queries(texts, advance=advance)

    def encode_passages(self, texts: Sequence[str], *, advance: Callable[[int], None] | None = None) -> EncodedBatch:
        """The student's passage vectors."""
        return self._student.encode_passages(texts, advance=advance)

    def anchor_queries(self, query_vectors: NDArray[np.float32], task: Task) -> NDArray[np.float32]:
        """The student's anchor vectors."""
        return self._student.anchor_queries(query_vectors, task)

    def score(
        self,
        query_vector: NDArray[np.float32],
        passage_vectors: NDArray[np.float32],
        task: Task,
    ) -> NDArray[np.float32]:
        """[dim], [n, dim] -> anchor logits [n]."""
        return passage_vectors @ self._student.anchor_queries(query_vector[None], task)[0]


def _unit(encoded: EncodedBatch) -> EncodedTexts:
    lengths = np.linalg.norm(encoded.vectors, axis=1, keepdims=True)
    # A vector of zeros (no direction) stays one: its cosine with anything is 0.
    vectors = np.divide(encoded.vectors, np.where(lengths > 0, lengths, 1), dtype=np.float32)
    return EncodedTexts(vectors, tuple(encoded.truncated), encoded.num_tokens)
