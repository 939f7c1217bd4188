"""vLLM's interface for pairs of texts, ``/score`` and ``/v1/score``, and for vectors of texts or tokens, ``/pooling``.

Its ``/v1/rerank`` is Jina's, its ``/rerank`` differs from TEI's by ``documents``, and its ``/v2/rerank`` is Cohere's.

Checked against the source of vLLM 0.33.0 (``entrypoints/pooling``, ``entrypoints/serve/exception_handling``).
Unlike there, an overloaded server answers 429 with Retry-After, and a wrong key gets an error of the usual shape.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any, Literal

import numpy as np
from fastapi import APIRouter
from numpy.typing import NDArray
from pydantic import AliasChoices, Field

from d2llm.server.dialects.shared import (
    DIMENSIONS,
    CutOptions,
    Texts,
    check_dimensions,
    check_size,
    embed,
    embed_tokens,
    errors,
    score_header,
    select_model,
    status_of,
    unit_length,
    warning_header,
)
from d2llm.server.errors import Problem, invalid
from d2llm.server.large_bodies import BodyRoute
from d2llm.server.response_schemas import FastJSONResponse, ResponseBody, listed_vectors, response_of
from d2llm.server.schemas import BASE64, VectorEncoding
from d2llm.server.services import TheCatalog

PATHS = ("/score", "/v1/score", "/pooling")
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


class ScoreUsage(ResponseBody):
    """Number of tokens read, counting each text once, as vLLM does for models that encode texts separately."""

    prompt_tokens: int
    total_tokens: int
    completion_tokens: int


class PoolingRequest(CutOptions):
    """Texts to embed, as a whole or token by token."""

    input: Texts = Field(description="A text or a list of texts; token ids are refused.")
    model: str | None = Field(None, description="The model's name, alone or with :query or :passage.")
    task: Literal["embed", "token_embed"] | None = Field(
        None, description="embed: a vector of each text (also if null). token_embed: vectors of its tokens."
    )
    dimensions: int | None = Field(None, ge=1, description=DIMENSIONS)
    encoding_format: VectorEncoding = Field("float", description=BASE64)
    use_activation: bool | None = Field(
        None, description="false: return a text's vector as the model computes it, not of length 1."
    )


class Pooled(ResponseBody):
    """A text's vector, or those of its tokens."""

    index: int
    object: Literal["pooling"]
    data: list[list[float]] | list[float] | str


class PoolingResponse(ResponseBody):
    """The texts' vectors, in the order of the request."""

    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[Pooled]
    usage: ScoreUsage


class Score(ResponseBody):
    """A pair's score."""

    index: int
    object: Literal["score"]
    score: float


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


@router.post("/pooling", response_model=PoolingResponse)
async def pooling(body: PoolingRequest, catalog: TheCatalog) -> FastJSONResponse:
    """Embed texts, or with task token_embed their tokens."""
    services, suffix = select_model(catalog, body.model, suffixes=True)
    models, kind = services.models, suffix or "passage"
    body.check_limits(models)
    sized = check_size(services, body.input, "input", kind, None if body.truncate_prompt_tokens is not None else _CUT)
    if body.task == "token_embed":
        if body.dimensions is not None:
            raise invalid("dimensions: vectors of tokens have one width; leave it out", "dimensions")
        encoded = await embed_tokens(services, sized.texts, kind, "input")
        assert encoded.tokens is not None
        vectors: Sequence[NDArray[np.float32]] = encoded.tokens
    else:
        width = check_dimensions(body.dimensions, models)
        encoded = await embed(services, sized.texts, kind)
        rows = encoded.vectors[:, :width]
        vectors = list(rows if body.use_activation is False else unit_length(rows))
    data: Sequence[Any] = vectors
    if body.encoding_format == "base64":
        data = [listed_vectors(vector.reshape(1, -1), "base64")[0] for vector in vectors]
    num_tokens = sum(encoded.num_tokens)
    response = {
        "id": f"pooling-{uuid.uuid4().hex}",
        "object": "list",
        "created": int(time.time()),
        "model": body.model or models.name,
        "data": [{"index": index, "object": "pooling", "data": value} for index, value in enumerate(data)],
        "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens, "completion_tokens": 0},
    }
    return await response_of(
        lambda: response, sum(map(len, vectors)), warning_header(sized.warn(encoded.truncated, "input"))
    )


def shape(problem: Problem) -> tuple[int, dict[str, Any]]:
    """A problem in vLLM's format: "Bad Request" if pydantic refused the body, "BadRequestError" for later checks."""
    status = status_of(problem, invalid=400)
    types = {404: "NotFoundError", 500: "InternalServerError"}
    if problem.reason is None:
        types[400] = "BadRequestError"
    kind = types.get(status, HTTPStatus(status).phrase)
    return status, {"error": {"message": problem.message, "type": kind, "param": problem.field, "code": status}}
