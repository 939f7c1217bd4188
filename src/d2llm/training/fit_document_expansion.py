"""Fits which words a passage lacks (``models.document_expansion``) to the queries for which passages are relevant."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from d2llm.core.errors import InputError
from d2llm.core.names import counted
from d2llm.core.progress import progress_bar
from d2llm.data.beir import Dataset
from d2llm.models.document_expansion import AMOUNT, NUM_WORDS, DocumentExpansion
from d2llm.models.student import Student
from d2llm.ops.bm25_words import terms
from d2llm.ops.ridge import NUM_FOLDS, PENALTIES, Moments, RidgeSet, folds_of, ridge_weights
from d2llm.training.mining.choose import key_of

_MIN_PASSAGES = 20  # passages with a query
_MIN_QUERIES = 2  # with a word

_Floats = NDArray[np.float64]


class _Passages(NamedTuple):
    """Passages of a data set: texts, and for each the fraction of its queries that have a word, by word."""

    name: str
    texts: list[str]
    fractions: list[dict[str, float]]
    num_queries: Counter[str]
    num_passages_with: Counter[str]
    num_counted: int


def fit_document_expansion(
    student: Student,
    data: Sequence[Dataset],
    *,
    split: str = "train",
    num_words: int = NUM_WORDS,
    amount: float = AMOUNT,
    max_passages: int = 20_000,
    seed: int = 0,
) -> DocumentExpansion:
    """Fit how likely a query for a passage has each word, from the passage's vector.

    Words of at least two queries; a linear function for each, by ridge regression on the fraction of a passage's
    queries that have the word. The penalty is the one with the smallest error on five parts of the passages that were
    left out.

    Args:
        student: makes the vectors.
        data: data sets with judgements of ``split``.
        split: whose queries; passages that are relevant in other splits too are left out, so that these can measure the
            result.
        num_words: words that are added to a passage, at most.
        amount: what part of its predicted count a word gets.
        max_passages: of each data set, at most so many, drawn at random, are read, and as many count rarity.
        seed: seed of this draw.

    Raises:
        InputError: too few passages are relevant to a query, or no word is in two queries.
    """
    sets = [_passages_of(dataset, split, max_passages, seed) for dataset in data]
    num_queries = sum((data_set.num_queries for data_set in sets), Counter[str]())
    vocabulary = sorted(term for term, count in num_queries.items() if count >= _MIN_QUERIES)
    if not vocabulary:
        raise InputError(f"no word is in two of the queries of '{split}'; use a data set with more of them")
    column_of = {term: index for index, term in enumerate(vocabulary)}
    texts = [text for data_set in sets for text in data_set.texts]
    with progress_bar("encoding passages with queries", len(texts)) as advance:
        features = student.encode_passages(texts, advance=advance).vectors.astype(np.float64)
    fractions = np.zeros((len(features), len(vocabulary)))
    for row, by_term in enumerate(fraction for data_set in sets for fraction in data_set.fractions):
        for term, value in by_term.items():
            if term in column_of:
                fractions[row, column_of[term]] = value
    set_of = np.repeat(np.arange(len(sets)), [len(data_set.texts) for data_set in sets])
    whole = RidgeSet(features, fractions, np.concatenate([folds_of(len(data_set.texts)) for data_set in sets]))
    errors = _errors_apart(whole, set_of)
    penalty = min(PENALTIES, key=lambda candidate: float(errors[candidate].sum()))
    usual, middle = fractions.mean(axis=0), features.mean(axis=0)
    variances = np.bincount(set_of, ((fractions - usual) ** 2).sum(axis=1))
    return DocumentExpansion(
        terms=tuple(vocabulary),
        usual=usual.astype(np.float32),
        middle=middle.astype(np.float32),
        weights=ridge_weights([whole], penalty).astype(np.float32),
        rarity=_rarity(vocabulary, sets).astype(np.float32),
        num_passages={data_set.name: len(data_set.texts) for data_set in sets},
        explained={
            data_set.name: round(1 - float(error / max(variance, 1e-12)), 4)
            for data_set, error, variance in zip(sets, errors[penalty], variances, strict=True)
        },
        num_words=num_words,
        amount=amount,
    )


def _passages_of(dataset: Dataset, split: str, max_passages: int, seed: int) -> _Passages:
    reserved = dataset.relevant_passages(other for other in dataset.qrels if other != split)
    queries_of: defaultdict[str, list[set[str]]] = defaultdict(list)
    num_queries = Counter[str]()
    for query_id, ids in dataset.positives(split).items():
        words = {*terms(dataset.queries[query_id].text)}
        fitted = [passage_id for passage_id in ids if passage_id not in reserved]
        if fitted:
            num_queries.update(words)
        for passage_id in fitted:
            queries_of[passage_id].append(words)
    if len(queries_of) < _MIN_PASSAGES:
        raise InputError(
            f"{dataset.name}: has {counted(len(queries_of), 'passage')} relevant to a query of '{split}' and to no "
            f"other split's, but at least {_MIN_PASSAGES} are needed to learn what words passages lack; use another set"
        )
    chosen = sorted(queries_of, key=lambda name: key_of(seed, "document expansion", name))[:max_passages]
    fractions: list[dict[str, float]] = []
    for passage_id in chosen:
        queries = queries_of[passage_id]
        counts = Counter(word for words in queries for word in words)
        fractions.append({word: count / len(queries) for word, count in counts.items()})
    num_with = Counter[str]()
    sample = sorted(dataset.passages, key=lambda name: key_of(seed, "rarity", name))[:max_passages]
    for passage_id in sample:
        num_with.update({*terms(dataset.passages[passage_id].full_text)})
    texts = [dataset.passages[passage_id].full_text for passage_id in chosen]
    return _Passages(dataset.name, texts, fractions, num_queries, num_with, len(sample))


def _rarity(vocabulary: Sequence[str], sets: Sequence[_Passages]) -> _Floats:
    """The idf of each word among the passages of all data sets (``store.bm25``)."""
    num_with = np.array([sum(data_set.num_passages_with[term] for data_set in sets) for term in vocabulary], np.float64)
    num = sum(data_set.num_counted for data_set in sets)
    return np.log1p((num - num_with + 0.5) / (num_with + 0.5))


def _errors_apart(data: RidgeSet, set_of: NDArray[np.int64]) -> dict[float, _Floats]:
    """By penalty, the squared errors in each data set of likelihoods that are predicted from the other four fifths."""
    errors = {penalty: np.zeros(int(set_of.max()) + 1) for penalty in PENALTIES}
    for fold in range(NUM_FOLDS):
        known, rest = data.only(data.folds != fold), data.only(data.folds == fold)
        moments, usual = Moments.of([known]), known.targets.mean(axis=0)
        differences = rest.features - known.features.mean(axis=0)
        for penalty, sums in errors.items():
            predicted = np.maximum(usual + differences @ moments.weights(penalty), 0)
            by_row = ((predicted - rest.targets) ** 2).sum(axis=1)
            sums += np.bincount(set_of[data.folds == fold], by_row, minlength=len(sums))
    return errors
