"""JSON responses: bodies of rankings and passages, and a fast serializer for large arrays."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import asdict
from typing import Any

from pydantic_core import to_json
from starlette.responses import JSONResponse

from d2llm.core.types import Excerpt, Explanation, MetadataValue, Passage, RankedPassage, Ranking
from d2llm.models.probabilities import WEAK, WEAK_WITHOUT_WORDS
from d2llm.ops.bm25_words import terms
from d2llm.retrieval.context import AnswerContext

_FEW_ITEMS = 64  # passages or vectors, which are serialized within a few milliseconds


class FastJSONResponse(JSONResponse):
    """A ``JSONResponse`` that is several times faster on vectors and accepts numpy arrays."""

    def render(self, content: Any) -> bytes:
        """Serialize the body."""
        return to_json(content, fallback=_plain)


async def answer_of(
    make: Callable[[], Any], num_items: int, headers: Mapping[str, str] | None = None
) -> FastJSONResponse:
    """The answer with the content that ``make`` returns; one of many items is made and serialized in another thread.

    Vectors should be items of a list: between them, other threads can work.
    """

    def respond() -> FastJSONResponse:
        return FastJSONResponse(make(), headers=headers)

    return respond() if num_items <= _FEW_ITEMS else await asyncio.to_thread(respond)


def _plain(value: Any) -> Any:
    return value.tolist()


def search_json(
    ranking: Ranking, excerpts: Sequence[Excerpt] | None, probabilities: Sequence[float | None]
) -> dict[str, Any]:
    """The fields of ``schemas.SearchAnswer`` that come from a ranking, from its excerpts if they were requested, and
    from the ``probabilities`` that its passages are relevant.
    """
    query_terms = frozenset(terms(ranking.query.text))
    return _ranking_json(ranking) | {
        "passages": [
            _ranked_json(place)
            | {"probability": probability, "weak": _is_weak(place.explanation, probability, query_terms)}
            for place, probability in zip(ranking.passages, probabilities, strict=True)
        ],
        "excerpts": None if excerpts is None else [_excerpt_json(excerpt) for excerpt in excerpts],
    }


def _is_weak(explanation: Explanation | None, probability: float | None, query_terms: Set[str]) -> bool | None:
    if explanation is None or probability is None:
        return None
    if not query_terms:  # only signs such as "???"
        return True
    if query_terms <= explanation.terms.keys():
        return False
    return probability < (WEAK if explanation.terms else WEAK_WITHOUT_WORDS)


def context_json(context: AnswerContext) -> dict[str, Any]:
    """The fields of ``schemas.ContextAnswer`` that come from a context."""
    return _ranking_json(context.ranking) | {
        "text": context.text,
        "sources": [asdict(source) | {"metadata": _metadata_json(source.metadata)} for source in context.sources],
        "num_tokens": context.num_tokens,
        "max_tokens": context.max_tokens,
        "left_out": context.left_out,
        "num_neighbours_left_out": context.num_neighbours_left_out,
        "context_truncated": context.truncated,
    }


def _ranking_json(ranking: Ranking) -> dict[str, Any]:
    certificate, cascade, selection = ranking.certificate, ranking.cascade, ranking.selection
    return {
        "query": ranking.query.text,
        "truncated": ranking.truncated,
        "num_candidates": ranking.num_candidates,
        "seconds": dict(ranking.seconds),
        "certificate": None
        if certificate is None
        else asdict(certificate)
        | {
            "highest_bound_left": _finite(certificate.highest_bound_left),
            "kth_score": _finite(certificate.kth_score),
        },
        "cascade": None if cascade is None else asdict(cascade),
        "selection": None if selection is None else asdict(selection),
        "expansion": None if ranking.expansion is None else asdict(ranking.expansion),
        "missing_shards": [shard.number for shard in ranking.missing_shards],
        "shards": _answered(ranking),
        "candidate_sources": list(ranking.sources),
    }


def _answered(ranking: Ranking) -> str | None:
    """How many shards gave an answer, as 7/8; None if the index is not sharded."""
    if ranking.num_shards is None:
        return None
    return f"{ranking.num_shards - len(ranking.missing_shards)}/{ranking.num_shards}"


def _excerpt_json(excerpt: Excerpt) -> dict[str, Any]:
    return {
        "document_id": excerpt.passages[0].document_id,
        "passage_ids": [passage.id for passage in excerpt.passages],
        "ranks": [result.rank for result in excerpt.results],
        "text": excerpt.text,
    }


def _ranked_json(place: RankedPassage) -> dict[str, Any]:
    document = place.document
    return passage_json(place.passage) | {
        "rank": place.rank,
        "score": place.score,
        "anchor_score": place.anchor_score,
        "log_odds": place.log_odds,
        "student_rank": place.student_rank,
        "explanation": None if place.explanation is None else asdict(place.explanation),
        "document": None
        if document is None
        else {
            "id": document.id,
            "passage_score": document.passage_score,
            "num_scored": document.num_scored,
            "others": [_short_json(passage) | {"score": score} for passage, score in document.others],
        },
        "before": [_short_json(passage) for passage in place.before],
        "after": [_short_json(passage) for passage in place.after],
    }


def passage_json(passage: Passage) -> dict[str, Any]:
    """The fields of ``schemas.PassageAnswer``."""
    return {
        "id": passage.id,
        "title": passage.title,
        "text": passage.text,
        "document_id": passage.document_id,
        "position": passage.position,
        "metadata": _metadata_json(passage.metadata),
    }


def _metadata_json(metadata: Mapping[str, MetadataValue]) -> dict[str, Any]:
    return {
        name: value if isinstance(value, str | int | float | bool | None) else value.isoformat()
        for name, value in metadata.items()
    }


def _short_json(passage: Passage) -> dict[str, Any]:
    return {"id": passage.id, "title": passage.title, "text": passage.text, "score": None}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
