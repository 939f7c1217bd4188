"""The true labels of a split of pairs (yes or no, classes, or grades), and the measures of scores against them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from d2llm.core.errors import DataFormatError, InputError
from d2llm.data.pair_training import nli_class
from d2llm.data.pairs import PairDataset
from d2llm.ops import pair_measures

Floats = NDArray[np.float64]
Positions = NDArray[np.intp]


@dataclass(frozen=True, slots=True)
class BinaryGold:
    """Yes or no."""

    positive: NDArray[np.bool_]

    @property
    def main_measure(self) -> str:
        """AP needs no threshold."""
        return "AP"

    def fit(self, scores: Floats, positions: Positions) -> tuple[float, float]:
        """Thresholds for accuracy and for F1."""
        labels = self.positive[positions]
        accuracy = pair_measures.best_threshold(scores, labels)
        return accuracy, pair_measures.best_threshold(scores, labels, measure="f1")

    def measurer(
        self, scores: Floats, positions: Positions, thresholds: tuple[float, float] | None
    ) -> pair_measures.Measurer:
        """Accuracy, F1, AP and AUC."""
        return pair_measures.binary_measurer(scores, self.positive[positions], thresholds=thresholds)

    def item_values(self, scores: Floats, positions: Positions, thresholds: tuple[float, float] | None) -> Floats:
        """1 for a right answer, else 0; without thresholds the fraction of pairs of the other label ranked right."""
        if thresholds is not None:
            return ((scores >= thresholds[0]) == self.positive[positions]).astype(np.float64)
        return _right_side(scores, self.positive[positions])


@dataclass(frozen=True, slots=True)
class NliGold:
    """Entailment, neutral or contradiction."""

    classes: tuple[str, ...]

    @property
    def main_measure(self) -> str:
        """Accuracy over all three classes."""
        return "accuracy (3 classes)"

    @property
    def positive(self) -> NDArray[np.bool_]:
        """Entailment counts as yes."""
        return np.array([name == "entailment" for name in self.classes])

    def fit(self, scores: Floats, positions: Positions) -> pair_measures.NliThresholds:
        """All thresholds of the protocol."""
        return pair_measures.fit_nli(scores, self._at(positions))

    def measurer(
        self, scores: Floats, positions: Positions, thresholds: pair_measures.NliThresholds | None
    ) -> pair_measures.Measurer:
        """See ``ops.pair_measures.nli_measurer``."""
        if thresholds is None:
            raise InputError("the classes need thresholds fitted on another split; add a dev split")
        return pair_measures.nli_measurer(scores, self._at(positions), thresholds=thresholds)

    def item_values(
        self, scores: Floats, positions: Positions, thresholds: pair_measures.NliThresholds | None
    ) -> Floats:
        """1 if the class is right, else 0."""
        assert thresholds is not None  # checked by ``measurer``
        answers, order = pair_measures.ordinal_answers(scores, thresholds.ordinal), pair_measures.NLI_CLASSES
        right = [order[index] == name for index, name in zip(answers.tolist(), self._at(positions), strict=True)]
        return np.array(right, np.float64)

    def _at(self, positions: Positions) -> list[str]:
        return [self.classes[position] for position in positions.tolist()]


@dataclass(frozen=True, slots=True)
class GradedGold:
    """A grade of similarity for each pair."""

    grades: Floats

    @property
    def main_measure(self) -> str:
        """Rank correlation, because the scale of a student's scores has no meaning."""
        return "Spearman"

    @property
    def positive(self) -> None:
        """None: grades have no yes."""
        return

    def fit(self, scores: Floats, positions: Positions) -> None:
        """Correlations need no threshold."""

    def measurer(
        self,
        scores: Floats,
        positions: Positions,
        thresholds: None,  # noqa: ARG002 - as for other labels
    ) -> pair_measures.Measurer:
        """Pearson and Spearman."""
        return pair_measures.graded_measurer(scores, self.grades[positions])

    def item_values(
        self,
        scores: Floats,
        positions: Positions,
        thresholds: None,  # noqa: ARG002 - as for other labels
    ) -> Floats:
        """1 minus the distance between the pair's rank by score and by grade, as a fraction of all ranks.

        Ties share their mean rank, as in Spearman's correlation.
        """
        ranks, truth = (pair_measures.mean_ranks(values) for values in (scores, self.grades[positions]))
        return 1 - np.abs(ranks - truth) / max(1, len(scores) - 1)


Gold = BinaryGold | NliGold | GradedGold
"""The true labels of the pairs of one split.

All kinds have the same methods. ``fit`` fits thresholds, to be used on another split, to the scores of the pairs at
``positions``. ``measurer`` makes a function that computes the measures of a resample of these, which is an array of
indices into ``positions``; without thresholds, only those that need none. ``item_values`` says how well each was
scored, in [0, 1]. ``positive`` [n] is whether a pair is a yes; ``main_measure`` is what examples and plots show.
"""


def measure_all(gold: Gold, scores: Floats, positions: Positions, thresholds: Any) -> dict[str, float]:
    """The measures of the pairs at ``positions``, which have ``scores``; without thresholds, those that need none."""
    return gold.measurer(scores, positions, thresholds)(np.arange(len(positions)))


def read_gold(dataset: PairDataset, split: str) -> Gold:
    """The true labels of a split; ``DataFormatError`` for unknown classes, or if a binary split has only one label."""
    pairs = dataset.pairs(split)
    if dataset.kind == "scores":
        return GradedGold(np.array([pair.score for pair in pairs], np.float64))
    if dataset.kind == "binary":
        positive = np.array(dataset.positives(split), bool)
        if positive.all() or not positive.any():
            missing = "negative" if positive.all() else "positive"
            raise DataFormatError(dataset.path, f"split '{split}' has no {missing} pair, so nothing can be measured")
        return BinaryGold(positive)
    return NliGold(tuple(nli_class(dataset, pair) for pair in pairs))


def _right_side(scores: Floats, positive: NDArray[np.bool_]) -> Floats:
    """For each pair, the fraction of pairs of the other label that it is ranked correctly against; ties count half."""
    fractions = np.empty(len(scores))
    for label in (True, False):
        others: Sequence[float] = np.sort(scores[positive != label]).tolist()
        label_scores = scores[positive == label]
        below = (
            (np.searchsorted(others, label_scores, "left") + np.searchsorted(others, label_scores, "right"))
            / 2
            / len(others)
        )
        fractions[positive == label] = below if label else 1 - below
    return fractions
