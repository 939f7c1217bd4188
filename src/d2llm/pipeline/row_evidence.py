"""What the words of passages add to their scores, for one query on one index (``models.evidence``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from d2llm.core.types import EvidenceTerm, Task
from d2llm.index.words import WordIndex
from d2llm.pipeline.protocols import EvidenceStudent, SearchStudent


@runtime_checkable
class WordedIndex(Protocol):
    """An index that counts words (``index.view.PassageView`` does)."""

    @property
    def words(self) -> WordIndex:
        """BM25 by row; rows behind the index's last may be there."""
        ...


class RowEvidence:
    """The weighted sum of the evidence of rows, float32."""

    def __init__(self, words: WordIndex, text: str, weights: Mapping[EvidenceTerm, float]) -> None:
        """Args: ``weights`` of the student for the query's task."""
        self._words = words
        self._query = words.query(text)
        limit = self._query.limit or 1.0  # a query without a known word has score 0, whatever it is divided by
        self._passage_weight = np.float32(weights.get("words", 0.0) + weights.get("words_share", 0.0) / limit)
        self._window_weight = np.float32(
            weights.get("window_words", 0.0) + weights.get("window_words_share", 0.0) / limit
        )

    def __call__(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Of some rows [n]."""
        passages, windows = self._words.score(self._query, rows)
        return self._sum(passages, windows)

    def bounds(self, num_rows: int) -> NDArray[np.float32]:
        """Of the first rows, what it is at most: below none of the sums, in their own arithmetic."""
        passages = self._words.scores(self._query)[:num_rows]
        if not self._window_weight:
            return self._passage_weight * passages
        return self._sum(passages, self._words.window_limits(self._query)[:num_rows])

    def _sum(self, passages: NDArray[np.float32], windows: NDArray[np.float32]) -> NDArray[np.float32]:
        return self._passage_weight * passages + self._window_weight * windows


def evidence_weights(student: SearchStudent, task: Task) -> Mapping[EvidenceTerm, float]:
    """What a student wants to be added to its scores, by weight; empty where its vectors' score is all."""
    return student.evidence_weights(task) if isinstance(student, EvidenceStudent) else {}


def row_evidence(index: object, text: str, weights: Mapping[EvidenceTerm, float]) -> RowEvidence | None:
    """What an index adds to the scores of a query; None where that is nothing."""
    if not any(weights.values()):
        return None
    assert isinstance(index, WordedIndex), "these scores count words, which the index does not"
    return RowEvidence(index.words, text, weights)
