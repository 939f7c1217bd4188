"""Fits the quality of passages (``models.quality``): which ones are relevant to any query, from their vectors alone.

Source: Chang et al., "Neural Passage Quality Estimation for Static Pruning", SIGIR 2024 (arXiv 2407.12170), which
trains a language model to tell relevant passages from others. Here a linear function of the vector that an index stores
does, so the quality of a passage costs one inner product.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from d2llm.core.errors import InputError
from d2llm.core.progress import progress_bar
from d2llm.data.beir import Dataset
from d2llm.models.quality import PassageQuality, directions
from d2llm.models.student import Student
from d2llm.ops.pair_measures import binary_measurer
from d2llm.training.mining.choose import key_of

_PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
_NUM_FOLDS = 5
_FEWEST = 20  # relevant passages, and others


def fit_quality(
    student: Student, data: Sequence[Dataset], *, split: str = "train", max_passages: int = 20_000, seed: int = 0
) -> PassageQuality:
    """Fit a student's quality of passages to the judgements of a split.

    Passages that some query judges relevant are told from all others of the corpus by ridge regression; its penalty is
    the one with the best mean AUC in five parts that were left out. Each data set counts by itself: what its passages
    have in common with each other, and not with those of other sets, is no quality.

    Args:
        student: makes the vectors.
        data: data sets with judgements of ``split``.
        split: whose judgements; passages that only other splits judge relevant are left out, so that these splits can
            measure the result.
        max_passages: of each corpus, at most so many, drawn at random, are read.
        seed: seed of this draw and of the five parts.

    Raises:
        InputError: there are too few relevant passages, or too few others.
    """
    sets: dict[str, tuple[NDArray[np.float64], NDArray[np.bool_], NDArray[np.int64]]] = {}
    for dataset in data:
        relevant = dataset.relevant_passages([split])
        reserved = dataset.relevant_passages(other for other in dataset.qrels if other != split) - relevant
        ids = sorted({*dataset.passages} - reserved, key=lambda name: key_of(seed, "quality", name))[:max_passages]
        labels = np.array([passage_id in relevant for passage_id in ids], np.bool_)
        if min(labels.sum(), len(labels) - labels.sum()) < _FEWEST:
            raise InputError(
                f"{dataset.name}: {int(labels.sum())} of {len(ids):,} passages are relevant to a query of '{split}', "
                f"but at least {_FEWEST} must be, and {_FEWEST} must not; use another data set"
            )
        with progress_bar(f"encoding passages of {dataset.name}", len(ids)) as advance:
            texts = [dataset.passages[passage_id].full_text for passage_id in ids]
            vectors = student.encode_passages(texts, advance=advance).vectors
        sets[dataset.name] = directions(vectors), labels, np.arange(len(ids)) % _NUM_FOLDS
    by_penalty = {penalty: _aucs(sets, penalty) for penalty in _PENALTIES}
    best = max(_PENALTIES, key=lambda penalty: (np.mean([*by_penalty[penalty].values()]), penalty))
    weights = _ridge([(vectors, labels) for vectors, labels, _ in sets.values()], best)
    return PassageQuality(
        student=student.fingerprint,
        weights=tuple(weights.tolist()),
        num_passages={name: len(labels) for name, (_, labels, _) in sets.items()},
        num_relevant={name: int(labels.sum()) for name, (_, labels, _) in sets.items()},
        auc=by_penalty[best],
    )


def _aucs(
    sets: dict[str, tuple[NDArray[np.float64], NDArray[np.bool_], NDArray[np.int64]]], penalty: float
) -> dict[str, float]:
    """The AUC of each data set, with qualities from fits that left a fifth of all passages out."""
    qualities = {name: np.zeros(len(labels)) for name, (_, labels, _) in sets.items()}
    for fold in range(_NUM_FOLDS):
        weights = _ridge([(vectors[f != fold], labels[f != fold]) for vectors, labels, f in sets.values()], penalty)
        for name, (vectors, _, f) in sets.items():
            # The mean of the fold is subtracted, because only differences within one fit mean anything.
            values = vectors[f == fold] @ weights
            qualities[name][f == fold] = values - values.mean()
    return {
        name: binary_measurer(qualities[name], labels, thresholds=None)(np.arange(len(labels)))["AUC"]
        for name, (_, labels, _) in sets.items()
    }


def _ridge(sets: Sequence[tuple[NDArray[np.float64], NDArray[np.bool_]]], penalty: float) -> NDArray[np.float64]:
    """The w with the least mean over sets of mean (w . x - y)^2, plus penalty |w|^2; x, y less their means in a set."""
    dim = sets[0][0].shape[1]
    products, targets = penalty * np.eye(dim), np.zeros(dim)
    for vectors, labels in sets:
        centred, own = vectors - vectors.mean(axis=0), labels - labels.mean()
        products += centred.T @ centred / len(own) / len(sets)
        targets += centred.T @ own / len(own) / len(sets)
    return np.linalg.solve(products, targets).astype(np.float64, copy=False)
