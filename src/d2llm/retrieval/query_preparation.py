"""What a search computes for queries before it ranks anything: expansions, vectors, words, and a scan for many."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from d2llm.core.errors import InputError
from d2llm.core.progress import progress_bar
from d2llm.core.types import Query, QueryExpansion, Task
from d2llm.data.python_records import QueryLike, queries_of
from d2llm.models.protocols import SearchStudent
from d2llm.models.row_features import dot_query
from d2llm.models.score_features import FeatureWeights
from d2llm.retrieval.corrections import corrected_query
from d2llm.retrieval.searched_segments import Missing, SearchedSegments
from d2llm.retrieval.segments import SegmentQuery
from d2llm.retrieval.settings import SearchSettings
from d2llm.store.view import CandidateRows
from d2llm.store.word_segment import QueryWords

if TYPE_CHECKING:
    from d2llm.retrieval.expansion import Expansion

ENCODED_AT_ONCE = 256
"""Queries that are encoded and scanned together: enough for full batches, few enough to keep the bar moving."""

_MAX_CANDIDATES = 1 << 20  # of queries that are scanned together: they are in memory
Tokens = Sequence[NDArray[np.float32] | None]
"""The vectors of each query's tokens."""


@dataclass(slots=True)
class PreparedQuery:
    """A query with everything computed before its ranking.

    It is not frozen: it is prepared in several steps, and its ranking adds to ``seconds`` and ``missing``.

    Attributes:
        sent: the query as segments get it.
        dot_is_score: whether its candidates' inner products are their final scores, and nothing changes their order.
        depth: how many candidates each source proposes at first.
        scanned: by segment, the query's candidates from a scan shared with other queries, to that depth.
        seconds: time by stage, as in a ranking.
        truncated: whether the query is longer than the student reads.
        missing: by segment, why it gave no answer to this query.
        expansion: what a language model added to the query, or None.
        rephrasings: other queries with its meaning, prepared like this one.
        asked: the query as it was given.
        corrections: its typing errors, and the words that were taken instead.
    """

    sent: SegmentQuery
    dot_is_score: bool
    depth: int
    scanned: Mapping[int, CandidateRows]
    seconds: dict[str, float]
    truncated: bool = False
    missing: Missing = field(default_factory=Missing)
    expansion: QueryExpansion | None = None
    rephrasings: tuple[PreparedQuery, ...] = ()
    asked: Query | None = None
    corrections: Mapping[str, str] = field(default_factory=dict[str, str])

    @property
    def query(self) -> Query:
        """Text and id."""
        return self.sent.query


class QueryPreparation:
    """Prepares the queries of a search; ``may_skip_score``: nothing but the student's score orders its passages."""

    def __init__(
        self,
        segments: SearchedSegments,
        student: SearchStudent,
        settings: SearchSettings,
        task: Task,
        weights: FeatureWeights,
        expansion: Expansion | None,
        *,
        may_skip_score: bool,
    ) -> None:
        self._segments, self._student, self._settings = segments, student, settings
        self._task: Task = task
        self._weights, self._expansion = weights, expansion
        only_vectors = not weights and segments.sources in (["vectors"], ["ann"])
        self._may_skip_score = may_skip_score and only_vectors and student.has_dot

    def prepare(
        self,
        queries: Iterable[QueryLike] | QueryLike,
        *,
        vectors: NDArray[np.float32] | None = None,
        tokens: Tokens | None = None,
        title: str = "searching",
    ) -> Iterator[PreparedQuery]:
        """Every query ready to be ranked; the bar counts the queries that were taken.

        Raises:
            InputError: a query has no text, or vectors [n, dim] are given that do not fit the search.
        """
        all_queries = queries_of(queries)
        if vectors is not None:
            self._check(vectors, len(all_queries))
        with progress_bar(title, len(all_queries)) as advance:
            for start in range(0, len(all_queries), ENCODED_AT_ONCE):
                asked = all_queries[start : start + ENCODED_AT_ONCE]
                corrections = [dict[str, str]() for _ in asked]
                if vectors is None and self._settings.corrects_words(counts_words=self._weights.counts_words):
                    corrections = self._segments.corrections([query.text for query in asked], {})
                block = [*map(corrected_query, asked, corrections)]
                if self._expansion is None:
                    given = None if vectors is None else vectors[start : start + len(block)]
                    prepared = self._block(block, given, None if tokens is None else tokens[start : start + len(block)])
                elif self._expansion.method == "multi":
                    prepared = self._rephrased(block, self._expansion)
                else:
                    prepared = self._hypothetical(block, self._expansion)
                for one, query, errors in zip(prepared, asked, corrections, strict=True):
                    one.asked, one.corrections = query, errors
                    yield one
                    advance(1)

    def _check(self, vectors: NDArray[np.float32], num_queries: int) -> None:
        if self._expansion is not None:
            raise InputError("an expansion is written for texts, not for vectors: leave out one of them")
        if self._settings.instruction is not None:
            raise InputError(
                "an instruction is read with a query's text, and these queries are encoded already: encode them with "
                "the instruction, and leave it out here"
            )
        if vectors.shape != (num_queries, self._student.vector_dim):
            raise InputError(
                f"vectors have the shape {vectors.shape}, but the {num_queries} queries need "
                f"({num_queries}, {self._student.vector_dim})"
            )

    def _block(
        self, queries: Sequence[Query], vectors: NDArray[np.float32] | None, given_tokens: Tokens | None = None
    ) -> Iterator[PreparedQuery]:
        """``prepare`` for as many queries as are encoded at once."""
        begin = time.perf_counter()
        cut: Sequence[int] = ()
        tokens: Tokens = [None] * len(queries)
        texts, instruction = [query.text for query in queries], self._settings.instruction
        if given_tokens is not None and vectors is not None:
            tokens = given_tokens
        elif "token" in self._weights.part_kinds:
            read = self._student.encode_with_tokens(texts, "query", instruction=instruction)
            assert read.tokens is not None
            tokens = read.tokens.split()
            if vectors is None:
                vectors, cut = read.vectors, read.truncated
        elif vectors is None:
            read = self._student.encode_queries(texts, instruction=instruction)
            vectors, cut = read.vectors, read.truncated
        seconds = (time.perf_counter() - begin) / len(queries)
        deepest = max(self._settings.ranking_depth, self._settings.num_candidates)
        at_once = max(1, min(ENCODED_AT_ONCE, _MAX_CANDIDATES // deepest))
        for at in range(0, len(queries), at_once):
            part = slice(at, at + at_once)
            together = self._together(queries[part], vectors[part], tokens[part], seconds)
            for position, prepared in enumerate(together, at):
                prepared.truncated = position in cut
                yield prepared

    def _rephrased(self, queries: Sequence[Query], expansion: Expansion) -> Iterator[PreparedQuery]:
        """``_block`` for queries with their rephrasings."""
        expansions = expansion.expand([query.text for query in queries])
        phrasings = [
            Query(query.id, text)
            for query, expanded in zip(queries, expansions, strict=True)
            for text in (query.text, *expanded.texts)
        ]
        prepared = self._block(phrasings, None)
        for expanded in expansions:
            phrased = next(prepared)
            phrased.rephrasings = tuple(next(prepared) for _ in expanded.texts)
            for other in phrased.rephrasings:
                for stage, seconds in other.seconds.items():
                    phrased.seconds[stage] += seconds
            phrased.seconds["expansion"] = expanded.seconds
            phrased.expansion = replace(expanded, num_truncated=sum(other.truncated for other in phrased.rephrasings))
            yield phrased

    def _hypothetical(self, queries: Sequence[Query], expansion: Expansion) -> Iterator[PreparedQuery]:
        """``_block`` for queries whose vectors include those of hypothetical passages."""
        from d2llm.retrieval.expansion import add_hypothetical_passages

        texts = [query.text for query in queries]
        expansions = expansion.expand(texts)
        begin = time.perf_counter()
        read = self._student.encode_queries(texts, instruction=self._settings.instruction)
        vectors, expansions = add_hypothetical_passages(self._student, read.vectors, expansions)
        seconds = (time.perf_counter() - begin) / len(queries)
        prepared = self._block(queries, vectors)
        for position, (phrased, expanded) in enumerate(zip(prepared, expansions, strict=True)):
            phrased.seconds["encode"] += seconds
            phrased.seconds["expansion"] = expanded.seconds
            phrased.expansion, phrased.truncated = expanded, position in read.truncated
            yield phrased

    def _together(
        self,
        queries: Sequence[Query],
        vectors: NDArray[np.float32],
        tokens: Tokens,
        encode_seconds: float,
    ) -> Iterator[PreparedQuery]:
        """Queries ready to be ranked, after one shared scan for all of them if the exact scan is a source."""
        begin = time.perf_counter()
        missing: Missing = {}
        words = self._segments.words(queries, missing)
        sent = [self._sent(*inputs) for inputs in zip(queries, vectors, tokens, words, strict=True)]
        are_scores = [self._may_skip_score and one.scorer is not None and one.scorer.bound == 0 for one in sent]
        score_seconds = (time.perf_counter() - begin) / len(queries)
        begin = time.perf_counter()
        # A scan orders rows by inner product. If the inner products are the scores, it need not go deeper than the
        # ranking.
        sources, depth = self._segments.sources, self._settings.ranking_depth
        if not ("vectors" in sources and all(are_scores)):
            depth = max(depth, math.ceil(self._settings.num_candidates / max(len(sources), 1)))
        scans = self._segments.scan_together([one.dot_query for one in sent], depth, missing)
        scan_seconds = (time.perf_counter() - begin) / len(queries)
        for index, (one, is_score) in enumerate(zip(sent, are_scores, strict=True)):
            scanned = {segment: candidates[index] for segment, candidates in scans.items()}
            seconds = {"encode": encode_seconds, "candidates": scan_seconds, "score": score_seconds}
            yield PreparedQuery(one, is_score, depth, scanned, seconds, missing=dict(missing))

    def _sent(
        self,
        query: Query,
        vector: NDArray[np.float32],
        tokens: NDArray[np.float32] | None,
        words: QueryWords | None,
    ) -> SegmentQuery:
        """A query for segments."""
        scorer = self._student.prepare(vector, self._task)
        dot = dot_query(self._student, vector, self._task, scorer)
        return SegmentQuery(query, vector, dot, tokens, words, scorer=scorer)
