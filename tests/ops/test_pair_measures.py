import numpy as np
import pytest

from d2llm.core.errors import InputError
from d2llm.ops.pair_measures import (
    NliThresholds,
    accuracy_at,
    best_threshold,
    binary_measurer,
    fit_nli,
    graded_measurer,
    nli_measurer,
    ordinal_answers,
    ordinal_thresholds,
    pearson,
)

SCORES = [0.9, 0.8, 0.7, 0.6, 0.5, 0.4]
LABELS = [True, True, False, True, False, False]


def binary_measures(scores, labels, thresholds=None):
    return binary_measurer(scores, labels, thresholds=thresholds)(np.arange(len(scores)))


def average_precision(scores, labels):
    return binary_measures(scores, labels)["AP"]


def roc_auc(scores, labels):
    return binary_measures(scores, labels)["AUC"]


def f1_at(scores, labels, threshold):
    return binary_measures(scores, labels, (0.0, threshold))["F1"]


def nli_measures(scores, classes, thresholds):
    return nli_measurer(scores, classes, thresholds=thresholds)(np.arange(len(scores)))


def precision_and_recall_at(scores, labels, threshold):
    """NLI reports these two, at the threshold of the best F1, for entailment against contradiction."""
    classes = ["entailment" if label else "contradiction" for label in labels]
    thresholds = NliThresholds(contradiction=0.0, f1=threshold, other=0.0, ordinal=(0.0, 0.0))
    measures = nli_measures(scores, classes, thresholds)
    return measures["precision"], measures["recall"]


def graded_measures(scores, gold):
    return graded_measurer(scores, gold)(np.arange(len(scores)))


def spearman(first, second):
    return graded_measures(first, second)["Spearman"]


def test_threshold_is_the_highest_of_the_best_midpoints():
    # Accuracy 5/6 between .8 and .7 and between .6 and .5; F1 4/5 at the first, 6/7 at the second.
    assert best_threshold(SCORES, LABELS) == pytest.approx(0.75)
    assert best_threshold(SCORES, LABELS, measure="f1") == pytest.approx(0.55)


def test_threshold_never_separates_equal_scores():
    # The best cut of the sorted list is between the two 1s, but no threshold separates them.
    threshold = best_threshold([2.0, 1.0, 1.0, 0.0], [True, True, False, False])
    assert threshold == 1.5
    assert accuracy_at([2.0, 1.0, 1.0, 0.0], [True, True, False, False], threshold) == 0.75


def test_threshold_when_one_label_for_all_is_best():
    assert best_threshold([3.0, 2.0, 1.0], [False, True, True]) == 1.0
    lowest = best_threshold([3.0, 2.0, 1.0], [False, False, True])
    assert lowest == np.nextafter(3.0, 4.0)
    assert f1_at([3.0, 2.0, 1.0], [False, False, True], lowest) == 0


def test_threshold_between_neighbouring_floats():
    low = 1.0
    high = float(np.nextafter(low, 2))
    assert best_threshold([high, low], [True, False]) == high


def test_measures_at_a_threshold_without_matches():
    assert precision_and_recall_at(SCORES, LABELS, 2.0) == (0, 0)
    assert f1_at(SCORES, LABELS, 2.0) == 0


def test_binary_measures_by_hand():
    values = binary_measures(SCORES, LABELS, (0.75, 0.55))
    assert values == pytest.approx(
        {
            "accuracy": 5 / 6,
            "F1": 6 / 7,
            "AP": (1 + 1 + 3 / 4) / 3,
            "AUC": 8 / 9,  # of 3 x 3 pairs, (.6, .7) is the wrong way round
        }
    )


def test_measures_match_scikit_learn():
    sklearn = pytest.importorskip("sklearn.metrics")
    draw = np.random.default_rng(0)
    for _ in range(30):
        scores, labels = draw.integers(0, 12, 60).astype(float), draw.random(60) < 0.4
        assert average_precision(scores, labels) == pytest.approx(sklearn.average_precision_score(labels, scores))
        assert roc_auc(scores, labels) == pytest.approx(sklearn.roc_auc_score(labels, scores))
        assert f1_at(scores, labels, 5.0) == pytest.approx(sklearn.f1_score(labels, scores >= 5))
        expected = sklearn.precision_score(labels, scores >= 5), sklearn.recall_score(labels, scores >= 5)
        assert precision_and_recall_at(scores, labels, 5.0) == pytest.approx(expected)


def test_correlations_match_scipy():
    stats = pytest.importorskip("scipy.stats")
    draw = np.random.default_rng(1)
    for _ in range(30):
        first = draw.integers(0, 6, 40).astype(float)
        second = first + draw.integers(-3, 4, 40)
        assert pearson(first, second) == pytest.approx(stats.pearsonr(first, second).statistic)
        assert spearman(first, second) == pytest.approx(stats.spearmanr(first, second).statistic)


def test_correlations_by_hand():
    # deviations (-1, 0, 1) and (-1, 2, -1) / 3 -> 0; ranks with a tie (1, 2.5, 2.5) against (1, 2, 3)
    assert pearson([1, 2, 3], [1, 2, 1]) == pytest.approx(0)
    assert pearson([1, 2, 4], [-1, -2, -4]) == pytest.approx(-1)
    assert spearman([1, 5, 5], [0, 1, 100]) == pytest.approx(1.5 / np.sqrt(1.5 * 2))
    assert graded_measures([1, 2, 4], [1, 2, 3]) == pytest.approx({"Pearson": 3 / np.sqrt(14 / 3 * 2), "Spearman": 1})


@pytest.mark.filterwarnings("error")
def test_correlation_of_a_constant_is_zero_without_a_warning():
    # .1 + .2 is not exact in binary: the deviations from the mean are not exactly 0.
    assert pearson([0.1 + 0.2] * 7, [1, 2, 3, 4, 5, 6, 7]) == spearman([1.0] * 3, [1, 2, 3]) == 0
    assert pearson([1e-300, 2e-300, 3e-300], [1e300, 2e300, 3e300]) == pytest.approx(1)


def test_three_classes_by_hand():
    scores = [6.0, 5.0, 4.0, 3.0, 2.0, 1.0]
    classes = [2, 2, 1, 2, 0, 0]
    assert ordinal_thresholds(scores, classes) == (3.5, 4.5)  # (2.5, 4.5) is as good
    answers = ordinal_answers(np.array(scores), (3.5, 4.5))
    assert (answers == classes).mean() == pytest.approx(5 / 6)


def test_three_classes_where_the_middle_one_is_best_left_out():
    lower, upper = ordinal_thresholds([3.0, 2.0, 1.0, 0.0, 0.0], [2, 2, 0, 0, 1])
    assert lower == upper == 1.5


NLI_SCORES = [5.0, 4.0, 3.0, 2.0, 1.0, 0.0]
NLI = ["entailment", "neutral", "entailment", "neutral", "contradiction", "contradiction"]


def test_nli_thresholds_by_hand():
    thresholds = fit_nli(NLI_SCORES, NLI)
    assert thresholds == NliThresholds(contradiction=2.0, f1=2.0, other=4.5, ordinal=(1.5, 4.5))


def test_nli_measures_by_hand():
    thresholds = NliThresholds(contradiction=0.5, f1=4.0, other=2.5, ordinal=(0.5, 3.5))
    assert nli_measures(NLI_SCORES, NLI, thresholds) == pytest.approx(
        {
            "accuracy (entailment/contradiction)": 3 / 4,  # the contradiction at 1 is called entailment
            "AP": 1.0,  # the neutral pair at 4 is left out
            "precision": 1.0,
            "recall": 1 / 2,
            "accuracy (entailment/other)": 5 / 6,
            "accuracy (3 classes)": 3 / 6,  # right: 5, 2, 0
        }
    )


@pytest.mark.parametrize("measure", [best_threshold, average_precision, roc_auc])
@pytest.mark.parametrize(("labels", "missing"), [([True, True], "negative"), ([False, False], "positive")])
def test_both_labels_are_needed(measure, labels, missing):
    with pytest.raises(InputError, match=f"none of the 2 pairs is {missing}"):
        measure([0.1, 0.2], labels)


@pytest.mark.parametrize("invalid", [float("nan"), float("inf")])
@pytest.mark.parametrize("measure", [best_threshold, average_precision, roc_auc, pearson, spearman, graded_measures])
def test_scores_must_be_finite(measure, invalid):
    with pytest.raises(InputError, match="1 of 3 numbers are NaN or infinite"):
        measure([0.1, invalid, 0.3], [0, 1, 1])


def test_other_invalid_input_is_rejected():
    with pytest.raises(InputError, match="true/false"):
        average_precision([1.0, 2.0], [0, 2])
    with pytest.raises(InputError, match="shapes"):
        accuracy_at([1.0, 2.0], [True], 0.0)
    with pytest.raises(InputError, match="no pairs"):
        pearson([], [])
    with pytest.raises(InputError, match="nothing to correlate"):
        graded_measures([1.0, 2.0], [3.0, 3.0])
    with pytest.raises(InputError, match="class 1"):
        ordinal_thresholds([1.0, 2.0], [0, 2])
    with pytest.raises(InputError, match="unknown NLI classes: maybe"):
        fit_nli([1.0], ["maybe"])
    with pytest.raises(InputError, match="'neutral'"):
        fit_nli([1.0, 2.0], ["entailment", "contradiction"])
    with pytest.raises(InputError, match="none of the 1 pairs is negative"):
        nli_measures([1.0, 2.0], ["entailment", "neutral"], NliThresholds(0.0, 0.0, 0.0, (0.0, 0.0)))


class TestResamples:
    """Measuring resamples of the same pairs: validated and sorted once, then each draw is measured as its own list."""

    SCORES = np.array([0.5, 0.5, 0.25, 1.0, 0.75, 0.5, -0.0, 0.0])
    CLASSES = (
        "entailment",
        "neutral",
        "contradiction",
        "entailment",
        "neutral",
        "contradiction",
        "neutral",
        "entailment",
    )
    THRESHOLDS = NliThresholds(contradiction=0.4, f1=0.3, other=0.6, ordinal=(0.3, 0.6))

    def draws(self):
        rng = np.random.default_rng(0)
        return [rng.integers(0, 8, 8) for _ in range(100)]

    def test_each_draw_has_the_measures_of_its_own_pairs(self):
        labels = np.array([name == "entailment" for name in self.CLASSES])
        grades = np.arange(8) % 3
        binary = binary_measurer(self.SCORES, labels, thresholds=(0.6, 0.3))
        nli = nli_measurer(self.SCORES, self.CLASSES, thresholds=self.THRESHOLDS)
        graded = graded_measurer(self.SCORES, grades)
        metrics = pytest.importorskip("sklearn.metrics")
        num_measured = 0
        for rows in self.draws():
            scores, classes = self.SCORES[rows], [self.CLASSES[row] for row in rows.tolist()]
            if len(set(classes)) < 3 or len(set(grades[rows].tolist())) < 2:
                continue
            num_measured += 1
            measures = binary(rows)
            assert measures == binary_measures(scores, labels[rows], (0.6, 0.3))
            assert measures["AP"] == pytest.approx(metrics.average_precision_score(labels[rows], scores))
            assert measures["AUC"] == pytest.approx(metrics.roc_auc_score(labels[rows], scores))
            assert measures["F1"] == pytest.approx(metrics.f1_score(labels[rows], scores >= 0.3))
            assert measures["accuracy"] == pytest.approx(metrics.accuracy_score(labels[rows], scores >= 0.6))
            assert nli(rows) == nli_measures(scores, classes, self.THRESHOLDS)
            assert graded(rows) == graded_measures(scores, grades[rows])
        assert num_measured > 30

    def test_a_draw_of_one_label_is_refused(self):
        measure = binary_measurer(SCORES, LABELS, thresholds=None)
        assert set(measure(np.array([0, 0, 2]))) == {"AP", "AUC"}
        with pytest.raises(InputError, match="none of the 3 pairs is negative"):
            measure(np.array([0, 1, 3]))
        with pytest.raises(InputError, match="none of the 2 pairs is positive"):
            nli_measurer([1.0, 2.0, 3.0], ["contradiction", "neutral", "entailment"], thresholds=self.THRESHOLDS)(
                np.array([0, 0, 1])
            )

    def test_invalid_input_is_rejected_before_the_first_draw(self):
        with pytest.raises(InputError, match="NaN or infinite"):
            binary_measurer([1.0, np.nan], [True, False], thresholds=None)
        with pytest.raises(InputError, match="labels must be"):
            binary_measurer([1.0, 2.0], [0, 2], thresholds=None)
