"""vLLM's interface for pairs of texts: ``/score`` and ``/v1/score``.

Its ``/v1/rerank`` is Jina's, its ``/rerank`` differs from TEI's by ``documents``, and its ``/v2/rerank`` is Cohere's.

Checked against the source of vLLM 0.33.0 (``entrypoints/pooling/scoring``, ``entrypoints/serve/exception_handling``).
Unlike there, an overloaded server answers 429 with Retry-After, and a wrong key gets an error of the usual shape.
"""

from __future__ import annotations

import time
import uuid
from http import HTTPStatus
from typing import Any, Literal

from fastapi import APIRouter
from pydantic import AliasChoices, Field

from d2llm.server.dialects.shared import (
    CutOptions,
    Texts,
    check_size,
    errors,
    score_header,
    select_model,
    status_of,
    warning_header,
)
from d2llm.server.errors import Problem, invalid
from d2llm.server.large_bodies import BodyRoute
from d2llm.server.response_schemas import ResponseBody
from d2llm.server.responses import FastJSONResponse
from d2llm.server.services import TheCatalog

PATHS = ("/score", "/v1/score")
_CUT = "shorten it, or send truncate_prompt_tokens: -1"


class ScoreRequest(CutOptions):
    """Pairs of texts: one with one, one with each of several, or each with its counterpart.

    A text that is too long is an error, unless one of the options allows cutting it; a header then reports it.
    """

    text_1: Texts = Field(
        validation_alias=AliasChoices("text_1", "queries", "data_1"),
        description="A query or several; may also be called queries or data_1.",
    )
    text_2: Texts = Field(
        validation_alias=AliasChoices("text_2", "documents", "items", "data_2"),
        description="A passage or several; may also be called documents, items or data_2.",
    )
    model: str | None = None
    use_activation: bool | None = Field(
        None,
        validation_alias=AliasChoices("use_activation", "activation"),
        description="false: return logits instead of probabilities. Older versions call it activation.",
    )


class Score(ResponseBody):
    """A pair's score."""

    index: int
    object: Literal["score"]
    score: float


class ScoreUsage(ResponseBody):
    """Number of tokens read, counting each text once, as vLLM does for models that encode texts separately."""

    prompt_tokens: int
    total_tokens: int
    completion_tokens: int


class ScoreResponse(ResponseBody):
    """The pairs' scores, in the order of the request."""

    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[Score]
    usage: ScoreUsage


class VLLMErrorDetail(ResponseBody):
    """What was wrong; ``code`` is the status."""

    message: str
    type: str
    param: str | None
    code: int


class VLLMError(ResponseBody):
    """Every error of this interface."""

    error: VLLMErrorDetail


router = APIRouter(tags=["vLLM"], responses=errors(VLLMError), route_class=BodyRoute)


@router.post("/v1/score", response_model=ScoreResponse)
@router.post("/score", response_model=ScoreResponse)
async def score(body: ScoreRequest, catalog: TheCatalog) -> FastJSONResponse:
    """Score how well passages answer queries, pair by pair."""
    services, _ = select_model(catalog, body.model)
    models = services.models
    body.check_limits(models)
    name_1, name_2 = body.name_of("text_1"), body.name_of("text_2")
    is_cut = body.truncate_prompt_tokens is not None
    cut_1, cut_2 = is_cut or bool(body.max_tokens_per_query), is_cut or bool(body.max_tokens_per_doc)
    sized_1 = check_size(services, body.text_1, name_1, "query", None if cut_1 else _CUT)
    sized_2 = check_size(services, body.text_2, name_2, "passage", None if cut_2 else _CUT)
    queries, passages = sized_1.texts, sized_2.texts
    if len(queries) not in (1, len(passages)):
        message = (
            f"{name_1} has {len(queries)} texts and {name_2} {len(passages)}; they must be 1 and 1, 1 and n, or n and n"
        )
        raise invalid(message, name_1)
    scored, _ = await services.score(queries, passages)
    warnings = sized_1.warn(scored.truncated_queries, name_1) + sized_2.warn(scored.truncated, name_2)
    is_raw = body.use_activation is False
    scores = scored.scores if is_raw else models.probabilities(scored)
    return FastJSONResponse(
        {
            "id": f"score-{uuid.uuid4().hex}",
            "object": "list",
            "created": int(time.time()),
            "model": body.model or models.name,
            "data": [
                {"index": index, "object": "score", "score": value} for index, value in enumerate(scores.tolist())
            ],
            "usage": {"prompt_tokens": scored.num_tokens, "total_tokens": scored.num_tokens, "completion_tokens": 0},
        },
        headers={**warning_header(warnings), **({} if is_raw else score_header(services, scored))},
    )


def shape(problem: Problem) -> tuple[int, dict[str, Any]]:
    """A problem in vLLM's format: "Bad Request" if pydantic refused the body, "BadRequestError" for later checks."""
    status = status_of(problem, invalid=400)
    types = {404: "NotFoundError", 500: "InternalServerError"}
    if problem.reason is None:
        types[400] = "BadRequestError"
    kind = types.get(status, HTTPStatus(status).phrase)
    return status, {"error": {"message": problem.message, "type": kind, "param": problem.field, "code": status}}
