"""The segments of an index in a search: each is asked, and what they answer is merged."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from d2llm.core.errors import DataFormatError, ShardAwayError, StorageError
from d2llm.core.fallbacks import count_fallback
from d2llm.core.types import MissingShard, Query, Task
from d2llm.models.protocols import SearchStudent, term_factors
from d2llm.models.row_features import FeatureParts
from d2llm.models.score_features import FeatureWeights
from d2llm.retrieval.corrections import find_corrections
from d2llm.retrieval.exact_search import merge_certified
from d2llm.retrieval.local_segment import source_names
from d2llm.retrieval.segments import (
    CachedBounds,
    CertifiedRows,
    IndexView,
    SegmentQuery,
    SegmentSearch,
    first_depth,
    joint_rows,
    map_in_threads,
    merge_candidates,
    rows_by_segment,
)
from d2llm.retrieval.settings import SearchSettings
from d2llm.store.view import CandidateRows
from d2llm.store.word_segment import CountedTerms, QueryWords

_log = logging.getLogger(__name__)
_NOTHING = np.zeros(0, np.float32)
_Answer = TypeVar("_Answer")
Missing = dict[int, MissingShard]
"""By segment, why it gave no answer to a query; it is not asked again."""


class SearchedSegments:
    """All segments of an index, in one search. Rows are joint ones; ``sources`` are those of the candidates."""

    def __init__(
        self,
        index: IndexView,
        student: SearchStudent,
        settings: SearchSettings,
        task: Task,
        weights: FeatureWeights,
        *,
        is_exact: bool,
        cached: CachedBounds,
        allow_missing: bool,
    ) -> None:
        """Prepare what does not depend on the query; arguments as for ``Searcher`` and ``LocalSearch``."""
        if "ann" in (settings.sources or ()) and not any(segment.has_graph for segment in index.segments):
            count_fallback("approximate index")
            _log.warning("no usable approximate index (d2llm index INDEX ann builds one); using the exact scan")
            exact = ["vectors" if name == "ann" else name for name in settings.sources or ()]
            settings = settings.replace(sources=tuple(dict.fromkeys(exact)))
        self._index, self._student, self._settings, self._weights = index, student, settings, weights
        self._allow_missing = allow_missing
        self.sources = source_names(settings, weights, is_exact=is_exact)
        self._searches = [
            segment.begin_search(
                student, settings, task, weights, is_exact=is_exact, cached=cached.of_segment(position)
            )
            for position, segment in enumerate(index.segments)
        ]

    def corrections(self, texts: Sequence[str], missing: Missing) -> list[dict[str, str]]:
        """The typing errors in queries (``find_corrections``)."""
        segments = self._index.segments

        def count_words(hashes: NDArray[np.uint64]) -> NDArray[np.int64]:
            counts = self._ask(missing, lambda segment_index, _: segments[segment_index].count_words(hashes))
            return sum(counts.values(), np.zeros(len(hashes), np.int64))

        return find_corrections(texts, count_words)

    def words(self, queries: Sequence[Query], missing: Missing) -> list[QueryWords | None]:
        """The words of each query, weighted by how many passages have them, in all segments that answer."""
        if not self._weights and "bm25" not in self.sources:
            return [None] * len(queries)
        texts = [query.text for query in queries]
        factors = term_factors(self._student, texts)
        return [*self.weigh([*map(CountedTerms.from_text, texts, factors)], missing)]

    def weigh(self, counted: Sequence[CountedTerms], missing: Missing) -> list[QueryWords]:
        """The words of queries, weighted by how many passages have them."""
        hashes = np.concatenate([one.hashes for one in counted])
        segments = self._index.segments
        counts = self._ask(missing, lambda segment_index, _: segments[segment_index].count_words(hashes))
        num_passages = sum(len(segments[segment_index]) for segment_index in counts)
        rows_with = sum(counts.values(), np.zeros(len(hashes), np.int64))
        ends = np.cumsum([len(one.hashes) for one in counted])
        return [
            one.weighted(num_with, num_passages)
            for one, num_with in zip(counted, np.split(rows_with, ends[:-1]), strict=True)
        ]

    def scan_together(
        self, dots: Sequence[NDArray[np.float32] | None], depth: int, missing: Missing
    ) -> dict[int, Sequence[CandidateRows]]:
        """What the exact scan proposes for several queries, by segment; nothing for one, or if it is no source."""
        together = [dot for dot in dots if dot is not None]
        if "vectors" not in self.sources or len(together) < 2:
            return {}
        stacked, asked = np.stack(together), first_depth(depth, len(self._searches))
        scans = self._ask(missing, lambda _, segment: segment.scan_together(stacked, asked))
        return {segment_index: scanned for segment_index, scanned in scans.items() if scanned is not None}

    def propose(
        self, query: SegmentQuery, depth: int, missing: Missing, scanned: Mapping[int, CandidateRows]
    ) -> dict[str, CandidateRows]:
        """What each source proposes for a query: the best ``depth`` of what the segments propose.

        Passages are in shards at random, so each is first asked for little more than its part. If even the last of
        these is among the best of all, it may have more of them, and is asked again.
        """
        asked = first_depth(depth, len(self._searches))
        proposals = self._ask(
            missing,
            lambda segment_index, segment: segment.propose(query, asked, scanned=scanned.get(segment_index)),
        )
        merged = self._merged(proposals, depth)
        more = [
            segment_index
            for segment_index, by_source in proposals.items()
            for name, one in by_source.items()
            if len(one.rows) == asked < depth and joint_rows(segment_index, one.rows[-1:]) in merged[name].rows
        ]
        if not more:
            return merged
        again = self._ask(missing, lambda _, segment: segment.propose(query, depth), dict.fromkeys(more))
        return self._merged(
            {segment_index: again.get(segment_index, by_source) for segment_index, by_source in proposals.items()},
            depth,
        )

    def with_nearest(
        self, query: SegmentQuery, proposals: Mapping[str, CandidateRows], missing: Missing
    ) -> SegmentQuery:
        """The query with how near the nearest passage is, if the weight of words depends on it."""
        if not self._weights.needs_nearest or query.nearest is not None:
            return query
        by_vectors = next((proposals[name].scores for name in ("vectors", "ann") if name in proposals), _NOTHING)
        if len(by_vectors):
            nearest = float(by_vectors[0])
        else:
            nearest = max(self._ask(missing, lambda _, segment: segment.nearest(query)).values())
        # If nothing may be found, nothing will be scored either.
        return replace(query, nearest=0.0 if nearest == -math.inf else nearest)

    def score(
        self, phrasings: Sequence[SegmentQuery], rows: NDArray[np.int64], missing: Missing
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """The rows [n] whose segments answer, and their scores for each phrasing of a query [phrasings, n]."""
        by_segment = {segment_index: (at, segment_rows) for segment_index, at, segment_rows in rows_by_segment(rows)}

        def score(segment_index: int, segment: SegmentSearch) -> NDArray[np.float32]:
            return np.stack([segment.score(phrasing, by_segment[segment_index][1]) for phrasing in phrasings])

        is_scored = np.zeros(len(rows), np.bool_)
        all_scores = np.zeros((len(phrasings), len(rows)), np.float32)
        for segment_index, scores in self._ask(missing, score, by_segment).items():
            is_scored[by_segment[segment_index][0]] = True
            all_scores[:, by_segment[segment_index][0]] = scores
        return rows[is_scored], all_scores[:, is_scored]

    def certify(self, query: SegmentQuery, top_k: int, missing: Missing) -> CertifiedRows:
        """The exact ranking of all segments with its proof.

        In this process, one segment after the other answers, and only looks for what those before it do not exceed.
        Shards in other processes answer at the same time: each does more work, but they take as long as the slowest.
        """
        begin, budget = time.perf_counter(), self._settings.budget_ms
        in_turn = not self._index.is_remote
        merging = threading.Lock()
        best: NDArray[np.float32] = _NOTHING  # the top_k best scores of the segments so far, in any order

        def certify(_: int, segment: SegmentSearch) -> CertifiedRows:
            nonlocal best
            left = None if budget is None else max(0.0, budget - 1e3 * (time.perf_counter() - begin))
            known = best
            floor = float(known.min()) if len(known) == top_k else -math.inf
            certified = segment.certify(query, top_k, budget_ms=left, floor=floor)
            with merging:
                scores = np.concatenate((best, certified.scores))
                best = np.partition(scores, len(scores) - top_k)[-top_k:] if len(scores) > top_k else scores
            return certified

        return merge_certified(self._ask(missing, certify, in_turn=in_turn), top_k, self._index.ids)

    def score_features(self, query: SegmentQuery, rows: NDArray[np.int64]) -> FeatureParts:
        """What words, windows and tokens add to the scores of some rows [n]."""
        added: dict[str, NDArray[np.float32]] = {}
        for segment_index, at, segment_rows in rows_by_segment(rows):
            for name, values in self._searches[segment_index].score_features(query, segment_rows)._asdict().items():
                if values is not None:
                    added.setdefault(name, np.zeros(len(rows), np.float32))[at] = values
        return FeatureParts(**added)

    def count_values(self, name: str, missing: Missing) -> Counter[Any]:
        """Number of passages that the filter allows, by their value of a metadata field, or None."""
        segments = self._index.segments
        counts = self._ask(
            missing, lambda segment_index, _: segments[segment_index].count_values(name, self._settings.filter)
        )
        return sum(map(Counter, counts.values()), Counter[Any]())

    def retrying_without_lost(self, rank: Callable[[], _Answer]) -> _Answer:
        """``rank()``; if a segment is lost after it has proposed passages, once more without it, if that is allowed."""
        for _ in self._searches:
            try:
                return rank()
            except ShardAwayError:
                if not self._allow_missing:
                    raise
        return rank()

    def _ask(
        self,
        missing: Missing,
        step: Callable[[int, SegmentSearch], _Answer],
        numbers: Iterable[int] | None = None,
        *,
        in_turn: bool = False,
    ) -> dict[int, _Answer]:
        """The answers of all segments, or of some, by their numbers; ``in_turn``: not at the same time.

        A segment that cannot be read is added to ``missing``, if that is allowed.

        Raises:
            ShardAwayError: no segment can be read.
        """
        answers: dict[int, _Answer] = {}
        chosen = range(len(self._searches)) if numbers is None else numbers
        readable = [segment_index for segment_index in chosen if segment_index not in missing]

        def answer(segment_index: int) -> _Answer | MissingShard:
            try:
                return step(segment_index, self._searches[segment_index])
            except (DataFormatError, StorageError, OSError) as error:
                if not self._allow_missing:
                    raise
                return self._index.lost(segment_index, error)

        results = map(answer, readable) if in_turn else map_in_threads(answer, readable)
        for segment_index, one in zip(readable, results, strict=True):
            if isinstance(one, MissingShard):
                missing[segment_index] = one
            else:
                answers[segment_index] = one
        if len(missing) == len(self._searches):
            raise ShardAwayError(f"no shard of the index answers; the first: {next(iter(missing.values())).problem}")
        return answers

    def _merged(self, proposals: Mapping[int, Mapping[str, CandidateRows]], depth: int) -> dict[str, CandidateRows]:
        """The best ``depth`` rows of each source, from those of the segments."""
        merged: dict[str, CandidateRows] = {}
        for name in self.sources:
            by_ids = name != "bm25" or self._settings.hybrid is not None
            by_segment = {segment_index: by_source[name] for segment_index, by_source in proposals.items()}
            merged[name] = merge_candidates(by_segment, depth, self._index.ids if by_ids else None)
        return merged
