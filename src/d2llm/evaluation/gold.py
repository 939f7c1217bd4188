"""The true labels of a split of pairs, and how scores are measured against them: yes or no, classes, or grades."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from d2llm.core.errors import DataFormatError, InputError
from d2llm.data.pair_training import nli_class
from d2llm.data.pairs import PairDataset
from d2llm.ops import pair_measures

Floats = NDArray[np.float64]
Positions = NDArray[np.intp]


class Gold(Protocol):
    """The true labels of the pairs of one split."""

    @property
    def main_measure(self) -> str:
        """The measure that examples and plots are about."""
        ...

    @property
    def positive(self) -> NDArray[np.bool_] | None:
        """[n] whether a pair is a yes; None for graded pairs."""
        ...

    def fit(self, scores: Floats, positions: Positions) -> Any:
        """Thresholds from the scores of these pairs, used with another split."""
        ...

    def measurer(self, scores: Floats, positions: Positions, thresholds: Any) -> pair_measures.Measurer:
        """Measures resamples of the pairs at ``positions``, whose scores are given; without thresholds those without.

        A resample is given by places in ``positions``.
        """
        ...

    def item_values(self, scores: Floats, positions: Positions, thresholds: Any) -> Floats:
        """One value in [0, 1] for each of the pairs at ``positions``: how well it was scored."""
        ...


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
        """1 where the answer is right, else 0; without a threshold the share of other pairs on the right side."""
        if thresholds is not None:
            return ((scores >= thresholds[0]) == self.positive[positions]).astype(np.float64)
        return _right_side(scores, self.positive[positions])


@dataclass(frozen=True, slots=True)
class NliGold:
    """Entailment, neutral or contradiction."""

    classes: tuple[str, ...]

    @property
    def main_measure(self) -> str:
        """All three classes count."""
        return "accuracy (3 classes)"

    @property
    def positive(self) -> NDArray[np.bool_]:
        """Entailment is a yes."""
        return np.array([name == "entailment" for name in self.classes])

    def fit(self, scores: Floats, positions: Positions) -> pair_measures.NliThresholds:
        """All thresholds of the protocol."""
        return pair_measures.fit_nli(scores, self._at(positions))

    def measurer(
        self, scores: Floats, positions: Positions, thresholds: pair_measures.NliThresholds | None
    ) -> pair_measures.Measurer:
        """See ``ops.pair_measures.nli_measures``."""
        if thresholds is None:
            raise InputError("the classes need thresholds from a split of their own; add a dev split")
        return pair_measures.nli_measurer(scores, self._at(positions), thresholds=thresholds)

    def item_values(
        self, scores: Floats, positions: Positions, thresholds: pair_measures.NliThresholds | None
    ) -> Floats:
        """1 where the class is right, else 0."""
        assert thresholds is not None  # ``measurer`` has refused that
        answers, order = pair_measures.ordinal_answers(scores, thresholds.ordinal), pair_measures.NLI_CLASSES
        right = [order[place] == name for place, name in zip(answers.tolist(), self._at(positions), strict=True)]
        return np.array(right, np.float64)

    def _at(self, positions: Positions) -> list[str]:
        return [self.classes[position] for position in positions.tolist()]


@dataclass(frozen=True, slots=True)
class GradedGold:
    """A number to agree with."""

    grades: Floats

    @property
    def main_measure(self) -> str:
        """Rank correlation: the scale of a student's scores means nothing."""
        return "Spearman"

    @property
    def positive(self) -> None:
        """There is no yes."""
        return

    def fit(self, scores: Floats, positions: Positions) -> None:
        """Correlations need no threshold."""

    def measurer(
        self,
        scores: Floats,
        positions: Positions,
        thresholds: None,  # noqa: ARG002 - part of the protocol
    ) -> pair_measures.Measurer:
        """Pearson and Spearman."""
        return pair_measures.graded_measurer(scores, self.grades[positions])

    def item_values(
        self,
        scores: Floats,
        positions: Positions,
        thresholds: None,  # noqa: ARG002 - part of the protocol
    ) -> Floats:
        """1 minus the distance between the pair's places by score and by grade, as shares of all places."""
        places, truth = (np.argsort(np.argsort(values, kind="stable")) for values in (scores, self.grades[positions]))
        return 1 - np.abs(places - truth) / max(1, len(scores) - 1)


def measure_all(gold: Gold, scores: Floats, positions: Positions, thresholds: Any) -> dict[str, float]:
    """The measures of the pairs at ``positions``, whose scores are given; without thresholds those without."""
    return gold.measurer(scores, positions, thresholds)(np.arange(len(positions)))


def read_gold(dataset: PairDataset, split: str) -> BinaryGold | NliGold | GradedGold:
    """The true labels of a split.

    Raises:
        DataFormatError: classes that are no natural language inference, or a split with one label only.
    """
    pairs = dataset.pairs(split)
    if dataset.kind == "scores":
        return GradedGold(np.array([pair.score for pair in pairs], np.float64))
    if dataset.kind == "binary":
        positive = np.array(dataset.positives(split), bool)
        if positive.all() or not positive.any():
            lacking = "negative" if positive.all() else "positive"
            raise DataFormatError(dataset.path, f"split '{split}' has no {lacking} pair, so nothing can be measured")
        return BinaryGold(positive)
    return NliGold(tuple(nli_class(dataset, pair) for pair in pairs))


def _right_side(scores: Floats, positive: NDArray[np.bool_]) -> Floats:
    """For each pair the share of pairs of the other label that its score is on the right side of, ties one half."""
    shares = np.empty(len(scores))
    for label in (True, False):
        others: Sequence[float] = np.sort(scores[positive != label]).tolist()
        own = scores[positive == label]
        below = (np.searchsorted(others, own, "left") + np.searchsorted(others, own, "right")) / 2 / len(others)
        shares[positive == label] = below if label else 1 - below
    return shares
