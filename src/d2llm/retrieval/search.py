"""Searching an index: candidates of all its segments get the full score, and the best of them are the results."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from d2llm.core.batches import batched
from d2llm.core.errors import InputError, ModelError
from d2llm.core.inputs import shown
from d2llm.core.types import IdRanking, Passage, Query, Ranking, Task
from d2llm.data.python_records import QueryLike
from d2llm.models.protocols import SearchStudent
from d2llm.models.tokens import EncodedTexts
from d2llm.ops.bm25_words import terms
from d2llm.ops.diversity import select_diverse
from d2llm.ops.fusion import reciprocal_rank_scores
from d2llm.ops.selection import check_scores, top_rows
from d2llm.retrieval.feature_weights import weights_for
from d2llm.retrieval.query_preparation import PreparedQuery, QueryPreparation, Tokens
from d2llm.retrieval.results import (
    Order,
    ScoredCandidates,
    check_fields,
    facet,
    group_passages,
    in_order_of,
    rerank_report,
    show,
)
from d2llm.retrieval.searched_segments import Missing, SearchedSegments
from d2llm.retrieval.segments import CachedBounds, IndexView, map_queries
from d2llm.retrieval.settings import SearchSettings
from d2llm.store.view import CandidateRows

# Most searches have none of these, which import much.
if TYPE_CHECKING:
    from d2llm.retrieval.expansion import Expansion
    from d2llm.retrieval.reranker import OpenReranker

RANKED_AT_ONCE = 32
"""Queries that are ranked together: their results' texts are read by one statement."""
_WIDENED = 4  # factor for the number of candidates, if these belong to too few documents


class Searcher:
    """Searches an index, many times: work that does not depend on the queries is done once.

    Every segment of the index does its part (``LocalSearch``), in threads. ``weights`` are those of the score features
    in the scores.
    """

    def __init__(
        self,
        index: IndexView,
        student: SearchStudent,
        settings: SearchSettings | None = None,
        *,
        cached: CachedBounds | None = None,
        rerank: OpenReranker | None = None,
        expansion: Expansion | None = None,
        allow_missing: bool = False,
    ) -> None:
        """Prepare a search.

        Args:
            index: an index made by this student, sharded or not.
            student: encodes the queries and scores the passages.
            settings: how to search.
            cached: keeps values that exact searches of this version compute for all rows.
            rerank: a second stage that scores the candidates again (``retrieval.reranker.open_reranker``).
            expansion: a language model that writes other queries, or passages that would answer them.
            allow_missing: a shard that cannot be read is left out and named in ``Ranking.missing_shards``, instead of
                ending the search.

        Raises:
            InputError: settings contradict each other.
            FilterError: the filter cannot be parsed, or does not fit the metadata.
            IndexMismatchError: the index was made by another student.
            MismatchError: the reranker is for another student.
        """
        self.settings = settings = settings or SearchSettings()
        index.storage.check_student(student.fingerprint)
        self._index = index
        check_fields(settings, index.metadata)
        self._task: Task = settings.task or index.task
        self.weights = weights_for(index, student, self._task, settings.score_features)
        by_vectors = not {"vectors", "ann"}.isdisjoint(settings.proposers(counts_words=self.weights.counts_words))
        self._exact = settings.exact or (by_vectors and not student.has_dot)
        _check_stages(settings, rerank, expansion, is_exact=self._exact)
        self._rerank = None if rerank is None else rerank.for_index(index, student, self._task)
        self._segments = SearchedSegments(
            index,
            student,
            settings,
            self._task,
            self.weights,
            is_exact=self._exact,
            cached=cached or CachedBounds(),
            allow_missing=allow_missing,
        )
        rephrases = expansion is not None and expansion.method == "multi"
        in_order = rerank is None and settings.hybrid is None and not rephrases
        self._in_students_order = in_order and settings.group == "passage"
        self._preparation = QueryPreparation(
            self._segments,
            student,
            settings,
            self._task,
            self.weights,
            expansion,
            may_skip_score=self._in_students_order and not self._exact,
        )

    def rank(
        self,
        queries: Iterable[QueryLike] | QueryLike,
        *,
        vectors: NDArray[np.float32] | None = None,
        tokens: Tokens | None = None,
    ) -> list[Ranking]:
        """Rank the passages for each query: find candidates, then apply the full score (IEM).

        If ``vectors`` [n, dim] are given, the queries are not encoded, and no ranking is marked as ``truncated``. If
        the score counts token embeddings, these are encoded unless all ``tokens`` [tokens, token_dim] are given, too.
        Vectors cannot be combined with an instruction, which would have had to be read for them.

        Returns:
            One ranking per query; passages are best first, ties by passage id. ``seconds`` holds "encode",
            "candidates", "score" and, with a reranker, "rerank", with an expansion, "expansion". For work done on
            several queries together (expanding, encoding and scanning 256, reading texts 32), each gets the mean.

        Raises:
            InputError: a query has no text, or vectors do not fit the search.
            ModelError: a score is NaN, or the reranker did not score all candidates.
        """
        if tokens is not None and any(embeddings is None for embeddings in tokens):
            tokens = None
        prepared, rankings = self._preparation.prepare(queries, vectors=vectors, tokens=tokens), list[Ranking]()
        for block in batched(prepared, RANKED_AT_ONCE):
            rankings += self._segments.retrying_without_lost(partial(self._shown, block))
        return rankings

    def rank_ids(
        self,
        queries: Iterable[QueryLike] | QueryLike,
        *,
        title: str = "searching",
        encoded: EncodedTexts | None = None,
    ) -> list[IdRanking]:
        """Like ``rank``, without reading the passages' texts: for long rankings that only a measure will see.

        ``title`` labels the progress bar. ``encoded`` are the queries, if they were encoded elsewhere; with vectors of
        their tokens, if the score counts these.
        """
        vectors = tokens = None
        cut: frozenset[int] = frozenset()
        if encoded is not None:
            vectors, cut = encoded.vectors, frozenset(encoded.truncated)
            tokens = None if encoded.tokens is None else encoded.tokens.split()
        rankings: list[IdRanking] = []
        prepared = self._preparation.prepare(queries, vectors=vectors, tokens=tokens, title=title)
        for block in batched(prepared, RANKED_AT_ONCE):
            orders = self._segments.retrying_without_lost(partial(self._orders, block))
            ids = iter(self._index.ids(np.concatenate([order.rows for order in orders])))
            for one, order in zip(block, orders, strict=True):
                passages = tuple((next(ids), score) for score in order.shown_scores)
                rankings.append(IdRanking(one.asked or one.query, passages, one.truncated or len(rankings) in cut))
        return rankings

    def _orders(self, block: Sequence[PreparedQuery]) -> list[Order]:
        """The order of the candidates of some queries, which are ranked on different cores if nothing forbids it."""
        is_shared = self._exact or self._rerank is not None  # ``CachedBounds``, a reranker's model
        if is_shared or any(segment.is_remote for segment in self._index.segments):
            return list(map(self._order, block))
        return list(map_queries(self._order, block))

    def _order(self, prepared: PreparedQuery) -> Order:
        depth, deepest = prepared.depth, math.inf
        if self.settings.max_num_candidates is not None:
            num_proposals = max(len(self._segments.sources), 1) * (1 + len(prepared.rephrasings))
            deepest = self.settings.max_num_candidates // num_proposals
        while True:
            scored = self._candidates(prepared, depth)
            documents = None if self.settings.group == "passage" else self._index.documents(scored.rows)
            is_enough = documents is None or scored.is_all or len(set(documents)) >= self.settings.ranking_depth
            if is_enough or depth >= deepest:
                return self._ranked(prepared.query, scored, documents)
            depth = int(min(_WIDENED * depth, deepest))

    def _shown(self, block: Sequence[PreparedQuery]) -> list[Ranking]:
        """The rankings of some queries, whose texts are read together."""
        orders = self._orders(block)
        begin = time.perf_counter()
        rows = np.unique(np.concatenate([order.shown_rows(self.settings.document_passages) for order in orders]))
        texts = dict(zip(rows.tolist(), self._index.passages(rows), strict=True))
        seconds = (time.perf_counter() - begin) / len(block)
        return [self._ranking(*query_and_order, texts, seconds) for query_and_order in zip(block, orders, strict=True)]

    def _ranking(
        self, prepared: PreparedQuery, order: Order, texts: Mapping[int, Passage], text_seconds: float
    ) -> Ranking:
        query, seconds = prepared.query, prepared.seconds
        begin = time.perf_counter()
        explained = self._segments.score_features(prepared.sent, order.rows) if self.settings.explain else None
        passages = show(
            self._index,
            query,
            prepared.sent.dot_query,
            order,
            texts,
            score_features=explained,
            document_passages=self.settings.document_passages,
            neighbours=self.settings.neighbours,
        )
        seconds["score"] += text_seconds + time.perf_counter() - begin
        report = None
        if self._rerank is not None:
            report = rerank_report(self._rerank.settings.kind, order)
            seconds["rerank"] = report.seconds
        scored = order.scored
        facets = {
            name: facet(
                self._segments.count_values(name, prepared.missing), self._index.field_values(scored.rows, name)
            )
            for name in self.settings.facets or ()
        }
        missing = sorted((*self._index.missing, *prepared.missing.values()), key=lambda shard: shard.number)
        return Ranking(
            prepared.asked or query,
            passages if self.settings.sort is None else in_order_of(passages, self.settings.sort),
            scored.num_scored,
            seconds,
            scored.certificate,
            self._index.version,
            report,
            truncated=prepared.truncated,
            selection=order.selection,
            expansion=prepared.expansion,
            missing_shards=tuple({shard.number: shard for shard in missing}.values()),
            num_shards=self._index.storage.num_shards,
            sources=tuple(self._segments.sources),
            facets=facets,
            corrections=prepared.corrections,
        )

    def _candidates(self, prepared: PreparedQuery, depth: int) -> ScoredCandidates:
        """At least ``depth`` candidates with the student's scores, if the index has that many."""
        begin = time.perf_counter()
        proposals = self._proposals(prepared, depth, prepared.missing)
        for position, other in enumerate(prepared.rephrasings, start=1):
            others = self._proposals(other, depth, prepared.missing)
            proposals |= {f"{name} for rephrasing {position}": proposal for name, proposal in others.items()}
        scoring_begin = time.perf_counter()
        score = self._score_exactly if self._exact else self._score
        scored = score(prepared, proposals, depth)
        prepared.seconds["candidates"] += scoring_begin - begin
        prepared.seconds["score"] += time.perf_counter() - scoring_begin
        return scored

    def _proposals(self, prepared: PreparedQuery, depth: int, missing: Missing) -> dict[str, CandidateRows]:
        """What each source proposes for one phrasing of a query, which then knows how near the nearest passage is."""
        scanned = prepared.scanned if depth == prepared.depth else {}
        proposals = self._segments.propose(prepared.sent, depth, missing, scanned)
        prepared.sent = self._segments.with_nearest(prepared.sent, proposals, missing)
        return proposals

    def _score(self, prepared: PreparedQuery, proposals: Mapping[str, CandidateRows], depth: int) -> ScoredCandidates:
        if prepared.dot_is_score:
            (proposal,), top_k = proposals.values(), self.settings.ranking_depth
            rows, scores = proposal.rows[:top_k], proposal.scores[:top_k]
            check_scores(scores, prepared.query.id)
            return ScoredCandidates(rows, scores, len(rows), proposals, None, len(proposal.rows) < depth)
        # Sorted rows are read from disk sequentially; the final order is made later.
        rows = np.unique(np.concatenate([proposal.rows for proposal in proposals.values()]))
        phrasings = (prepared, *prepared.rephrasings)
        rows, all_scores = self._segments.score([one.sent for one in phrasings], rows, prepared.missing)
        for one, scores in zip(phrasings, all_scores, strict=True):
            check_scores(scores, one.query.id)
        is_all = all(len(proposal.rows) < depth for proposal in proposals.values())
        return ScoredCandidates(rows, all_scores[0], len(rows), proposals, None, is_all, tuple(all_scores[1:]))

    def _score_exactly(
        self, prepared: PreparedQuery, proposals: Mapping[str, CandidateRows], depth: int
    ) -> ScoredCandidates:
        top_k = self.settings.ranking_depth if self._in_students_order else depth
        try:
            certified = self._segments.certify(prepared.sent, top_k, prepared.missing)
        except ModelError as error:
            raise ModelError(f"query {prepared.query.id!r}: {error}") from error
        # It only proves the student's order of passages.
        certificate = certified.certificate if self._in_students_order else None
        is_all = len(certified.rows) < top_k
        # BM25's proposals in a fusion need not be among the student's best.
        proposed = np.concatenate([np.zeros(0, np.int64), *(proposal.rows for proposal in proposals.values())])
        others = np.setdiff1d(proposed, certified.rows)
        others, (more,) = self._segments.score([prepared.sent], others, prepared.missing)
        rows, scores = np.concatenate([certified.rows, others]), np.concatenate([certified.scores, more])
        return ScoredCandidates(rows, scores, certified.certificate.num_scored, proposals, certificate, is_all)

    def _ranked(self, query: Query, scored: ScoredCandidates, documents: Sequence[str] | None) -> Order:
        """The top ``top_k`` passages or documents by the student's score, a fusion of rankings, or the reranker's.

        With ``mmr`` or ``near_duplicates``, they are a selection from the top ``ranking_depth``.
        """
        rows, top_k = scored.rows, self.settings.top_k

        def best(scores: NDArray[np.floating[Any]], count: int) -> NDArray[np.int64]:
            return top_rows(scores, count, lambda positions: self._index.ids(rows[positions]))

        final: NDArray[np.floating[Any]] = scored.scores
        reranked, student_ranks = None, None
        if self.settings.hybrid is not None or scored.rephrasing_scores:
            bm25_weight = self.settings.hybrid
            phrasings = (scored.scores, *scored.rephrasing_scores)
            rankings = [rows[best(scores, len(rows))].tolist() for scores in phrasings]
            num_others = len(scored.rephrasing_scores)
            # The query counts as much as all other phrasings together.
            weights = [float(max(1, num_others)), *[1.0] * num_others]
            if bm25_weight is not None:
                rankings += [one.rows.tolist() for name, one in scored.proposals.items() if name.startswith("bm25")]
                weights = [2 * part * weight for part in (1 - bm25_weight, bm25_weight) for weight in weights]
            fused = reciprocal_rank_scores(rankings, weights=weights)
            final = np.array([fused[row] for row in rows.tolist()], np.float32)
        if self._rerank is not None:
            from d2llm.retrieval.reranker import Candidates, rerank_candidates

            best_first = best(final, len(rows))
            student_ranks = np.empty(len(rows), np.int64)
            student_ranks[best_first] = np.arange(1, len(rows) + 1)
            candidates = Candidates(
                scored.scores,
                best_first,
                texts=lambda positions: self._texts(rows[positions]),
                vectors=lambda positions: self._index.vectors(rows[positions]),
                task=self._task,
                top_k=top_k,
            )
            reranked = rerank_candidates(self._rerank, query.text, candidates)
            final = reranked.scores
        depth = self.settings.ranking_depth
        if documents is None:
            order = Order(scored, final, best(final, depth), None, reranked, student_ranks)
        else:
            best_first, how = best(final, len(rows)), self.settings.group
            grouped = group_passages(final, best_first, documents, how, self.settings.document_passages)
            order = Order(scored, final, best_first[:top_k], grouped[:depth], reranked, student_ranks)
        return self._select(query, order) if self.settings.selects else order

    def _select(self, query: Query, order: Order) -> Order:
        """The diverse or distinct results of a ranking."""
        from d2llm.ops.diversity import Statement

        statements: list[Statement] = []
        query_terms = frozenset(terms(query.text))
        same: dict[int, int] = {}

        def says_the_same(index: int, better: int) -> bool:
            if not statements:
                statements.extend(map(Statement, self._texts(order.rows)))
            found = statements[index].adds_nothing_to(statements[better], query_terms)
            if found:
                same[index] = better
            return found

        selected = select_diverse(
            np.array(order.shown_scores),
            self._index.vectors(order.rows),
            self.settings.top_k,
            mmr=self.settings.mmr,
            near_duplicates=self.settings.near_duplicates,
            says_the_same=says_the_same,
        )
        left_out, better = (self._index.ids(order.rows[[*rows]]) if same else [] for rows in (same, same.values()))
        return order.selected(selected, dict(zip(left_out, better, strict=True)))

    def _texts(self, rows: NDArray[np.int64]) -> list[str]:
        return [passage.full_text for passage in self._index.passages(rows)]


def _check_stages(
    settings: SearchSettings, rerank: OpenReranker | None, expansion: Expansion | None, *, is_exact: bool
) -> None:
    """Check that the stages of a search can be combined.

    Raises:
        InputError: they cannot.
    """
    if not hasattr(expansion, "method") and expansion is not None:
        raise InputError(f"expansion is {shown(expansion)}, but must be an Expansion (d2llm.retrieval.expansion)")
    rephrases = expansion is not None and expansion.method == "multi"
    if rerank is not None and (settings.exact or settings.hybrid is not None):
        raise InputError(
            "a reranker requires the student's scores alone and changes their order: leave out exact and hybrid"
        )
    if rerank is not None and expansion is not None:
        raise InputError(
            "a reranker requires the student's scores of the plain queries: leave out either expansion or reranker"
        )
    if settings.group == "sum" and rephrases:
        raise InputError("fused scores are sums of ranks and cannot be summed as odds: set group to 'best'")
    if settings.group == "sum" and rerank is not None and not rerank.settings.gives_log_odds:
        kind = rerank.settings.kind
        raise InputError(f"scores of the reranker '{kind}' cannot be summed as odds: set group to 'best'")
    if rephrases and is_exact:
        raise InputError(
            "an exact search (a head without an inner product has no other) ranks by the scores of one query, not "
            "by a fusion: expand with 'hyde', or leave out expansion or exact"
        )
