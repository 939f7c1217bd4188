"""Evidence: what an index adds to its passages' scores for one query (``models.evidence``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from d2llm.core.errors import InputError
from d2llm.core.types import EvidenceTerm, Task
from d2llm.models.evidence import EvidenceWeights
from d2llm.retrieval.protocols import EvidenceStudent, SearchStudent
from d2llm.store.bm25 import QueryWords, WordIndex
from d2llm.store.view import PassageView


class EvidenceParts(NamedTuple):
    """What words and windows each add to the scores of some rows [n]; None if they do not count."""

    words: NDArray[np.float32] | None
    windows: NDArray[np.float32] | None


class RowEvidence:
    """The weighted sum of the word and window evidence of rows, float32."""

    def __init__(
        self,
        index: PassageView,
        text: str,
        weights: EvidenceWeights,
        anchor: NDArray[np.float32] | None,
    ) -> None:
        """Args: ``weights`` of the student for the task; ``anchor`` [dim], the query's vector for inner products."""
        self._index, self._words = index, index.words
        self._query = self._words.query(text)
        self._passage_weight, self._window_weight = weights.word_weights(self._query.limit, self._query.statistics)
        self._anchor, self._vector_weight = anchor, np.float32(weights.terms.get("window_vectors", 0.0))

    def __call__(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """The evidence of some rows [n]."""
        return self._with_windows(self._word_evidence(rows), rows)

    def parts(self, rows: NDArray[np.int64]) -> EvidenceParts:
        """The evidence of some rows [n], by kind."""
        return EvidenceParts(
            self._word_evidence(rows) if self._passage_weight or self._window_weight else None,
            self._window_evidence(rows) if self._vector_weight else None,
        )

    def _word_evidence(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        if not self._window_weight:
            return self._passage_weight * self._passages[rows]
        return self._sum(*self._words.score(self._query, rows))

    def bounds(self, num_rows: int) -> NDArray[np.float32]:
        """Upper bounds of the evidence of the first rows, valid in the same float32 arithmetic."""
        passages = self._passages[:num_rows]
        if self._window_weight:
            words = self._sum(passages, self._words.window_limits(self._query)[:num_rows])
        else:
            words = self._passage_weight * passages
        return self._with_windows(words, np.arange(num_rows, dtype=np.int64))

    @cached_property
    def _passages(self) -> NDArray[np.float32]:
        """BM25 of every row."""
        return self._words.scores(self._query)

    def _sum(self, passages: NDArray[np.float32], windows: NDArray[np.float32]) -> NDArray[np.float32]:
        return self._passage_weight * passages + self._window_weight * windows

    def _with_windows(self, words: NDArray[np.float32], rows: NDArray[np.int64]) -> NDArray[np.float32]:
        return words + self._window_evidence(rows) if self._vector_weight else words

    def _window_evidence(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        assert self._anchor is not None, "windows are scored by inner products, which this student does not have"
        return self._vector_weight * self._index.best_windows(self._anchor, rows)


def evidence_weights(student: SearchStudent, task: Task, *, windows: bool = True) -> EvidenceWeights:
    """The weights of the evidence in a student's score; empty if only the vectors count.

    ``windows``: whether the index stores the vectors of windows.
    """
    if not isinstance(student, EvidenceStudent):
        return EvidenceWeights()
    return student.evidence_weights(task, windows=windows)


def weights_for(
    index: PassageView,
    student: SearchStudent,
    task: Task,
    requested: EvidenceWeights | Mapping[EvidenceTerm, float] | None = None,
) -> EvidenceWeights:
    """The weights for a search of an index: those requested, else the student's for what the index stores.

    Raises:
        InputError: windows have a weight, but the index stores no vectors of windows.
    """
    if requested is not None and not isinstance(requested, EvidenceWeights):
        requested = EvidenceWeights(terms=dict(requested))
    weights = evidence_weights(student, task) if requested is None else requested
    if not weights.counts_windows or index.windows is not None:
        return weights
    if requested is not None:
        raise InputError(
            "window_vectors have a weight, but this index stores no vectors of windows; index the corpus again with "
            "--window-vectors (in Python, window_vectors='int3'), or leave that weight out"
        )
    return evidence_weights(student, task, windows=False)


def scored_list(
    own: NDArray[np.float32],
    words: WordIndex,
    query: QueryWords,
    rows: NDArray[np.int64],
    grades: Mapping[int, float],
    terms: Sequence[EvidenceTerm],
    best_windows: NDArray[np.float32] | None = None,
) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """The scores [n, 1 + terms] of some rows [n], the student's ``own`` first, and their grades [n], 0 if not judged.

    The terms are those that ``RowEvidence`` weights; ``best_windows`` [n] are for the term "window_vectors".
    """
    passage_scores, window_scores = words.score(query, rows)
    limit = query.limit or 1.0
    values: dict[EvidenceTerm, NDArray[np.float32]] = {
        "words": passage_scores,
        "words_share": passage_scores / limit,
        "window_words": window_scores,
        "window_words_share": window_scores / limit,
    }
    if best_windows is not None:
        values["window_vectors"] = best_windows
    scores = np.stack([own, *(values[term] for term in terms)], axis=1)
    return scores, np.array([grades.get(row, 0) for row in rows.tolist()], np.float64)
