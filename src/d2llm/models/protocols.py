"""What the scores of texts need of a student; ``retrieval.protocols`` has what a search needs besides."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from d2llm.core.types import PART_KINDS, PartKind, Task
from d2llm.models.document_expansion import DocumentExpansion
from d2llm.models.plain_student import PairScorer
from d2llm.models.score_features import FeatureWeights

if TYPE_CHECKING:
    from d2llm.models.tokens import EncodedTexts, TextKind


@runtime_checkable
class TokenEncoder(Protocol):
    """Encodes queries and passages into vectors, and their tokens too, each text by itself."""

    def encode_queries(
        self,
        texts: Sequence[str],
        *,
        instruction: str | None = None,
        advance: Callable[[int], None] | None = None,
    ) -> EncodedTexts:
        """Encode queries; ``advance`` is called with the number of texts finished since the last call.

        ``instruction``: put before each query, in place of what is put there otherwise.
        """
        ...

    def encode_passages(self, texts: Sequence[str], *, advance: Callable[[int], None] | None = None) -> EncodedTexts:
        """Encode passages (title and text as one string)."""
        ...

    @property
    def token_dim(self) -> int | None:
        """Width of a token's vector; None if there are no token embeddings."""
        ...

    def encode_with_tokens(
        self,
        texts: Sequence[str],
        kind: TextKind,
        *,
        instruction: str | None = None,
        advance: Callable[[int], None] | None = None,
    ) -> EncodedTexts:
        """Encode queries or passages; the result's ``tokens`` are the vectors of their tokens.

        ``instruction``: put before each query, as in ``encode_queries``; its tokens are not among those of the result.
        """
        ...


@runtime_checkable
class PreparingScorer(Protocol):
    """Scores passages for a query, from their vectors alone."""

    @property
    def has_dot(self) -> bool:
        """Whether part of the score is an inner product, which an index can search by."""
        ...

    def query_vectors(self, query_vectors: NDArray[np.float32], task: Task) -> NDArray[np.float32]:
        """[q, dim] -> [q, dim]; inner products of the result with passage vectors are those of the score."""
        ...

    def score(
        self, query_vector: NDArray[np.float32], passage_vectors: NDArray[np.float32], task: Task
    ) -> NDArray[np.float32]:
        """[dim], [n, dim] -> final logits [n]."""
        ...

    def prepare(self, query_vector: NDArray[np.float32], task: Task) -> PairScorer | None:
        """A scorer for one query [dim]; None if the score is not an inner product plus a bounded change."""
        ...


@runtime_checkable
class ScoringStudent(TokenEncoder, PreparingScorer, Protocol):
    """An encoder that also says what counts in the score of a text."""

    @property
    def trained_tasks(self) -> Sequence[Task]:
        """The tasks of its training data; empty if it was not trained, or that is not recorded."""
        ...

    @property
    def document_expansion(self) -> DocumentExpansion | None:
        """What words an index adds to passages; None if this was not fitted."""
        ...

    def feature_weights(self, task: Task, *, stored: Collection[PartKind] = PART_KINDS) -> FeatureWeights:
        """The weights of the score features from an index in the score; empty if only the vectors count.

        ``stored``: the parts of passages whose vectors the index has.
        """
        ...

    def term_factors(self, queries: Sequence[str]) -> Sequence[Mapping[str, float]] | None:
        """How much each term of each query counts in BM25; None if all count alike."""
        ...
