"""Gold labels of pairs: their kinds, values of single pairs, and unusable labels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2llm.core.errors import DataFormatError, InputError
from d2llm.data.pairs import LabelledPair, PairDataset
from d2llm.evaluation.gold import BinaryGold, GradedGold, NliGold, measure_all, read_gold
from d2llm.ops.pair_measures import binary_measurer

ALL = np.arange(4)


def dataset(labels, kind="binary"):
    pairs = tuple(
        LabelledPair(
            f"test-{n}", "q", f"p{n}", None if kind == "scores" else label, label if kind == "scores" else None
        )
        for n, label in enumerate(labels)
    )
    return PairDataset("d", Path("d"), kind, (), {"test": pairs}, ())


def test_kinds_of_gold_labels():
    binary = read_gold(dataset(["yes", "no", "no", "yes"]), "test")
    assert isinstance(binary, BinaryGold)
    assert binary.positive.tolist() == [True, False, False, True]
    nli = read_gold(dataset(["ENTAILMENT", "refutes", "not_enough_info", "contradiction"], "classes"), "test")
    assert isinstance(nli, NliGold)
    assert nli.classes == ("entailment", "contradiction", "neutral", "contradiction")
    assert nli.positive.tolist() == [True, False, False, False]
    graded = read_gold(dataset([0.5, 2.0], "scores"), "test")
    assert isinstance(graded, GradedGold)
    assert graded.grades.tolist() == [0.5, 2.0]
    assert graded.positive is None
    assert [gold.main_measure for gold in (binary, nli, graded)] == ["AP", "accuracy (3 classes)", "Spearman"]


def test_unusable_labels_are_rejected():
    with pytest.raises(DataFormatError, match="split 'test' has no positive pair"):
        read_gold(dataset(["0", "0"]), "test")
    with pytest.raises(DataFormatError, match="split 'test' has no negative pair"):
        read_gold(dataset(["1", "1"]), "test")
    with pytest.raises(DataFormatError, match="pair 'test-1' has the class 'sport'; known are yes/no labels and"):
        read_gold(dataset(["entailment", "sport"], "classes"), "test")
    with pytest.raises(DataFormatError, match="split 'dev' was not read; read: test"):
        read_gold(dataset(["0", "1"]), "dev")
    nli = NliGold(("entailment", "neutral", "contradiction", "neutral"))
    with pytest.raises(InputError, match="the classes need thresholds fitted on another split; add a dev split"):
        measure_all(nli, np.zeros(4), ALL, None)


def test_measures_use_only_the_pairs_at_the_positions():
    gold = BinaryGold(np.array([True, False, True, False]))
    part = np.array([0, 3, 3])
    assert measure_all(gold, np.array([1.0, 2.0, 0.0]), part, None) == {"AP": 1 / 2, "AUC": 1 / 2}
    measures = measure_all(gold, np.array([1.0, 2.0, 0.0]), part, (0.5, 0.5))
    assert measures == pytest.approx({"accuracy": 2 / 3, "F1": 2 / 3, "AP": 1 / 2, "AUC": 1 / 2})
    assert gold.fit(np.array([3.0, 1.0]), np.array([0, 1])) == (2.0, 2.0)
    graded = GradedGold(np.array([0.0, 5.0, 1.0, 2.0]))
    assert measure_all(graded, np.array([1.0, 2.0, 3.0]), np.array([2, 3, 1]), None)["Spearman"] == pytest.approx(1)
    assert graded.fit(np.zeros(4), ALL) is None


def test_values_of_single_pairs_by_hand():
    binary = BinaryGold(np.array([True, False, True, False]))
    scores = np.array([0.9, 0.8, 0.3, 0.1])
    assert binary.item_values(scores, ALL, (0.5, 0.2)).tolist() == [1, 0, 0, 1]
    # Without a threshold: the first positive is above both negatives, the first negative above one positive, ...
    assert binary.item_values(scores, ALL, None).tolist() == [1, 0.5, 0.5, 1]
    assert binary.item_values(np.array([2.0, 1.0, 1.0]), np.array([1, 0, 3]), None).tolist() == [0, 0.25, 0.5]
    nli = NliGold(("entailment", "neutral", "contradiction", "neutral"))
    thresholds = nli.fit(np.array([3.0, 2.0, 1.0, 2.0]), ALL)
    assert thresholds.ordinal == (1.5, 2.5)
    assert nli.item_values(np.array([2.5, 2.6, 0.0, 1.5]), ALL, thresholds).tolist() == [1, 0, 1, 1]
    assert nli.item_values(np.array([1.5, 2.5]), np.array([3, 0]), thresholds).tolist() == [1, 1]
    graded = GradedGold(np.array([0.0, 1.0, 2.0, 3.0]))
    assert graded.item_values(np.array([1.0, 2.0, 3.0, 4.0]), ALL, None).tolist() == [1, 1, 1, 1]
    assert graded.item_values(np.array([4.0, 3.0, 2.0, 1.0]), ALL, None) == pytest.approx([0, 2 / 3, 2 / 3, 0])
    assert graded.item_values(np.array([1.0]), np.array([2]), None).tolist() == [1]
    tied = GradedGold(np.array([0.0, 0.0, 1.0, 1.0]))
    assert tied.item_values(np.array([1.0, 2.0, 3.0, 4.0]), ALL, None) == pytest.approx([5 / 6] * 4)
    assert tied.item_values(np.zeros(4), ALL, None) == pytest.approx([2 / 3] * 4)  # in any order of the pairs


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=2, max_size=12))
def test_item_values_average_to_the_auc(pairs):
    scores, truth = np.array([s for s, _ in pairs], np.float64), np.array([label for _, label in pairs])
    if truth.all() or not truth.any():
        return
    everything = np.arange(len(pairs))
    values = BinaryGold(truth).item_values(scores, everything, None)
    for label in (True, False):
        expected = binary_measurer(scores, truth, thresholds=None)(everything)["AUC"]
        assert values[truth == label].mean() == pytest.approx(expected)
