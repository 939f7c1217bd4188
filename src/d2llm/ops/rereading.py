"""Which results a teacher should read again: how far the student's score can be believed, and where reading pays.

The teacher's log-odds of a passage are taken as  slope * score + intercept + query's offset + passage's error,  both
errors normal. The offset moves all passages of a query alike; only the passages' own errors change their order.

Sources: analysis of covariance with random groups, Searle et al., "Variance Components", 1992, sections 3.5 to 3.7 (the
moments) and 7.4 (the offset of a group of which some are known); expected improvement, Jones et al., "Efficient Global
Optimization of Expensive Black-Box Functions", Journal of Global Optimization 13, 1998, equation 15.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from d2llm.core.errors import InputError


@dataclass(frozen=True, slots=True)
class StudentError:
    """What a student's score says of its teacher's log-odds.

    Attributes:
        slope: log-odds for a unit of the student's score, above 0.
        intercept: log-odds of score 0, of the mean query.
        sigma: standard deviation of a passage's own error, in log-odds. Two passages' difference has sqrt(2) of it.
        query_sigma: standard deviation of the offset that a query's passages share.
        num_pairs: how many pairs it was fitted to.
    """

    slope: float
    intercept: float
    sigma: float
    query_sigma: float = 0.0
    num_pairs: int = 0

    def __post_init__(self) -> None:
        values = (self.slope, self.intercept, self.sigma, self.query_sigma)
        if not np.isfinite(values).all() or self.slope <= 0 or self.sigma < 0 or self.query_sigma < 0:
            raise InputError(
                f"slope {self.slope}, intercept {self.intercept}, sigma {self.sigma}, query_sigma {self.query_sigma}: "
                "they must be finite, slope above 0, and no standard deviation below 0"
            )

    def log_odds(self, scores: ArrayLike) -> NDArray[np.float64]:
        """The teacher's log-odds to be expected from the student's scores, of the mean query."""
        return self.slope * np.asarray(scores, np.float64) + self.intercept


def calibrate_error(scores: ArrayLike, log_odds: ArrayLike, queries: Sequence[str]) -> StudentError:
    """Fit the student's error: least squares within queries, and the variance that is left within and between them.

    Args:
        scores: [pairs] the student's.
        log_odds: [pairs] the teacher's of the same pairs.
        queries: [pairs] each pair's query.

    Raises:
        InputError: lengths that differ, values that are not finite, fewer than two more pairs than queries, or scores
            that do not go up with the log-odds within queries.
    """
    student, teacher = np.asarray(scores, np.float64), np.asarray(log_odds, np.float64)
    if student.ndim != 1 or not student.shape == teacher.shape == (len(queries),):
        raise InputError(f"{student.shape} scores, {teacher.shape} log-odds, {len(queries)} queries: give as many each")
    if not (np.isfinite(student).all() and np.isfinite(teacher).all()):
        raise InputError("a score or log-odds is no finite number; check the student and the teacher")
    place_of = {query: place for place, query in enumerate(dict.fromkeys(queries))}
    group, num_queries = np.array([place_of[query] for query in queries], np.int64), len(place_of)
    freedom = len(student) - num_queries - 1
    if freedom < 1:
        raise InputError(
            f"{len(student)} pairs of {num_queries} queries are too few to tell an error; give several of each"
        )
    counts = np.bincount(group)
    student_means, teacher_means = (np.bincount(group, values) / counts for values in (student, teacher))
    within, wanted = student - student_means[group], teacher - teacher_means[group]
    spread = float(within @ within)
    slope = float(within @ wanted) / spread if spread > 0 else 0.0
    if slope <= 0:
        raise InputError(
            "within queries the student's scores do not go up with the teacher's log-odds, so the two cannot be put on "
            "one scale; check that they belong to the same pairs and task"
        )
    variance = float(np.square(wanted - slope * within).sum()) / freedom
    offsets = teacher_means - slope * student_means
    between = float(offsets.var(ddof=1) - np.mean(variance / counts)) if num_queries > 1 else 0.0
    return StudentError(slope, float(offsets.mean()), variance**0.5, max(0.0, between) ** 0.5, len(student))


def on_one_scale(
    scores: ArrayLike, read: NDArray[np.int64], log_odds: NDArray[np.float64], error: StudentError
) -> NDArray[np.float64]:
    """Log-odds [n] of all passages of a query: the teacher's where it read them, else what is to be expected.

    The passages read also tell of the query's offset: it is their mean residual, shrunk by
    n query_sigma^2 / (n query_sigma^2 + sigma^2).

    Args:
        scores: [n] the student's.
        read: [m] places of the passages that the teacher read.
        log_odds: [m] what it said of them.
        error: of the student.
    """
    expected = error.log_odds(scores)
    if len(read):
        known = len(read) * error.query_sigma**2
        share = known / (known + error.sigma**2) if known else 0.0
        expected += share * float((log_odds - expected[read]).mean())
        expected[read] = log_odds
    return expected


@dataclass(frozen=True, slots=True)
class Doubt:
    """The pairs of a ranking whose order may be wrong and matters.

    ``alone`` [n, n] is the gain to be expected of reading i if j is not read, ``both`` of reading both; 0 where their
    order is sure enough or does not matter. Gains are in log-odds times the discount that nDCG gives to a place.
    """

    alone: NDArray[np.float64]
    both: NDArray[np.float64]
    unread: NDArray[np.bool_]

    @property
    def unsure(self) -> NDArray[np.int64]:
        """Places of the passages that reading could move within the first k, into them or out of them."""
        return np.flatnonzero(self.unread & (self.both.sum(axis=1) > 0))

    def choose(self, num: int) -> NDArray[np.int64]:
        """At most ``num`` unread passages that together promise most, chosen one after another; unsure ones only."""
        allowed, gains = self.unread.copy(), self.alone.sum(axis=1)
        chosen: list[int] = []
        while len(chosen) < num and allowed.any():
            best = int(np.argmax(np.where(allowed, gains, -np.inf)))
            if gains[best] <= 0:
                break
            chosen.append(best)
            allowed[best] = False
            gains += self.both[:, best] - 2 * self.alone[:, best]
        return np.array(chosen, np.int64)


def doubt(
    log_odds: NDArray[np.float64], unread: NDArray[np.bool_], sigma: float, top_k: int, *, unsure_from: float = 0.05
) -> Doubt:
    """Where the order of passages may be wrong.

    Two passages with a margin m, whose difference has the standard deviation s, are the wrong way round with
    probability Phi(-m / s). Knowing the difference gains s phi(m / s) - m Phi(-m / s) log-odds on average, and that
    counts by how much more the higher of their places is worth, 1 / log2(1 + rank) in the first k and else 0.

    Args:
        log_odds: [n] as far as they are known.
        unread: [n] which are the student's, with standard deviation ``sigma``; the others are the teacher's.
        sigma: standard deviation of an unread passage's error.
        top_k: how many places matter.
        unsure_from: pairs less likely than this to be the wrong way round are taken as sure.
    """
    rank = np.empty(len(log_odds), np.int64)
    rank[np.argsort(-log_odds, kind="stable")] = np.arange(len(log_odds))
    worth = np.where(rank < top_k, 1 / np.log2(rank + 2), 0.0)
    margin = np.abs(log_odds[:, None] - log_odds)
    num_unread = unread[:, None].astype(np.int64) + unread
    wrong = _normal_tail(margin, sigma * np.sqrt(num_unread))
    matters = np.where(wrong >= unsure_from, np.abs(worth[:, None] - worth), 0.0)
    np.fill_diagonal(matters, 0.0)
    one, two = (matters * _expected_improvement(margin, sigma * count**0.5) for count in (1, 2))
    return Doubt(one * unread[:, None], np.where(num_unread == 2, two, one * (num_unread > 0)), unread)


def _expected_improvement(margin: NDArray[np.float64], deviation: float) -> NDArray[np.float64]:
    if deviation == 0:
        return np.zeros_like(margin)
    ratio = margin / deviation
    density = np.exp(-(ratio**2) / 2) / np.sqrt(2 * np.pi)
    return deviation * density - margin * torch.special.ndtr(torch.from_numpy(-ratio)).numpy()


def _normal_tail(margin: NDArray[np.float64], deviation: NDArray[np.float64]) -> NDArray[np.float64]:
    """Phi(-margin / deviation); 0 where nothing deviates."""
    ratio = np.divide(margin, deviation, out=np.full_like(margin, np.inf), where=deviation > 0)
    return torch.special.ndtr(torch.from_numpy(-ratio)).numpy()
