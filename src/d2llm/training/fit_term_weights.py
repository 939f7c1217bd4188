"""Fits how much each word of a query counts in BM25 (``models.term_weights``) to the judgements of data sets."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

import numpy as np
from numpy.typing import NDArray

from d2llm.core.errors import InputError
from d2llm.core.names import counted
from d2llm.data.beir import Dataset
from d2llm.models.student import Student
from d2llm.models.term_weights import TermWeights
from d2llm.ops.bm25_words import terms
from d2llm.ops.ridge import RidgeSet, choose_penalty, folds_of, ridge_weights
from d2llm.training.mining.choose import key_of

_MIN_QUERIES = 20  # queries


def fit_term_weights(
    student: Student, data: Sequence[Dataset], *, split: str = "train", max_queries: int = 2_000, seed: int = 0
) -> TermWeights:
    """Fit the factors of a query's words to the fraction of its relevant passages that contain each of them.

    A linear function of the words' states, by ridge regression; its penalty is the one whose factors explain
    most of the fractions' variance in five parts of the queries that were left out.

    Args:
        student: makes the states.
        data: data sets with judgements of ``split``.
        split: whose queries.
        max_queries: of each data set, at most so many, drawn at random.
        seed: seed of this draw and of the five parts.

    Raises:
        InputError: there are too few queries with a relevant passage, or the student gives no states of words.
    """
    sets: dict[str, RidgeSet] = {}
    for dataset in data:
        positives = {query_id: ids for query_id, ids in dataset.positives(split).items() if ids}
        chosen = sorted(positives, key=lambda query_id: key_of(seed, "term weights", query_id))[:max_queries]
        if len(chosen) < _MIN_QUERIES:
            raise InputError(
                f"{dataset.name}: '{split}' has {counted(len(chosen), 'query')} with a relevant passage, but at least "
                f"{_MIN_QUERIES} are needed to weigh words; use another data set"
            )
        passages = {passage_id for query_id in chosen for passage_id in positives[query_id]}
        terms_of = {passage_id: {*terms(dataset.passages[passage_id].full_text)} for passage_id in passages}
        states: list[NDArray[np.float32]] = []
        fractions: list[float] = []
        folds: list[int] = []
        words = student.term_states([dataset.queries[query_id].text for query_id in chosen])
        for query_id, word_states, fold in zip(chosen, words, folds_of(len(chosen)).tolist(), strict=True):
            for term, state in word_states.items():
                states.append(state)
                fractions.append(fmean(term in terms_of[passage_id] for passage_id in positives[query_id]))
                folds.append(fold)
        sets[dataset.name] = RidgeSet(np.array(states, np.float64), np.array(fractions), np.array(folds, np.int64))
    fitted = [*sets.values()]
    penalty, explained = choose_penalty(fitted, _explained)
    weights = ridge_weights(fitted, penalty)
    usual = fmean(float(one.targets.mean()) for one in fitted)
    middle = np.mean([one.features.mean(axis=0) for one in fitted], axis=0)
    return TermWeights(
        weights=tuple(weights.tolist()),
        offset=usual - float(middle @ weights),
        usual=usual,
        num_words={name: len(one.targets) for name, one in sets.items()},
        explained=dict(zip(sets, explained, strict=True)),
    )


def _explained(predictions: NDArray[np.float64], targets: NDArray[np.float64]) -> float:
    """The fraction of the targets' variance [n] that predictions [n] of their differences from the mean explain."""
    differences = targets - targets.mean()
    return 1 - float(((predictions - differences) ** 2).mean() / max(float(differences.var()), 1e-12))
