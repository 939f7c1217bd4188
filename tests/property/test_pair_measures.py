from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from d2llm.ops.pair_measures import (
    best_threshold,
    binary_measurer,
    graded_measurer,
    ordinal_answers,
    ordinal_thresholds,
    pearson,
)
from examples import examples

# Few distinct values, so that ties are common
tied = st.sampled_from([-2.0, -0.0, 0.0, 1.0, 1.0000001, 5e-324, 1e308, -1e308])
score = tied | st.floats(-1e308, 1e308)
binary = st.lists(st.tuples(score, st.booleans()), min_size=2, max_size=25)
ordinal = st.lists(st.tuples(score, st.integers(0, 2)), min_size=3, max_size=9)
PROPERTY = settings(max_examples=examples(50))


def unzip(pairs):
    scores, labels = zip(*pairs, strict=True)
    return list(scores), list(labels)


def binary_measures(scores, labels, threshold=None):
    thresholds = None if threshold is None else (threshold, threshold)
    return binary_measurer(scores, labels, thresholds=thresholds)(np.arange(len(scores)))


def spearman(first, second):
    return graded_measurer(first, second)(np.arange(len(first)))["Spearman"]


def every_cut(scores):
    """A threshold for every way to split the scores: each score, and one above all."""
    return [*sorted(set(scores)), float(np.nextafter(max(scores), np.inf))]


@PROPERTY
@given(pairs=binary)
def test_best_threshold_is_optimal(pairs):
    scores, labels = unzip(pairs)
    assume(0 < sum(labels) < len(labels))
    for measure, name in (("accuracy", "accuracy"), ("f1", "F1")):
        best = binary_measures(scores, labels, best_threshold(scores, labels, measure=measure))[name]
        assert best == max(binary_measures(scores, labels, cut)[name] for cut in every_cut(scores))


@PROPERTY
@given(pairs=ordinal)
def test_ordinal_thresholds_are_optimal(pairs):
    scores, classes = unzip(pairs)
    assume(set(classes) == {0, 1, 2})
    lower, upper = ordinal_thresholds(scores, classes)
    assert lower <= upper
    cuts = itertools.combinations_with_replacement(every_cut(scores), 2)

    def num_right(thresholds):
        return (ordinal_answers(np.array(scores), thresholds) == classes).sum()

    assert num_right((lower, upper)) == max(num_right(pair) for pair in cuts)


@PROPERTY
@given(pairs=binary)
def test_auc_counts_pairs_of_positive_and_negative(pairs):
    scores, labels = unzip(pairs)
    positives = [score for score, label in pairs if label]
    negatives = [score for score, label in pairs if not label]
    assume(positives and negatives)
    wins = sum((positive > negative) + (positive == negative) / 2 for positive in positives for negative in negatives)
    assert binary_measures(scores, labels)["AUC"] == pytest.approx(wins / (len(positives) * len(negatives)))


@PROPERTY
@given(pairs=binary)
def test_average_precision_is_a_mean_over_the_positives(pairs):
    scores, labels = unzip(pairs)
    positives = [score for score, label in pairs if label]
    assume(positives and len(positives) < len(pairs))
    precisions = [
        sum(other_score >= positive for other_score in positives)
        / sum(other_score >= positive for other_score in scores)
        for positive in positives
    ]
    assert binary_measures(scores, labels)["AP"] == pytest.approx(sum(precisions) / len(positives))


@PROPERTY
@given(pairs=binary, data=st.data())
def test_order_of_the_pairs_does_not_matter(pairs, data):
    scores, labels = unzip(pairs)
    assume(0 < sum(labels) < len(labels))
    moved_scores, moved_labels = unzip(data.draw(st.permutations(pairs)))
    assert best_threshold(moved_scores, moved_labels) == best_threshold(scores, labels)
    moved, measures = binary_measures(moved_scores, moved_labels), binary_measures(scores, labels)
    assert moved["AP"] == pytest.approx(measures["AP"])
    assert spearman(moved_scores, moved_labels) == pytest.approx(spearman(scores, labels), abs=1e-9)


@pytest.mark.filterwarnings("error")
@PROPERTY
@given(pairs=st.lists(st.tuples(score, score), min_size=1, max_size=20))
def test_correlations_are_symmetric_and_bounded(pairs):
    first, second = unzip(pairs)
    value = pearson(first, second)
    assert -1 <= value <= 1
    assert pearson(second, first) == pytest.approx(value, abs=1e-12)
    assert pearson(first, first) == pytest.approx(1.0 if len(set(first)) > 1 else 0.0)
    assume(len(set(first)) > 1 and len(set(second)) > 1)  # grades that are all the same are refused
    value = spearman(first, second)
    assert -1 <= value <= 1
    assert spearman(second, first) == pytest.approx(value, abs=1e-12)
    assert spearman(first, first) == pytest.approx(1.0)
