"""An index as the corpus of texts that are not in it: they get the scores that they would have there."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from d2llm.core.errors import ShardAwayError
from d2llm.core.types import Query, Task
from d2llm.models.row_features import dot_query
from d2llm.models.text_scores import RowFormats, TextQuery
from d2llm.retrieval.feature_weights import weights_for
from d2llm.retrieval.searched_segments import Missing, SearchedSegments
from d2llm.retrieval.segments import CachedBounds, IndexView, SegmentQuery
from d2llm.retrieval.settings import SearchSettings
from d2llm.store.index_spec import StoredSpec
from d2llm.store.word_segment import CountedTerms, QueryWords, WordStatistics

if TYPE_CHECKING:
    from d2llm.models.protocols import PairScorer, SearchStudent


class IndexCorpus:
    """A version of an index as a ``models.text_scores.ScoringCorpus``."""

    def __init__(
        self, index: IndexView, student: SearchStudent, task: Task | None = None, *, allow_missing: bool = False
    ) -> None:
        """Prepare what depends on no query.

        Raises:
            IndexMismatchError: another student made the index.
        """
        index.storage.check_student(student.fingerprint)
        self.name = index.folder.name
        self.task: Task = task or index.task
        self.weights = weights_for(index, student, self.task)
        spec = StoredSpec.of_manifest(index.storage.manifest)
        self.formats = RowFormats(spec.vector_format, spec.window_format or "float32", spec.token_format or "float32")
        self._index, self._student = index, student
        self._segments = SearchedSegments(
            index,
            student,
            SearchSettings(),
            self.task,
            self.weights,
            is_exact=not student.has_dot,
            cached=CachedBounds(),
            allow_missing=allow_missing,
        )

    def words(self, query: TextQuery) -> tuple[QueryWords, WordStatistics]:
        """Weighted by all passages of the index."""
        (words,) = self._segments.weigh([CountedTerms.from_text(query.text, query.factors)], {})
        return words, self._index.word_statistics

    def nearest(self, query: TextQuery, dot: NDArray[np.float32], vectors: NDArray[np.float32]) -> float:
        """The highest inner product with a passage of the index; 0 if it is empty."""
        del vectors
        nearest = self._segments.with_nearest(_sent(query, dot), {}, {}).nearest
        assert nearest is not None, "asked only if the weight of words depends on it"
        return nearest

    def score(self, query: TextQuery, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """The scores of passages of the index, by row [n], as in a search."""
        prepared = self._student.prepare(query.vector, self.task)
        dot = dot_query(self._student, query.vector, self.task, prepared)
        sent = _sent(query, dot, self.words(query)[0], prepared)
        missing: Missing = {}
        sent = self._segments.with_nearest(sent, {}, missing)
        scored, (scores,) = self._segments.score([sent], rows, missing)
        if len(scored) < len(rows):
            raise ShardAwayError(f"not all passages can be read: {next(iter(missing.values())).problem}")
        return scores


def _sent(
    query: TextQuery,
    dot: NDArray[np.float32] | None,
    words: QueryWords | None = None,
    prepared: PairScorer | None = None,
) -> SegmentQuery:
    return SegmentQuery(Query("1", query.text), query.vector, dot, query.tokens, words, scorer=prepared)
