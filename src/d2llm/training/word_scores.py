"""What words add to the scores of a data set's passages in training (``score_features.in_training``)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from d2llm.data.beir import Dataset
from d2llm.models.score_features import FeatureWeights
from d2llm.store.bm25 import WordIndex


class WordScores:
    """The words' part of the score of any query and passage of one data set, with fixed weights."""

    def __init__(self, dataset: Dataset, weights: FeatureWeights) -> None:
        self._words = WordIndex.from_texts(passage.full_text for passage in dataset.passages.values())
        self._row_of = {passage_id: row for row, passage_id in enumerate(dataset.passages)}
        self._weights = weights

    def __call__(self, query: str, passage_ids: Sequence[str]) -> NDArray[np.float32]:
        """What words add to the scores [n] of some passages of the data set."""
        words = self._words.query(query)
        rows = np.array([self._row_of[passage_id] for passage_id in passage_ids], np.int64)
        passages, windows = self._words.score(words, rows)
        passage_weight, window_weight = self._weights.word_weights(words.limit, words.statistics)
        return passage_weight * passages + window_weight * windows
