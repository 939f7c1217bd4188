"""What a search, and the scores of texts, need of a student. ``Student`` has it all; another class may begin as a
``PlainStudent``.

The protocol of teachers is ``models.teachers.pair_teacher.PairTeacher``.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from d2llm.core.errors import InputError
from d2llm.core.inputs import check_choice
from d2llm.core.progress import Advance
from d2llm.core.types import PART_KINDS, TASKS, PartKind, Task, WholeText, default_task
from d2llm.models.document_expansion import DocumentExpansion, LearnedWords
from d2llm.models.fitted_part import PassageQuality
from d2llm.models.score_features import FeatureWeights

if TYPE_CHECKING:
    from d2llm.models.late_chunking import EncodedChunks
    from d2llm.models.tokens import EncodedTexts, TextKind


_log = logging.getLogger(__name__)


@runtime_checkable
class TextEncoder(Protocol):
    """Encodes queries and passages into vectors, and their tokens too, each text by itself."""

    @property
    def fingerprint(self) -> str:
        """Hash that identifies the encoder."""
        ...

    @property
    def config(self) -> Any:
        """The encoder's configuration; its ``model_dump(mode="json")`` gives plain JSON values."""
        ...

    @property
    def vector_dim(self) -> int:
        """Width of a text's vector."""
        ...

    @property
    def token_dim(self) -> int | None:
        """Width of a token's vector; None if there are no token embeddings."""
        ...

    @property
    def token_fingerprint(self) -> str | None:
        """Hash of what makes the token embeddings; None if there are none."""
        ...

    def encode_queries(
        self, texts: Sequence[str], *, instruction: str | None = None, advance: Advance | None = None
    ) -> EncodedTexts:
        """Encode queries; ``advance`` is called with the number of texts finished since the last call.

        ``instruction``: put before each query, in place of what is put there otherwise.
        """
        ...

    def encode_passages(self, texts: Sequence[str], *, advance: Advance | None = None) -> EncodedTexts:
        """Encode passages (title and text as one string)."""
        ...

    def encode_with_tokens(
        self, texts: Sequence[str], kind: TextKind, *, instruction: str | None = None, advance: Advance | None = None
    ) -> EncodedTexts:
        """Encode queries or passages; the result's ``tokens`` are the vectors of their tokens.

        ``instruction``: put before each query, as in ``encode_queries``; its tokens are not among those of the result.
        """
        ...


@runtime_checkable
class VectorStudent(Protocol):
    """Scores passages for a query, from their vectors alone."""

    @property
    def fingerprint(self) -> str:
        """Hash that identifies the student."""
        ...

    @property
    def trained_tasks(self) -> Sequence[Task]:
        """The tasks of its training data; empty if it was not trained, or that is not recorded."""
        ...

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

    def passage_bound(self, passage_vectors: NDArray[np.float32]) -> NDArray[np.float32]:
        """[n, dim] -> r_p [n] in [0, 1], the passages' factor in a pair's bound."""
        ...


@runtime_checkable
class SearchStudent(TextEncoder, VectorStudent, Protocol):
    """An encoder that also scores passages, and may know more about them; ``PlainStudent`` is one that does not."""

    @property
    def quality(self) -> PassageQuality | None:
        """Which passages answer queries at all; None if it was not fitted."""
        ...

    @property
    def document_expansion(self) -> DocumentExpansion | LearnedWords | None:
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

    def why_no_interaction(self, task: Task) -> str | None:
        """Why an interaction adds nothing to the score of any pair in a task; None if one does, or may."""
        ...

    def encode_chunks(
        self, texts: Iterable[tuple[WholeText, Sequence[tuple[int, int]]]], *, with_tokens: bool = False
    ) -> EncodedChunks:
        """Encode parts of texts in the context of the rest; each part is a pair of character offsets (start, end).

        ``with_tokens``: also give the vectors of their tokens.
        """
        ...


def task_for(student: VectorStudent, task: Task | None = None) -> Task:
    """The task to use a student for: the given one, else the only one that it was trained for, else asymmetric.

    A given task that its training has not touched is a warning in the log.

    Raises:
        InputError: there is no such task.
    """
    trained = student.trained_tasks
    if task is None:
        return default_task(trained)
    check_choice(task, "task", TASKS)
    if trained and task not in trained:
        _log.warning(
            "the student was trained for %s search and is used for %s search, which its training has not touched; "
            "leave the task (--task) out to use it for what it was trained for, or take another student",
            trained[0],
            task,
        )
    return task


def expansion_fingerprint(student: SearchStudent) -> str | None:
    """Hash of what adds words to passages; None if the student knows none."""
    return None if student.document_expansion is None else student.document_expansion.fingerprint


def term_factors(student: SearchStudent, queries: Sequence[str]) -> Sequence[Mapping[str, float] | None]:
    """How much each word of each query counts in BM25, by a student that says so; None for words that count alike."""
    return student.term_factors(queries) or [None] * len(queries)


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

    def prepare(self, query_vector: NDArray[np.float32], task: Task) -> PairScorer | None:
        """None: its score has no known bound."""
        return None

    def why_no_interaction(self, task: Task) -> str | None:
        """None: there is nothing to say about it."""
        return None

    def passage_bound(self, passage_vectors: NDArray[np.float32]) -> NDArray[np.float32]:
        """[n, dim] -> ones [n]."""
        return np.ones(len(passage_vectors), np.float32)

    def feature_weights(self, task: Task, *, stored: Collection[PartKind] | PartKind = PART_KINDS) -> FeatureWeights:
        """None: only the vectors count."""
        return FeatureWeights()

    def term_factors(self, queries: Sequence[str]) -> Sequence[Mapping[str, float]] | None:
        """None: all words of a query count alike."""
        return None

    def encode_with_tokens(
        self, texts: Sequence[str], kind: TextKind, *, instruction: str | None = None, advance: Advance | None = None
    ) -> EncodedTexts:
        """Raises an ``InputError``: it has no token embeddings."""
        raise InputError(f"a {type(self).__name__} has no token embeddings; make the index without them")

    def encode_chunks(
        self, texts: Iterable[tuple[WholeText, Sequence[tuple[int, int]]]], *, with_tokens: bool = False
    ) -> EncodedChunks:
        """Raises an ``InputError``: it does not read a part of a text in the context of the rest."""
        raise InputError(f"a {type(self).__name__} cannot read parts of documents; chunk early")
