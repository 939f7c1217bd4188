"""The second stage of a search: a reranker scores the candidates of a query again. Its kinds are in ``methods``."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field

from d2llm.core.errors import D2LLMError, InputError, ModelError
from d2llm.core.registry import Registry, modules_in
from d2llm.core.types import DEFAULT_RERANKED_PASSAGES, Task
from d2llm.models.protocols import SearchStudent
from d2llm.models.teachers.pair_teacher import PairTeacher, load_teacher
from d2llm.ops.rereading import StudentError
from d2llm.recipe.recipe import named_section, named_teacher
from d2llm.recipe.sections import SectionOfKind
from d2llm.retrieval.segments import IndexView

_MARGIN = 1.0  # between the passages that were read and the others, so that none of them tie


@dataclass(frozen=True, slots=True)
class Candidates:
    """A query's candidates, as a reranker gets them; it names them by their places.

    Attributes:
        scores: [n] the student's scores.
        best_first: [n] the places, best first, ties by passage id.
        texts: returns the full texts of the passages at some places; called only for passages to be read.
        vectors: returns the vectors [m, dim] of the passages at some places.
        task: the task of the search.
        top_k: how many places of the ranking matter.
    """

    scores: NDArray[np.float32]
    best_first: NDArray[np.int64]
    texts: Callable[[NDArray[np.int64]], Sequence[str]]
    vectors: Callable[[NDArray[np.int64]], NDArray[np.float32]]
    task: Task
    top_k: int

    def with_scores(self, read: NDArray[np.int64], scores: ArrayLike) -> NDArray[np.float64]:
        """[n]: new scores [m] of the places ``read`` [m]; the others follow below them, in the student's order."""
        result = self.scores.astype(np.float64)
        result[read] = scores
        others = self.best_first[~np.isin(self.best_first, read)]
        if len(read) and len(others):
            result[others] -= max(0.0, float(result[others[0]] - result[read].min()) + _MARGIN)
        return result


@dataclass(frozen=True, slots=True)
class Reranked:
    """What a reranker made of a query's candidates.

    Attributes:
        scores: [n] the numbers by which all candidates are ranked.
        read: [m] places of the candidates that it read, in the order of reading.
        log_odds: [m] a teacher's log-odds of those; None if no teacher read them.
        unsure: places of the candidates that the student was unsure of, before anything was read.
        num_truncated: number of candidates that were read only in part.
        out_of_time: whether reading stopped because its time ran out.
        seconds: how long it took; set by the search.
    """

    scores: NDArray[np.float64]
    read: NDArray[np.int64]
    log_odds: NDArray[np.float64] | None = None
    unsure: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    num_truncated: int = 0
    out_of_time: bool = False
    seconds: float = 0.0


class Reranker(SectionOfKind):
    """The settings of a reranker; ``open`` loads it.

    Example::

        class LongestFirst(Reranker, kind="longest"):
            \"\"\"Longer passages first.\"\"\"

            num_passages: int = 20

            def open(self, *, device=None, dtype=None):
                return OpenLongestFirst(self)

        class OpenLongestFirst(OpenReranker):
            def rerank(self, query, candidates):
                read = candidates.best_first[: self.settings.num_passages]
                return candidates.with_scores(read, [len(text) for text in candidates.texts(read)])

        index.search("how do plants breathe", rerank="longest")
    """

    kinds = Registry["Reranker"]("reranker", modules_in("methods/rerankers"), "d2llm.rerankers")
    gives_log_odds: ClassVar[bool] = False
    """Whether the scores are log-odds, which can be summed over the passages of a document."""

    score_name: ClassVar[str] = "score"
    """What the search page calls its scores."""

    def open(self, *, device: str | None = None, dtype: str | None = None) -> OpenReranker:
        """Load what it needs; a kind defines it."""
        raise NotImplementedError


class TeacherReranker(Reranker):
    """A reranker whose passages a teacher reads: one of its own, or a server's."""

    uses_error: ClassVar[bool] = False
    """Whether it needs the student's error against the teacher (``retrieval.calibrate``)."""

    model: str | None = None
    """The teacher: MODEL, KIND:MODEL or a TOML file."""
    prompt: str | None = None
    """Prompt of an untuned teacher: a name or a TOML file."""
    num_passages: int | None = Field(default=DEFAULT_RERANKED_PASSAGES, ge=0)
    """Maximum number of passages that the teacher reads."""  # of a query; None: no limit
    max_ms: float | None = Field(default=None, ge=0)
    """Time limit of the teacher, in milliseconds."""  # for a query
    batch_passages: int = Field(default=8, ge=1)
    """Passages read in one call; the time is checked between calls."""

    def open(self, *, device: str | None = None, dtype: str | None = None) -> OpenReranker:
        """Load its teacher, and give it to it."""
        return self.with_teacher(self.load_teacher(device=device, dtype=dtype))

    def load_teacher(self, *, device: str | None = None, dtype: str | None = None) -> PairTeacher:
        """Load its teacher.

        Raises:
            InputError: no teacher is named.
        """
        if self.model is None:
            raise InputError(f"the reranker '{self.kind}' needs a teacher: name one as {self.kind}:MODEL")
        return load_teacher(named_teacher(self.model, prompt=self.prompt), device=device, dtype=dtype)

    def with_teacher(self, teacher: PairTeacher, error: StudentError | None = None) -> OpenReranker:
        """The reranker with a loaded teacher; a kind defines it.

        ``error``: the student's error against it; by default the one that is stored with the index.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class OpenReranker(ABC):
    """A reranker with its models."""

    settings: Reranker

    def for_index(self, index: IndexView, student: SearchStudent, task: Task) -> OpenReranker:
        """The reranker for searches of an index; raises a ``D2LLMError`` if it cannot rerank what the student finds."""
        del index, student, task
        return self

    @abstractmethod
    def rerank(self, query: str, candidates: Candidates) -> Reranked | NDArray[np.floating[Any]]:
        """Scores [n] of all candidates of a query, or these and what else is to be reported."""


RerankerLike: TypeAlias = OpenReranker | Reranker | str | Path
"""An open reranker, its settings, or a name: KIND, KIND:MODEL, or a TOML file."""


def named_reranker(text: str, **changes: Any) -> Reranker:
    """The settings that a text names: ``KIND``, ``KIND:MODEL``, or a TOML file; ``changes`` override single ones.

    Raises:
        RecipeError: there is no such kind or file, or a setting is unknown or wrong.
    """

    def named(text: str) -> Reranker:
        kind, _, model = text.partition(":")
        return Reranker.model_validate({"kind": kind, **({"model": model} if model else {}), **changes})

    return named_section(text, "reranker", Reranker, named, **changes)


def open_reranker(
    reranker: RerankerLike, *, teacher: PairTeacher | None = None, device: str | None = None, dtype: str | None = None
) -> OpenReranker:
    """Load a reranker, for one search or for many; ``teacher`` is that of one that needs a teacher and names none.

    Raises:
        RecipeError: as ``named_reranker``.
        InputError: it lacks a teacher.
    """
    if isinstance(reranker, OpenReranker):
        return reranker
    settings = reranker if isinstance(reranker, Reranker) else named_reranker(str(reranker))
    if isinstance(settings, TeacherReranker) and settings.model is None and teacher is not None:
        return settings.with_teacher(teacher)
    return settings.open(device=device, dtype=dtype)


def rerank_candidates(reranker: OpenReranker, query: str, candidates: Candidates) -> Reranked:
    """What a reranker makes of the candidates of a query.

    Raises:
        ModelError: it failed, did not score every candidate, or not by a finite number.
    """
    begin = time.perf_counter()
    kind, expected = reranker.settings.kind, len(candidates.scores)
    try:
        answer: Any = reranker.rerank(query, candidates)
    except D2LLMError:
        raise
    except Exception as error:
        raise ModelError(f"the reranker '{kind}' failed ({type(error).__name__}: {error}) on {query!r}") from error
    if not isinstance(answer, Reranked):
        answer = Reranked(answer, candidates.best_first)
    try:
        scores = np.asarray(answer.scores, np.float64)
    except (TypeError, ValueError) as error:
        raise ModelError(f"the reranker '{kind}' gave scores that are not numbers ({error})") from error
    if scores.shape != (expected,):
        raise ModelError(
            f"the reranker '{kind}' gave scores of shape {scores.shape} for {expected} candidates of the query "
            f"{query!r}; it must score each of them, also those that it did not read (Candidates.with_scores)"
        )
    if num_wrong := int((~np.isfinite(scores)).sum()):
        raise ModelError(
            f"the reranker '{kind}' gave {num_wrong} of {expected} scores of the query {query!r} that are not finite "
            "numbers and cannot be ranked"
        )
    return replace(answer, scores=scores, seconds=time.perf_counter() - begin)
