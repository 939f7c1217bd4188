"""Candidate sources: they propose passages of an index for scoring.

``propose`` returns at most ``top_k`` rows, best first; ``dot_query`` [dim] is the query's vector for inner products,
``words`` are its words, if they were weighted already. The ``name`` of a source appears in explanations. To add one,
write a class like those below and create it in ``LocalSearch``.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from d2llm.core.fallbacks import count_fallback
from d2llm.core.types import Query, Ties
from d2llm.store.ann import AnnSearch
from d2llm.store.view import CandidateRows, PassageView
from d2llm.store.word_segment import QueryWords

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class VectorSource:
    """The highest inner products, by an exact scan of the stored vectors. Requires a head with an inner product."""

    index: PassageView
    allowed: NDArray[np.bool_] | None
    name: str = "vectors"

    def propose(
        self, query: Query, dot_query: NDArray[np.float32] | None, top_k: int, words: QueryWords | None = None
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
        else:
            count_fallback("approximate index")
            _log.warning("no usable approximate index (d2llm index INDEX ann builds one); using the exact scan")

    def propose(
        self, query: Query, dot_query: NDArray[np.float32] | None, top_k: int, words: QueryWords | None = None
    ) -> CandidateRows:
        """The rows found, with exact inner products."""
        del words
        result = None
        if self._search is not None and dot_query is not None:
            result = self._search.search(dot_query, top_k)
            if result is None:
                count_fallback("approximate index")  # the exact scan is as fast, or reaches deeper
        return self._exact.propose(query, dot_query, top_k) if result is None else CandidateRows(*result)


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
