"""Cohere's interface: ``/v2/rerank``.

Checked against Cohere's OpenAPI document and list of errors (cohere-developer-experience e814c8a, August 2026) and
cohere 7.3.1. ``return_documents`` is from version 1 and from vLLM.
"""

from __future__ import annotations

import math
import uuid
from typing import Any

from fastapi import APIRouter
from pydantic import Field

from d2llm.server.dialects.shared import (
    ClientBody,
    RerankResult,
    Text,
    TextList,
    check_limit,
    errors,
    rerank_results,
    score_documents,
    score_header,
    select_model,
    status_of,
)
from d2llm.server.errors import Problem
from d2llm.server.large_bodies import BodyRoute
from d2llm.server.response_schemas import ResponseBody
from d2llm.server.responses import FastJSONResponse
from d2llm.server.services import TheCatalog

PATHS = ("/v2/rerank",)
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


class CohereVersion(ResponseBody):
    """The interface's version."""

    version: str


class CohereUnits(ResponseBody):
    """A query with up to 100 documents is one unit."""

    search_units: int


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
    meta: dict[str, Any] = {
        "api_version": {"version": "2"},
        "billed_units": {"search_units": math.ceil(len(body.documents) / _DOCUMENTS_A_UNIT)},
        "tokens": {"input_tokens": scored.num_tokens},
    }
    return FastJSONResponse(
        {
            "id": str(uuid.uuid4()),
            "results": rerank_results(services, scored, body.documents, body.top_n, with_texts=body.return_documents),
            "meta": meta | ({"warnings": warnings} if warnings else {}),
        },
        headers=score_header(services, scored),
    )


def shape(problem: Problem) -> tuple[int, dict[str, Any]]:
    """A problem in Cohere's format: 400 for an invalid value, but 422 for an unknown field."""
    status = 422 if problem.reason == "extra_forbidden" else status_of(problem, invalid=400)
    return status, {"id": problem.request_id or str(uuid.uuid4()), "message": problem.message}
