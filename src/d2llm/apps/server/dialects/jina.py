"""Jina's interface: ``/v1/rerank``, which others (vLLM, LocalAI, Xinference) have taken over."""

from __future__ import annotations

from typing import Annotated, Any, Literal, cast

from fastapi import APIRouter, Depends
from pydantic import BeforeValidator, Field

from d2llm.apps.server.dialects.shared import (
    Answer,
    OpenBody,
    RerankResult,
    Text,
    check_size,
    cut_warnings,
    errors,
    find_model,
    rerank_results,
    status_of,
    task_of,
)
from d2llm.apps.server.errors import Problem
from d2llm.apps.server.fast_json import FastJSONResponse
from d2llm.apps.server.services import Services, services_of

PATHS = ("/v1/rerank",)


class JinaDocument(OpenBody):
    """A document that is not a plain string."""

    text: Text


def _readable(value: Any) -> Any:
    """Say plainly what is wrong with a list of documents; a union's own errors name every alternative."""
    if not isinstance(value, list) or not value:
        raise ValueError("give a list of at least one document")
    for place, document in enumerate(cast("list[Any]", value)):
        text = cast("dict[str, Any]", document).get("text") if isinstance(document, dict) else document
        if not isinstance(text, str) or not text:
            raise ValueError(f"number {place} is neither a text nor an object with a 'text', or it is empty")
    return cast(Any, value)


class JinaRerankRequest(OpenBody):
    """A query and documents to order by it."""

    model: str
    query: Text
    documents: Annotated[list[Text | JinaDocument], Field(min_length=1), BeforeValidator(_readable)]
    top_n: int | None = Field(None, ge=1, description="Answer with the best so many; null: all.")
    return_documents: bool = Field(True, description="Repeat the documents' texts in the answer.")


class JinaUsage(Answer):
    """Tokens that were read."""

    total_tokens: int
    prompt_tokens: int


class JinaRerankAnswer(Answer):
    """The documents, best first; ``warnings`` tell of texts that were cut."""

    model: str
    object: Literal["list"]
    usage: JinaUsage
    results: list[RerankResult]
    warnings: list[str] | None = None


class JinaError(Answer):
    """Every error of this interface."""

    detail: str


router = APIRouter(tags=["Jina"], responses=errors(JinaError))


@router.post("/v1/rerank", response_model=JinaRerankAnswer)
async def rerank(body: JinaRerankRequest, services: Annotated[Services, Depends(services_of)]) -> FastJSONResponse:
    """Order documents by how well they answer a query."""
    models = services.models
    find_model(models, body.model)
    documents = [document if isinstance(document, str) else document.text for document in body.documents]
    check_size(services, body.query, "query")
    check_size(services, documents, "documents")
    scored = await models.score(body.query, documents, task_of(services))
    answer: dict[str, Any] = {
        "model": models.name,
        "object": "list",
        "usage": {"total_tokens": scored.num_tokens, "prompt_tokens": scored.num_tokens},
        "results": rerank_results(scored.logits, documents, body.top_n, with_texts=body.return_documents),
    }
    warnings = cut_warnings(scored.query_truncated, scored.truncated, models)
    return FastJSONResponse(answer | ({"warnings": warnings} if warnings else {}))


def shape(problem: Problem) -> tuple[int, dict[str, Any]]:
    """A problem as Jina tells it."""
    return status_of(problem, invalid=422), {"detail": problem.message}
