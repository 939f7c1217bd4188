"""OpenAI's interface: ``/v1/embeddings``, which is Jina's too, and ``/v1/models``.

Extensions: the model's name may end in ``:query`` or ``:passage``, or ``input_type`` may tell whether the texts are
queries or passages (default: passages); ``truncate``, or vLLM's ``truncate_prompt_tokens``, says what to do with texts
that are too long; the header ``X-Warning`` names those that were cut.

Checked against OpenAI's OpenAPI document (openai-openapi f85dbe2, August 2026), errors reported by its users, and
openai 3.57.0.
"""

from __future__ import annotations

import time
from typing import Annotated, Any, Literal, TypeAlias

from fastapi import APIRouter
from pydantic import Field, WrapValidator

from d2llm.models.tokens import TextKind
from d2llm.server.dialects import jina
from d2llm.server.dialects.shared import (
    DIMENSIONS,
    ClientBody,
    Texts,
    Truncate,
    check_cut,
    check_dimensions,
    check_size,
    embed,
    embeddings_response,
    errors,
    offered_models,
    select_model,
    status_of,
    unit_length,
    warning_header,
)
from d2llm.server.errors import Problem, invalid
from d2llm.server.large_bodies import BodyRoute
from d2llm.server.response_schemas import FastJSONResponse, ResponseBody, listed_vectors
from d2llm.server.schemas import BASE64, VectorEncoding
from d2llm.server.services import TheCatalog

PATHS = ("/v1/embeddings", "/v1/models")
_LOADED = int(time.time())


class EmbeddingsRequest(ClientBody):
    """Texts to embed."""

    input: Texts = Field(description="A text or a list of texts; token ids are refused.", examples=["a cat on a mat"])
    model: str = Field(description="The model's name, alone or with :query or :passage.")
    dimensions: int | None = Field(None, ge=1, description=DIMENSIONS)
    encoding_format: VectorEncoding | None = Field(None, description=BASE64)
    user: str | None = Field(None, description="Ignored.")
    input_type: TextKind | None = Field(None, description="Whether the texts are queries or passages.")
    truncate: Truncate = Field(
        "NONE", description="NONE: texts that are too long are an error. END: they are truncated."
    )
    truncate_prompt_tokens: int | None = Field(
        None, ge=-1, description="vLLM's equivalent of END: -1, or the model's limit or more."
    )


def _by_fields(body: Any, _handler: object) -> EmbeddingsRequest | jina.JinaEmbeddingsRequest:
    if isinstance(body, EmbeddingsRequest | jina.JinaEmbeddingsRequest):  # it was large, and has been validated already
        return body
    return (jina.JinaEmbeddingsRequest if jina.is_jinas(body) else EmbeddingsRequest).model_validate(body)


EitherEmbeddingsRequest: TypeAlias = Annotated[
    EmbeddingsRequest | jina.JinaEmbeddingsRequest, WrapValidator(_by_fields)
]
"""With a field that only Jina has, it is Jina's request. A union's own errors would name both kinds."""


class Embedding(ResponseBody):
    """A text's vector, of length 1."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | list[int] | str


class Usage(ResponseBody):
    """Number of tokens read."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingsResponse(ResponseBody):
    """Vectors of texts."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: Usage


class Model(ResponseBody):
    """An available model."""

    id: str
    object: Literal["model"] = "model"
    created: int = _LOADED
    owned_by: str = "d2llm"


class ModelsResponse(ResponseBody):
    """The available models."""

    object: Literal["list"] = "list"
    data: list[Model]


class OpenAIErrorDetail(ResponseBody):
    """What was wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class OpenAIError(ResponseBody):
    """Every error of this interface; ``detail`` repeats the message for Jina's clients."""

    error: OpenAIErrorDetail
    detail: str


router = APIRouter(tags=["OpenAI"], responses=errors(OpenAIError), route_class=BodyRoute)


@router.post("/v1/embeddings", response_model=EmbeddingsResponse)
async def embeddings(body: EitherEmbeddingsRequest, catalog: TheCatalog) -> FastJSONResponse:
    """Embed texts as vectors of length 1; a body with Jina's fields is read as Jina does."""
    if isinstance(body, jina.JinaEmbeddingsRequest):
        return await jina.embeddings(body, catalog)
    services, suffix = select_model(catalog, body.model, suffixes=True)
    models, kind = services.models, _kind_of(suffix, body.input_type)
    limit = models.max_query_tokens if kind == "query" else models.max_passage_tokens
    check_cut(body.truncate_prompt_tokens, limit)
    cut = body.truncate == "END" or body.truncate_prompt_tokens is not None
    sized = check_size(services, body.input, "input", kind, None if cut else 'shorten it, or send truncate: "END"')
    width = check_dimensions(body.dimensions, models)
    encoded = await embed(services, sized.texts, kind)
    headers = warning_header(sized.warn(encoded.truncated, "input"))
    vectors = unit_length(encoded.vectors[:, :width])
    values = listed_vectors(vectors, body.encoding_format)
    return await embeddings_response(values, body.model, sum(encoded.num_tokens), headers)


@router.get("/v1/models")
async def list_models(catalog: TheCatalog) -> ModelsResponse:
    """List the model names that a request may give."""
    return ModelsResponse(data=[Model(id=name) for name in offered_models(catalog, suffixes=True)])


@router.get("/v1/models/{model:path}")
async def get_model(model: str, catalog: TheCatalog) -> Model:
    """Get a model by its name."""
    select_model(catalog, model, suffixes=True)
    return Model(id=model)


def shape(problem: Problem) -> tuple[int, dict[str, Any]]:
    """A problem in OpenAI's format."""
    status = status_of(problem, invalid=400)
    kinds = {403: "permission_error", 429: "requests"}
    kind = kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")
    codes = {"unauthorized": "invalid_api_key", "method_not_allowed": "method_not_supported"}
    code = codes.get(problem.kind)
    if problem.kind == "not_found" and problem.field == "model":
        code = "model_not_found"
    elif status == 429:
        code = "rate_limit_exceeded"
    error = {"message": problem.message, "type": kind, "param": problem.field, "code": code}
    return status, {"error": error, "detail": problem.message}


def _kind_of(suffix: TextKind | None, input_type: TextKind | None) -> TextKind:
    if suffix is not None and input_type not in (None, suffix):
        raise invalid(f"input_type: {input_type!r} contradicts the model's name; leave one of them out", "input_type")
    return suffix or input_type or "passage"
