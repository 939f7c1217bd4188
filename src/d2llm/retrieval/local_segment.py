"""A segment in this process, and its part in a search: sources of candidates, full scores, and proofs.

A search has up to four rounds, and in each a segment gets plain values and returns plain values, so that it can also be
in another process (``SegmentSearch``; ``server.ray_shards`` has such ones):

1. ``count_words``: how many passages of the segment have the query's words, so that all segments weight them alike
   (``bm25.CountedTerms``). The other statistics (``WordStatistics``) belong to the version, not to the query.
2. ``propose``: the segment's best rows of each source of candidates. The best of all segments are the candidates. If
   the weight of words depends on how near the nearest passage is, and no source looks for it, ``nearest`` does.
3. ``score``: full scores of the candidates that are in the segment. An exact search has ``certify`` instead of 2 and 3.
4. Texts of the results, from the view (``IndexView.passages``), and with ``explain`` the ``score_features`` for them.

Scores do not depend, but for rounding, on the segment that a passage is in, and candidates are chosen among all, so a
sharded search ranks as a search of one index does. (Only candidates that tie with the last one by BM25 may be others.)

A source of candidates proposes passages for scoring: ``propose`` returns at most ``top_k`` rows, best first;
``dot_query`` [dim] is the query's vector for inner products, ``words`` are its words, if they were weighted already.
The ``name`` of a source appears in explanations. To add one, write a class like those below and create it in
``LocalSearch``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from weakref import ref

import numpy as np
from numpy.typing import NDArray

from d2llm.core.fallbacks import count_fallback
from d2llm.core.types import Query, Task, Ties
from d2llm.models.protocols import VectorStudent
from d2llm.models.row_features import FeatureParts, RowFeatures, RowScorer
from d2llm.models.score_features import FeatureWeights
from d2llm.retrieval.exact_search import certified_top_k
from d2llm.retrieval.segments import CachedBounds, CertifiedRows, IndexView, SegmentQuery, map_queries
from d2llm.retrieval.settings import SearchSettings
from d2llm.store.ann import AnnSearch
from d2llm.store.shards import Storage
from d2llm.store.view import CandidateRows, PassageView
from d2llm.store.word_segment import QueryWords, WordStatistics


@dataclass(frozen=True, slots=True)
class VectorSource:
    """The highest inner products, by an exact scan of the stored vectors. Requires a head with an inner product."""

    index: PassageView
    allowed: NDArray[np.bool_] | None
    name: str = "vectors"

    def propose(
        self, query: Query | None, dot_query: NDArray[np.float32] | None, top_k: int, words: QueryWords | None = None
    ) -> CandidateRows:
        """The rows with the highest inner products."""
        del query, words
        assert dot_query is not None, "a search without an inner product has no vector source"
        return self.index.scan(dot_query, top_k, self.allowed)

    def propose_together(self, dot_queries: NDArray[np.float32], top_k: int) -> Sequence[CandidateRows]:
        """``propose`` for each of several queries [q, dim]."""
        return self.index.scan_together(dot_queries, top_k, self.allowed)


class AnnSource:
    """Nearly the highest inner products, from an approximate index, or from the exact scan if that is as fast."""

    def __init__(self, index: PassageView, allowed: NDArray[np.bool_] | None, name: str = "ann") -> None:
        self.name = name
        self._exact = VectorSource(index, allowed)
        self._search: AnnSearch | None = None
        if index.ann is not None:
            self._search = AnnSearch(index.ann, index.mask(allowed), index.ids)

    def propose(
        self, query: Query | None, dot_query: NDArray[np.float32] | None, top_k: int, words: QueryWords | None = None
    ) -> CandidateRows:
        """The rows found, with exact inner products."""
        del words
        result = None
        if self._search is not None and dot_query is not None:
            result = self._search.search(dot_query, top_k)
            if result is None:
                count_fallback("approximate index")  # the exact scan is as fast, or reaches deeper
        return self._exact.propose(query, dot_query, top_k) if result is None else CandidateRows(*result)

    def propose_together(self, dot_queries: NDArray[np.float32], top_k: int) -> Sequence[CandidateRows]:
        """``propose`` for each of several queries [q, dim]: in a row, they find parts of the graph in the caches."""
        return list(map_queries(lambda dot: self.propose(None, dot, top_k), [*dot_queries]))


@dataclass(frozen=True, slots=True)
class LexicalSource:
    """BM25. ``ties`` as in ``match``; their order does not matter if every candidate gets the full score."""

    index: PassageView
    filter: str | None
    ties: Ties
    name: str = "bm25"

    def propose(
        self, query: Query, dot_query: NDArray[np.float32] | None, top_k: int, words: QueryWords | None = None
    ) -> CandidateRows:
        """The rows that BM25 finds."""
        del dot_query
        return self.index.match(query.text, top_k, self.filter, ties=self.ties, query_words=words)


CandidateSource = VectorSource | AnnSource | LexicalSource


_NOTHING = np.zeros(0, np.float32)


def source_names(settings: SearchSettings, weights: FeatureWeights, *, is_exact: bool) -> list[str]:
    """The names of the sources of candidates in a search with these settings."""
    names = settings.proposers(counts_words=weights.counts_words)
    chosen = [name for name in ("vectors", "ann") if name in names and not is_exact]
    if "bm25" in names and (not is_exact or settings.hybrid is not None):
        chosen.append("bm25")
    return chosen


class LocalSegment(PassageView):
    """A segment in this process."""

    is_remote = False
    away = None

    @property
    def has_graph(self) -> bool:
        """Whether there is a usable approximate index."""
        return self.ann is not None

    @property
    def word_statistics(self) -> WordStatistics:
        """The statistics of the words of these passages alone."""
        return self.own_words.statistics

    def count_words(self, hashes: NDArray[np.uint64]) -> NDArray[np.int64]:
        """Number of passages that contain each term [n]."""
        return self.own_words.rows_with(hashes)

    def begin_search(
        self,
        student: VectorStudent,
        settings: SearchSettings,
        task: Task,
        weights: FeatureWeights,
        *,
        is_exact: bool,
        cached: CachedBounds | None = None,
    ) -> LocalSearch:
        """Its part in a search; arguments as for ``LocalSearch``."""
        return LocalSearch(self, student, settings, task, weights, is_exact=is_exact, cached=cached)


def open_view(storage: Storage) -> IndexView:
    """The latest version of an index whose segments are in this process."""

    def corpus() -> WordStatistics:
        whole = reference()
        assert whole is not None, "a segment was used without its view"
        return whole.word_statistics

    several = len(storage.stores) > 1
    view = IndexView(storage, [LocalSegment(store, corpus=corpus if several else None) for store in storage.stores])
    reference = ref(view)  # else files stay open until a garbage collection finds the circle
    return view


class LocalSearch:
    """A search of one segment. Rows are those of the segment.

    Call it in one thread at a time, because exact searches fill ``cached``. Others may search the same view meanwhile.
    """

    def __init__(
        self,
        view: PassageView,
        student: VectorStudent,
        settings: SearchSettings,
        task: Task,
        weights: FeatureWeights,
        *,
        is_exact: bool,
        cached: CachedBounds | None = None,
    ) -> None:
        """Prepare what does not depend on the query.

        Args:
            view: the passages, as part of the corpus whose statistics BM25 uses.
            student: scores them.
            settings: how to search.
            task: the branch of the student's head.
            weights: those of the score features.
            is_exact: whether ``certify`` will be called instead of ``score``.
            cached: values that exact searches compute for all rows of this view.

        Raises:
            FilterError: the filter cannot be parsed, or does not fit the metadata.
        """
        self.view = view
        self._student, self._weights = student, weights
        self._task: Task = task
        self._cached_bounds = cached or CachedBounds()
        self._allowed = view.select(settings.filter)
        self._sources: list[CandidateSource] = []
        for name in source_names(settings, weights, is_exact=is_exact):
            if name == "vectors" and settings.sources is None and view.ann is not None:
                self._sources.append(AnnSource(view, self._allowed, name))
            elif name == "vectors":
                self._sources.append(VectorSource(view, self._allowed))
            elif name == "ann":
                self._sources.append(AnnSource(view, self._allowed))
            else:
                ties = "rows" if settings.hybrid is None else "ids"
                self._sources.append(LexicalSource(view, settings.filter, ties))

    def propose(
        self, query: SegmentQuery, depth: int, *, scanned: CandidateRows | None = None
    ) -> dict[str, CandidateRows]:
        """What each source proposes, at most ``depth`` rows; ``scanned`` is that by vectors, if it is known."""
        proposals: dict[str, CandidateRows] = {}
        for source in self._sources:
            if scanned is not None and not isinstance(source, LexicalSource):
                proposals[source.name] = scanned
            else:
                proposals[source.name] = source.propose(query.query, query.dot_query, depth, query.words)
        return proposals

    def scan_together(self, dot_queries: NDArray[np.float32], depth: int) -> Sequence[CandidateRows] | None:
        """The proposals by vectors for several queries [q, dim]; None if these propose nothing."""
        source = next((source for source in self._sources if not isinstance(source, LexicalSource)), None)
        return None if source is None else source.propose_together(dot_queries, depth)

    def nearest(self, query: SegmentQuery) -> float:
        """The highest inner product with a passage that the filter admits; minus infinity if there is none."""
        assert query.dot_query is not None, "without inner products, no passage is the nearest"
        scores = self.view.scan(query.dot_query, 1, self._allowed).scores
        return float(scores[0]) if len(scores) else -math.inf

    def score(self, query: SegmentQuery, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """The full scores of some rows [n]."""
        if not len(rows):
            return _NOTHING
        score_features = self._score_features(query)
        return RowScorer(self.view, self._student, query.vector, self._task, score_features, query.scorer)(rows)

    def certify(
        self, query: SegmentQuery, top_k: int, *, budget_ms: float | None = None, floor: float = -np.inf
    ) -> CertifiedRows:
        """The segment's ``top_k`` rows of the exact ranking, with a proof (``certified_top_k``)."""
        return certified_top_k(
            self.view,
            self._student,
            query.vector,
            self._task,
            top_k,
            allowed=self._allowed,
            budget_ms=budget_ms,
            cached=self._cached_bounds,
            score_features=self._score_features(query),
            floor=floor,
            prepared=query.scorer,
        )

    def score_features(self, query: SegmentQuery, rows: NDArray[np.int64]) -> FeatureParts:
        """What words, windows and tokens add to the scores of some rows [n]."""
        score_features = self._score_features(query)
        return FeatureParts() if score_features is None else score_features.by_kind(rows)

    def _score_features(self, query: SegmentQuery) -> RowFeatures | None:
        if not self._weights:
            return None
        return RowFeatures(
            self.view, query.query.text, self._weights, query.dot_query, query.tokens, query.words, query.nearest
        )
