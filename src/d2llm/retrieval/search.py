"""The ``search`` verb: rank the passages of an index for queries."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar, cast, overload

import numpy as np
from numpy.typing import NDArray

from d2llm.core.errors import DataFormatError, InputError, ModelError, ShardAwayError, StorageError
from d2llm.core.progress import progress_bar
from d2llm.core.types import IdRanking, MissingShard, Query, QueryExpansion, Ranking, Task
from d2llm.data.python_records import QueryLike, is_one_query, queries_of
from d2llm.models.backbone import EncodedTexts
from d2llm.ops.bm25_words import terms
from d2llm.ops.diversity import select_diverse
from d2llm.ops.fusion import reciprocal_rank_scores
from d2llm.ops.same_statement import Statement
from d2llm.ops.selection import check_scores, top_rows
from d2llm.retrieval.exact_search import CachedBounds, CertifiedRows, merge_certified
from d2llm.retrieval.expansion import Expansion, add_hypothetical_passages
from d2llm.retrieval.protocols import SearchStudent, SearchView, term_factors
from d2llm.retrieval.reranker import Candidates, OpenReranker, rerank_candidates
from d2llm.retrieval.results import Order, ScoredCandidates, group_passages, rerank_report, show
from d2llm.retrieval.row_features import FeatureParts, weights_for
from d2llm.retrieval.settings import SearchSettings
from d2llm.retrieval.shard_search import RemoteShard, SearchedShard, ShardQuery, ShardSearch, source_names
from d2llm.store.sharded_view import ShardView, joint_rows, map_in_threads, merge_candidates, rows_by_shard
from d2llm.store.view import CandidateRows, PassageView
from d2llm.store.word_segment import CountedTerms, QueryWords

_WIDENED = 4  # factor for the number of candidates, if these belong to too few documents
ENCODED_AT_ONCE = 256
"""Queries that are encoded together: enough for full batches, few enough to keep the progress bar moving."""

_SCANNED_AT_ONCE = 32  # queries: limited because their candidates are in memory together
_SPARE_SHARE = 16  # rows of a shard's first proposals beyond its expected share
_Answer = TypeVar("_Answer")


@overload
def search(
    index: SearchView,
    student: SearchStudent,
    queries: Query | str,
    settings: SearchSettings | None = None,
    *,
    rerank: OpenReranker | None = None,
    expansion: Expansion | None = None,
    **changes: Any,
) -> Ranking: ...
@overload
def search(  # pyright: ignore[reportOverlappingOverload] - a dictionary is one query, or has queries by id
    index: SearchView,
    student: SearchStudent,
    queries: Mapping[str, Any],
    settings: SearchSettings | None = None,
    *,
    rerank: OpenReranker | None = None,
    expansion: Expansion | None = None,
    **changes: Any,
) -> Ranking | list[Ranking]: ...
@overload
def search(
    index: SearchView,
    student: SearchStudent,
    queries: Iterable[QueryLike],
    settings: SearchSettings | None = None,
    *,
    rerank: OpenReranker | None = None,
    expansion: Expansion | None = None,
    **changes: Any,
) -> list[Ranking]: ...
def search(
    index: SearchView,
    student: SearchStudent,
    queries: Iterable[QueryLike] | QueryLike,
    settings: SearchSettings | None = None,
    *,
    rerank: OpenReranker | None = None,
    expansion: Expansion | None = None,
    **changes: Any,
) -> Ranking | list[Ranking]:
    """Rank the passages of an index for one query or a list: find candidates, then apply the full score (IEM).

    Args:
        index: an index made by this student, sharded or not.
        student: encodes the queries and scores the passages.
        queries: one text, query, or dictionary with ``text`` and ``id``, or a list of them; without an id they get
            "1", "2", ...
        settings: how to search.
        rerank: a second stage that scores the candidates again (``retrieval.reranker.open_reranker``).
        expansion: a language model that writes other queries, or passages that would answer them.
        changes: override single fields of the settings, as in ``search(index, student, queries, top_k=3)``.

    Returns:
        The ranking of one query; for a list, a list with one ranking per query. Passages are best first, ties by
        passage id. ``seconds`` holds "encode", "candidates", "score" and, with a reranker, "rerank", with an
        expansion, "expansion". For work done on several queries together (expanding and encoding 256, the exact scan
        32), each query gets the mean.

    Raises:
        InputError: settings contradict each other, or a query has no text.
        FilterError: the filter cannot be parsed, or does not fit the metadata.
        IndexMismatchError: the index was made by another student.
        MismatchError: the reranker is for another student.
        ModelError: a score is NaN, or the reranker did not score all candidates.
    """
    searcher = Searcher(index, student, SearchSettings.of(settings, **changes), rerank=rerank, expansion=expansion)
    return searcher.rank(queries)


@dataclass(slots=True)
class _PreparedQuery:
    """A query with everything computed before its ranking.

    It is not frozen: it is prepared in several steps, and its ranking adds to ``seconds`` and ``missing``.

    Attributes:
        sent: the query as shards get it.
        dot_is_score: whether its candidates' inner products are their final scores.
        depth: how many candidates each source proposes at first.
        scanned: by shard, the query's candidates from a scan shared with other queries, to that depth.
        seconds: time by stage, as in a ranking.
        truncated: whether the query is longer than the student reads.
        missing: by shard, why it gave no answer to this query.
        expansion: what a language model added to the query, or None.
        rephrasings: other queries with its meaning, prepared like this one.
    """

    sent: ShardQuery
    dot_is_score: bool
    depth: int
    scanned: Mapping[int, CandidateRows]
    seconds: dict[str, float]
    truncated: bool = False
    missing: dict[int, MissingShard] = field(default_factory=dict[int, MissingShard])
    expansion: QueryExpansion | None = None
    rephrasings: tuple[_PreparedQuery, ...] = ()

    @property
    def query(self) -> Query:
        """Text and id."""
        return self.sent.query


class Searcher:
    """``search`` for many calls: work that does not depend on the queries is done once. Arguments: see ``search``.

    Every shard of the index does its part (``ShardSearch``), in threads; what they return is merged here.
    ``weights`` are those of the score features in the scores.
    """

    def __init__(
        self,
        index: SearchView,
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
            index: as for ``search``, like all others that are not named here.
            student: makes the vectors of queries, and scores.
            settings: how to search.
            cached: keeps values that exact searches of this version compute for all rows.
            rerank: a reranker.
            expansion: a language model.
            allow_missing: a shard that cannot be read is left out and named in ``Ranking.missing_shards``, instead of
                ending the search.
        """
        self.settings = settings or SearchSettings()
        if rerank is not None and (self.settings.exact or self.settings.hybrid is not None):
            raise InputError(
                "a reranker requires the student's scores alone and changes their order: leave out exact and hybrid"
            )
        self._expansion = expansion
        self._rephrases = expansion is not None and expansion.method == "multi"
        if expansion is not None and rerank is not None:
            raise InputError(
                "a reranker requires the student's scores of the plain queries: leave out either expansion or reranker"
            )
        if self._rephrases and self.settings.group == "sum":
            raise InputError("fused scores are sums of ranks and cannot be summed as odds: set group to 'best'")
        index.check_student(student.fingerprint)
        if rerank is not None and self.settings.group == "sum" and not rerank.settings.gives_log_odds:
            kind = rerank.settings.kind
            raise InputError(f"scores of the reranker '{kind}' cannot be summed as odds: set group to 'best'")
        self._index = index
        self._student = student
        self._task: Task = self.settings.task or index.task
        self.weights = weights_for(index, student, self._task, self.settings.score_features)
        names = self.settings.proposers(counts_words=self.weights.counts_words)
        by_vectors = not {"vectors", "ann"}.isdisjoint(names)
        self._exact = self.settings.exact or (by_vectors and not student.has_dot)
        if self._rephrases and self._exact:
            raise InputError(
                "an exact search (a head without an inner product has no other) ranks by the scores of one query, not "
                "by a fusion: expand with 'hyde', or leave out expansion or exact"
            )
        self._rerank = None if rerank is None else rerank.for_index(index, student, self._task)
        cached = cached or CachedBounds()
        self._shards = [
            self._begin(view, cached.of_shard(shard_index)) for shard_index, view in enumerate(index.shards)
        ]
        self._allow_missing = allow_missing
        self._sources = source_names(self.settings, self.weights, is_exact=self._exact)
        in_order = rerank is None and self.settings.hybrid is None and not self._rephrases
        self._in_students_order = in_order and self.settings.group == "passage"

    def _begin(self, view: ShardView, cached: CachedBounds) -> SearchedShard:
        if isinstance(view, RemoteShard):
            return view.begin_search(self._student, self.settings, self._task, self.weights, is_exact=self._exact)
        return ShardSearch(
            cast("PassageView", view),
            self._student,
            self.settings,
            self._task,
            self.weights,
            is_exact=self._exact,
            cached=cached,
        )

    @overload
    def rank(
        self,
        queries: Query | str,
        *,
        vectors: NDArray[np.float32] | None = None,
        tokens: Sequence[NDArray[np.float32] | None] | None = None,
    ) -> Ranking: ...
    @overload
    def rank(  # pyright: ignore[reportOverlappingOverload] - a dictionary is one query, or has queries by id
        self,
        queries: Mapping[str, Any],
        *,
        vectors: NDArray[np.float32] | None = None,
        tokens: Sequence[NDArray[np.float32] | None] | None = None,
    ) -> Ranking | list[Ranking]: ...
    @overload
    def rank(
        self,
        queries: Iterable[QueryLike],
        *,
        vectors: NDArray[np.float32] | None = None,
        tokens: Sequence[NDArray[np.float32] | None] | None = None,
    ) -> list[Ranking]: ...
    def rank(
        self,
        queries: Iterable[QueryLike] | QueryLike,
        *,
        vectors: NDArray[np.float32] | None = None,
        tokens: Sequence[NDArray[np.float32] | None] | None = None,
    ) -> Ranking | list[Ranking]:
        """Rank the passages for one query (a ranking) or for each of a list (a list of rankings).

        If ``vectors`` [n, dim] are given, the queries are not encoded, and no ranking is marked as ``truncated``. If
        the score counts token embeddings, these are encoded unless all ``tokens`` [tokens, token_dim] are given, too.
        Vectors cannot be combined with an instruction, which would have had to be read for them.
        """
        if tokens is not None and any(own is None for own in tokens):
            tokens = None
        prepared = self._prepare(queries, vectors, "searching", tokens)
        rankings = [self._retrying_without_lost_shards(partial(self._shown, one)) for one in prepared]
        return rankings[0] if is_one_query(queries) else rankings

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
        for position, prepared in enumerate(self._prepare(queries, vectors, title, tokens)):
            passages = self._retrying_without_lost_shards(partial(self._ids, prepared))
            rankings.append(IdRanking(prepared.query, passages, prepared.truncated or position in cut))
        return rankings

    def _prepare(
        self,
        queries: Iterable[QueryLike] | QueryLike,
        vectors: NDArray[np.float32] | None,
        title: str,
        tokens: Sequence[NDArray[np.float32] | None] | None = None,
    ) -> Iterator[_PreparedQuery]:
        """Every query ready to be ranked; the bar counts the queries that were taken."""
        all_queries = queries_of(queries)
        if vectors is not None and self._expansion is not None:
            raise InputError("an expansion is written for texts, not for vectors: leave out one of them")
        if vectors is not None and self.settings.instruction is not None:
            raise InputError(
                "an instruction is read with a query's text, and these queries are encoded already: encode them with "
                "the instruction, and leave it out here"
            )
        if vectors is not None and vectors.shape != (len(all_queries), self._student.vector_dim):
            raise InputError(
                f"vectors have the shape {vectors.shape}, but the {len(all_queries)} queries need "
                f"({len(all_queries)}, {self._student.vector_dim})"
            )
        with progress_bar(title, len(all_queries)) as advance:
            for start in range(0, len(all_queries), ENCODED_AT_ONCE):
                block = all_queries[start : start + ENCODED_AT_ONCE]
                if self._expansion is None:
                    given = None if vectors is None else vectors[start : start + len(block)]
                    own = None if tokens is None else tokens[start : start + len(block)]
                    prepared = self._prepare_block(block, given, own)
                elif self._rephrases:
                    prepared = self._prepare_rephrased(block, self._expansion)
                else:
                    prepared = self._prepare_hypothetical(block, self._expansion)
                for one in prepared:
                    yield one
                    advance(1)

    def _prepare_block(
        self,
        queries: Sequence[Query],
        vectors: NDArray[np.float32] | None,
        given_tokens: Sequence[NDArray[np.float32] | None] | None = None,
    ) -> Iterator[_PreparedQuery]:
        """``_prepare`` for as many queries as are encoded at once."""
        begin = time.perf_counter()
        cut: Sequence[int] = ()
        tokens: Sequence[NDArray[np.float32] | None] = [None] * len(queries)
        texts, instruction = [query.text for query in queries], self.settings.instruction
        if given_tokens is not None and vectors is not None:
            tokens = given_tokens
        elif "token" in self.weights.part_kinds:
            read = self._student.encode_with_tokens(texts, "query", instruction=instruction)
            assert read.tokens is not None
            tokens = read.tokens.split()
            if vectors is None:
                vectors, cut = read.vectors, read.truncated
        elif vectors is None:
            read = self._student.encode_queries(texts, instruction=instruction)
            vectors, cut = read.vectors, read.truncated
        dot_queries = self._dot_queries(vectors)
        seconds = (time.perf_counter() - begin) / len(queries)
        for at in range(0, len(queries), _SCANNED_AT_ONCE):
            part = slice(at, at + _SCANNED_AT_ONCE)
            together = self._prepare_together(queries[part], vectors[part], dot_queries[part], tokens[part], seconds)
            for position, prepared in enumerate(together, at):
                prepared.truncated = position in cut
                yield prepared

    def _prepare_rephrased(self, queries: Sequence[Query], expansion: Expansion) -> Iterator[_PreparedQuery]:
        """``_prepare_block`` for queries with their rephrasings."""
        expansions = expansion.expand([query.text for query in queries])
        phrasings = [
            Query(query.id, text)
            for query, expanded in zip(queries, expansions, strict=True)
            for text in (query.text, *expanded.texts)
        ]
        prepared = self._prepare_block(phrasings, None)
        for expanded in expansions:
            own = next(prepared)
            own.rephrasings = tuple(next(prepared) for _ in expanded.texts)
            for other in own.rephrasings:
                for stage, seconds in other.seconds.items():
                    own.seconds[stage] += seconds
            own.seconds["expansion"] = expanded.seconds
            own.expansion = replace(expanded, num_truncated=sum(other.truncated for other in own.rephrasings))
            yield own

    def _prepare_hypothetical(self, queries: Sequence[Query], expansion: Expansion) -> Iterator[_PreparedQuery]:
        """``_prepare_block`` for queries whose vectors include those of hypothetical passages."""
        texts = [query.text for query in queries]
        expansions = expansion.expand(texts)
        begin = time.perf_counter()
        read = self._student.encode_queries(texts, instruction=self.settings.instruction)
        vectors, expansions = add_hypothetical_passages(self._student, read.vectors, expansions)
        seconds = (time.perf_counter() - begin) / len(queries)
        prepared = self._prepare_block(queries, vectors)
        for position, (own, expanded) in enumerate(zip(prepared, expansions, strict=True)):
            own.seconds["encode"] += seconds
            own.seconds["expansion"] = expanded.seconds
            own.expansion, own.truncated = expanded, position in read.truncated
            yield own

    def _prepare_together(
        self,
        queries: Sequence[Query],
        vectors: NDArray[np.float32],
        dot_queries: Sequence[NDArray[np.float32] | None],
        tokens: Sequence[NDArray[np.float32] | None],
        encode_seconds: float,
    ) -> Iterator[_PreparedQuery]:
        """Queries ready to be ranked, after one shared scan for all of them if the exact scan is a source."""
        begin = time.perf_counter()
        missing: dict[int, MissingShard] = {}
        words = self._words(queries, missing)
        sent = [
            ShardQuery(query, vector, dot_query, own_tokens, own_words)
            for query, vector, dot_query, own_tokens, own_words in zip(
                queries, vectors, dot_queries, tokens, words, strict=True
            )
        ]
        are_scores = [self._dot_is_score(one) for one in sent]
        score_seconds = (time.perf_counter() - begin) / len(queries)
        begin = time.perf_counter()
        # A scan orders rows by inner product. If the inner products are the scores, it need not go deeper than the
        # ranking.
        final = "vectors" in self._sources and all(are_scores)
        share = math.ceil(self.settings.num_candidates / max(len(self._sources), 1))
        depth = self.settings.ranking_depth if final else max(share, self.settings.ranking_depth)
        together = [dot_query for dot_query in dot_queries if dot_query is not None]
        scans: dict[int, Sequence[CandidateRows] | None] = {}
        if "vectors" in self._sources and len(together) > 1:
            stacked = np.stack(together)
            scans = self._ask(missing, lambda _, shard: shard.scan_together(stacked, self._share(depth)))
        prepared = [
            _PreparedQuery(
                one,
                is_score,
                depth,
                {shard_index: scanned[number] for shard_index, scanned in scans.items() if scanned is not None},
                {},
                missing=dict(missing),
            )
            for number, (one, is_score) in enumerate(zip(sent, are_scores, strict=True))
        ]
        scan_seconds = (time.perf_counter() - begin) / len(queries)
        for one in prepared:
            one.seconds.update(encode=encode_seconds, candidates=scan_seconds, score=score_seconds)
            yield one

    def _words(self, queries: Sequence[Query], missing: dict[int, MissingShard]) -> list[QueryWords | None]:
        """The words of each query, weighted by how many passages have them, in all shards that answer."""
        if not self.weights and "bm25" not in self._sources:
            return [None] * len(queries)
        texts = [query.text for query in queries]
        factors = term_factors(self._student, texts)
        counted = [CountedTerms.from_text(text, own) for text, own in zip(texts, factors, strict=True)]
        hashes = np.concatenate([one.hashes for one in counted])
        counts = self._ask(missing, lambda _, shard: shard.count_words(hashes))
        num_passages = sum(len(self._index.shards[shard_index]) for shard_index in counts)
        rows_with = sum(counts.values(), np.zeros(len(hashes), np.int64))
        ends = np.cumsum([len(one.hashes) for one in counted])
        return [
            one.weighted(own, num_passages) for one, own in zip(counted, np.split(rows_with, ends[:-1]), strict=True)
        ]

    def _ask(
        self,
        missing: dict[int, MissingShard],
        step: Callable[[int, SearchedShard], _Answer],
        shard_indexes: Iterable[int] | None = None,
        *,
        in_turn: bool = False,
    ) -> dict[int, _Answer]:
        """The answers of all shards, or of ``shard_indexes``, by shard index; ``in_turn``: not at the same time.

        A shard that cannot be read is added to ``missing``, and not asked again, if that is allowed.

        Raises:
            ShardAwayError: no shard can be read.
        """
        answers: dict[int, _Answer] = {}
        chosen = range(len(self._shards)) if shard_indexes is None else shard_indexes
        readable = [shard_index for shard_index in chosen if shard_index not in missing]

        def answer(asked_index: int) -> _Answer | MissingShard:
            shard = self._shards[asked_index]
            try:
                return step(asked_index, shard)
            except (DataFormatError, StorageError, OSError) as error:
                if not self._allow_missing:
                    raise
                return shard.missing(error)

        results = map(answer, readable) if in_turn else map_in_threads(answer, readable)
        for shard_index, one in zip(readable, results, strict=True):
            if isinstance(one, MissingShard):
                missing[shard_index] = one
            else:
                answers[shard_index] = one
        if len(missing) == len(self._shards):
            raise ShardAwayError(f"no shard of the index answers; the first: {next(iter(missing.values())).problem}")
        return answers

    def _dot_is_score(self, sent: ShardQuery) -> bool:
        """Whether the candidates' inner products are their final scores and nothing else changes their order."""
        if self._exact or self.weights or not self._in_students_order or self._sources not in (["vectors"], ["ann"]):
            return False
        if not self._student.has_dot:
            return False
        prepared = self._student.prepare(sent.vector, self._task)
        return prepared is not None and prepared.bound == 0

    def _dot_queries(self, vectors: NDArray[np.float32]) -> Sequence[NDArray[np.float32] | None]:
        if not self._student.has_dot:
            return [None] * len(vectors)
        return list(self._student.query_vectors(vectors, self._task))

    def _order(self, prepared: _PreparedQuery) -> Order:
        depth, deepest = prepared.depth, math.inf
        if self.settings.max_num_candidates is not None:
            num_proposals = max(len(self._sources), 1) * (1 + len(prepared.rephrasings))
            deepest = self.settings.max_num_candidates // num_proposals
        while True:
            scored = self._candidates(prepared, depth)
            documents = None if self.settings.group == "passage" else self._index.documents(scored.rows)
            is_enough = documents is None or scored.is_all or len(set(documents)) >= self.settings.ranking_depth
            if is_enough or depth >= deepest:
                return self._ranked(prepared.query, scored, documents)
            depth = int(min(_WIDENED * depth, deepest))

    def _ids(self, prepared: _PreparedQuery) -> tuple[tuple[str, float], ...]:
        order = self._order(prepared)
        return tuple(zip(self._index.ids(order.rows), order.shown_scores, strict=True))

    def _retrying_without_lost_shards(self, rank: Callable[[], _Answer]) -> _Answer:
        """``rank()``; if a shard is lost after it has proposed passages, once more without it, if that is allowed."""
        for _ in self._shards:
            try:
                return rank()
            except ShardAwayError:
                if not self._allow_missing:
                    raise
        return rank()

    def _shown(self, prepared: _PreparedQuery) -> Ranking:
        query, seconds = prepared.query, prepared.seconds
        order = self._order(prepared)
        begin = time.perf_counter()
        explained = self._score_features(prepared, order.rows) if self.settings.explain else None
        passages = show(
            self._index,
            query,
            prepared.sent.dot_query,
            order,
            score_features=explained,
            document_passages=self.settings.document_passages,
            neighbours=self.settings.neighbours,
        )
        seconds["score"] += time.perf_counter() - begin
        report = None
        if self._rerank is not None:
            report = rerank_report(self._rerank.settings.kind, order)
            seconds["rerank"] = report.seconds
        scored = order.scored
        missing = sorted((*self._index.missing, *prepared.missing.values()), key=lambda shard: shard.number)
        return Ranking(
            query,
            passages,
            scored.num_scored,
            seconds,
            scored.certificate,
            self._index.version,
            report,
            truncated=prepared.truncated,
            selection=order.selection,
            expansion=prepared.expansion,
            missing_shards=tuple({shard.number: shard for shard in missing}.values()),
            num_shards=self._index.num_shards,
            sources=tuple(self._sources),
        )

    def _score_features(self, prepared: _PreparedQuery, rows: NDArray[np.int64]) -> FeatureParts:
        """What words, windows and tokens add to the scores of some rows [n]."""
        parts: dict[str, NDArray[np.float32]] = {}
        for shard_index, at, own in rows_by_shard(rows):
            for name, values in self._shards[shard_index].score_features(prepared.sent, own)._asdict().items():
                if values is not None:
                    parts.setdefault(name, np.zeros(len(rows), np.float32))[at] = values
        return FeatureParts(**parts)

    def _candidates(self, prepared: _PreparedQuery, depth: int) -> ScoredCandidates:
        """At least ``depth`` candidates with the student's scores, if the index has that many."""
        begin = time.perf_counter()
        proposals = self._proposals(prepared, depth, prepared.missing)
        self._set_nearest(prepared, proposals, prepared.missing)
        for number, other in enumerate(prepared.rephrasings, start=1):
            others = self._proposals(other, depth, prepared.missing)
            self._set_nearest(other, others, prepared.missing)
            proposals |= {f"{name} for rephrasing {number}": proposal for name, proposal in others.items()}
        scoring_begin = time.perf_counter()
        score = self._score_exactly if self._exact else self._score
        scored = score(prepared, proposals, depth)
        prepared.seconds["candidates"] += scoring_begin - begin
        prepared.seconds["score"] += time.perf_counter() - scoring_begin
        return scored

    def _proposals(
        self, prepared: _PreparedQuery, depth: int, missing: dict[int, MissingShard]
    ) -> dict[str, CandidateRows]:
        """What each source proposes for one phrasing of a query: the best ``depth`` of what the shards propose.

        Passages are in shards at random, so each shard is first asked for little more than its share. If even the last
        of these is among the best of all, it may have more of them, and is asked again.
        """
        scanned = prepared.scanned if depth == prepared.depth else {}
        share = self._share(depth)
        proposals = self._ask(
            missing, lambda shard_index, shard: shard.propose(prepared.sent, share, scanned=scanned.get(shard_index))
        )
        merged = self._merged(proposals, depth)
        more = [
            shard_index
            for shard_index, own in proposals.items()
            for name, one in own.items()
            if len(one.rows) == share < depth and joint_rows(shard_index, one.rows[-1:]) in merged[name].rows
        ]
        if not more:
            return merged
        again = self._ask(missing, lambda _, shard: shard.propose(prepared.sent, depth), dict.fromkeys(more))
        return self._merged({shard_index: again.get(shard_index, own) for shard_index, own in proposals.items()}, depth)

    def _set_nearest(
        self, prepared: _PreparedQuery, proposals: Mapping[str, CandidateRows], missing: dict[int, MissingShard]
    ) -> None:
        """Look up how near the nearest passage is, if the weight of words depends on it."""
        if not self.weights.needs_nearest or prepared.sent.nearest is not None:
            return
        by_vectors = next((proposals[name].scores for name in ("vectors", "ann") if name in proposals), _NOTHING)
        if len(by_vectors):
            nearest = float(by_vectors[0])
        else:
            nearest = max(self._ask(missing, lambda _, shard: shard.nearest(prepared.sent)).values())
        # If nothing may be found, nothing will be scored either.
        prepared.sent = replace(prepared.sent, nearest=0.0 if nearest == -math.inf else nearest)

    def _share(self, depth: int) -> int:
        """How many of the best ``depth`` rows a shard is first asked for: seldom fewer than it has of them."""
        mean = depth / len(self._shards)
        return depth if len(self._shards) == 1 else min(depth, math.ceil(mean + 4 * math.sqrt(mean)) + _SPARE_SHARE)

    def _merged(self, proposals: Mapping[int, Mapping[str, CandidateRows]], depth: int) -> dict[str, CandidateRows]:
        """The best ``depth`` rows of each source, from those of the shards."""
        merged: dict[str, CandidateRows] = {}
        for name in self._sources:
            by_ids = name != "bm25" or self.settings.hybrid is not None
            by_shard = {shard_index: own[name] for shard_index, own in proposals.items()}
            merged[name] = merge_candidates(by_shard, depth, self._index.ids if by_ids else None)
        return merged

    def _score(self, prepared: _PreparedQuery, proposals: Mapping[str, CandidateRows], depth: int) -> ScoredCandidates:
        if prepared.dot_is_score:
            (proposal,), top_k = proposals.values(), self.settings.ranking_depth
            rows, scores = proposal.rows[:top_k], proposal.scores[:top_k]
            check_scores(scores, prepared.query.id)
            return ScoredCandidates(rows, scores, len(rows), proposals, None, len(proposal.rows) < depth)
        # Sorted rows are read from disk sequentially; the final order is made later.
        rows = np.unique(np.concatenate([proposal.rows for proposal in proposals.values()]))
        phrasings = (prepared, *prepared.rephrasings)
        parts = {shard_index: (at, own) for shard_index, at, own in rows_by_shard(rows)}

        def score(shard_index: int, shard: SearchedShard) -> NDArray[np.float32]:
            return np.stack([shard.score(one.sent, parts[shard_index][1]) for one in phrasings])

        is_scored = np.zeros(len(rows), np.bool_)
        all_scores = np.zeros((len(phrasings), len(rows)), np.float32)
        for shard_index, scores in self._ask(prepared.missing, score, parts).items():
            is_scored[parts[shard_index][0]] = True
            all_scores[:, parts[shard_index][0]] = scores
        rows, all_scores = rows[is_scored], all_scores[:, is_scored]
        for one, scores in zip(phrasings, all_scores, strict=True):
            check_scores(scores, one.query.id)
        is_all = all(len(proposal.rows) < depth for proposal in proposals.values())
        return ScoredCandidates(rows, all_scores[0], len(rows), proposals, None, is_all, tuple(all_scores[1:]))

    def _score_exactly(
        self, prepared: _PreparedQuery, proposals: Mapping[str, CandidateRows], depth: int
    ) -> ScoredCandidates:
        top_k = self.settings.ranking_depth if self._in_students_order else depth
        try:
            certified = self._certify(prepared, top_k)
        except ModelError as error:
            raise ModelError(f"query {prepared.query.id!r}: {error}") from error
        # It only proves the student's order of passages.
        certificate = certified.certificate if self._in_students_order else None
        rows, scores, is_all = certified.rows, certified.scores, len(certified.rows) < top_k
        # BM25's proposals in a fusion need not be among the student's best.
        proposed = np.concatenate([np.zeros(0, np.int64), *(proposal.rows for proposal in proposals.values())])
        others = {shard_index: own for shard_index, _, own in rows_by_shard(np.setdiff1d(proposed, rows))}
        more = self._ask(
            prepared.missing, lambda shard_index, shard: shard.score(prepared.sent, others[shard_index]), others
        )
        rows = np.concatenate([rows, *(joint_rows(shard_index, others[shard_index]) for shard_index in more)])
        scores = np.concatenate([scores, *more.values()])
        return ScoredCandidates(rows, scores, certified.certificate.num_scored, proposals, certificate, is_all)

    def _certify(self, prepared: _PreparedQuery, top_k: int) -> CertifiedRows:
        """The exact ranking of all shards with its proof.

        In this process, one shard after the other answers, and only looks for what those before it do not exceed.
        Shards in other processes answer at the same time: each does more work, but they take as long as the slowest.
        """
        begin, budget = time.perf_counter(), self.settings.budget_ms
        in_turn = not all(isinstance(view, RemoteShard) for view in self._index.shards)
        merging = threading.Lock()
        best: NDArray[np.float32] = _NOTHING  # the top_k best scores of the shards so far, in any order

        def certify(_: int, shard: SearchedShard) -> CertifiedRows:
            nonlocal best
            left = None if budget is None else max(0.0, budget - 1e3 * (time.perf_counter() - begin))
            known = best
            floor = float(known.min()) if len(known) == top_k else -math.inf
            certified = shard.certify(prepared.sent, top_k, budget_ms=left, floor=floor)
            with merging:
                scores = np.concatenate((best, certified.scores))
                best = np.partition(scores, len(scores) - top_k)[-top_k:] if len(scores) > top_k else scores
            return certified

        return merge_certified(self._ask(prepared.missing, certify, in_turn=in_turn), top_k, self._index.ids)

    def _ranked(self, query: Query, scored: ScoredCandidates, documents: Sequence[str] | None) -> Order:
        """The top ``top_k`` passages or documents by the student's score, a fusion of rankings, or the reranker's.

        With ``mmr`` or ``near_duplicates``, they are a selection from the top ``ranking_depth``.
        """
        rows, top_k = scored.rows, self.settings.top_k

        def best(scores: NDArray[np.floating[Any]], count: int) -> NDArray[np.int64]:
            return top_rows(scores, count, lambda places: self._index.ids(rows[places]))

        final: NDArray[np.floating[Any]] = scored.scores
        reranked, student_ranks = None, None
        if self.settings.hybrid is not None or scored.rephrasing_scores:
            share = self.settings.hybrid
            phrasings = (scored.scores, *scored.rephrasing_scores)
            rankings = [rows[best(scores, len(rows))].tolist() for scores in phrasings]
            num_others = len(scored.rephrasing_scores)
            # The query counts as much as all other phrasings together.
            weights = [float(max(1, num_others)), *[1.0] * num_others]
            if share is not None:
                rankings += [one.rows.tolist() for name, one in scored.proposals.items() if name.startswith("bm25")]
                weights = [2 * part * weight for part in (1 - share, share) for weight in weights]
            fused = reciprocal_rank_scores(rankings, weights=weights)
            final = np.array([fused[row] for row in rows.tolist()], np.float32)
        if self._rerank is not None:
            best_first = best(final, len(rows))
            student_ranks = np.empty(len(rows), np.int64)
            student_ranks[best_first] = np.arange(1, len(rows) + 1)
            candidates = Candidates(
                scored.scores,
                best_first,
                texts=lambda places: self._texts(rows[places]),
                vectors=lambda places: self._index.vectors(rows[places]),
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
        left_out, better = (self._index.ids(order.rows[[*each]]) if same else [] for each in (same, same.values()))
        return order.selected(selected, dict(zip(left_out, better, strict=True)))

    def _texts(self, rows: NDArray[np.int64]) -> list[str]:
        return [passage.full_text for passage in self._index.passages(rows)]


_NOTHING = np.zeros(0, np.float32)
