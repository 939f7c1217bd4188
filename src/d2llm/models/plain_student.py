"""The least that a student can be: vectors of texts, and a score of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from d2llm.core.errors import InputError
from d2llm.core.types import PART_KINDS, PartKind, Task, WholeText
from d2llm.models.document_expansion import DocumentExpansion
from d2llm.models.learned_words import LearnedWords
from d2llm.models.quality import PassageQuality
from d2llm.models.score_features import FeatureWeights

if TYPE_CHECKING:
    from d2llm.models.late_chunking import EncodedChunks
    from d2llm.models.tokens import EncodedTexts, TextKind


@runtime_checkable
class PairScorer(Protocol):
    """Scores passages for one prepared query: dot + bound * r_p * change."""

    @property
    def dot_query(self) -> NDArray[np.float32] | None:
        """[dim]; its inner product with a passage's vector is part of the score. None if the score has no such part."""
        ...

    @property
    def bound(self) -> float:
        """The query's factor R_q in a pair's bound, at least 0; 0 if the inner product is the whole score."""
        ...

    def __call__(self, passages: NDArray[np.float32]) -> NDArray[np.float32]:
        """[n, dim] -> final logits [n]."""
        ...

    def change(self, passages: NDArray[np.float32]) -> NDArray[np.float32]:
        """[n, dim] -> the interaction as a fraction of its bound, [n] in [-1, 1]."""
        ...


def why_no_interaction(head: str, weight: float | None, task: Task) -> str | None:
    """Why an interaction adds nothing to the score of any pair in a task; None if it adds something.

    ``head`` is the kind of head (``InteractionConfig.head``), ``weight`` the interaction's weight r in the task; None
    if it has none.
    """
    if head in ("cosine", "product", "divergence"):
        return f"this student has no interaction: its head is the {head}"
    if weight is None:
        return (
            f"this student has no interaction in {task} search: on the dev sets it added nothing to the inner product, "
            "so training left it out"
        )
    if head == "dot" and not weight:
        return (
            f"the interaction's weight r is 0 in {task} search: on the dev sets it added nothing to the inner product, "
            "so training switched it off"
        )
    return None


class PlainStudent:
    """Base of a student without what ``Student`` may have beside its vectors; a subclass adds those and the score.

    Subclasses have what ``models.protocols.SearchStudent`` asks for: ``fingerprint``, ``config``, ``vector_dim``,
    ``encode_queries``, ``encode_passages``, ``has_dot``, ``query_vectors`` and ``score``.
    """

    token_dim: int | None = None
    token_fingerprint: str | None = None
    quality: PassageQuality | None = None
    document_expansion: DocumentExpansion | LearnedWords | None = None

    @property
    def trained_tasks(self) -> tuple[Task, ...]:
        """None are known."""
        return ()

    def prepare(self, query_vector: NDArray[np.float32], task: Task) -> PairScorer | None:  # noqa: ARG002
        """None: its score has no known bound."""
        return None

    def why_no_interaction(self, task: Task) -> str | None:  # noqa: ARG002
        """None: there is nothing to say about it."""
        return None

    def passage_bound(self, passage_vectors: NDArray[np.float32]) -> NDArray[np.float32]:
        """[n, dim] -> ones [n]."""
        return np.ones(len(passage_vectors), np.float32)

    def feature_weights(
        self,
        task: Task,  # noqa: ARG002
        *,
        stored: Collection[PartKind] | PartKind = PART_KINDS,  # noqa: ARG002
    ) -> FeatureWeights:
        """None: only the vectors count."""
        return FeatureWeights()

    def term_factors(self, queries: Sequence[str]) -> Sequence[Mapping[str, float]] | None:  # noqa: ARG002
        """None: all words of a query count alike."""
        return None

    def encode_with_tokens(
        self,
        texts: Sequence[str],  # noqa: ARG002
        kind: TextKind,  # noqa: ARG002
        *,
        instruction: str | None = None,  # noqa: ARG002
        advance: Callable[[int], None] | None = None,  # noqa: ARG002
    ) -> EncodedTexts:
        """Raises an ``InputError``: it has no token embeddings."""
        raise InputError(f"a {type(self).__name__} has no token embeddings; make the index without them")

    def encode_chunks(
        self,
        texts: Iterable[tuple[WholeText, Sequence[tuple[int, int]]]],  # noqa: ARG002
        *,
        with_tokens: bool = False,  # noqa: ARG002
    ) -> EncodedChunks:
        """Raises an ``InputError``: it does not read a part of a text in the context of the rest."""
        raise InputError(f"a {type(self).__name__} cannot read parts of documents; chunk early")
