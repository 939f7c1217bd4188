"""The interface of Hugging Face's Text Embeddings Inference: ``/embed``, ``/rerank``, ``/similarity`` and ``/info``.

Its ``/v1/embeddings`` is OpenAI's. The names of prompts are ``query`` and ``passage``, the sides of a search.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Depends
from numpy.typing import NDArray
from pydantic import Field, RootModel

from d2llm import __version__
from d2llm.apps.server.dialects.shared import (
    Answer,
    OpenBody,
    Text,
    TextList,
    Texts,
    as_list,
    best_first,
    check_size,
    embed,
    errors,
    probabilities,
    refuse_cut,
    task_of,
    unit_length,
)
from d2llm.apps.server.errors import Problem, invalid
from d2llm.apps.server.fast_json import FastJSONResponse
from d2llm.apps.server.model_service import TextKind
from d2llm.apps.server.services import Services, services_of

PATHS = ("/embed", "/rerank", "/similarity", "/info")
_CUT = "shorten it, or send truncate: true"

Cut = Annotated[bool | None, Field(description="Cut a text that is too long; else it is an error.")]
Direction = Annotated[Literal["Right", "right"], Field(description="Texts are cut at the right, and nowhere else.")]
PromptName = Annotated[TextKind | None, Field(description="Which side of a search the texts are on.")]


class EmbedRequest(OpenBody):
    """Texts to embed."""

    inputs: Texts
    normalize: bool = Field(True, description="Vectors of length 1; else as the model gives them.")
    truncate: Cut = False
    truncation_direction: Direction = "Right"
    prompt_name: PromptName = None
    dimensions: int | None = Field(None, ge=1, description="Keep the first so many components.")


class EmbedAnswer(RootModel[list[list[float]]]):
    """A vector for each text."""


class RerankRequest(OpenBody):
    """A query and texts to order by it."""

    query: Text
    texts: TextList
    raw_scores: bool = Field(False, description="Logits in place of probabilities.")
    return_text: bool = Field(False, description="Repeat the texts in the answer.")
    truncate: Cut = False
    truncation_direction: Direction = "Right"


class Rank(Answer):
    """A text's place: ``index`` in the request, and its score."""

    index: int
    score: float
    text: str | None = None


class RerankAnswer(RootModel[list[Rank]]):
    """The texts, best first."""


class SimilarityInput(OpenBody):
    """A text and others to compare it with."""

    source_sentence: Text
    sentences: TextList


class SimilarityParameters(OpenBody):
    """How to compare."""

    truncate: Cut = False
    truncation_direction: Direction = "Right"
    prompt_name: PromptName = None


class SimilarityRequest(OpenBody):
    """Texts to compare."""

    inputs: SimilarityInput
    parameters: SimilarityParameters | None = None


class SimilarityAnswer(RootModel[list[float]]):
    """The cosine of each text's vector with the first's."""


class EmbeddingPooling(Answer):
    """How a text's vector is pooled."""

    pooling: str


class EmbeddingKind(Answer):
    """A model that embeds."""

    embedding: EmbeddingPooling


class InfoAnswer(Answer):
    """What is served, and its limits."""

    model_id: str
    model_sha: str
    model_dtype: str
    model_type: EmbeddingKind
    max_concurrent_requests: int
    max_input_length: int
    max_batch_tokens: int
    max_client_batch_size: int
    auto_truncate: bool
    tokenization_workers: int
    version: str


class TEIError(Answer):
    """Every error of this interface."""

    error: str
    error_type: Literal["Unhealthy", "Backend", "Overloaded", "Validation", "Tokenizer"]


router = APIRouter(tags=["Text Embeddings Inference"], responses=errors(TEIError))
TheServices = Annotated[Services, Depends(services_of)]


@router.post("/embed", response_model=EmbedAnswer)
async def embed_texts(body: EmbedRequest, services: TheServices) -> FastJSONResponse:
    """Vectors of texts."""
    models = services.models
    if body.dimensions is not None and body.dimensions > models.dim:
        raise invalid(f"dimensions: the model has {models.dim}, {body.dimensions} were asked for", "dimensions")
    vectors = await _vectors(services, body.inputs, "inputs", body)
    vectors = np.ascontiguousarray(vectors[:, : body.dimensions])
    return FastJSONResponse(unit_length(vectors) if body.normalize else vectors)


@router.post("/rerank", response_model=RerankAnswer)
async def rerank(body: RerankRequest, services: TheServices) -> FastJSONResponse:
    """Order texts by how well they answer a query."""
    models = services.models
    check_size(services, body.query, "query")
    check_size(services, body.texts, "texts")
    scored = await models.score(body.query, body.texts, task_of(services))
    if not body.truncate:
        refuse_cut(body.query, (0,) if scored.query_truncated else (), "query", models.max_query_tokens, _CUT)
        refuse_cut(body.texts, scored.truncated, "texts", models.max_passage_tokens, _CUT)
    scores = (scored.logits if body.raw_scores else probabilities(scored.logits)).tolist()
    ranks: list[dict[str, Any]] = []
    for place in best_first(scored.logits):
        rank: dict[str, Any] = {"index": place, "score": scores[place]}
        ranks.append(rank | ({"text": body.texts[place]} if body.return_text else {}))
    return FastJSONResponse(ranks)


@router.post("/similarity", response_model=SimilarityAnswer)
async def similarity(body: SimilarityRequest, services: TheServices) -> FastJSONResponse:
    """The cosines of a text with others, all read as passages unless ``prompt_name`` says otherwise."""
    parameters = body.parameters or SimilarityParameters()
    texts = [body.inputs.source_sentence, *body.inputs.sentences]
    vectors = unit_length(await _vectors(services, texts, "inputs", parameters))
    return FastJSONResponse(np.clip(vectors[1:] @ vectors[0], -1.0, 1.0))


@router.get("/info")
async def info(services: TheServices) -> InfoAnswer:
    """What is served, and its limits."""
    models, settings = services.models, services.settings
    return InfoAnswer(
        model_id=models.name,
        model_sha=models.fingerprint,
        model_dtype=str(models.student.compute_dtype).removeprefix("torch."),
        model_type=EmbeddingKind(embedding=EmbeddingPooling(pooling=models.student.config.pooling.method)),
        max_concurrent_requests=settings.queue_texts,
        max_input_length=models.max_passage_tokens,
        max_batch_tokens=models.batch_tokens,
        max_client_batch_size=settings.max_texts,
        auto_truncate=False,
        tokenization_workers=1,
        version=__version__,
    )


def shape(problem: Problem) -> tuple[int, dict[str, Any]]:
    """A problem as Text Embeddings Inference tells it."""
    kinds = {413: "Validation", 422: "Tokenizer", 429: "Overloaded", 503: "Unhealthy"}
    kind = kinds.get(problem.status, "Validation" if problem.status < 500 else "Backend")
    return problem.status, {"error": problem.message, "error_type": kind}


async def _vectors(
    services: Services, texts: str | list[str], field: str, how: EmbedRequest | SimilarityParameters
) -> NDArray[np.float32]:
    check_size(services, texts, field)
    kind = how.prompt_name or "passage"
    encoded = await embed(services, as_list(texts), kind)
    if not how.truncate:
        models = services.models
        limit = models.max_query_tokens if kind == "query" else models.max_passage_tokens
        refuse_cut(texts, encoded.truncated, field, limit, _CUT)
    return encoded.vectors
