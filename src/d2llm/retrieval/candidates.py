"""Where candidates come from: the sources that propose passages of an index."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from d2llm.core.fallbacks import count_fallback
from d2llm.core.types import Query, Ties
from d2llm.store.ann import AnnSearch
from d2llm.store.view import CandidateRows, PassageView

_log = logging.getLogger(__name__)


class CandidateSource(Protocol):
    """Proposes passages for a query. A new one is a class like those below and a line in ``sources_of``."""

    @property
    def name(self) -> str:
        """What an explanation calls it."""
        ...

    def propose(self, query: Query, anchor: NDArray[np.float32] | None, top_k: int) -> CandidateRows:
        """At most ``top_k`` rows, best first. ``anchor`` [dim] is the query for an inner product."""
        ...


@dataclass(frozen=True, slots=True)
class VectorSource:
    """The highest inner products: an exact scan of what is stored. Nothing for a head without an anchor."""

    index: PassageView
    allowed: NDArray[np.bool_] | None
    name: str = "vectors"

    def propose(self, query: Query, anchor: NDArray[np.float32] | None, top_k: int) -> CandidateRows:
        """The rows with the highest inner products."""
        del query
        assert anchor is not None, "a search without an anchor has no vector source"
        return self.index.scan(anchor, top_k, self.allowed)

    def propose_together(self, anchors: NDArray[np.float32], top_k: int) -> Sequence[CandidateRows]:
        """``propose`` for each of several queries [q, dim]."""
        return self.index.scan_together(anchors, top_k, self.allowed)


class AnnSource:
    """Nearly the highest inner products, by an approximate index, or by the exact scan where that is as quick."""

    name = "ann"

    def __init__(self, index: PassageView, allowed: NDArray[np.bool_] | None) -> None:
        self._exact = VectorSource(index, allowed)
        self._search: AnnSearch | None = None
        if index.ann is not None:
            self._search = AnnSearch(index.ann, index.mask(allowed), index.ids)
        else:
            count_fallback("approximate index")
            _log.warning("no approximate index fits (d2llm index INDEX ann builds one); the exact scan answers")

    def propose(self, query: Query, anchor: NDArray[np.float32] | None, top_k: int) -> CandidateRows:
        """The rows found, with exact inner products."""
        result = None
        if self._search is not None and anchor is not None:
            result = self._search.search(anchor, top_k)
            if result is None:
                count_fallback("approximate index")  # as the exact scan is as quick, or reaches deeper
        return self._exact.propose(query, anchor, top_k) if result is None else CandidateRows(*result)


@dataclass(frozen=True, slots=True)
class LexicalSource:
    """BM25. ``ties`` as in ``match``: where every candidate is scored in full, their order decides nothing."""

    index: PassageView
    filter: str | None
    ties: Ties
    name: str = "bm25"

    def propose(self, query: Query, anchor: NDArray[np.float32] | None, top_k: int) -> CandidateRows:
        """The rows that BM25 finds."""
        del anchor
        return self.index.match(query.text, top_k, self.filter, ties=self.ties)
