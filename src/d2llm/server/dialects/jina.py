"""Jina's interface: ``/v1/rerank``, which others (vLLM, LocalAI, Xinference) have adopted, and ``/v1/embeddings``.

The latter is OpenAI's path: a body with a field that only Jina has is read here (``is_jinas``), and errors there are
OpenAI's with a ``detail``, which Jina's clients show. Vectors of queries (``retrieval.query``) are for inner products
with those of all other texts.

vLLM's clients use ``/v1/rerank`` too; its fields are accepted there, and the answer has the fields that either's
clients read.

Checked against Jina's own server (jina-on-prem c9fde81, August 2026), which states that it was compared with
api.jina.ai; vLLM 0.33.0; and the clients jina-haystack 2.0.1, llama-index-postprocessor-jinaai-rerank 0.6.0 and
vllm-haystack 3.0.1.
"""

from __future__ import annotations

import uuid
from typing import Annotated, Any, Literal, cast

from fastapi import APIRouter
from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from d2llm.models.tokens import TextKind
from d2llm.server.dialects.shared import (
    DIMENSIONS,
    ClientBody,
    CutOptions,
    NumberType,
    RerankResult,
    Text,
    check_dimensions,
    check_size,
    embed,
    embeddings_response,
    errors,
    rerank_results,
    score_documents,
    score_header,
    select_model,
    status_of,
    typed_vectors,
    unit_length,
    warning_header,
)
from d2llm.server.errors import Problem, invalid
from d2llm.server.large_bodies import BodyRoute
from d2llm.server.response_schemas import FastJSONResponse, ResponseBody
from d2llm.server.services import TheCatalog

PATHS = ("/v1/rerank",)
_ONLY_JINAS = frozenset(
    {"task", "embedding_type", "encoding_type", "late_chunking", "normalized", "return_multivector"}
)


class JinaDocument(BaseModel):
    """A document that is not a plain string. Its ``text`` is ranked; what else it has is its owner's."""

    model_config = ConfigDict(strict=True, extra="ignore")

    text: Text


def _readable(value: Any) -> Any:
    """Give a clear error for an invalid list of documents; a union's own errors name every alternative."""
    if not isinstance(value, str | list):
        raise ValueError("it is not a list of documents")
    if not value:
        raise PydanticCustomError("empty", "give a list of at least one document")
    for index, document in enumerate(cast("list[Any]", value) if isinstance(value, list) else ()):
        text = cast("dict[str, Any]", document).get("text") if isinstance(document, dict) else document
        if not isinstance(text, str) or not text:
            raise ValueError(f"number {index} is neither a text nor an object with a 'text', or it is empty")
    return cast(Any, value)


class JinaRerankRequest(CutOptions):
    """A query and documents to rank."""

    model: str | None = None
    query: Text
    documents: Annotated[
        Text | Annotated[list[Text | JinaDocument], Field(min_length=1, fail_fast=True)], BeforeValidator(_readable)
    ]
    top_n: int | None = Field(None, ge=0, description="Return only this many, the best; null or 0: all.")
    return_documents: bool = Field(True, description="Include the documents' texts in the answer.")
    return_embeddings: bool = Field(False, description="Not supported: true is an error.")
    rank_fields: list[str] | None = Field(
        None, fail_fast=True, description="Of Cohere's version 1: only ['text'], which is what is ranked."
    )
    truncate: bool = Field(
        True,
        validation_alias=AliasChoices("truncate", "truncation"),
        description="Cut texts that are too long; if false, they are an error.",
    )


JinaTask = Literal[
    "retrieval.query",
    "retrieval.passage",
    "retrieval",
    "text-matching",
    "classification",
    "clustering",
    "separation",
    "code",
    "code.query",
    "code.passage",
]


class JinaEmbeddingsRequest(ClientBody):
    """Texts to embed."""

    model: str | None = None
    input: Annotated[
        Text | Annotated[list[Text | JinaDocument], Field(min_length=1, fail_fast=True)], BeforeValidator(_readable)
    ] = Field(description="A text or a list of texts, which may be objects with a text.")
    task: JinaTask | None = Field(
        None, description="Tasks that end in query embed queries; the others, and null, embed passages."
    )
    embedding_type: NumberType = Field(
        "float",
        validation_alias=AliasChoices("embedding_type", "encoding_type", "encoding_format"),
        description="Which numbers to return; older clients call it encoding_type.",
    )
    dimensions: int | None = Field(None, ge=1, description=DIMENSIONS)
    normalized: bool = Field(True, description="Return vectors of length 1; if false, as the model computes them.")
    truncate: bool = Field(False, description="Cut texts that are too long; if false, they are an error.")
    late_chunking: bool = Field(False, description="Not supported: true is an error.")
    return_multivector: bool = Field(False, description="Not supported: true is an error.")


class JinaUsage(ResponseBody):
    """Number of tokens read."""

    total_tokens: int
    prompt_tokens: int


class JinaRerankResponse(ResponseBody):
    """The documents, best first; ``warnings`` name texts that were cut."""

    id: str
    model: str
    object: Literal["list"]
    usage: JinaUsage
    results: list[RerankResult]
    warnings: list[str] | None = None


class JinaErrorDetail(ResponseBody):
    """What went wrong; ``code`` is machine-readable."""

    message: str
    request_id: str
    code: str


class JinaFieldError(ResponseBody):
    """What is wrong with a field."""

    field: str
    message: str
    type: str
    input: None = None


class JinaError(ResponseBody):
    """Every error of this interface. For 401 and 422 ``detail`` is a text, else an object; 422 also has ``errors``."""

    detail: str | JinaErrorDetail
    request_id: str | None = None
    errors: list[JinaFieldError] | None = None


router = APIRouter(tags=["Jina"], responses=errors(JinaError), route_class=BodyRoute)


@router.post("/v1/rerank", response_model=JinaRerankResponse)
async def rerank(body: JinaRerankRequest, catalog: TheCatalog) -> FastJSONResponse:
    """Rank documents by how well they answer a query."""
    services, _ = select_model(catalog, body.model)
    models = services.models
    body.check_limits(models)
    if body.return_embeddings:
        raise invalid("return_embeddings: the answer has no vectors; use /v1/embeddings", "return_embeddings")
    items = [body.documents] if isinstance(body.documents, str) else body.documents
    documents = [_text_of(document) for document in items]
    if body.rank_fields not in (None, ["text"]):
        message = (
            "rank_fields: only the field 'text' of a document is ranked; put what counts there, and leave this out"
        )
        raise invalid(message, "rank_fields")
    remedy = None if body.truncate else f"shorten it, or leave {body.name_of('truncate')} out"
    scored, warnings = await score_documents(services, body.query, documents, remedy=remedy)
    response: dict[str, Any] = {
        "id": f"rerank-{uuid.uuid4().hex}",
        "model": body.model or models.name,
        "object": "list",
        "usage": {"total_tokens": scored.num_tokens, "prompt_tokens": scored.num_tokens},
        "results": rerank_results(services, scored, documents, body.top_n or None, with_texts=body.return_documents),
    }
    return FastJSONResponse(
        response | ({"warnings": warnings} if warnings else {}), headers=score_header(services, scored)
    )


def is_jinas(body: Any) -> bool:
    """Whether a body for ``/v1/embeddings`` has what only Jina's interface has."""
    if not isinstance(body, dict):
        return False
    fields = cast("dict[str, Any]", body)
    texts = fields.get("input")
    has_objects = isinstance(texts, list) and any(isinstance(text, dict) for text in cast("list[Any]", texts))
    return has_objects or bool(_ONLY_JINAS & fields.keys()) or isinstance(fields.get("truncate"), bool)


async def embeddings(body: JinaEmbeddingsRequest, catalog: TheCatalog) -> FastJSONResponse:
    """Embed texts for a request of ``/v1/embeddings`` that is Jina's."""
    if body.late_chunking:
        message = "late_chunking: each text is embedded by itself; an index of documents can have late chunks instead"
        raise invalid(f"{message} (--late)", "late_chunking")
    if body.return_multivector:
        raise invalid("return_multivector: for vectors of tokens, use /pooling (token_embed)", "return_multivector")
    if not body.normalized and body.embedding_type not in ("float", "base64"):
        message = f"normalized: {body.embedding_type} is made of vectors of length 1; leave normalized out"
        raise invalid(message, "normalized")
    kind: TextKind = "query" if (body.task or "").endswith("query") else "passage"
    services, suffix = select_model(catalog, body.model, suffixes=True)
    if body.task is None:
        kind = suffix or kind
    texts = [body.input] if isinstance(body.input, str) else [_text_of(one) for one in body.input]
    sized = check_size(services, texts, "input", kind, None if body.truncate else "shorten it, or send truncate: true")
    width = check_dimensions(body.dimensions, services.models)
    encoded = await embed(services, sized.texts, kind)
    headers = warning_header(sized.warn(encoded.truncated, "input"))
    vectors = encoded.vectors[:, :width]
    values = typed_vectors(unit_length(vectors) if body.normalized else vectors, body.embedding_type)
    return await embeddings_response(values, body.model or services.models.name, sum(encoded.num_tokens), headers)


def _text_of(document: str | JinaDocument) -> str:
    return document if isinstance(document, str) else document.text


def shape(problem: Problem) -> tuple[int, dict[str, Any]]:
    """A problem in Jina's format; an unknown model is an invalid field."""
    status = 422 if problem.field == "model" else status_of(problem, invalid=422)
    if status == 401:
        return status, {"detail": problem.message}
    request_id = problem.request_id or uuid.uuid4().hex
    if status != 422:
        return status, {"detail": {"message": problem.message, "request_id": request_id, "code": problem.kind}}
    location = ["body", *(problem.field.split(".") if problem.field else [])]
    error = {
        "field": " -> ".join(location),
        "message": problem.message,
        "type": problem.reason or problem.kind,
        "input": None,
    }
    return status, {"detail": problem.message, "request_id": request_id, "errors": [error]}
