"""Which candidates become hard negatives: they are tried in order, and what looks like a positive is dropped."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from d2llm.core.types import Passage, Query
from d2llm.data.same_text import likeness, shingles
from d2llm.training.mining.draw import NegativeCandidate
from d2llm.training.mining.ranking import EncoderRanking
from d2llm.training.mining.teacher import TeacherCheck

Reason = Literal["near_duplicate", "relative_margin", "teacher_margin"]
REASONS: tuple[Reason, ...] = ("near_duplicate", "relative_margin", "teacher_margin")


@dataclass(frozen=True, slots=True)
class Dropped:
    """A candidate that is no negative: ``value`` (likeness, score, log-odds) is above ``limit``."""

    candidate: NegativeCandidate
    reason: Reason
    value: float
    limit: float


@dataclass
class Selection:
    """One query's candidates in the order in which they are tried, and what became of them."""

    query: Query
    positives: tuple[str, ...]
    candidates: Sequence[NegativeCandidate]
    judged_negative: Collection[str]
    """What the data set itself says is not relevant: no check drops it."""
    place: int
    """Of the query among those that are mined."""
    num_tried: int = 0
    kept: list[NegativeCandidate] = field(default_factory=list[NegativeCandidate])
    dropped: list[Dropped] = field(default_factory=list[Dropped])


Check = Callable[[Selection, NegativeCandidate], Dropped | None]
"""Says why a candidate is no negative, or None."""


def select(
    selections: Sequence[Selection], num_hard: int, checks: Sequence[Check], teacher: TeacherCheck | None
) -> None:
    """Try the candidates of some queries until each has ``num_hard`` negatives or no candidate is left.

    Each round proposes as many candidates as are still wanted, so that the teacher judges many pairs at once, and few
    that are not needed.
    """
    waiting = list(selections)
    while waiting:
        proposed = [(item, _propose(item, num_hard - len(item.kept), checks)) for item in waiting]
        if teacher is not None:
            teacher.judge(
                [(item.query, item.positives + tuple(c.passage_id for c in found)) for item, found in proposed if found]
            )
        for item, found in proposed:
            for candidate in found:
                drop = None if teacher is None else _teacher_drop(teacher, item, candidate)
                if drop is None:
                    item.kept.append(candidate)
                else:
                    item.dropped.append(drop)
        waiting = [item for item in waiting if len(item.kept) < num_hard and item.num_tried < len(item.candidates)]


def near_duplicate_check(passages: Mapping[str, Passage], threshold: float) -> Check:
    """Texts alike a positive's by more than ``threshold``; see ``likeness``."""
    of_positives: dict[str, list[frozenset[str]]] = {}

    def check(item: Selection, candidate: NegativeCandidate) -> Dropped | None:
        if item.query.id not in of_positives:
            of_positives.clear()  # queries come one after the other
            of_positives[item.query.id] = [shingles(passages[passage_id].text) for passage_id in item.positives]
        own = shingles(passages[candidate.passage_id].text)
        value = max(likeness(own, other) for other in of_positives[item.query.id])
        return Dropped(candidate, "near_duplicate", value, threshold) if value > threshold else None

    return check


def relative_margin_check(ranking: EncoderRanking, margin: float) -> Check:
    """Scores above mean - margin |mean|, where mean is of the positives' scores."""
    limits: dict[str, float] = {}

    def check(item: Selection, candidate: NegativeCandidate) -> Dropped | None:
        if item.query.id not in limits:
            limits.clear()
            mean = float(np.mean(ranking.scores(item.place, item.positives)))
            limits[item.query.id] = mean - margin * abs(mean)
        [value] = ranking.scores(item.place, [candidate.passage_id]).tolist()
        limit = limits[item.query.id]
        return Dropped(candidate, "relative_margin", value, limit) if value > limit else None

    return check


def _propose(item: Selection, wanted: int, checks: Sequence[Check]) -> list[NegativeCandidate]:
    proposed: list[NegativeCandidate] = []
    while len(proposed) < wanted and item.num_tried < len(item.candidates):
        candidate = item.candidates[item.num_tried]
        item.num_tried += 1
        trusted = candidate.passage_id in item.judged_negative
        drop = None if trusted else next((drop for check in checks if (drop := check(item, candidate))), None)
        if drop is None:
            proposed.append(candidate)
        else:
            item.dropped.append(drop)
    return proposed


def _teacher_drop(teacher: TeacherCheck, item: Selection, candidate: NegativeCandidate) -> Dropped | None:
    limit = teacher.limit(item.query.id, item.positives)
    value = teacher.log_odds(item.query.id, candidate.passage_id)
    if value is None or limit is None or candidate.passage_id in item.judged_negative or value <= limit:
        return None
    return Dropped(candidate, "teacher_margin", value, limit)
