"""How closely a student agrees with its teacher, beyond being equally accurate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize
from scipy.special import entr, expit

from d2llm.core.errors import InputError
from d2llm.core.inputs import check_count
from d2llm.ops.pair_measures import accuracy_at, best_threshold, pearson
from d2llm.ops.ranking import kendall_tau


@dataclass(frozen=True, slots=True)
class Agreement:
    """Agreement of teacher and student on the same pairs.

    ``label_loyalty`` is in [0, 1], None if the teacher gives all pairs the same answer, which any student can copy.
    ``probability_loyalty`` is in [0, 1].
    ``pearson_within`` and ``kendall_within`` are means over the ``num_queries`` queries with two pairs or more, None
    if there are none; ``pearson_over_all`` is computed over all ``num_pairs`` pairs at once, and is also known as
    regression loyalty (Avram et al., "Distilling the Knowledge of Romanian BERTs Using Multiple Teachers", LREC 2022).
    """

    label_loyalty: float | None
    pearson_within: float | None
    kendall_within: float | None
    pearson_over_all: float
    num_queries: int
    num_pairs: int
    probability_loyalty: float


def label_loyalty(teacher_log_odds: ArrayLike, student_logits: ArrayLike, *, student_threshold: float) -> float:
    """Fraction of the pairs [n] to which teacher and student give the same yes or no.

    The teacher says yes at log-odds of at least 0, the student at logits of at least ``student_threshold``.

    Source: Xu et al., "Beyond Preserved Accuracy: Evaluating Loyalty and Robustness of BERT Compression", EMNLP 2021.
    """
    return accuracy_at(student_logits, np.asarray(teacher_log_odds, np.float64) >= 0, student_threshold)


def probability_loyalty(teacher_log_odds: ArrayLike, student_logits: ArrayLike) -> float:
    """How close the student's P(yes) are to the teacher's: 1 minus the mean Jensen-Shannon distance over pairs [n].

    The distance is the root of the divergence in bits, 0 to 1. The student's probabilities are the sigmoid of a linear
    function of its logits, which is fitted to the teacher's on these same pairs, as their scale and origin differ.

    Source: Xu et al., as ``label_loyalty``.

    >>> probability_loyalty([-2.0, 0.0, 4.0], [0.0, 1.0, 3.0])  # the same but for scale and origin
    1.0
    """
    teacher = expit(np.asarray(teacher_log_odds, np.float64))
    logits = np.asarray(student_logits, np.float64)
    spread = logits.std()
    standard = (logits - logits.mean()) / (spread if spread > 0 else 1.0)

    def cross_entropy(line: NDArray[np.float64]) -> float:
        values = line[0] * standard + line[1]
        return float(np.mean(np.logaddexp(0, values) - teacher * values))

    def gradient(line: NDArray[np.float64]) -> NDArray[np.float64]:
        errors = expit(line[0] * standard + line[1]) - teacher
        return np.array([np.mean(errors * standard), np.mean(errors)])

    fitted = minimize(cross_entropy, np.zeros(2), jac=gradient, method="BFGS", options={"gtol": 1e-9}).x
    student = expit(fitted[0] * standard + fitted[1])
    middle = (teacher + student) / 2
    entropies = [entr(probabilities) + entr(1 - probabilities) for probabilities in (middle, teacher, student)]
    divergences = (entropies[0] - (entropies[1] + entropies[2]) / 2) / np.log(2)
    return round(1 - float(np.mean(np.sqrt(divergences.clip(min=0)))), 6)


def top_k_overlap(first: Sequence[str], second: Sequence[str], k: int = 10) -> float:
    """Overlap of the first ``k`` places of two rankings, in [0, 1].

    If both rankings are shorter than ``k``, the fraction is of the longer one; two empty rankings agree fully.

    Raises:
        InputError: k is below 1.
    """
    check_count(k, "k")
    left, right = set(first[:k]), set(second[:k])
    depth = max(len(left), len(right))
    return len(left & right) / depth if depth else 1.0


def agreement(by_query: Mapping[str, tuple[ArrayLike, ArrayLike]]) -> Agreement:
    """Compare the teacher's log-odds with the student's logits.

    The student's logits have their own scale and origin, so the student's threshold is the one that agrees best with
    the teacher on these same pairs: the label loyalty is the best that a single threshold can reach.
    If teacher or student scores all pairs of a query equally, the query counts as 0 in the means, because there is no
    order to compare. ``by_query`` maps a query's id to the teacher's log-odds [n] and the student's logits [n] of its
    passages.

    Raises:
        InputError: no pairs, a number is not finite, or the lengths of a query differ (the message names the query).
    """
    arrays = {
        query_id: (np.asarray(teacher, np.float64), np.asarray(student, np.float64))
        for query_id, (teacher, student) in by_query.items()
    }
    for query_id, (teacher, student) in arrays.items():
        if teacher.shape != student.shape or not np.isfinite([teacher, student]).all():
            raise InputError(
                f"query '{query_id}': one finite number per passage is needed from teacher and student each, found "
                f"{teacher.shape} and {student.shape}"
            )
    if not sum(len(teacher) for teacher, _ in arrays.values()):
        raise InputError("there are no pairs that both teacher and student have scored")
    teachers, students = (np.concatenate([pair[side] for pair in arrays.values()]) for side in (0, 1))
    teacher_yes = teachers >= 0
    loyalty = None
    if teacher_yes.any() and not teacher_yes.all():
        loyalty = label_loyalty(teachers, students, student_threshold=best_threshold(students, teacher_yes))
    several = [pair for pair in arrays.values() if len(pair[0]) > 1]
    return Agreement(
        label_loyalty=loyalty,
        pearson_within=fmean(pearson(*pair) for pair in several) if several else None,
        kendall_within=fmean(kendall_tau(one.tolist(), other.tolist()) for one, other in several) if several else None,
        pearson_over_all=pearson(teachers, students),
        num_queries=len(several),
        num_pairs=len(teachers),
        probability_loyalty=probability_loyalty(teachers, students),
    )
