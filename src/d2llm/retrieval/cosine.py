"""Students without the interaction, searched in the same way: the baselines that the IEM has to beat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from d2llm.core.progress import Advance
from d2llm.core.types import Task
from d2llm.models.protocols import PlainStudent, SearchStudent, TextEncoder, VectorStudent
from d2llm.models.tokens import EncodedTexts, TextKind


class ForwardingEncoder(PlainStudent):
    """An encoder that passes everything on to another. Subclasses override parts of it."""

    def __init__(self, encoder: TextEncoder) -> None:
        self._encoder = encoder

    @property
    def fingerprint(self) -> str:
        """The encoder's fingerprint, so that both can use the same index."""
        return self._encoder.fingerprint

    @property
    def config(self) -> Any:
        return self._encoder.config

    @property
    def vector_dim(self) -> int:
        return self._encoder.vector_dim

    def encode_queries(
        self, texts: Sequence[str], *, instruction: str | None = None, advance: Advance | None = None
    ) -> EncodedTexts:
        return self._encoder.encode_queries(texts, instruction=instruction, advance=advance)

    def encode_passages(self, texts: Sequence[str], *, advance: Advance | None = None) -> EncodedTexts:
        return self._encoder.encode_passages(texts, advance=advance)


class ForwardingStudent(ForwardingEncoder):
    """A student that passes everything on to another. Subclasses override parts of it."""

    def __init__(self, student: SearchStudent) -> None:
        super().__init__(student)
        self._student = student
        self.token_dim, self.token_fingerprint = student.token_dim, student.token_fingerprint
        self.document_expansion = student.document_expansion

    @property
    def has_dot(self) -> bool:
        return self._student.has_dot

    def query_vectors(self, query_vectors: NDArray[np.float32], task: Task) -> NDArray[np.float32]:
        return self._student.query_vectors(query_vectors, task)

    def score(
        self, query_vector: NDArray[np.float32], passage_vectors: NDArray[np.float32], task: Task
    ) -> NDArray[np.float32]:
        return self._student.score(query_vector, passage_vectors, task)

    def encode_with_tokens(
        self, texts: Sequence[str], kind: TextKind, *, instruction: str | None = None, advance: Advance | None = None
    ) -> EncodedTexts:
        return self._student.encode_with_tokens(texts, kind, instruction=instruction, advance=advance)

    def term_factors(self, queries: Sequence[str]) -> Sequence[Mapping[str, float]] | None:
        return self._student.term_factors(queries)


class _InnerProduct(PlainStudent):
    """Scores by the inner product of a passage's vector with the query's vector."""

    @property
    def has_dot(self) -> bool:
        return True

    def query_vectors(self, query_vectors: NDArray[np.float32], task: Task) -> NDArray[np.float32]:
        raise NotImplementedError

    def score(
        self, query_vector: NDArray[np.float32], passage_vectors: NDArray[np.float32], task: Task
    ) -> NDArray[np.float32]:
        return passage_vectors @ self.query_vectors(query_vector[None], task)[0]


class CosineStudent(_InnerProduct, ForwardingEncoder):
    """An encoder whose score is the cosine of its vectors."""

    @property
    def fingerprint(self) -> str:
        """The encoder's fingerprint with a suffix, because the stored vectors have length one."""
        return f"{self._encoder.fingerprint}-cosine"

    def encode_queries(
        self, texts: Sequence[str], *, instruction: str | None = None, advance: Advance | None = None
    ) -> EncodedTexts:
        """Query vectors of length one."""
        return _unit(super().encode_queries(texts, instruction=instruction, advance=advance))

    def encode_passages(self, texts: Sequence[str], *, advance: Advance | None = None) -> EncodedTexts:
        """Passage vectors of length one."""
        return _unit(super().encode_passages(texts, advance=advance))

    def query_vectors(self, query_vectors: NDArray[np.float32], task: Task) -> NDArray[np.float32]:
        return query_vectors


class DotScorer(_InnerProduct):
    """A scorer without the rest of its score: by the inner-product part alone."""

    def __init__(self, scorer: VectorStudent) -> None:
        self._scorer = scorer

    @property
    def fingerprint(self) -> str:
        """The scorer's fingerprint: both can use the same index."""
        return self._scorer.fingerprint

    def query_vectors(self, query_vectors: NDArray[np.float32], task: Task) -> NDArray[np.float32]:
        return self._scorer.query_vectors(query_vectors, task)


class DotStudent(DotScorer, ForwardingStudent):
    """A D2LLM student that scores by the inner-product part alone."""

    def __init__(self, student: SearchStudent) -> None:
        DotScorer.__init__(self, student)
        ForwardingStudent.__init__(self, student)


def _unit(encoded: EncodedTexts) -> EncodedTexts:
    lengths = np.linalg.norm(encoded.vectors, axis=1, keepdims=True)
    # A zero vector stays zero: its cosine with anything is 0.
    vectors = np.divide(encoded.vectors, np.where(lengths > 0, lengths, 1), dtype=np.float32)
    return EncodedTexts(vectors, tuple(encoded.truncated), encoded.num_tokens)
