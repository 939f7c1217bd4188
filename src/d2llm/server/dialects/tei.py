"""The interface of Hugging Face's Text Embeddings Inference (TEI).

``/embed``, ``/embed_all``, ``/embed_sparse``, ``/predict``, ``/rerank``, ``/similarity`` and ``/info``.
``/embed_all`` returns the student's token embeddings (``shared.embed_tokens``), which it has for some tokens only.
``/embed_sparse`` returns words: the product of a query's with a passage's is the passage's BM25 in the served index,
or by the tables that ship. A word's index is the first half of its hash, of 32 bits.
``/predict`` scores pairs of a query and a passage, as ``/rerank`` does.

Its ``/v1/embeddings`` is OpenAI's. The prompt names are ``query`` and ``passage``. Bodies have no field for a model, so
the address names the index if there are several: ``/indexes/NAME/embed``.
vLLM also has a ``/rerank``, which is Jina's: a body with ``documents`` is answered like ``/v1/rerank``.

Checked against the source of its router (1.9.3 and main at 0d124dc, July 2026). As there, texts are cut unless
``truncate`` is false; here the header ``X-Warning`` says which. Unlike there, a failure of the server has a 5xx status,
not 424, and every error is JSON.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, TypeAlias, cast

import numpy as np
from fastapi import APIRouter
from numpy.typing import NDArray
from pydantic import BeforeValidator, Field, RootModel, WrapValidator
from pydantic_core import PydanticCustomError

from d2llm import __version__
from d2llm.models.tokens import TextKind
from d2llm.server.dialects import jina
from d2llm.server.dialects.shared import (
    DIMENSIONS,
    EMPTY,
    ClientBody,
    SizedTexts,
    Text,
    TextList,
    Texts,
    best_first,
    check_dimensions,
    check_size,
    embed,
    embed_tokens,
    errors,
    score_documents,
    score_header,
    status_of,
    unit_length,
    warning_header,
    word_header,
)
from d2llm.server.errors import Problem
from d2llm.server.large_bodies import BodyRoute
from d2llm.server.response_schemas import FastJSONResponse, ResponseBody, response_of
from d2llm.server.services import TheCatalog, TheServices
from d2llm.server.serving import Services

PATHS = ("/embed", "/embed_all", "/embed_sparse", "/predict", "/rerank", "/similarity", "/info")
_CUT = "shorten it, or leave truncate out"

Cut = Annotated[
    bool | None, Field(description="false: texts that are too long are an error; otherwise they are truncated.")
]
Direction = Annotated[Literal["Right", "right"], Field(description="Texts are only truncated at the right.")]
PromptName = Annotated[TextKind | None, Field(description="Whether the texts are queries or passages.")]


_UNUSED = frozenset({"model", "user", "options"})
"""Fields of Hugging Face's clients: which model, for whom, and whether to wait until it is loaded."""


def _pairs(value: Any) -> Any:
    """Give a clear error for an invalid pair or list of pairs; a union's own errors name every alternative."""
    if not isinstance(value, list) or not value:
        raise ValueError("it is neither a pair of texts nor a list of pairs; a student scores a query with a passage")
    items = cast("list[Any]", value)
    pairs: list[Any] = items if any(isinstance(item, list) for item in items) else [items]
    for index, pair in enumerate(pairs):
        texts = cast("list[Any]", pair) if isinstance(pair, list) else []
        if len(texts) != 2 or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"number {index} is not a pair of texts, a query and a passage")
        if not all(texts):
            raise PydanticCustomError("empty", "number {place} has an empty text", {"place": index})
    return items


class TextsRequest(ClientBody):
    """Texts to read."""

    unused: ClassVar[frozenset[str]] = _UNUSED

    inputs: Texts
    truncate: Cut = None
    truncation_direction: Direction = "Right"
    prompt_name: PromptName = None


class EmbedRequest(TextsRequest):
    """Texts to embed."""

    normalize: bool = Field(True, description="Return vectors of length 1; if false, as the model computes them.")
    dimensions: int | None = Field(None, ge=1, description=DIMENSIONS)


class EmbedResponse(RootModel[list[list[float]]]):
    """A vector for each text."""


class EmbedAllResponse(RootModel[list[list[list[float]]]]):
    """A vector for each token of each text that has one."""


class SparseValue(ResponseBody):
    """A word and its weight."""

    index: int
    value: float


class EmbedSparseResponse(RootModel[list[list[SparseValue]]]):
    """The words of each text."""


class PredictRequest(ClientBody):
    """Pairs to score: one, or a list of them."""

    unused: ClassVar[frozenset[str]] = _UNUSED

    inputs: Annotated[list[Text] | list[list[Text]], BeforeValidator(_pairs)] = Field(
        description="A query and a passage, or a list of such pairs."
    )
    raw_scores: bool = Field(False, description="Return logits instead of probabilities.")
    truncate: Cut = None
    truncation_direction: Direction = "Right"


class Prediction(ResponseBody):
    """A pair's score; there is one label."""

    label: str
    score: float


class PredictResponse(RootModel[list[Prediction] | list[list[Prediction]]]):
    """The predictions for a pair, or for each."""


class RerankRequest(ClientBody):
    """A query and texts to rank."""

    unused: ClassVar[frozenset[str]] = _UNUSED

    query: Text
    texts: TextList
    raw_scores: bool = Field(False, description="Return logits instead of probabilities.")
    return_text: bool = Field(False, description="Include the texts in the answer.")
    truncate: Cut = None
    truncation_direction: Direction = "Right"


def _by_field_names(body: Any, _handler: object) -> RerankRequest | jina.JinaRerankRequest:
    if isinstance(body, RerankRequest | jina.JinaRerankRequest):  # it was large, and has been validated already
        return body
    kind = jina.JinaRerankRequest if isinstance(body, dict) and "documents" in body else RerankRequest
    return kind.model_validate(body)


EitherRerankRequest: TypeAlias = Annotated[RerankRequest | jina.JinaRerankRequest, WrapValidator(_by_field_names)]
"""With ``documents``, it is Jina's and vLLM's request. A union's own errors would name both kinds."""


class Rank(ResponseBody):
    """A ranked text: its ``index`` in the request, and its score."""

    index: int
    score: float
    text: str | None = None


class RerankResponse(RootModel[list[Rank]]):
    """The texts, best first."""


class SimilarityInput(ClientBody):
    """A text and others to compare it with."""

    source_sentence: Text
    sentences: TextList


class SimilarityParameters(ClientBody):
    """Options of the comparison."""

    truncate: Cut = None
    truncation_direction: Direction = "Right"
    prompt_name: PromptName = None


class SimilarityRequest(ClientBody):
    """Texts to compare."""

    unused: ClassVar[frozenset[str]] = _UNUSED

    inputs: SimilarityInput
    parameters: SimilarityParameters | None = None


class SimilarityResponse(RootModel[list[float]]):
    """The cosine of each text's vector with the first's."""


class EmbeddingPooling(ResponseBody):
    """How a text's vector is pooled."""

    pooling: str


class EmbeddingKind(ResponseBody):
    """A model that embeds."""

    embedding: EmbeddingPooling


class InfoResponse(ResponseBody):
    """The served model and its limits."""

    model_id: str
    model_sha: str
    model_dtype: str
    served_model_name: str
    model_type: EmbeddingKind
    max_concurrent_requests: int
    max_input_length: int
    max_batch_tokens: int
    max_batch_requests: int | None = None
    max_client_batch_size: int
    auto_truncate: bool
    tokenization_workers: int
    version: str
    sha: str | None = None
    docker_label: str | None = None


class TEIError(ResponseBody):
    """Every error of this interface."""

    error: str
    error_type: Literal["Unhealthy", "Backend", "Overloaded", "Validation", "Empty"]


router = APIRouter(tags=["Text Embeddings Inference"], responses=errors(TEIError), route_class=BodyRoute)


@router.post("/embed", response_model=EmbedResponse)
async def embed_texts(body: EmbedRequest, services: TheServices) -> FastJSONResponse:
    """Embed texts."""
    width = check_dimensions(body.dimensions, services.models)
    vectors, warnings = await _vectors(services, body.inputs, "inputs", body)
    vectors = vectors[:, :width]
    values = list(unit_length(vectors) if body.normalize else vectors)
    return await response_of(lambda: values, len(values), warning_header(warnings))


@router.post("/embed_all", response_model=EmbedAllResponse)
async def embed_all(body: TextsRequest, services: TheServices) -> FastJSONResponse:
    """Embed the tokens of texts."""
    kind, sized = _sized(services, body.inputs, "inputs", body)
    encoded = await embed_tokens(services, sized.texts, kind, "inputs")
    assert encoded.tokens is not None
    tokens = list(encoded.tokens)
    return await response_of(
        lambda: tokens, sum(map(len, tokens)), warning_header(sized.warn(encoded.truncated, "texts"))
    )


@router.post("/embed_sparse", response_model=EmbedSparseResponse)
async def embed_sparse(body: TextsRequest, services: TheServices) -> FastJSONResponse:
    """Weigh the words of texts."""
    kind, sized = _sized(services, body.inputs, "inputs", body)
    words, name = await services.word_weights(sized.texts, kind)
    values = [
        [{"index": index, "value": value} for index, value in zip(indices.tolist(), weights.tolist(), strict=True)]
        for indices, weights in words
    ]
    headers = warning_header(sized.warn((), "texts")) | {"X-Word-Statistics": name}
    return await response_of(lambda: values, len(values), headers)


@router.post("/predict", response_model=PredictResponse)
async def predict(body: PredictRequest, services: TheServices) -> FastJSONResponse:
    """Score how well passages answer queries, pair by pair."""
    is_batch = isinstance(body.inputs[0], list)
    pairs = cast("list[list[str]]", body.inputs if is_batch else [body.inputs])
    remedy = _CUT if body.truncate is False else None
    queries = check_size(services, [query for query, _ in pairs], "inputs", "query", remedy)
    passages = check_size(services, [passage for _, passage in pairs], "inputs", "passage", remedy)
    scored, _ = await services.score(queries.texts, passages.texts)
    warnings = queries.warn(scored.truncated_queries, "queries") + passages.warn(scored.truncated, "passages")
    scores = scored.scores if body.raw_scores else services.models.probabilities(scored)
    predictions = [[{"label": "LABEL_0", "score": score}] for score in scores.tolist()]
    header = word_header(scored) if body.raw_scores else score_header(services, scored)
    return _response(predictions if is_batch else predictions[0], warnings, header)


@router.post("/rerank", response_model=RerankResponse | jina.JinaRerankResponse)
async def rerank(body: EitherRerankRequest, catalog: TheCatalog) -> FastJSONResponse:
    """Rank texts by how well they answer a query; a body with ``documents`` is answered like ``/v1/rerank``."""
    if isinstance(body, jina.JinaRerankRequest):
        return await jina.rerank(body, catalog)
    services = catalog.select()
    remedy = _CUT if body.truncate is False else None
    scored, warnings = await score_documents(services, body.query, body.texts, "texts", remedy)
    scores = scored.scores if body.raw_scores else services.models.probabilities(scored)
    values = scores.tolist()
    ranks: list[dict[str, Any]] = []
    for index in best_first(scored.scores):
        rank: dict[str, Any] = {"index": index, "score": values[index]}
        ranks.append(rank | ({"text": body.texts[index]} if body.return_text else {}))
    header = word_header(scored) if body.raw_scores else score_header(services, scored)
    return _response(ranks, warnings, header)


@router.post("/similarity", response_model=SimilarityResponse)
async def similarity(body: SimilarityRequest, services: TheServices) -> FastJSONResponse:
    """Compute the cosines of a text with others, all encoded as passages unless ``prompt_name`` says otherwise."""
    parameters = body.parameters or SimilarityParameters()
    texts = [body.inputs.source_sentence, *body.inputs.sentences]
    vectors, warnings = await _vectors(services, texts, "inputs", parameters)
    vectors = unit_length(vectors)
    return _response(np.clip(vectors[1:] @ vectors[0], -1.0, 1.0), warnings)


@router.get("/info")
async def info(services: TheServices) -> InfoResponse:
    """The served model and its limits."""
    models, settings = services.models, services.settings
    return InfoResponse(
        model_id=models.name,
        model_sha=models.fingerprint,
        model_dtype=str(models.student.compute_dtype).removeprefix("torch."),
        served_model_name=models.name,
        model_type=EmbeddingKind(embedding=EmbeddingPooling(pooling=models.student.config.pooling.kind)),
        max_concurrent_requests=settings.queue_texts,
        max_input_length=models.max_passage_tokens,
        max_batch_tokens=models.batch_tokens,
        max_client_batch_size=settings.max_texts,
        auto_truncate=True,
        tokenization_workers=1,
        version=__version__,
    )


def shape(problem: Problem) -> tuple[int, dict[str, Any]]:
    """A problem in the format of Text Embeddings Inference: 400 for empty texts and invalid JSON, else 422."""
    is_empty = problem.reason in EMPTY
    status = status_of(problem, invalid=400 if is_empty or problem.reason == "json_invalid" else 422)
    kinds = {429: "Overloaded", 503: "Unhealthy"}
    kind = "Empty" if is_empty else kinds.get(status, "Validation" if status < 500 else "Backend")
    return status, {"error": problem.message, "error_type": kind}


def _response(content: Any, warnings: list[str], headers: dict[str, str] | None = None) -> FastJSONResponse:
    return FastJSONResponse(content, headers={**warning_header(warnings), **(headers or {})})


def _sized(
    services: Services, texts: str | list[str], field: str, options: TextsRequest | SimilarityParameters
) -> tuple[TextKind, SizedTexts]:
    kind = options.prompt_name or "passage"
    return kind, check_size(services, texts, field, kind, _CUT if options.truncate is False else None)


async def _vectors(
    services: Services, texts: str | list[str], field: str, options: EmbedRequest | SimilarityParameters
) -> tuple[NDArray[np.float32], list[str]]:
    """Vectors of texts, and warnings about those that were cut."""
    kind, sized = _sized(services, texts, field, options)
    encoded = await embed(services, sized.texts, kind)
    return encoded.vectors, sized.warn(encoded.truncated, "texts")
