"""What a search needs of a student. ``Student`` has it all; another class may begin as a
``PlainStudent``.

The protocol of teachers is ``models.teachers.pair_teacher.PairTeacher``.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from d2llm.core.types import Task, WholeText, default_task
from d2llm.models.protocols import PreparingScorer, ScoringStudent, TokenEncoder
from d2llm.models.quality import PassageQuality

if TYPE_CHECKING:
    from d2llm.models.late_chunking import EncodedChunks


_log = logging.getLogger(__name__)


class TextEncoder(TokenEncoder, Protocol):
    """Encodes queries and passages into vectors, each text by itself."""

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
    def token_fingerprint(self) -> str | None:
        """Hash of what makes the token embeddings; None if there are none."""
        ...


class VectorStudent(PreparingScorer, Protocol):
    """Scores passages for a query, from their vectors alone."""

    @property
    def fingerprint(self) -> str:
        """Hash that identifies the student."""
        ...

    def passage_bound(self, passage_vectors: NDArray[np.float32]) -> NDArray[np.float32]:
        """[n, dim] -> r_p [n] in [0, 1], the passages' factor in a pair's bound."""
        ...

    @property
    def trained_tasks(self) -> Sequence[Task]:
        """The tasks of its training data; empty if it was not trained, or that is not recorded."""
        ...


class SearchStudent(TextEncoder, VectorStudent, ScoringStudent, Protocol):
    """An encoder that also scores passages, and may know more about them; ``PlainStudent`` is one that does not."""

    @property
    def quality(self) -> PassageQuality | None:
        """Which passages answer queries at all; None if it was not fitted."""
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
    """
    trained = student.trained_tasks
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


def expansion_fingerprint(student: SearchStudent) -> str | None:
    """Hash of what adds words to passages; None if the student knows none."""
    return None if student.document_expansion is None else student.document_expansion.fingerprint


def term_factors(student: SearchStudent, queries: Sequence[str]) -> Sequence[Mapping[str, float] | None]:
    """How much each word of each query counts in BM25, by a student that says so; None for words that count alike."""
    return student.term_factors(queries) or [None] * len(queries)
