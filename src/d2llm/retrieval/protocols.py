"""What the verbs ask of a student. ``Student`` fits; so does anything else with these methods.

What they ask of a teacher is ``models.teachers.judge.Judge``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from d2llm.core.types import Task, WholeText
from d2llm.models.evidence import EvidenceWeights

if TYPE_CHECKING:
    from torch import Tensor

    from d2llm.models.backbone import EncodedTexts
    from d2llm.models.late_chunking import EncodedChunks


class Describable(Protocol):
    """A configuration that can be written down."""

    def model_dump(self, *, mode: str) -> dict[str, Any]:
        """As plain values, with ``mode="json"``."""
        ...


class TextEncoder(Protocol):
    """Turns queries and passages into vectors, each alone."""

    @property
    def fingerprint(self) -> str:
        """Tells whether two encoders are the same."""
        ...

    @property
    def config(self) -> Describable:
        """What the encoder is built of."""
        ...

    @property
    def vector_dim(self) -> int:
        """Width of a text's vector."""
        ...

    def encode_queries(self, texts: Sequence[str], *, advance: Callable[[int], None] | None = None) -> EncodedTexts:
        """Encode queries; ``advance`` is called with the number of texts finished since the last call."""
        ...

    def encode_passages(self, texts: Sequence[str], *, advance: Callable[[int], None] | None = None) -> EncodedTexts:
        """Encode passages (title and text as one string)."""
        ...


class SearchStudent(TextEncoder, Protocol):
    """An encoder that also scores a query with passages by their vectors alone."""

    @property
    def has_anchor(self) -> bool:
        """Whether part of the score is an inner product that an index can follow."""
        ...

    def anchor_queries(self, query_vectors: NDArray[np.float32], task: Task) -> NDArray[np.float32]:
        """[q, dim] -> [q, dim], whose inner products with passage vectors are the anchor logits."""
        ...

    def score(
        self, query_vector: NDArray[np.float32], passage_vectors: NDArray[np.float32], task: Task
    ) -> NDArray[np.float32]:
        """[dim], [n, dim] -> final logits [n]."""
        ...


@runtime_checkable
class ChunkStudent(Protocol):
    """A ``SearchStudent`` that can read parts of a text with the rest around them (``Student`` can)."""

    def encode_chunks(self, texts: Iterable[tuple[WholeText, Sequence[tuple[int, int]]]]) -> EncodedChunks:
        """Encode parts of texts, given by the characters where they begin and end."""
        ...


class PairScorer(Protocol):
    """One query, ready to be scored with passages: anchor + reach * r_p * change."""

    @property
    def anchor_query(self) -> NDArray[np.float32] | None:
        """[dim], whose inner product with a passage's vector is the anchor; None where the score has none."""
        ...

    @property
    def reach(self) -> float:
        """The query's part of the bound of a pair, at least 0; 0 where the anchor is the whole score."""
        ...

    def __call__(self, passages: NDArray[np.float32] | None, projections: Tensor | None = None) -> NDArray[np.float32]:
        """[n, dim] -> final logits [n].

        With ``projections`` [n, hidden] of the same passages (``ProjectingStudent``) the vectors are for the anchor
        alone, and None if there is none.
        """
        ...

    def change(self, passages: NDArray[np.float32] | None, projections: Tensor | None = None) -> NDArray[np.float32]:
        """[n, dim], or projections -> the share of its reach that the interaction uses, [n] in [-1, 1]."""
        ...


@runtime_checkable
class BoundedStudent(Protocol):
    """A ``SearchStudent`` whose score is an inner product and a bounded change (``Student`` is one)."""

    def prepare(self, query_vector: NDArray[np.float32], task: Task) -> PairScorer:
        """What scores one query [dim]."""
        ...

    def passage_reach(self, passage_vectors: NDArray[np.float32]) -> NDArray[np.float32]:
        """[n, dim] -> r_p [n] in [0, 1], the passages' part of the bound of a pair."""
        ...


@runtime_checkable
class EvidenceStudent(Protocol):
    """A ``SearchStudent`` to whose score an index can add (``Student`` is one)."""

    def evidence_weights(self, task: Task, *, windows: bool = True) -> EvidenceWeights:
        """What is added, by weight; nothing where the vectors' score is all.

        ``windows``: by an index that stores the vectors of windows.
        """
        ...


@runtime_checkable
class ProjectingStudent(Protocol):
    """A ``SearchStudent`` part of whose score can be computed from a passage alone (``Student`` is one)."""

    @property
    def fingerprint(self) -> str:
        """Tells whether two students are the same."""
        ...

    @property
    def can_project(self) -> bool:
        """Whether this student's head has such a part."""
        ...

    def project_passages(self, passage_vectors: NDArray[np.float32]) -> Tensor:
        """[n, dim] -> W_p b, bfloat16 [n, hidden]; raises InputError where the head has no such part."""
        ...
