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
from d2llm.ops.ridge import RidgeSet, choose_penalty, folds_of, ridge_weights
from d2llm.training.mining.choose import key_of

_MIN_PASSAGES = 20  # relevant passages, and others


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
    sets: dict[str, RidgeSet] = {}
    for dataset in data:
        relevant = dataset.relevant_passages([split])
        reserved = dataset.relevant_passages(other for other in dataset.qrels if other != split) - relevant
        ids = sorted({*dataset.passages} - reserved, key=lambda name: key_of(seed, "quality", name))[:max_passages]
        labels = np.array([passage_id in relevant for passage_id in ids], np.float64)
        if min(labels.sum(), len(labels) - labels.sum()) < _MIN_PASSAGES:
            raise InputError(
                f"{dataset.name}: {int(labels.sum())} of {len(ids):,} passages are relevant to a query of '{split}', "
                f"but at least {_MIN_PASSAGES} must be, and {_MIN_PASSAGES} must not; use another data set"
            )
        with progress_bar(f"encoding passages of {dataset.name}", len(ids)) as advance:
            texts = [dataset.passages[passage_id].full_text for passage_id in ids]
            vectors = student.encode_passages(texts, advance=advance).vectors
        sets[dataset.name] = RidgeSet(directions(vectors), labels, folds_of(len(ids)))
    fitted = [*sets.values()]
    penalty, aucs = choose_penalty(fitted, _auc)
    return PassageQuality(
        weights=tuple(ridge_weights(fitted, penalty).tolist()),
        num_passages={name: len(one.targets) for name, one in sets.items()},
        num_relevant={name: int(one.targets.sum()) for name, one in sets.items()},
        auc=dict(zip(sets, aucs, strict=True)),
    )


def _auc(qualities: NDArray[np.float64], labels: NDArray[np.float64]) -> float:
    return binary_measurer(qualities, labels > 0, thresholds=None)(np.arange(len(labels)))["AUC"]
