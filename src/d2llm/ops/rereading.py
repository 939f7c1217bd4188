"""Which results a teacher should reread: how reliable the student's score is, and where rereading pays off.

The teacher's log-odds of a passage are modelled as  slope * score + intercept + query offset + passage error,  offset
and error both normal. The offset shifts all passages of a query alike; only the passage errors change their order.

Sources: analysis of covariance with random groups, Searle et al., "Variance Components", 1992, chapters 3 (the
moments) and 7 (the offset of a group with some known members); ``reading_gains`` names its own source.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from d2llm.core.errors import InputError
from d2llm.ops.calibration import sigmoid


@dataclass(frozen=True, slots=True)
class StudentError:
    """How a student's score predicts its teacher's log-odds, and with what error.

    Attributes:
        slope: log-odds per unit of the student's score, above 0.
        intercept: log-odds at score 0 for the mean query.
        sigma: standard deviation of the passage error, in log-odds. The difference of two passages has sqrt(2) times
            this.
        query_sigma: standard deviation of the offset that a query's passages share.
        num_pairs: number of pairs it was fitted to.
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
        """The teacher's log-odds expected from the student's scores, for the mean query."""
        return self.slope * np.asarray(scores, np.float64) + self.intercept


def calibrate_error(scores: ArrayLike, log_odds: ArrayLike, queries: Sequence[str]) -> StudentError:
    """Fit the student's error: least squares within queries, and the residual variance within and between them.

    The student's scores, the teacher's log-odds and the query of each pair are [pairs].

    Raises:
        InputError: lengths that differ, values that are not finite, fewer than two more pairs than queries, or scores
            that do not rise with the log-odds within queries.
    """
    student, teacher = np.asarray(scores, np.float64), np.asarray(log_odds, np.float64)
    if student.ndim != 1 or not student.shape == teacher.shape == (len(queries),):
        raise InputError(f"{student.shape} scores, {teacher.shape} log-odds, {len(queries)} queries: give as many each")
    if not (np.isfinite(student).all() and np.isfinite(teacher).all()):
        raise InputError("a score or log-odds is not a finite number; check the student and the teacher")
    group_of = {query: index for index, query in enumerate(dict.fromkeys(queries))}
    group, num_queries = np.array([group_of[query] for query in queries], np.int64), len(group_of)
    freedom = len(student) - num_queries - 1
    if freedom < 1:
        raise InputError(
            f"{len(student)} pairs of {num_queries} queries are too few to estimate an error; give several per query"
        )
    counts = np.bincount(group)
    student_means, teacher_means = (np.bincount(group, values) / counts for values in (student, teacher))
    within, teacher_within = student - student_means[group], teacher - teacher_means[group]
    spread = float(within @ within)
    slope = float(within @ teacher_within) / spread if spread > 0 else 0.0
    if slope <= 0:
        raise InputError(
            "within queries the student's scores do not go up with the teacher's log-odds, so the two cannot be put on "
            "one scale; check that they belong to the same pairs and task"
        )
    variance = float(np.square(teacher_within - slope * within).sum()) / freedom
    offsets = teacher_means - slope * student_means
    between = float(offsets.var(ddof=1) - np.mean(variance / counts)) if num_queries > 1 else 0.0
    return StudentError(slope, float(offsets.mean()), variance**0.5, max(0.0, between) ** 0.5, len(student))


def on_one_scale(
    scores: ArrayLike, read: NDArray[np.int64], log_odds: NDArray[np.float64], error: StudentError
) -> NDArray[np.float64]:
    """The teacher's log-odds [n] of all passages of a query: its own where it has read them, else the expected ones.

    The passages that the teacher has read, at the positions ``read`` [m], with ``log_odds`` [m], also give an estimate
    of the query's offset: their mean residual, shrunk by n query_sigma^2 / (n query_sigma^2 + sigma^2).
    """
    expected = error.log_odds(scores)
    if len(read):
        known = len(read) * error.query_sigma**2
        weight = known / (known + error.sigma**2) if known else 0.0
        expected += weight * float((log_odds - expected[read]).mean())
        expected[read] = log_odds
    return expected


def expected_log_odds(log_odds: NDArray[np.float64], unread: NDArray[np.bool_], sigma: float) -> NDArray[np.float64]:
    """Log-odds [n] of the expected probability: logit E[sigmoid(x)], with x normal around ``log_odds`` if unread.

    Ranking by them maximises the expected DCG. For passages that the teacher has read they are its own log-odds.
    """
    possible = log_odds[:, None] + sigma * _NODES
    yes, no = (np.logaddexp.reduce(np.log(_WEIGHTS) - np.logaddexp(0, sign * possible), axis=1) for sign in (-1, 1))
    return np.where(unread, yes - no, log_odds)


def reading_gains(
    log_odds: NDArray[np.float64], unread: NDArray[np.bool_], sigma: float, top_k: int
) -> NDArray[np.float64]:
    """Expected increase of the DCG of the first k if the teacher reads a passage, for each passage [n].

    A passage's gain in the DCG is its probability, and the ranking is by expected probability. Reading a passage
    replaces its expected probability by the teacher's and moves the passage to the matching place; the result is the
    mean DCG over the teacher's possible answers, minus the DCG before. It is larger the more likely the passage is to
    swap places with its neighbours and the more those places count (1 / log2(1 + rank)). 0 for passages already read.
    ``log_odds`` [n] are those of ``on_one_scale``, ``sigma`` is the standard deviation of an unread passage's error.

    Source: the knowledge gradient, Frazier et al., "A knowledge-gradient policy for sequential information collection",
    SIAM Journal on Control and Optimization 47, 2008.
    """
    worth = 1 / np.log2(np.arange(min(top_k, len(log_odds))) + 2)
    now = sigmoid(expected_log_odds(log_odds, unread, sigma))
    positions = np.flatnonzero(unread)
    outcomes = np.tile(now, (len(positions), len(_NODES), 1))
    outcomes[np.arange(len(positions)), :, positions] = sigmoid(log_odds[positions, None] + sigma * _NODES)
    gains = np.zeros(len(log_odds))
    gains[positions] = (_best(outcomes, len(worth)) @ worth) @ _WEIGHTS - _best(now, len(worth)) @ worth
    return np.maximum(gains, 0.0)  # negative only through rounding


_NODES, _GAUSS = np.polynomial.hermite_e.hermegauss(12)
_WEIGHTS = _GAUSS / _GAUSS.sum()  # with the nodes: quadrature over a normal distribution


def _best(values: NDArray[np.float64], count: int) -> NDArray[np.float64]:
    """The ``count`` highest values along the last axis, in descending order."""
    return -np.sort(-values, axis=-1)[..., :count]
