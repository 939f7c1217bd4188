"""JSON responses: bodies of rankings, and a fast serializer for large arrays."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic_core import to_json
from starlette.responses import JSONResponse

from d2llm.core.types import Excerpt, Explanation, Ranking
from d2llm.models.probabilities import WEAK, WEAK_WITHOUT_WORDS
from d2llm.ops.bm25_words import terms
from d2llm.retrieval.context import AnswerContext
from d2llm.server.response_schemas import ContextResponse, Joined, RatedPassage, SearchResponse

_FEW_ITEMS = 64  # passages or vectors, which are serialized within a few milliseconds


class FastJSONResponse(JSONResponse):
    """A ``JSONResponse`` that is several times faster on vectors and accepts numpy arrays."""

    def render(self, content: Any) -> bytes:
        """Serialize the body."""
        return to_json(content, fallback=_plain)


async def response_of(
    make: Callable[[], Any], num_items: int, headers: Mapping[str, str] | None = None
) -> FastJSONResponse:
    """The response with the content that ``make`` returns; one of many items is made and serialized in another thread.

    Vectors should be items of a list: between them, other threads can work.
    """

    def respond() -> FastJSONResponse:
        return FastJSONResponse(make(), headers=headers)

    return respond() if num_items <= _FEW_ITEMS else await asyncio.to_thread(respond)


def listed_vectors(vectors: NDArray[np.float32], encoding: str | None) -> list[Any]:
    """Vectors [n, dim] as the items of a body: arrays, or with "base64" texts of float32 numbers, little-endian."""
    if encoding != "base64":
        return list(vectors)
    return [base64.b64encode(vector).decode("ascii") for vector in np.ascontiguousarray(vectors, "<f4")]


def _plain(value: Any) -> Any:
    return value.tolist()


def search_response(
    ranking: Ranking, excerpts: Sequence[Excerpt] | None, probabilities: Sequence[float | None], **origin: Any
) -> SearchResponse:
    """A ranking with its excerpts, if they were requested, and the ``probabilities`` that its passages are relevant."""
    query_terms = frozenset(terms(ranking.query.text))
    passages = [
        RatedPassage(ranked, probability, _is_weak(ranked.explanation, probability, query_terms))
        for ranked, probability in zip(ranking.passages, probabilities, strict=True)
    ]
    facts = _facts(ranking) | origin
    return SearchResponse.model_validate(Joined(ranking, passages=passages, excerpts=excerpts, **facts))


def _is_weak(explanation: Explanation | None, probability: float | None, query_terms: Set[str]) -> bool | None:
    if explanation is None or probability is None:
        return None
    if not query_terms:  # only signs such as "???"
        return True
    if query_terms <= explanation.terms.keys():
        return False
    return probability < (WEAK if explanation.terms else WEAK_WITHOUT_WORDS)


def context_response(context: AnswerContext, **origin: Any) -> ContextResponse:
    """A context with facts about its ranking."""
    facts = _facts(context.ranking) | origin
    fields = {"sources": context.sources, "context_truncated": context.truncated}
    return ContextResponse.model_validate(Joined(context.ranking, context, **fields, **facts))


def _facts(ranking: Ranking) -> dict[str, Any]:
    return {"candidate_sources": ranking.sources, "shards": _answered(ranking)}


def _answered(ranking: Ranking) -> str | None:
    """How many shards gave an answer, as 7/8; None if the index is not sharded."""
    if ranking.num_shards is None:
        return None
    return f"{ranking.num_shards - len(ranking.missing_shards)}/{ranking.num_shards}"
