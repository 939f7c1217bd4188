"""Score features: the terms that an index adds to the score of the vectors.

    z(q, p) = t <U y_q, V y_p> + w max_k t <U y_q, V y_pk> + v mean_i max_j cos(W x_qi, W x_pj)
            + l(q) sum_j w_j e_j(q, p) + B r_q r_p tanh(g(y_q, y_p))

One vector cannot hold everything that a teacher reads in a passage. The added terms use other views of the passage,
all computed from data that an index stores once per passage. y_pk are the vectors of its windows, each encoded on its
own (``ops.bm25_words.windows``). x_qi and x_pj are the states of the backbone for the tokens of query and passage
(``models.token_vectors``). e_j are the BM25 scores of the passage and of its best window, raw and divided by the
query's upper limit, which no passage reaches. The weights w, v and w_j are at least 0, separate for each task, and
fitted on dev (``training.fit_score_features``). l(q) scales the word terms for the query: an exponential function of
how many words it has, what they weigh, how many of them are unknown, and how near the nearest passage is; 1 if not
fitted. BM25 needs a corpus: for texts that are in no index, it is a named index, or tables that
ship (``models.text_scores``).

The weights are stored as ``score_features.json`` in a student's folder. Passage vectors do not depend on them, so an
index is valid for the student with or without them. Vectors of windows and tokens take space and time, so an index may
leave them out; it then uses other weights, fitted without them.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, NonNegativeFloat

from d2llm.core.types import PART_KINDS, PartKind, ScoreFeature, Task
from d2llm.models.fitted_part import FittedPart, FittedValues

VECTOR_TERMS: dict[ScoreFeature, PartKind] = {"window_vectors": "window", "maxsim": "token"}
"""The terms that use vectors of parts of passages, which an index may or may not store; the others use words."""


class WordsFactor(FittedValues):
    """l(q) = exp(offset + slopes * statistics + nearest_slope * nearest): how much words count for one query.

    The statistics are those of ``store.bm25.QueryWords``. ``nearest`` is the highest inner product of the query with a
    passage that may be found: a passage that is very near in the vectors' view makes words less useful.

    The exponent is clipped to ``lowest`` and ``highest``, its range over the queries of the fit, because a larger
    corpus gives words weights outside the range of the fit.
    """

    slopes: tuple[float, ...]
    offset: float
    lowest: float
    highest: float
    nearest_slope: float = 0.0

    def __call__(self, statistics: NDArray[np.floating[Any]], nearest: float | None = None) -> float:
        """The factor l(q), from the statistics [n] of one query.

        Args:
            statistics: of its words.
            nearest: its highest inner product with a passage; required if that has a slope.
        """
        exponent = self.offset + float(np.dot(statistics.astype(np.float64), self.slopes))
        if self.nearest_slope:
            assert nearest is not None, "the weight of words depends on the nearest passage, which was not looked for"
            exponent += self.nearest_slope * nearest
        return math.exp(min(max(exponent, self.lowest), self.highest))


class FeatureWeights(FittedValues):
    """The weights of the terms in the score of an index's passages; the student's own score has weight 1."""

    terms: dict[ScoreFeature, NonNegativeFloat] = Field(default_factory=dict[ScoreFeature, float])
    words_factor: WordsFactor | None = None

    def __bool__(self) -> bool:
        """Whether any term has a weight, in addition to the student's own score."""
        return any(self.terms.values())

    @property
    def counts_words(self) -> bool:
        """Whether BM25 has a weight, for passages or for windows."""
        return any(weight for term, weight in self.terms.items() if term not in VECTOR_TERMS)

    @property
    def part_kinds(self) -> frozenset[PartKind]:
        """The kinds of parts of passages whose vectors have a weight."""
        return frozenset(kind for term, kind in VECTOR_TERMS.items() if self.terms.get(term))

    @property
    def needs_nearest(self) -> bool:
        """Whether the weight of words depends on how near the nearest passage is."""
        return self.counts_words and self.words_factor is not None and bool(self.words_factor.nearest_slope)

    def word_weights(
        self, limit: float, statistics: NDArray[np.floating[Any]], nearest: float | None = None
    ) -> tuple[np.float32, np.float32]:
        """The weights of BM25 of the passage and of its best window for one query.

        Args:
            limit: the query's upper limit, which no passage's BM25 reaches.
            statistics: [n] statistics of the query's words.
            nearest: the query's highest inner product with a passage, if ``needs_nearest``.
        """
        divisor = limit or 1.0  # without a known word all scores are 0
        scale = 1.0 if self.words_factor is None or not self.counts_words else self.words_factor(statistics, nearest)
        passage = self.terms.get("bm25", 0.0) + self.terms.get("bm25_fraction", 0.0) / divisor
        window = self.terms.get("window_bm25", 0.0) + self.terms.get("window_bm25_fraction", 0.0) / divisor
        return np.float32(scale * passage), np.float32(scale * window)

    def without(self, terms: Collection[ScoreFeature]) -> FeatureWeights:
        """The weights without the given terms."""
        return self.model_copy(update={"terms": {term: w for term, w in self.terms.items() if term not in terms}})


class TaskFeatureWeights(FittedValues):
    """The weights of one task; the student's own score has weight 1.

    ``words_factor`` is l(q), None for 1. ``dev`` has two values of nDCG@10 for each data set: with the student's own
    score, and with score features whose weights were fitted without the queries measured; none if the weights are those
    of the student that training started from. ``num_queries`` is the number of dev queries of each data set.
    ``without_parts`` applies to an index without the vectors of parts that these weights need; None if they need none.
    """

    weights: dict[ScoreFeature, NonNegativeFloat]
    words_factor: WordsFactor | None = None
    dev: dict[str, tuple[float, float]]
    num_queries: dict[str, int]
    without_parts: TaskFeatureWeights | None = None

    def inherited(self) -> TaskFeatureWeights:
        """The same weights for a student that was trained from this one, on which they were not measured."""
        lesser = None if self.without_parts is None else self.without_parts.inherited()
        return self.model_copy(update={"dev": {}, "num_queries": {}, "without_parts": lesser})


class ScoreFeatures(FittedPart):
    """The feature weights of one student, by task; a task without an entry has none. False if none has any."""

    kind: ClassVar[str] = "score_features"
    file_name: ClassVar[str] = "score_features.json"
    without: ClassVar[str] = "search without score features"

    tasks: dict[Task, TaskFeatureWeights] = Field(default={})

    def __bool__(self) -> bool:
        """Whether any task has score features."""
        return bool(self.tasks)

    def weights(self, task: Task, *, stored: Collection[PartKind] = PART_KINDS) -> FeatureWeights:
        """The non-zero weights of one task; ``stored`` are the parts of passages whose vectors the index has."""
        fitted = self.tasks.get(task)
        while fitted is not None:
            kept: dict[ScoreFeature, float] = {term: weight for term, weight in fitted.weights.items() if weight}
            weights = FeatureWeights(terms=kept, words_factor=fitted.words_factor)
            if weights.part_kinds <= set(stored):
                return weights
            fitted = fitted.without_parts
        return FeatureWeights()

    def inherited(self, *, has_tokens: bool) -> ScoreFeatures:
        """The same weights for a student that was trained from this one.

        Without ``has_tokens`` it has no token embeddings.
        """
        score_features = self if has_tokens else self.without_tokens()
        return ScoreFeatures(tasks={task: fitted.inherited() for task, fitted in score_features.tasks.items()})

    def without_tokens(self) -> ScoreFeatures:
        """The weights for indexes without token embeddings; a task without such weights has no score features."""
        tasks: dict[Task, TaskFeatureWeights] = {}
        for task, fitted in self.tasks.items():
            left: TaskFeatureWeights | None = fitted
            while left is not None and left.weights.get("maxsim"):
                left = left.without_parts
            if left is not None:
                tasks[task] = left
        return self.model_copy(update={"tasks": tasks})
