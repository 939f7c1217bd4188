"""Score features of one query for some rows (``models.score_features``), and their full scores.

The rows are those of an index, or texts that are in none (``models.encoded_texts``): both are scored by this code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from d2llm.core.progress import Advance
from d2llm.core.types import ScoreFeature, Task
from d2llm.models.protocols import PairScorer, VectorStudent
from d2llm.models.score_features import FeatureWeights
from d2llm.store.bm25 import WordIndex
from d2llm.store.word_segment import QueryWords

_SCORED_AT_ONCE = 8_192  # rows: their vectors are in memory together


@runtime_checkable
class RowVectors(Protocol):
    """Vectors of passages by row (``store.view.PassageView``)."""

    def vectors(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Vectors of the given rows [n, dim]."""
        ...


@runtime_checkable
class ScoredRows(RowVectors, Protocol):
    """What the score of passages needs of them, by row (``store.view.PassageView``)."""

    @cached_property
    def words(self) -> WordIndex:
        """Their words."""
        ...

    def best_windows(self, query: NDArray[np.float32], rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """The highest inner product of a query [dim] with a window of each row [n]."""
        ...

    def best_tokens(
        self, queries: NDArray[np.float32], rows: NDArray[np.int64], needed: NDArray[np.float64] | None = None
    ) -> NDArray[np.float32]:
        """The sum of the highest products of a query's tokens [m, dim] with tokens of each row [n].

        Of rows whose sum is below ``needed`` [n], any number between.
        """
        ...


class FeatureParts(NamedTuple):
    """What words, windows and tokens each add to the scores of some rows [n]; None if they do not count."""

    words: NDArray[np.float32] | None = None
    windows: NDArray[np.float32] | None = None
    tokens: NDArray[np.float32] | None = None


class RowFeatures:
    """The weighted sum of the score features of rows, float32."""

    def __init__(
        self,
        index: ScoredRows,
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

    def by_kind(self, rows: NDArray[np.int64]) -> FeatureParts:
        """The score features of some rows [n], by kind."""
        return FeatureParts(
            self._word_scores(rows) if self._passage_weight or self._window_weight else None,
            self._window_scores(rows) if self._vector_weight else None,
            None if self._tokens is None else self._token_scores(self._tokens, rows),
        )

    def _word_scores(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        return self._sum(*self._words.score(self._query, rows))

    def bounds(
        self, rows: NDArray[np.int64], needed_of: Callable[[NDArray[np.float32]], NDArray[np.float32]]
    ) -> NDArray[np.float32]:
        """Upper bounds of the score features of some rows [n], valid in the same float32 arithmetic.

        Args:
            rows: [n].
            needed_of: called with the bounds [n] without tokens; returns the score features that each row must have to
                be of interest. A bound below that is no close one.
        """
        passages = self._passages[rows]
        if self._window_weight:
            words = self._sum(passages, self._words.window_limits(self._query)[rows])
        else:
            words = self._passage_weight * passages
        bounds = self._with_windows(words, rows)
        if self._tokens is None:
            return bounds
        needed = None
        if self._token_weight > 0:
            needed = np.divide(needed_of(bounds) - bounds, self._token_weight, dtype=np.float64)
        return bounds + self._token_scores(self._tokens, rows, needed)

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

    def _token_scores(
        self, tokens: NDArray[np.float32], rows: NDArray[np.int64], needed: NDArray[np.float64] | None = None
    ) -> NDArray[np.float32]:
        return self._token_weight * self._index.best_tokens(tokens, rows, needed)


class RowScorer:
    """Scores rows of ``view`` for one query, and adds its ``score_features``, if any.

    ``prepared`` is the student's scorer for the query, made now unless it is given; None if its score has no bound.
    """

    def __init__(
        self,
        view: RowVectors,
        student: VectorStudent,
        query_vector: NDArray[np.float32],
        task: Task,
        score_features: RowFeatures | None = None,
        prepared: PairScorer | None = None,
    ) -> None:
        self._view = view
        self._student = student
        self._query_vector = query_vector
        self._task: Task = task
        self.score_features = score_features
        self.prepared = prepared or student.prepare(query_vector, task)

    def __call__(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Final logits [n] of the query with the passages at some rows [n]."""
        if len(rows) > _SCORED_AT_ONCE:
            starts = range(0, len(rows), _SCORED_AT_ONCE)
            return np.concatenate([self(rows[start : start + _SCORED_AT_ONCE]) for start in starts])
        vectors = self._view.vectors(rows)
        if self.prepared is None:
            scores = self._student.score(self._query_vector, vectors, self._task)
        else:
            scores = self.prepared(vectors)
        return scores if self.score_features is None else scores + self.score_features(rows)

    def change(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """The interaction as a fraction of its bound, [n] in [-1, 1]; only if there is ``prepared``."""
        assert self.prepared is not None
        return self.prepared.change(self._view.vectors(rows))


def dot_query(
    student: VectorStudent, vector: NDArray[np.float32], task: Task, prepared: PairScorer | None
) -> NDArray[np.float32] | None:
    """A query's vector [dim] for inner products, from its ``prepared`` scorer if it has one; None without such a part.

    It does not depend on the queries read with it: the order of summation in BLAS depends on their number.
    """
    if not student.has_dot:
        return None
    dot = None if prepared is None else prepared.dot_query
    return student.query_vectors(vector[None], task)[0] if dot is None else dot


def mean_of_cosines(tokens: NDArray[np.float32]) -> NDArray[np.float32]:
    """Vectors of a query's tokens [m, dim], scaled so that their products with those of passages sum to a mean cosine.

    The token embeddings have the norm sqrt(dim), those of long queries a smaller one (``models.token_vectors``).
    """
    return np.divide(tokens, max(tokens.size, 1), dtype=np.float32)


def scored_list(
    student_scores: NDArray[np.float32],
    words: WordIndex,
    query: QueryWords,
    rows: NDArray[np.int64],
    grades: Mapping[int, int] | Mapping[int, float],
    terms: Sequence[ScoreFeature],
    best_windows: NDArray[np.float32] | None = None,
    best_tokens: NDArray[np.float32] | None = None,
) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """The scores [n, 1 + terms] of some rows [n], ``student_scores`` first, and their grades [n], 0 if not judged.

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
    scores = np.stack([student_scores, *(values[term] for term in terms)], axis=1)
    return scores, np.array([grades.get(row, 0) for row in rows.tolist()], np.float64)


def score_by_query(
    student: VectorStudent,
    pairs: Sequence[tuple[str, str]],
    queries: Mapping[str, NDArray[np.float32]],
    passages: Mapping[str, NDArray[np.float32]],
    task: Task,
    advance: Advance | None = None,
) -> NDArray[np.float32]:
    """Logits [n] of pairs, all of a query's pairs at once, from the vector [dim] of each query and of each passage.

    ``advance`` is called with the number of pairs of each query.
    """
    rows_of_query: dict[str, list[int]] = {}
    for index, (query, _) in enumerate(pairs):
        rows_of_query.setdefault(query, []).append(index)
    scores = np.empty(len(pairs), np.float32)
    for query, positions in rows_of_query.items():
        vectors = np.stack([passages[pairs[index][1]] for index in positions])
        scores[positions] = student.score(queries[query], vectors, task)
        if advance is not None:
            advance(len(positions))
    return scores
