"""d2llm's own HTTP interface: search, explain, index facts, vectors and scores (passages: ``corpus_routes``)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from numpy.typing import NDArray
from pydantic import BaseModel

from d2llm import __version__
from d2llm.core.errors import D2LLMError, InputError
from d2llm.core.types import Excerpt, Ranking, Task
from d2llm.retrieval.context import AnswerContext, answering_sentences, context_settings
from d2llm.retrieval.expansion import Expansion
from d2llm.retrieval.results import merge_neighbours
from d2llm.retrieval.settings import ExpansionSettings, SearchSettings
from d2llm.server.errors import Problem, ServingError, invalid, request_id_of
from d2llm.server.model_service import Encoded, ModelService
from d2llm.server.response_schemas import (
    ContextResponse,
    EncodeResponse,
    ExplainResponse,
    FastJSONResponse,
    HealthResponse,
    IndexesResponse,
    IndexResponse,
    Joined,
    ReloadResponse,
    RescoreResponse,
    SearchResponse,
    context_response,
    listed_vectors,
    response_of,
    search_response,
)
from d2llm.server.running import Lifecycle
from d2llm.server.schemas import (
    BY_STUDENT,
    ContextRequest,
    EncodeRequest,
    ExplainRequest,
    RankingRequest,
    RescoreRequest,
    SearchRequest,
)
from d2llm.server.served_index import ServedIndex
from d2llm.server.served_version import OpenVersion
from d2llm.server.services import (
    ERRORS,
    StrictRoute,
    TheCatalog,
    TheIndex,
    TheServices,
    at_most,
    few_enough,
    require_index,
    short_enough,
)
from d2llm.server.serving import Services, Serving
from d2llm.server.settings import ServeSettings

_log = logging.getLogger(__name__)
router = APIRouter(tags=["d2llm"], responses=ERRORS, route_class=StrictRoute)
health_router = APIRouter(tags=["operations"])


@router.post("/v1/search", response_model=SearchResponse)
async def search(body: SearchRequest, request: Request, services: TheServices) -> JSONResponse:
    """Find the passages that answer a query, best first."""
    limits, index = services.settings, require_index(services)
    settings = _limited(body, settings_of(body, limits), limits)
    teacher_limits, expansion = _teacher_limits(body, limits), _expansion_of(body, index)
    ranking, student = await index.search(body.query, settings, body.rescore, teacher_limits, expansion, body.history)
    excerpts = await index.read(partial(_excerpts, ranking)) if body.excerpts else None
    probabilities = student.probabilities_of(ranking, body.task or services.task, iem=body.rescore != "none")
    origin = _origin(request, index, ranking, student)
    num_passages = len(ranking.passages) * (1 + 2 * body.neighbours)
    return await response_of(lambda: search_response(ranking, excerpts, probabilities, **origin), num_passages)


@router.post("/v1/context", response_model=ContextResponse)
async def context(body: ContextRequest, request: Request, services: TheServices) -> JSONResponse:
    """The best passages for a query as one text with numbered sources, for a language model to answer from."""
    index = require_index(services)
    context, student = await answer_context(body, services)
    return FastJSONResponse(context_response(context, **_origin(request, index, context.ranking, student)))


async def answer_context(body: ContextRequest, services: Services) -> tuple[AnswerContext, ModelService]:
    """The context for a query, and the student that ranked its passages.

    Raises:
        ServingError: something is above the server's limits, or there is no index.
        InputError: the settings contradict each other, or do not fit the index.
    """
    limits, index = services.settings, require_index(services)
    settings = _limited(body, context_settings(settings_of(body, limits)), limits)
    max_tokens = number_of(body, "max_tokens", limits.max_context_tokens)
    teacher_limits, expansion = _teacher_limits(body, limits), _expansion_of(body, index)
    ranking, student = await index.search(body.query, settings, body.rescore, teacher_limits, expansion, body.history)
    if body.answering is not None:
        task = body.task or services.task
        ranking = await student.in_lane(lambda: answering_sentences(ranking, student.student, task, body.answering))
    return await index.context(ranking, student, max_tokens, body.order), student


@router.post("/v1/explain")
async def explain(body: ExplainRequest, services: TheServices) -> ExplainResponse:
    """Explain a passage's score for a query, word by word; optionally with the teacher's score."""
    index = require_index(services)
    short_enough([body.query], services.settings, "query")
    task = body.task or services.task
    passage, explanation, no_interaction = await index.explain(body.query, body.passage_id, task)
    teacher = await index.score_pair(body.query, passage, task) if body.teacher else None
    return ExplainResponse.model_validate(Joined(passage, explanation, no_interaction=no_interaction, teacher=teacher))


@router.get("/v1/indexes")
async def list_indexes(catalog: TheCatalog) -> IndexesResponse:
    """List the indexes that the key may use. Put ``/indexes/NAME`` before any path to use one of several."""
    return IndexesResponse(indexes=catalog.serving.describe(catalog.allowed))


@router.get("/v1/index")
async def index_facts(index: TheIndex) -> IndexResponse:
    """Facts about the index, and the ways to search it on this server."""
    stats, examples, version = await index.read(
        lambda version: (index.stats(version), version.example_queries, version)
    )
    models, config = version.models, version.models.student.config
    student = Joined(
        models,
        head=config.interaction.head,
        backbone=_name_of(config.backbone.model),
        relevance_score=models.probability_kind(version.view.task, version.corpus(version.view.task).weights),
    )
    facts = Joined(
        stats,
        name=index.name,
        num_bytes=round(stats.bytes_per_passage * max(stats.num_passages, 1)),
        task=version.view.task,
        student=student,
        teacher=index.settings.teacher,
        writer=None if index.settings.writer is None else _name_of(index.settings.writer),
        fields=stats.metadata,
        has_ann=stats.ann_passages > 0,
        missing_shards=version.view.missing,
        rescore=index.ways_to_rescore(version),
        score_parts=version.score_parts(),
        candidate_sources=version.default_sources(),
        example_queries=examples,
        writable=index.settings.writable,
        d2llm=__version__,
    )
    return IndexResponse.model_validate(facts)


@router.post("/v1/index/reload")
async def reload_index(index: TheIndex) -> ReloadResponse:
    """Load the current contents of the index's folder, and another student if another one made it.

    Requests in progress finish with the version they started with. On failure, the answer is a 409 with the reason, and
    nothing changes.
    """
    try:
        changed = await index.reload()
    except D2LLMError as error:
        _log.error("the index was not reloaded: %s", error)
        raise ServingError(Problem(409, "conflict", f"the previous version is still served: {error}")) from error
    version = index.version
    return ReloadResponse(
        version=version.view.version,
        student=version.models.name,
        fingerprint=version.models.fingerprint,
        changed=changed,
    )


@router.post("/v1/encode", response_model=EncodeResponse)
async def encode(body: EncodeRequest, services: TheServices) -> JSONResponse:
    """Encode texts with the student, for use with its interaction elsewhere."""
    few_enough(len(body.texts), services.settings, "texts")
    short_enough(body.texts, services.settings, "texts")
    encoded = await services.models.encode(body.texts, body.kind)
    response = {
        "vectors": listed_vectors(encoded.vectors, body.encoding_format),
        "num_tokens": encoded.num_tokens,
        "truncated": encoded.truncated,
        "dim": services.models.dim,
        "student": services.models.name,
        "fingerprint": services.models.fingerprint,
    }
    return await response_of(lambda: response, len(body.texts))


@router.post("/v1/rescore")
async def rescore(body: RescoreRequest, services: TheServices) -> RescoreResponse:
    """Score passages, given as texts, ids or vectors, for a query.

    Passages of an index and texts get the score of a search. If a vector takes the place of a text, on either side, the
    scores are those of the vectors alone.
    """
    if body.query is not None:
        short_enough([body.query], services.settings, "query")
    if body.passages is not None:
        few_enough(len(body.passages), services.settings, "passages")
        short_enough(body.passages, services.settings, "passages")
        if body.query is not None:
            scored, models = await services.score([body.query], body.passages, body.task)
            return _rescored(models, scored.scores, scored.truncated, query_truncated=bool(scored.truncated_queries))
        encoded = await services.models.encode(body.passages, "passage")
        return await _rescored_vectors(body, services.models, body.task or services.task, encoded)
    if body.passage_ids is not None:
        index = require_index(services)
        at_most(len(body.passage_ids), services.settings.max_num_candidates, "passage_ids", "max_num_candidates")
        if body.query is not None:
            scores, is_cut, models = await index.score_passages(body.query, body.passage_ids, body.task)
            return _rescored(models, scores, query_truncated=is_cut)
        ids = body.passage_ids
        version, vectors = await index.read(lambda version: (version, version.view.vectors(version.view.rows(ids))))
        task = body.task or version.view.task
        return await _rescored_vectors(body, version.models, task, Encoded(vectors, (), ()))
    assert body.passage_vectors is not None
    values = body.passage_vectors
    at_most(len(values), services.settings.max_num_candidates, "passage_vectors", "max_num_candidates")
    vectors = _vectors(values, services.models.dim, "passage_vectors")
    return await _rescored_vectors(body, services.models, body.task or services.task, Encoded(vectors, (), ()))


@health_router.get("/health", response_model=HealthResponse, responses={503: {"model": HealthResponse}})
async def health(request: Request) -> JSONResponse:
    """Whether the server can answer: 200 when it is ready, else 503."""
    lifecycle = cast(Lifecycle, request.app.state.lifecycle)
    serving: Serving | None = getattr(request.app.state, "serving", None)
    student, indexes = None, None
    if serving is not None:
        student = serving.student
        indexes = serving.describe(serving.indexes) if serving.settings.keys_file is None else None
    response = HealthResponse(
        status=lifecycle.state,
        message=lifecycle.message,
        fingerprint=None if student is None else student.fingerprint,
        engine=None if student is None else student.student.engine,
        indexes=indexes,
    )
    return JSONResponse(response.model_dump(), 200 if lifecycle.state == "ready" else 503)


async def _rescored_vectors(
    body: RescoreRequest, models: ModelService, task: Task, passages: Encoded
) -> RescoreResponse:
    """The scores of passages' vectors."""
    query_truncated = False
    if body.query_vector is not None:
        query = _vectors([body.query_vector], models.dim, "query_vector")[0]
    else:
        assert body.query is not None
        encoded = await models.encode([body.query], "query")
        query, query_truncated = encoded.vectors[0], bool(encoded.truncated)
    scores = await models.score_vectors(query, passages.vectors, task)
    return _rescored(models, scores, passages.truncated, query_truncated=query_truncated)


def _rescored(
    models: ModelService, scores: NDArray[np.float32], truncated: Sequence[int] = (), *, query_truncated: bool
) -> RescoreResponse:
    return RescoreResponse(
        scores=scores.tolist(),
        truncated=list(truncated),
        query_truncated=query_truncated,
        student=models.name,
        fingerprint=models.fingerprint,
    )


def _excerpts(ranking: Ranking, version: OpenVersion) -> list[Excerpt]:
    """The results with their neighbours, merged."""
    return merge_neighbours(ranking.passages, overlapping=version.repeats_text)


def _origin(request: Request, index: ServedIndex, ranking: Ranking, student: ModelService) -> dict[str, Any]:
    """Which version of which index, and which student, answered which request."""
    return {
        "index": {
            "name": index.name,
            "version": ranking.index_version,
            "student": student.name,
            "fingerprint": student.fingerprint,
        },
        "request_id": request_id_of(request),
    }


def number_of(body: BaseModel, name: str, limit: int) -> int:
    """A number of a request; a default is lowered to the server's limit.

    Raises:
        ServingError: 400, the client's number is above the limit.
    """
    value: int = getattr(body, name)
    if name not in body.model_fields_set:
        return min(value, limit)
    at_most(value, limit, name, "max_context_tokens" if name == "max_tokens" else f"max_{name}")
    return value


def settings_of(body: RankingRequest, limits: ServeSettings) -> SearchSettings:
    """The settings of a search.

    Raises:
        ServingError: 400, a number is above the server's limit.
    """
    return SearchSettings.of(
        body,
        top_k=number_of(body, "top_k", limits.max_top_k),
        num_candidates=number_of(body, "num_candidates", limits.max_num_candidates),
        max_num_candidates=limits.max_num_candidates,
    )


def _limited(body: RankingRequest, settings: SearchSettings, limits: ServeSettings) -> SearchSettings:
    """The settings with ``select_from`` within the server's limit, if the client has not set it.

    Raises:
        ServingError: 400, the query, a turn before it, the instruction or ``select_from`` is too large.
    """
    short_enough([body.query], limits, "query")
    short_enough([turn.content for turn in body.history], limits, "history")
    if settings.instruction is not None:
        short_enough([settings.instruction], limits, "instruction")
    most = max(limits.max_num_candidates, settings.top_k)
    if settings.select_from is not None:
        at_most(settings.select_from, most, "select_from", "max_num_candidates")
    elif settings.ranking_depth > most:
        return settings.replace(select_from=most)
    return settings


def _teacher_limits(body: RankingRequest, limits: ServeSettings) -> dict[str, Any] | None:
    """The settings of a reranker that uses the server's teacher; None if the student ranks.

    Raises:
        ServingError: 400, a time limit is for something that the search does not do.
    """
    if body.budget_ms is not None and not body.exact:
        raise invalid("budget_ms is for an exact search; leave it out. The teacher's limit is teacher_ms", "budget_ms")
    if body.rescore in BY_STUDENT:
        if body.teacher_ms is not None:
            raise invalid("teacher_ms is for a teacher that rescores; leave it out", "teacher_ms")
        return None
    longest = limits.teacher_ms
    max_ms = longest if body.teacher_ms is None else min(body.teacher_ms, longest)
    return {"num_passages": body.teacher_passages, "max_ms": max_ms}


def _expansion_of(body: RankingRequest, index: ServedIndex) -> Expansion | None:
    """How the query is expanded.

    Raises:
        ServingError: 400, a field is for an expansion, or cannot be combined with one.
        InputError: there is no writer.
    """
    try:
        settings = ExpansionSettings.of(body)
    except InputError as error:
        raise invalid(str(error), "expansions") from error
    if settings.expand is None:
        return None
    if body.rescore not in BY_STUDENT:
        raise invalid("a reranker reads only for plain queries; leave out expand, or rescore with 'iem'", "expand")
    return index.slow.find_expansion(settings.expand, settings.expansions)


def _name_of(model: str) -> str:
    """The model's name, without its path on this machine."""
    return Path(model).name if Path(model).is_absolute() else model


def _vectors(values: Sequence[Sequence[float]], dim: int, name: str) -> NDArray[np.float32]:
    for index, value in enumerate(values):
        if len(value) != dim:
            raise invalid(f"{name}: number {index} has {len(value)} components, but the student uses {dim}", name)
    with np.errstate(over="ignore"):
        vectors = np.array(values, np.float32)
    if not np.isfinite(vectors).all():
        raise invalid(f"{name}: a component is out of range for float32", name)
    return vectors
