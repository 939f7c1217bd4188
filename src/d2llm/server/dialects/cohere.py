"""Cohere's interface: ``/v2/rerank``, ``/v2/embed`` and ``/v1/embed``; its ``/v1/rerank`` is Jina's.

Vectors have length 1. Those of queries (``search_query``) are for inner products with those of all other texts.

Checked against Cohere's OpenAPI document and list of errors (cohere-developer-experience e814c8a, August 2026) and
cohere 7.3.1. ``return_documents`` is from version 1 and from vLLM.
"""

from __future__ import annotations

import builtins
import math
import uuid
from typing import Any, Literal

from fastapi import APIRouter
from pydantic import Field

from d2llm.server.dialects.shared import (
    DIMENSIONS,
    ClientBody,
    NumberType,
    RerankResult,
    Text,
    TextList,
    TextsOnly,
    check_dimensions,
    check_limit,
    check_size,
    embed,
    errors,
    rerank_results,
    score_documents,
    score_header,
    select_model,
    status_of,
    typed_vectors,
    unit_length,
)
from d2llm.server.errors import Problem
from d2llm.server.large_bodies import BodyRoute
from d2llm.server.response_schemas import FastJSONResponse, ResponseBody, response_of
from d2llm.server.services import Catalog, TheCatalog

PATHS = ("/v2/rerank", "/v2/embed", "/v1/embed")
_DOCUMENTS_A_UNIT = 100  # as Cohere counts its search units


class CohereRerankRequest(ClientBody):
    """A query and documents to rank."""

    model: str
    query: Text
    documents: TextList
    top_n: int | None = Field(None, ge=1, description="Return only this many, the best; null: all.")
    return_documents: bool = Field(False, description="Include the documents' texts in the answer.")
    max_tokens_per_doc: int | None = Field(
        None, ge=1, description="Documents are truncated to the model's limit; a lower value is refused."
    )
    priority: int | None = Field(None, ge=0, le=999, description="Ignored.")


InputType = Literal["search_document", "search_query", "classification", "clustering"]
_KINDS = "search_query embeds queries; the others embed passages."


class CohereTexts(ClientBody):
    """Texts to embed, in both versions."""

    images: TextsOnly = Field(None, description="Not supported.")
    inputs: TextsOnly = Field(None, description="Not supported.")
    texts: TextList
    embedding_types: list[NumberType] | None = Field(
        None, min_length=1, fail_fast=True, description="Which numbers to return; null: float."
    )
    truncate: Literal["NONE", "END"] = Field(
        "END", description="END: texts that are too long are truncated. NONE: they are an error."
    )


class CohereEmbedV1Request(CohereTexts):
    """Texts to embed."""

    model: str | None = None
    input_type: InputType | None = Field(None, description=_KINDS)


class CohereEmbedRequest(CohereTexts):
    """Texts to embed."""

    model: str
    input_type: InputType = Field(description=_KINDS)
    output_dimension: int | None = Field(None, ge=1, description=DIMENSIONS)
    max_tokens: int | None = Field(
        None, ge=1, description="Texts are truncated to the model's limit; a lower value is refused."
    )
    priority: int | None = Field(None, ge=0, le=999, description="Ignored.")


class CohereVersion(ResponseBody):
    """The interface's version."""

    version: str


class CohereUnits(ResponseBody):
    """A query with up to 100 documents is one search unit; embedded texts are counted in tokens."""

    search_units: int | None = None
    input_tokens: int | None = None


class CohereTokens(ResponseBody):
    """Number of tokens read."""

    input_tokens: int


class CohereMeta(ResponseBody):
    """Metadata of the answer; ``warnings`` name texts that were cut."""

    api_version: CohereVersion
    billed_units: CohereUnits
    tokens: CohereTokens
    warnings: list[str] | None = None


class CohereRerankResponse(ResponseBody):
    """The documents, best first."""

    id: str
    results: list[RerankResult]
    meta: CohereMeta


class CohereEmbeddings(ResponseBody):
    """Vectors of the texts in each requested form."""

    float: list[list[builtins.float]] | None = None
    int8: list[list[int]] | None = None
    uint8: list[list[int]] | None = None
    binary: list[list[int]] | None = None
    ubinary: list[list[int]] | None = None
    base64: list[str] | None = None


class CohereEmbedResponse(ResponseBody):
    """Vectors of the texts; of version 1 without ``embedding_types``, a list of float vectors."""

    id: str
    embeddings: CohereEmbeddings | list[list[float]]
    texts: list[str]
    response_type: Literal["embeddings_floats", "embeddings_by_type"]
    meta: CohereMeta


class CohereError(ResponseBody):
    """Every error of this interface."""

    id: str
    message: str


router = APIRouter(tags=["Cohere"], responses=errors(CohereError), route_class=BodyRoute)


@router.post("/v2/rerank", response_model=CohereRerankResponse)
async def rerank(body: CohereRerankRequest, catalog: TheCatalog) -> FastJSONResponse:
    """Rank documents by how well they answer a query."""
    services, _ = select_model(catalog, body.model)
    check_limit(body.max_tokens_per_doc, services.models.max_passage_tokens, "max_tokens_per_doc")
    scored, warnings = await score_documents(services, body.query, body.documents)
    units = {"search_units": math.ceil(len(body.documents) / _DOCUMENTS_A_UNIT)}
    return FastJSONResponse(
        {
            "id": str(uuid.uuid4()),
            "results": rerank_results(services, scored, body.documents, body.top_n, with_texts=body.return_documents),
            "meta": _meta(2, units, scored.num_tokens, warnings),
        },
        headers=score_header(services, scored),
    )


@router.post("/v2/embed", response_model=CohereEmbedResponse)
async def embed_texts(body: CohereEmbedRequest, catalog: TheCatalog) -> FastJSONResponse:
    """Embed texts as vectors of length 1."""
    return await _embeddings(body, catalog, 2)


@router.post("/v1/embed", response_model=CohereEmbedResponse)
async def embed_texts_v1(body: CohereEmbedV1Request, catalog: TheCatalog) -> FastJSONResponse:
    """Embed texts as vectors of length 1."""
    return await _embeddings(body, catalog, 1)


async def _embeddings(
    body: CohereEmbedV1Request | CohereEmbedRequest, catalog: Catalog, version: int
) -> FastJSONResponse:
    services, _ = select_model(catalog, body.model)
    models, kind = services.models, "query" if body.input_type == "search_query" else "passage"
    width = models.dim
    if isinstance(body, CohereEmbedRequest):
        width = check_dimensions(body.output_dimension, models, "output_dimension")
        limit = models.max_query_tokens if kind == "query" else models.max_passage_tokens
        check_limit(body.max_tokens, limit, "max_tokens")
    remedy = "shorten it, or leave truncate out" if body.truncate == "NONE" else None
    sized = check_size(services, body.texts, "texts", kind, remedy)
    encoded = await embed(services, sized.texts, kind)
    warnings, num_tokens = sized.warn(encoded.truncated, "texts"), sum(encoded.num_tokens)
    vectors = unit_length(encoded.vectors[:, :width])
    by_type = body.embedding_types is not None or version > 1

    def answer() -> dict[str, Any]:
        embeddings = {name: typed_vectors(vectors, name) for name in body.embedding_types or ("float",)}
        return {
            "id": str(uuid.uuid4()),
            "embeddings": embeddings if by_type else embeddings["float"],
            "texts": body.texts,
            "response_type": "embeddings_by_type" if by_type else "embeddings_floats",
            "meta": _meta(version, {"input_tokens": num_tokens}, num_tokens, warnings),
        }

    return await response_of(answer, len(vectors))


def _meta(version: int, units: dict[str, int], num_tokens: int, warnings: list[str]) -> dict[str, Any]:
    meta = {
        "api_version": {"version": str(version)},
        "billed_units": units,
        "tokens": {"input_tokens": num_tokens},
    }
    return meta | ({"warnings": warnings} if warnings else {})


def shape(problem: Problem) -> tuple[int, dict[str, Any]]:
    """A problem in Cohere's format: 400 for an invalid value, but 422 for an unknown field."""
    status = 422 if problem.reason == "extra_forbidden" else status_of(problem, invalid=400)
    return status, {"id": problem.request_id or str(uuid.uuid4()), "message": problem.message}
