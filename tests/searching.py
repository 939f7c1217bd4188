"""A search of one version of an index, in one call."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from d2llm.core.types import Ranking
from d2llm.data.python_records import QueryLike
from d2llm.models.protocols import SearchStudent
from d2llm.retrieval.expansion import Expansion
from d2llm.retrieval.reranker import OpenReranker
from d2llm.retrieval.search import Searcher
from d2llm.retrieval.segments import IndexView
from d2llm.retrieval.settings import SearchSettings


def search(
    index: IndexView,
    student: SearchStudent,
    queries: Iterable[QueryLike],
    settings: SearchSettings | None = None,
    *,
    rerank: OpenReranker | None = None,
    expansion: Expansion | None = None,
    **changes: Any,
) -> list[Ranking]:
    """The rankings of some queries; ``changes`` are single fields of the settings."""
    chosen = SearchSettings.of(settings, **changes)
    return Searcher(index, student, chosen, rerank=rerank, expansion=expansion).rank(queries)
