"""How closely a student agrees with its teacher, beyond being equally accurate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
from numpy.typing import ArrayLike

from d2llm.core.errors import InputError
from d2llm.ops.pair_measures import accuracy_at, best_threshold, pearson
from d2llm.ops.ranking import kendall_tau


@dataclass(frozen=True, slots=True)
class Agreement:
    """Agreement of teacher and student on the same pairs.

    ``label_loyalty`` is in [0, 1], None if the teacher gives all pairs the same answer, which any student can copy.
    ``pearson_within`` and ``kendall_within`` are means over the ``num_queries`` queries with two pairs or more, None
    if there are none; ``pearson_over_all`` is computed over all ``num_pairs`` pairs at once.
    """

    label_loyalty: float | None
    pearson_within: float | None
    kendall_within: float | None
    pearson_over_all: float
    num_queries: int
    num_pairs: int


def label_loyalty(teacher_log_odds: ArrayLike, student_logits: ArrayLike, *, student_threshold: float) -> float:
    """Share of the pairs [n] to which teacher and student give the same yes or no.

    The teacher says yes at log-odds of at least 0, the student at logits of at least ``student_threshold``.

    Source: Xu et al., "Beyond Preserved Accuracy: Evaluating Loyalty and Robustness of BERT Compression", EMNLP 2021.
    """
    return accuracy_at(student_logits, np.asarray(teacher_log_odds, np.float64) >= 0, student_threshold)


def top_k_overlap(first: Sequence[str], second: Sequence[str], k: int = 10) -> float:
    """Overlap of the first ``k`` places of two rankings, in [0, 1].

    If both rankings are shorter than ``k``, the share is of the longer one; two empty rankings agree fully.

    Raises:
        InputError: k is below 1.
    """
    if k < 1:
        raise InputError(f"k is {k}, but must be at least 1")
    left, right = set(first[:k]), set(second[:k])
    places = max(len(left), len(right))
    return len(left & right) / places if places else 1.0


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
    )
