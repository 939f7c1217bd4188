"""Protocols of students. ``Student`` implements them; so can any other class with these methods.

The protocol of teachers is ``models.teachers.judge.Judge``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from d2llm.core.types import PART_KINDS, MissingShard, PartKind, Task, WholeText, default_task
from d2llm.models.document_expansion import DocumentExpansion
from d2llm.models.evidence import EvidenceWeights
from d2llm.models.quality import PassageQuality
from d2llm.store.sharded_view import ReadableView

if TYPE_CHECKING:
    from d2llm.models.backbone import EncodedTexts, TextKind
    from d2llm.models.late_chunking import EncodedChunks
    from d2llm.store.sharded_view import ShardView
    from d2llm.store.view import CandidateRows


_log = logging.getLogger(__name__)


class SearchView(ReadableView, Protocol):
    """One version of an index, sharded (``ShardedView``) or not (``PassageView``), as searches and readers use it.

    Rows are those of the index, or of all its shards (``joint_rows``).
    """

    @property
    def shards(self) -> Sequence[ShardView]:
        """The parts that are searched one by one."""
        ...

    @property
    def missing(self) -> Sequence[MissingShard]:
        """Shards that could not be opened, and are not searched."""
        ...

    @property
    def num_shards(self) -> int | None:
        """Number of shards, missing ones included; None if the index is not sharded."""
        ...

    def check_student(self, fingerprint: str) -> None:
        """Raise an ``IndexMismatchError`` unless the student with this fingerprint made the vectors."""
        ...

    def rows(self, ids: Sequence[str]) -> NDArray[np.int64]:
        """The rows of the passages with these ids, in their order."""
        ...

    def match(self, text: str, top_k: int, filter: str | None = None) -> CandidateRows:  # noqa: A002
        """The best passages of a query text by BM25, best first, ties by id."""
        ...


class Describable(Protocol):
    """A configuration that can be serialized."""

    def model_dump(self, *, mode: str) -> dict[str, Any]:
        """The configuration; ``mode="json"`` gives plain JSON values."""
        ...


class TextEncoder(Protocol):
    """Encodes queries and passages into vectors, each text by itself."""

    @property
    def fingerprint(self) -> str:
        """Hash that identifies the encoder."""
        ...

    @property
    def config(self) -> Describable:
        """The encoder's configuration."""
        ...

    @property
    def vector_dim(self) -> int:
        """Width of a text's vector."""
        ...

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


class VectorStudent(Protocol):
    """Scores passages for a query, from their vectors alone."""

    @property
    def fingerprint(self) -> str:
        """Hash that identifies the student."""
        ...

    @property
    def has_anchor(self) -> bool:
        """Whether part of the score is an inner product, which an index can search by."""
        ...

    def anchor_queries(self, query_vectors: NDArray[np.float32], task: Task) -> NDArray[np.float32]:
        """[q, dim] -> [q, dim]; inner products of the result with passage vectors are the anchor logits."""
        ...

    def score(
        self, query_vector: NDArray[np.float32], passage_vectors: NDArray[np.float32], task: Task
    ) -> NDArray[np.float32]:
        """[dim], [n, dim] -> final logits [n]."""
        ...


class SearchStudent(TextEncoder, VectorStudent, Protocol):
    """An encoder that also scores passages for a query."""


@runtime_checkable
class ChunkStudent(Protocol):
    """A ``SearchStudent`` that can encode parts of a text in the context of the rest (``Student`` can)."""

    def encode_chunks(
        self, texts: Iterable[tuple[WholeText, Sequence[tuple[int, int]]]], *, with_tokens: bool = False
    ) -> EncodedChunks:
        """Encode parts of texts; each part is a pair of character offsets (start, end).

        ``with_tokens``: also give the vectors of their tokens; requested only of a ``TokenStudent`` that has some.
        """
        ...


class PairScorer(Protocol):
    """Scores passages for one prepared query: anchor + reach * r_p * change."""

    @property
    def anchor_query(self) -> NDArray[np.float32] | None:
        """[dim]; its inner product with a passage's vector is the anchor. None if the score has no anchor."""
        ...

    @property
    def reach(self) -> float:
        """The query's factor R_q in a pair's bound, at least 0; 0 if the anchor is the whole score."""
        ...

    def __call__(self, passages: NDArray[np.float32]) -> NDArray[np.float32]:
        """[n, dim] -> final logits [n]."""
        ...

    def change(self, passages: NDArray[np.float32]) -> NDArray[np.float32]:
        """[n, dim] -> the interaction as a share of its reach, [n] in [-1, 1]."""
        ...


@runtime_checkable
class BoundedStudent(Protocol):
    """A ``VectorStudent`` whose score is an inner product plus a bounded change (``Student`` is one)."""

    def prepare(self, query_vector: NDArray[np.float32], task: Task) -> PairScorer:
        """A scorer for one query [dim]."""
        ...

    def passage_reach(self, passage_vectors: NDArray[np.float32]) -> NDArray[np.float32]:
        """[n, dim] -> r_p [n] in [0, 1], the passages' factor in a pair's bound."""
        ...


@runtime_checkable
class EvidenceStudent(Protocol):
    """A ``SearchStudent`` whose score can include evidence from the index (``Student`` is one)."""

    def evidence_weights(self, task: Task, *, stored: Collection[PartKind] = PART_KINDS) -> EvidenceWeights:
        """The weights of the evidence; empty if only the vectors count.

        ``stored``: the parts of passages whose vectors the index has.
        """
        ...


@runtime_checkable
class TokenStudent(Protocol):
    """A ``SearchStudent`` that can also give a vector for each token of a text (``Student``, if they were fitted)."""

    @property
    def token_dim(self) -> int | None:
        """Width of a token's vector; None if this student has none."""
        ...

    @property
    def token_fingerprint(self) -> str | None:
        """Hash of what makes the token embeddings; None if this student has none."""
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
class QualityStudent(Protocol):
    """A ``SearchStudent`` that may say which passages answer queries at all (``Student``, if it was fitted)."""

    @property
    def quality(self) -> PassageQuality | None:
        """The quality of passages; None if it was not fitted."""
        ...


@runtime_checkable
class ExpandingStudent(Protocol):
    """A ``SearchStudent`` that may know words that a passage lacks (``Student``, if they were fitted)."""

    @property
    def document_expansion(self) -> DocumentExpansion | None:
        """What words an index adds to passages; None if this was not fitted."""
        ...


@runtime_checkable
class TermStudent(Protocol):
    """A ``SearchStudent`` that may say how much each word of a query counts in BM25 (``Student``, if it was fitted)."""

    def term_factors(self, queries: Sequence[str]) -> Sequence[Mapping[str, float]] | None:
        """A factor for each term of each query; None if this was not fitted."""
        ...


@runtime_checkable
class TaskStudent(Protocol):
    """A ``VectorStudent`` that knows what it was trained for (``Student`` does)."""

    @property
    def trained_tasks(self) -> Sequence[Task]:
        """The tasks of its training data; empty if it was not trained, or that is not recorded."""
        ...


def task_for(student: object, task: Task | None = None) -> Task:
    """The task to use a student for: the given one, else the only one that it was trained for, else asymmetric.

    A given task that its training has not touched is a warning in the log.
    """
    trained = student.trained_tasks if isinstance(student, TaskStudent) else ()
    if task is None:
        return default_task(trained)
    if trained and task not in trained:
        _log.warning(
            "the student was trained for %s search and is used for %s search, which its training has not touched; "
            "leave the task (--task) out to use it for what it was trained for, or take another student",
            trained[0],
            task,
        )
    return task


def expansion_of(student: object) -> DocumentExpansion | None:
    """What words an index adds to passages, by a student that knows some."""
    return student.document_expansion if isinstance(student, ExpandingStudent) else None


def expansion_fingerprint(student: object) -> str | None:
    """Hash of what adds words to passages; None if the student knows none."""
    expansion = expansion_of(student)
    return None if expansion is None else expansion.fingerprint


def term_factors(student: object, queries: Sequence[str]) -> Sequence[Mapping[str, float] | None]:
    """How much each word of each query counts in BM25, by a student that says so; None for words that count alike."""
    factors = student.term_factors(queries) if isinstance(student, TermStudent) else None
    return [None] * len(queries) if factors is None else factors
