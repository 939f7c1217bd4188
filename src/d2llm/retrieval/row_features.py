"""Score features: what an index adds to its passages' scores for one query (``models.score_features``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from d2llm.core.errors import IndexMismatchError, InputError
from d2llm.core.types import PART_NAMES, ScoreFeature, Task
from d2llm.models.score_features import FeatureWeights
from d2llm.retrieval.protocols import SearchStudent
from d2llm.retrieval.segments import IndexView
from d2llm.store.bm25 import WordIndex
from d2llm.store.view import PassageView
from d2llm.store.word_segment import QueryWords


class FeatureParts(NamedTuple):
    """What words, windows and tokens each add to the scores of some rows [n]; None if they do not count."""

    words: NDArray[np.float32] | None = None
    windows: NDArray[np.float32] | None = None
    tokens: NDArray[np.float32] | None = None


class RowFeatures:
    """The weighted sum of the score features of rows, float32."""

    def __init__(
        self,
        index: PassageView,
        text: str,
        weights: FeatureWeights,
        dot_query: NDArray[np.float32] | None,
        tokens: NDArray[np.float32] | None = None,
        query_words: QueryWords | None = None,
        nearest: float | None = None,
    ) -> None:
        """Prepare a query.

        Args:
            index: the passages.
            text: the query's text.
            weights: those of the student for the task.
            dot_query: [dim], the query's vector for inner products.
            tokens: [tokens, token_dim], the vectors of its tokens, if these have a weight.
            query_words: its words, if they were weighted already, as those of a corpus of which this is a part.
            nearest: its highest inner product with a passage, if the weights depend on that.
        """
        self._index, self._words = index, index.words
        self._query = self._words.query(text) if query_words is None else query_words
        self._passage_weight, self._window_weight = weights.word_weights(
            self._query.limit, self._query.statistics, nearest
        )
        self._dot_query, self._vector_weight = dot_query, np.float32(weights.terms.get("window_vectors", 0.0))
        self._token_weight, self._tokens = np.float32(weights.terms.get("maxsim", 0.0)), None
        if self._token_weight:
            assert tokens is not None, "the tokens of the query have a weight, but no vectors"
            self._tokens = mean_of_cosines(tokens)

    def __call__(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """The score features of some rows [n]."""
        score_features = self._with_windows(self._word_scores(rows), rows)
        return score_features if self._tokens is None else score_features + self._token_scores(self._tokens, rows)

    def parts(self, rows: NDArray[np.int64]) -> FeatureParts:
        """The score features of some rows [n], by kind."""
        return FeatureParts(
            self._word_scores(rows) if self._passage_weight or self._window_weight else None,
            self._window_scores(rows) if self._vector_weight else None,
            None if self._tokens is None else self._token_scores(self._tokens, rows),
        )

    def _word_scores(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        return self._sum(*self._words.score(self._query, rows))

    def bounds(self, num_rows: int) -> NDArray[np.float32]:
        """Upper bounds of the score features of the first rows, valid in the same float32 arithmetic."""
        passages = self._passages[:num_rows]
        if self._window_weight:
            words = self._sum(passages, self._words.window_limits(self._query)[:num_rows])
        else:
            words = self._passage_weight * passages
        rows = np.arange(num_rows, dtype=np.int64)
        bounds = self._with_windows(words, rows)
        return bounds if self._tokens is None else bounds + self._token_scores(self._tokens, rows)

    @cached_property
    def _passages(self) -> NDArray[np.float32]:
        """BM25 of every row."""
        return self._words.scores(self._query)

    def _sum(self, passages: NDArray[np.float32], windows: NDArray[np.float32]) -> NDArray[np.float32]:
        return self._passage_weight * passages + self._window_weight * windows

    def _with_windows(self, words: NDArray[np.float32], rows: NDArray[np.int64]) -> NDArray[np.float32]:
        return words + self._window_scores(rows) if self._vector_weight else words

    def _window_scores(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        assert self._dot_query is not None, "windows are scored by inner products, which this student does not have"
        return self._vector_weight * self._index.best_windows(self._dot_query, rows)

    def _token_scores(self, tokens: NDArray[np.float32], rows: NDArray[np.int64]) -> NDArray[np.float32]:
        return self._token_weight * self._index.best_tokens(tokens, rows)


def mean_of_cosines(tokens: NDArray[np.float32]) -> NDArray[np.float32]:
    """Vectors of a query's tokens [m, dim], scaled so that their products with those of passages sum to a mean cosine.

    The token embeddings have the norm sqrt(dim), those of long queries a smaller one (``models.token_vectors``).
    """
    return np.divide(tokens, max(tokens.size, 1), dtype=np.float32)


def weights_for(
    index: IndexView,
    student: SearchStudent,
    task: Task,
    requested: FeatureWeights | Mapping[ScoreFeature, float] | None = None,
) -> FeatureWeights:
    """The weights for a search of an index: those requested, else the student's for what the index stores.

    Raises:
        InputError: windows or tokens have a weight, but the index does not store their vectors.
        IndexMismatchError: tokens have a weight, and their vectors in the index were made by another projection.
    """
    if requested is not None and not isinstance(requested, FeatureWeights):
        requested = FeatureWeights(terms=dict(requested))
    stored = index.part_kinds
    weights = student.feature_weights(task, stored=stored) if requested is None else requested
    for kind in weights.part_kinds - stored:
        raise InputError(
            f"{kind}_vectors have a weight, but this index stores no {PART_NAMES[kind]}; index the corpus again with "
            f"--{kind}-vectors (in Python, {kind}_vectors='int4'), or leave that weight out"
        )
    if "token" in weights.part_kinds:
        own = student.token_fingerprint
        if own is None:
            raise InputError(
                "maxsim has a weight, but this student has no token embeddings; train them with `d2llm "
                "fit-tokens`, or leave that weight out"
            )
        if own != index.token_projection:
            raise IndexMismatchError(
                f"this index has the token embeddings of projection {index.token_projection}, but the student has "
                f"{own}; index the corpus again, or search with other score features"
            )
    return weights


def scored_list(
    own: NDArray[np.float32],
    words: WordIndex,
    query: QueryWords,
    rows: NDArray[np.int64],
    grades: Mapping[int, float],
    terms: Sequence[ScoreFeature],
    best_windows: NDArray[np.float32] | None = None,
    best_tokens: NDArray[np.float32] | None = None,
) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """The scores [n, 1 + terms] of some rows [n], the student's ``own`` first, and their grades [n], 0 if not judged.

    The terms are those that ``RowFeatures`` weights; ``best_windows`` [n] are for the term "window_vectors",
    ``best_tokens`` [n] for "maxsim".
    """
    passage_scores, window_scores = words.score(query, rows)
    limit = query.limit or 1.0
    values: dict[ScoreFeature, NDArray[np.float32]] = {
        "bm25": passage_scores,
        "bm25_fraction": passage_scores / limit,
        "window_bm25": window_scores,
        "window_bm25_fraction": window_scores / limit,
    }
    if best_windows is not None:
        values["window_vectors"] = best_windows
    if best_tokens is not None:
        values["maxsim"] = best_tokens
    scores = np.stack([own, *(values[term] for term in terms)], axis=1)
    return scores, np.array([grades.get(row, 0) for row in rows.tolist()], np.float64)
