"""Measures for judged pairs: is the second text a match (binary), how good a match (graded), which NLI class.

With a threshold t, scores of at least t count as yes. It is chosen on the dev split and applied to the test split:
chosen on the test split, it would flatter every system.

NLI follows C-MTEB (Xiao et al., "C-Pack", SIGIR 2024), which contains the OCNLI and CMNLI that D2LLM (Liao et al., ACL
2024) reports; we assume that the paper's figures follow it too. There the task is pair classification on the
validation split, entailment (1) against contradiction (0), without the neutral pairs: 947 and 900 of OCNLI's 2,950
pairs, 8,315 pairs of CMNLI. It reports accuracy, AP, precision and recall, the last two at the threshold of the best
F1. Two things differ here. mteb chooses its thresholds on the pairs that it then reports, so its accuracy
("max_accuracy") is at least ours on the same scores; AP needs no threshold and is the same. And mteb may cut between
pairs of equal score, which no threshold can do.

A *measurer* checks and sorts its pairs once and then measures any number of resamples of them. Every function raises an
``InputError`` if a score is not finite, the lengths differ, or there are no pairs; other errors are named where they
occur.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from d2llm.core.errors import InputError

Floats = NDArray[np.float64]
Measurer = Callable[[NDArray[np.intp]], dict[str, float]]
"""Measures the pairs at the given positions, which may repeat.

Raises:
    InputError: there is no pair of one of the labels, or (graded) all judgements are the same.
"""
NLI_CLASSES = ("contradiction", "neutral", "entailment")
"""By ascending score: the higher the score, the more the first text entails the second."""
MEANINGS = {
    "accuracy": "fraction of the pairs that are put into the right class, with the threshold chosen on other pairs",
    "F1": "harmonic mean of precision and recall of yes, with the threshold chosen on other pairs",
    "AP": "precision at each correct yes, averaged, when the pairs are sorted by score; needs no threshold",
    "AUC": "probability that a yes pair scores above a no pair; 0.5 is guessing",
    "precision": "fraction of correct pairs among those classified as yes",
    "recall": "fraction of the yes pairs that are classified as yes",
    "Pearson": "correlation of the scores with the grades; 1 is a straight line",
    "Spearman": "correlation of the order of the scores with that of the grades; 1 is the same order",
}
"""How to read each measure of a measurer, by the first word of its name, in one clause, for reports."""


@dataclass(frozen=True, slots=True)
class NliThresholds:
    """Cuts chosen on a dev split by ``fit_nli``.

    ``contradiction`` and ``f1`` separate entailment from contradiction (best accuracy, best F1), ``other`` separates
    entailment from the other two classes, ``ordinal`` holds the two cuts between the three classes.
    """

    contradiction: float
    f1: float
    other: float
    ordinal: tuple[float, float]


def best_threshold(scores: ArrayLike, labels: ArrayLike, *, measure: Literal["accuracy", "f1"] = "accuracy") -> float:
    """The threshold with the best accuracy or F1: the midpoint between two neighbouring scores.

    Of equally good ones, the highest. If yes for all pairs is best, it is the lowest score; if no for all, the next
    float above the highest score. Exact, O(n log n).

    Args:
        scores: [n].
        labels: [n] bool, true for a match.
        measure: what to maximise.

    Raises:
        InputError: there is no pair of one of the labels.
    """
    values, truth = _checked(scores, labels)
    _require_both(int(truth.sum()), len(truth))
    order, num_above, thresholds = _cuts(values)
    hits = np.concatenate([[0], np.cumsum(truth[order])])[num_above]
    # Right answers are hits + (negatives - (num_above - hits)); terms that are constant over the cuts are left out.
    quality = 2 * hits / (num_above + truth.sum()) if measure == "f1" else 2 * hits - num_above
    return float(thresholds[np.argmax(quality)])


def accuracy_at(scores: ArrayLike, labels: ArrayLike, threshold: float) -> float:
    """Fraction of the pairs [n] whose answer, score >= threshold, is the label."""
    values, truth = _checked(scores, labels)
    return float(np.mean((values >= threshold) == truth))


def pearson(first: ArrayLike, second: ArrayLike) -> float:
    """Linear correlation of two scorings [n] of the same items; 0 if one of them is constant."""
    return _pearson(*_paired(first, second))


def binary_measurer(scores: ArrayLike, labels: ArrayLike, *, thresholds: tuple[float, float] | None) -> Measurer:
    """The measures "accuracy", "F1", "AP" and "AUC" of pairs with a yes/no label.

    AP = sum_n (R_n - R_(n-1)) P_n over the distinct scores from the highest down, without interpolation. AUC is the
    probability that a match scores higher than a non-match; equal scores count one half.

    Args:
        scores: [n].
        labels: [n] bool, true for a match.
        thresholds: ``best_threshold`` of the dev split for accuracy and for F1; None leaves these two out.
    """
    values, truth = _checked(scores, labels)
    pairs = _Sorted.from_scores(values, truth)
    if thresholds is None:
        return lambda rows: pairs.cuts(rows).ranking_measures()
    is_right, answers = (values >= thresholds[0]) == truth, values >= thresholds[1]

    def measure(rows: NDArray[np.intp]) -> dict[str, float]:
        ranking = pairs.cuts(rows).ranking_measures()
        return {"accuracy": float(np.mean(is_right[rows])), "F1": _f1(answers[rows], truth[rows])} | ranking

    return measure


def graded_measurer(scores: ArrayLike, gold: ArrayLike) -> Measurer:
    """The measures "Pearson" and "Spearman" of scores [n] with graded judgements [n]; ties share their mean rank."""
    values, grades = _paired(scores, gold)

    def measure(rows: NDArray[np.intp]) -> dict[str, float]:
        ours, theirs = values[rows], grades[rows]
        if theirs.min() == theirs.max():
            raise InputError(f"all {len(theirs)} judgements are {theirs[0]:g}: there is nothing to correlate with")
        return {"Pearson": _pearson(ours, theirs), "Spearman": _pearson(mean_ranks(ours), mean_ranks(theirs))}

    return measure


def ordinal_thresholds(scores: ArrayLike, classes: ArrayLike) -> tuple[float, float]:
    """The two cuts of one score axis with the best accuracy on three ordered classes.

    Class 0 below the first cut, 2 from the second on, 1 between; the cuts may coincide, which leaves class 1 empty.
    Of equally good cuts, the highest first cut, then the highest second. Exact, O(n log n): with the pairs sorted from
    the highest score down, the first i called 2 and the first j >= i called at least 1, the number of right answers is
    (twos - ones)[i] + (ones - zeros)[j] + a constant, so the best i for every j is a running maximum.

    Args:
        scores: [n].
        classes: [n] integers 0, 1, 2.

    Returns:
        (lower cut, upper cut).

    Raises:
        InputError: a class does not occur.
    """
    values, truth = _paired(scores, classes)
    for label in range(3):
        if not (truth == label).any():
            raise InputError(f"no pair is of class {label}: three-way thresholds need all of 0, 1 and 2")
    order, num_above, thresholds = _cuts(values)
    num_zeros, num_ones, num_twos = (
        np.concatenate([[0], np.cumsum(truth[order] == label)])[num_above] for label in range(3)
    )
    upper_gain = num_twos - num_ones
    best_so_far = np.maximum.accumulate(upper_gain)
    lower = int(np.argmax(best_so_far + num_ones - num_zeros))
    upper = int(np.argmax(upper_gain[: lower + 1]))
    return float(thresholds[lower]), float(thresholds[upper])


def ordinal_answers(values: Floats, thresholds: tuple[float, float]) -> NDArray[np.int_]:
    """The class 0, 1 or 2 that the two cuts assign to each score [n]."""
    lower, upper = thresholds
    return (values >= lower).astype(int) + (values >= upper)


def fit_nli(scores: ArrayLike, classes: Sequence[str]) -> NliThresholds:
    """Choose the thresholds of ``nli_measurer`` on a dev split.

    Args:
        scores: [n].
        classes: [n] of ``NLI_CLASSES``.

    Raises:
        InputError: a class is unknown or does not occur.
    """
    values, numbers = _paired(scores, _nli_numbers(classes))
    for label, name in enumerate(NLI_CLASSES):
        if not (numbers == label).any():
            raise InputError(f"no pair of the dev split is '{name}', so no threshold can be chosen; use another split")
    decided = numbers != 1
    return NliThresholds(
        contradiction=best_threshold(values[decided], numbers[decided] == 2),
        f1=best_threshold(values[decided], numbers[decided] == 2, measure="f1"),
        other=best_threshold(values, numbers == 2),
        ordinal=ordinal_thresholds(values, numbers),
    )


def nli_measurer(scores: ArrayLike, classes: Sequence[str], *, thresholds: NliThresholds) -> Measurer:
    """Natural language inference from a single score; the module docstring describes the protocol.

    "accuracy (entailment/contradiction)", "AP", "precision" and "recall" are without the neutral pairs, "accuracy
    (entailment/other)" and "accuracy (3 classes)" over all pairs.

    Args:
        scores: [n].
        classes: [n] of ``NLI_CLASSES``.
        thresholds: ``fit_nli`` of the dev split.

    Raises:
        InputError: a class is unknown.
    """
    values, numbers = _paired(scores, _nli_numbers(classes))
    decided, truth = numbers != 1, numbers == 2
    pairs = _Sorted.from_scores(values, truth)
    answers = values >= thresholds.f1
    right_of_two = (values >= thresholds.contradiction) == truth
    right_of_other = (values >= thresholds.other) == truth
    right_of_three = ordinal_answers(values, thresholds.ordinal) == numbers

    def measure(rows: NDArray[np.intp]) -> dict[str, float]:
        decided_rows = rows[decided[rows]]
        average = pairs.cuts(decided_rows).average_precision()
        hits = int((answers & truth)[decided_rows].sum())
        return {
            "accuracy (entailment/contradiction)": float(np.mean(right_of_two[decided_rows])),
            "AP": average,
            "precision": hits / max(int(answers[decided_rows].sum()), 1),
            "recall": hits / int(truth[decided_rows].sum()),
            "accuracy (entailment/other)": float(np.mean(right_of_other[rows])),
            "accuracy (3 classes)": float(np.mean(right_of_three[rows])),
        }

    return measure


def _nli_numbers(classes: Sequence[str]) -> list[int]:
    unknown = sorted(set(classes) - set(NLI_CLASSES))
    if unknown:
        raise InputError(f"unknown NLI classes: {', '.join(unknown[:5])}; known are {', '.join(NLI_CLASSES)}")
    return [NLI_CLASSES.index(name) for name in classes]


def _paired(first: ArrayLike, second: ArrayLike) -> tuple[Floats, Floats]:
    left, right = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if left.ndim != 1 or left.shape != right.shape:
        raise InputError(f"shapes {left.shape} and {right.shape}: one number of each per pair is needed")
    if not len(left):
        raise InputError("there are no pairs to measure")
    for values in (left, right):
        wrong: list[int] = np.flatnonzero(~np.isfinite(values)).tolist()
        if wrong:
            raise InputError(
                f"{len(wrong)} of {len(values)} numbers are NaN or infinite (first: number {wrong[0] + 1}); "
                "check the model that gave them"
            )
    return left, right


def _checked(scores: ArrayLike, labels: ArrayLike) -> tuple[Floats, NDArray[np.bool_]]:
    values, numbers = _paired(scores, labels)
    if not np.isin(numbers, (0, 1)).all():
        raise InputError(f"labels must be true/false or 1/0, found {np.unique(numbers).tolist()[:5]}")
    return values, numbers == 1


def _require_both(num_positive: int, num_pairs: int) -> None:
    if num_positive in (0, num_pairs):
        kind = "positive" if num_positive == 0 else "negative"
        raise InputError(f"none of the {num_pairs} pairs is {kind}; a split with both labels is needed")


def _f1(answers: NDArray[np.bool_], truth: NDArray[np.bool_]) -> float:
    hits = int((answers & truth).sum())
    return 2 * hits / (int(answers.sum()) + int(truth.sum())) if hits else 0.0


def _pearson(left: Floats, right: Floats) -> float:
    # Checked explicitly: deviations from a rounded mean need not be exactly 0.
    if left.min() == left.max() or right.min() == right.max():
        return 0.0
    left, right = _unit(left), _unit(right)
    return float(np.clip(left @ right, -1.0, 1.0))


@dataclass(frozen=True, slots=True)
class _Sorted:
    """Pairs with the rank of each among the distinct scores, the highest first, so that resamples need no sorting."""

    ranks: NDArray[np.intp]
    num_ranks: int
    truth: NDArray[np.bool_]

    @classmethod
    def from_scores(cls, values: Floats, truth: NDArray[np.bool_]) -> _Sorted:
        distinct, ranks = np.unique(-values, return_inverse=True)
        return cls(ranks, len(distinct), truth)

    def cuts(self, rows: NDArray[np.intp]) -> _Cuts:
        """The possible cuts of the pairs at the given positions.

        Raises:
            InputError: there is no pair of one of the labels.
        """
        if not len(rows):
            raise InputError("there are no pairs to measure")
        positions, truth = self.ranks[rows], self.truth[rows]
        pairs = np.bincount(positions, minlength=self.num_ranks)
        matches = np.bincount(positions[truth], minlength=self.num_ranks)
        drawn = pairs > 0
        cuts = _Cuts(pairs[drawn], matches[drawn])
        _require_both(int(cuts.hits[-1]), len(rows))
        return cuts


@dataclass(frozen=True, slots=True)
class _Cuts:
    """For each distinct score from the highest down: how many pairs have it, and how many matches are among them."""

    pairs: NDArray[np.intp]
    matches: NDArray[np.intp]
    hits: NDArray[np.intp] = field(init=False)  # matches with at least this score

    def __post_init__(self) -> None:
        object.__setattr__(self, "hits", np.cumsum(self.matches))

    def average_precision(self) -> float:
        return float(np.sum(self.matches * self.hits / np.cumsum(self.pairs)) / self.hits[-1])

    def roc_auc(self) -> float:
        others = self.pairs - self.matches
        not_above = np.cumsum(others)
        below = not_above[-1] - not_above + others / 2  # an equal score counts one half
        return float((self.matches * below).sum() / (self.hits[-1] * not_above[-1]))

    def ranking_measures(self) -> dict[str, float]:
        return {"AP": self.average_precision(), "AUC": self.roc_auc()}


def _cuts(values: Floats) -> tuple[NDArray[np.intp], NDArray[np.intp], Floats]:
    """Possible cuts from the top down: sort order [n], and per cut the number of scores above it and its threshold."""
    order = np.argsort(-values, kind="stable")
    ordered = values[order]
    inner = np.flatnonzero(ordered[1:] < ordered[:-1]) + 1
    upper, lower = ordered[inner - 1], ordered[inner]
    middle = upper / 2 + lower / 2
    # There is no midpoint between two adjacent floats.
    thresholds = np.where((middle > lower) & (middle <= upper), middle, upper)
    num_above = np.concatenate([[0], inner, [len(values)]])
    return order, num_above, np.concatenate([[np.nextafter(ordered[0], np.inf)], thresholds, ordered[-1:]])


def mean_ranks(values: Floats) -> Floats:
    """[n] ranks from 1, ascending; ties share their mean rank."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]


def _unit(values: Floats) -> Floats:
    """Deviations from the mean, of length one."""
    scaled = values / np.abs(values).max()  # keeps the squares of very large or small numbers in range
    centred = scaled - scaled.mean()
    return centred / np.linalg.norm(centred)
