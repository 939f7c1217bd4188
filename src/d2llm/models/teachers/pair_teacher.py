"""The protocol of all teachers: models that read query and passage together and return log-odds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float32
from numpy.typing import NDArray

from d2llm.core.errors import InputError, ModelError
from d2llm.core.progress import Advance
from d2llm.core.types import Task
from d2llm.models.downloads import find_saved
from d2llm.recipe import FusedTeacherConfig, GradedTeacherConfig, RecordedConfig, TeacherConfig, TeacherIdentity

RANKING_TEACHER = (
    "this teacher ranks the passages of a list, so its log-odds cannot be compared with the student's scores: it can "
    "reorder the top of a ranking (by a reranker that needs no calibration), but neither choose what to "
    "read nor score a single passage; for that, use a teacher of kind graded"
)
TextPair = tuple[str, str]
"""Query text and full passage text."""


@dataclass(frozen=True, slots=True)
class TeacherScores:
    """A teacher's answers for n pairs: log-odds of yes over no, and features of the score token if it has any."""

    log_odds: Float32[np.ndarray, " pairs"]
    features: Float32[np.ndarray, "pairs dim"] | None
    num_truncated: int
    num_tokens: int
    num_bounded: int = 0
    """Number of log-odds that are only a bound, because a remote teacher returned just one of the two probabilities."""
    num_undecided: int = 0
    """Number of pairs with log-odds 0, because a remote teacher returned neither probability, or no grade."""
    num_written_tokens: int = 0
    """Number of tokens that a remote teacher wrote, besides the ``num_tokens`` that the teacher read."""
    cost: float = 0.0
    """Price of these tokens, in the currency of the endpoint's settings; 0 without prices."""
    grades: Float32[np.ndarray, " pairs"] | None = None
    """Grades from 0 to 100 of a graded teacher, NaN where undecided."""


@dataclass(frozen=True, slots=True)
class PartialScores:
    """What a teacher had scored when an error ended its work; without an ``error``, all pairs.

    Of the ``scores``, those of other pairs mean nothing; their counts are about what was done.
    """

    scores: TeacherScores
    is_scored: Bool[np.ndarray, " pairs"]
    error: BaseException | None = None

    def require_all(self) -> TeacherScores:
        """The scores of all pairs, or the error."""
        if self.error is not None:
            raise self.error
        return self.scores


@runtime_checkable
class PairTeacher(Protocol):
    """A teacher of any kind, or another model that reads query and passage together."""

    @property
    def fingerprint(self) -> str:
        """Equal if and only if two teachers are the same."""
        ...

    def prompt_fingerprint(self, task: Task) -> str:
        """Equal if and only if two teachers ask the same question."""
        ...

    def score_pairs(
        self, pairs: Sequence[TextPair], task: Task, *, with_features: bool = False, advance: Advance | None = None
    ) -> TeacherScores:
        """Score pairs; the results are in the same order.

        Args:
            pairs: query text and full passage text.
            task: which question to ask.
            with_features: also return the features, [pairs, dim], if this kind of teacher has any.
            advance: called with the number of pairs finished.
        """
        ...


class IdentifiedTeacher:
    """A teacher that is known by the identity of its configuration."""

    _identity: TeacherIdentity

    @property
    def fingerprint(self) -> str:
        return self._identity.fingerprint

    def prompt_fingerprint(self, task: Task) -> str:
        return self._identity.prompts[task]


@runtime_checkable
class InterruptibleTeacher(PairTeacher, Protocol):
    """A teacher whose answers cost time or money: an error, or Ctrl-C, must not lose those that came before it.

    A class that inherits from it has ``score_pairs`` by its ``score_until_error``.
    """

    def score_pairs(
        self, pairs: Sequence[TextPair], task: Task, *, with_features: bool = False, advance: Advance | None = None
    ) -> TeacherScores:
        """Score pairs (``PairTeacher.score_pairs``); the first error is raised."""
        return self.score_until_error(pairs, task, with_features=with_features, advance=advance).require_all()

    def score_until_error(
        self, pairs: Sequence[TextPair], task: Task, *, with_features: bool = False, advance: Advance | None = None
    ) -> PartialScores:
        """Like ``score_pairs``; an error or an interruption after the first answer is not raised but returned."""
        ...


def score_until_error(
    teacher: PairTeacher,
    pairs: Sequence[TextPair],
    task: Task,
    *,
    with_features: bool = False,
    advance: Advance | None = None,
) -> PartialScores:
    """Score pairs (``PairTeacher.score_pairs``); what came before an error is returned with it."""
    if isinstance(teacher, InterruptibleTeacher):
        return teacher.score_until_error(pairs, task, with_features=with_features, advance=advance)
    scores = teacher.score_pairs(pairs, task, with_features=with_features, advance=advance)
    return PartialScores(scores, np.ones(len(pairs), np.bool_))


def shared_steps(advance: Advance | None, times: int) -> Advance:
    """A callback for work that is done so many ``times`` to each pair: it counts a pair once that is so on average."""
    finished = 0

    def step(count: int) -> None:
        nonlocal finished
        before, finished = finished, finished + count
        if advance is not None:
            advance(finished // times - before // times)

    return step


def whole_queries(pairs: Sequence[TextPair], is_scored: Bool[np.ndarray, " pairs"]) -> Bool[np.ndarray, " pairs"]:
    """Mask of the pairs of queries whose pairs are all scored."""
    unfinished = {query for (query, _), scored in zip(pairs, is_scored, strict=True) if not scored}
    return np.array([query not in unfinished for query, _ in pairs], np.bool_)


def load_teacher(config: TeacherConfig, *, device: str | None = None, dtype: str | None = None) -> PairTeacher:
    """Load a teacher of any kind.

    Raises:
        ModelNotFoundError: there are no usable weights.
        ModelError: the model is not a teacher of that kind.
        InputError: its head is new and was never tuned.
    """
    if config.needs_tuning and find_saved(config.model, "teachers") is None:
        raise InputError(
            f"teacher '{config.model}' has a new head, which must be tuned before use; run tune-teacher first"
        )
    return config.load(device=device, dtype=dtype)


def identify_teacher(config: TeacherConfig) -> TeacherIdentity:
    """The identity of ``load_teacher(config)``, computed without loading the model.

    Raises:
        ModelNotFoundError: there are no usable weights.
        InputError: there is no such prompt set.
    """
    return config.identify()


def asks_endpoint(config: TeacherConfig) -> bool:
    """Whether a teacher, or a member of an ensemble, is remote: then its endpoint sets the pace everywhere."""
    return any("endpoint" in member.needs for member in config.members)


def recorded_teacher(config: TeacherConfig, lists: Path, data: Path | None = None) -> TeacherConfig:
    """The graded teacher ``config`` that repeats the grades in ``lists``, whose ids are those of ``data``.

    Of a fused one, it is the graded ones.

    Raises:
        InputError: it is not of kind ``graded``, and fuses none.
    """
    if isinstance(config, FusedTeacherConfig) and any(isinstance(one, GradedTeacherConfig) for one in config.teachers):
        teachers = tuple(
            recorded_teacher(one, lists, data) if isinstance(one, GradedTeacherConfig) else one
            for one in config.teachers
        )
        return config.model_copy(update={"teachers": teachers})
    if not isinstance(config, GradedTeacherConfig):
        raise InputError(
            f"{lists}: recorded grades are those of a graded teacher, and '{config.model}' is of kind {config.kind}; "
            'name the model that gave them as graded:MODEL, or set kind = "graded" in [teacher]'
        )
    unlisted = None if config.recorded is None else config.recorded.unlisted
    recorded_data = () if config.recorded is None else config.recorded.data
    recorded = RecordedConfig(lists=str(lists), data=recorded_data if data is None else (str(data),), unlisted=unlisted)
    return config.model_copy(update={"recorded": recorded})


def ranks_lists(teacher: PairTeacher | TeacherConfig) -> bool:
    """Whether log-odds compare only the passages of one query: kinds ``listwise``, ``likelihood`` and ``fused``.

    It is also true of an ensemble with such a member.
    """
    if isinstance(teacher, TeacherConfig):
        return teacher.ranks_lists or any(member.ranks_lists for member in teacher.members)
    return bool(getattr(teacher, "ranks_lists", False))


def score_passages(
    teacher: PairTeacher, query: str, texts: Sequence[str], task: Task
) -> tuple[NDArray[np.float64], int]:
    """The teacher's log-odds [n] of a query with passages, and how many passages it read only in part.

    Raises:
        ModelError: the teacher returned a log-odds value that is not finite.
    """
    scores = teacher.score_pairs([(query, text) for text in texts], task)
    values = np.asarray(scores.log_odds, np.float64)
    if not np.isfinite(values).all():
        raise ModelError(f"the teacher's log-odds for the query {query!r} are not all finite; check the teacher")
    return values, scores.num_truncated


def scores_only_recorded(teacher: TeacherConfig) -> bool:
    """Whether a pair that was not recorded is undecided; also true of an ensemble with such a member."""
    return any(member.scores_only_recorded for member in teacher.members)


def gives_grades(teacher: PairTeacher) -> bool:
    """Whether a pair that has an answer has a grade too: kind ``graded``, from an endpoint or recorded."""
    return bool(getattr(teacher, "gives_grades", False))
