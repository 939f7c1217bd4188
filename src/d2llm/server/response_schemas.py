"""Response bodies of d2llm's own interface, read by attributes from the results that they show."""

from __future__ import annotations

import asyncio
import base64
import math
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import AliasGenerator, AliasPath, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import to_json
from starlette.responses import JSONResponse

from d2llm.core.types import (
    EngineName,
    Excerpt,
    Explanation,
    MetadataValue,
    MissingShard,
    Passage,
    QueryExpansion,
    QueryRewriting,
    RankedPassage,
    Ranking,
    RerankReport,
    Selection,
    Task,
)
from d2llm.models.attribution import WordWeight
from d2llm.models.probabilities import WEAK, WEAK_WITHOUT_WORDS
from d2llm.ops.bm25_words import terms
from d2llm.retrieval.context import AnswerContext
from d2llm.server.schemas import Rescore
from d2llm.store.index_manifest import Chunking

ScorePart = Literal["dot", "windows", "tokens", "lexical", "interaction"]
"""A part of a student's score in an index, by its name in an explanation."""


class ResponseBody(BaseModel):
    """Base class of response bodies."""

    model_config = ConfigDict(extra="forbid", from_attributes=True)


class Joined:
    """The attributes of several objects: those given by name, then those of the first object that has them."""

    def __init__(self, *sources: object, **more: Any) -> None:
        self.__dict__.update(more)
        self._sources = sources

    def __getattr__(self, name: str) -> Any:
        for source in self._sources:
            if hasattr(source, name):
                return getattr(source, name)
        raise AttributeError(name)


def _plain_value(value: MetadataValue) -> str | int | float | bool | None:
    return value if isinstance(value, str | int | float | bool | None) else value.isoformat()


def _plain_metadata(metadata: Mapping[str, MetadataValue]) -> dict[str, Any]:
    return {name: _plain_value(value) for name, value in metadata.items()}


def _scored(passages: Sequence[tuple[Passage, float]]) -> list[Joined]:
    return [Joined(passage, score=score) for passage, score in passages]


def _shard_numbers(shards: Sequence[MissingShard]) -> list[int]:
    return [shard.number for shard in shards]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


PlainMetadata = Annotated[dict[str, str | int | float | bool | None], BeforeValidator(_plain_metadata)]
"""Metadata of a passage; times are texts."""
MissingShards = Annotated[list[int], BeforeValidator(_shard_numbers)]
"""The numbers of shards."""
Finite = Annotated[float | None, BeforeValidator(_finite)]
"""A number; null stands for minus infinity."""


class ErrorDetail(ResponseBody):
    """What was wrong."""

    kind: str
    message: str
    field: str | None
    request_id: str


class ErrorResponse(ResponseBody):
    """Every error of this interface."""

    error: ErrorDetail


class ShortPassage(ResponseBody):
    """A neighbour of a passage in its document."""

    id: str
    title: str
    text: str
    score: float | None = None


class DocumentResponse(ResponseBody):
    """The document of a ranked passage, with its next best passages."""

    id: str
    passage_score: float
    num_scored: int
    others: Annotated[list[ShortPassage], BeforeValidator(_scored)]


class PassageResponse(ResponseBody):
    """A passage of the index."""

    id: str
    title: str
    text: str
    document_id: str
    position: int
    metadata: PlainMetadata


@dataclass(frozen=True, slots=True)
class RatedPassage:
    """A ranked passage with the probability that its passage is relevant, and whether that is weak."""

    ranked: RankedPassage
    probability: float | None
    weak: bool | None


def _of_rated_passage(name: str) -> str | AliasPath:
    """Where a field of ``RankedResponse`` is read from."""
    if name in RatedPassage.__slots__:
        return name
    return AliasPath("ranked", "passage", name) if name in PassageResponse.model_fields else AliasPath("ranked", name)


class RankedResponse(PassageResponse):
    """One passage of a ranking.

    With explain, ``probability`` is that the passage is relevant, by the student's own score without words, windows and
    tokens. It is ``weak`` if that is low and the passage lacks words of the query, so that it probably does not fit:
    below 0.15, or below 0.5 if it has none of them. Both are null if the student's scores are not calibrated, if the
    ranking does not have its score, or if a teacher has scored the passage.
    """

    model_config = ConfigDict(alias_generator=AliasGenerator(validation_alias=_of_rated_passage))

    rank: int
    score: float
    probability: float | None
    weak: bool | None
    dot_score: float | None
    log_odds: float | None
    student_rank: int | None
    explanation: Explanation | None
    document: DocumentResponse | None
    before: list[ShortPassage]
    after: list[ShortPassage]


class CertificateResponse(ResponseBody):
    """What is proved about a ranking; null stands for minus infinity."""

    num_scored: int
    num_left: int
    highest_bound_left: Finite
    kth_score: Finite
    proved: int


class IndexVersion(ResponseBody):
    """The index that answered, its version, and the name and content hash of its student."""

    name: str
    version: int | None
    student: str
    fingerprint: str


class RankingResponse(ResponseBody):
    """Facts about a ranking. ``truncated``: the end of the query was not read. ``seconds``: time by stage.

    ``expansion``: what a language model added to the query; or null. ``rewriting``: how one made the query of the last
    question of a conversation (``rewriting.asked``); or null. ``selection``: the results were selected from a longer
    ranking, with mmr or near_duplicates; the certificate then proves that ranking, not their order. ``missing_shards``:
    numbers of the shards of the index that gave no answer, whose passages may be missing. ``corrections``: words of the
    query that were taken for typing errors, each with the one that was searched instead. ``shards``: how many gave one,
    as 7/8; null if the index is not sharded. ``candidate_sources``: what proposed the candidates; nothing in an exact
    search, which considers every passage.
    """

    query: str = Field(validation_alias=AliasPath("query", "text"))
    truncated: bool
    num_candidates: int
    seconds: dict[str, float]
    certificate: CertificateResponse | None
    reranking: RerankReport | None
    selection: Selection | None
    expansion: QueryExpansion | None
    rewriting: QueryRewriting | None
    corrections: dict[str, str]
    missing_shards: MissingShards
    shards: str | None
    candidate_sources: list[str]
    index: IndexVersion
    request_id: str


class FacetValueResponse(ResponseBody):
    """A value of a field, and how many of all passages that the filter allows, and of the candidates, have it."""

    value: Annotated[str | int | float | bool, BeforeValidator(_plain_value)]
    num_passages: int
    num_candidates: int


class FacetResponse(ResponseBody):
    """How often the values of a field occur: at most 100, the most frequent first, of ``num_values``."""

    values: list[FacetValueResponse]
    num_values: int
    num_without: int


class ExcerptResponse(ResponseBody):
    """Consecutive passages of a document around the results with these ranks; ``text`` has each part once."""

    document_id: str
    passage_ids: list[str]
    ranks: list[int]
    text: str


class SearchResponse(RankingResponse):
    """A ranking, best first, and its excerpts if they were requested."""

    passages: list[RankedResponse]
    facets: dict[str, FacetResponse]
    excerpts: list[ExcerptResponse] | None


class SourceResponse(ResponseBody):
    """A source of a context: consecutive passages of a document; its header and text stand in the context."""

    number: int
    header: str
    text: str
    title: str
    pages: list[int]
    path: str
    document_id: str
    passage_ids: list[str]
    ranks: list[int]
    score: float
    metadata: PlainMetadata


class ContextResponse(RankingResponse):
    """The best passages for a query as one text of at most ``max_tokens`` tokens, with numbered sources.

    ``left_out`` are the results that did not fit, ``num_neighbours_left_out`` counts neighbours that did not fit.
    ``context_truncated``: the best result alone was longer than the limit, and its end was cut off.
    """

    text: str
    sources: list[SourceResponse]
    num_tokens: int
    max_tokens: int
    left_out: list[str]
    num_neighbours_left_out: int
    context_truncated: bool


class TeacherResponse(ResponseBody):
    """The teacher's score of a query and a passage."""

    log_odds: float
    probability: float
    seconds: float
    truncated: bool


class ExplainResponse(ResponseBody):
    """A passage's score for a query, in parts; word positions count characters of title, line break and text.

    ``truncated``: the end of the passage was not read; ``query_truncated``: the end of the query was not read.
    ``no_interaction`` says why the interaction is 0 for every pair, if it is.
    """

    id: str
    title: str
    text: str
    score: float
    dot: float | None
    interaction: float | None
    words: tuple[WordWeight, ...]
    truncated: bool
    query_truncated: bool
    no_interaction: str | None
    teacher: TeacherResponse | None


class StudentResponse(ResponseBody):
    """The student."""

    name: str
    fingerprint: str
    dim: int
    head: str
    backbone: str
    max_query_tokens: int
    max_passage_tokens: int
    relevance_score: str = Field(description="How rerank endpoints turn its scores into numbers in [0, 1].")


class IndexResponse(ResponseBody):
    """Facts about the index. ``num_shards``: null if it is not sharded. ``missing_shards``: left out of searches.

    ``score_parts``: what the student's score adds up in this index, for its task. ``candidate_sources``: what
    proposes candidates if a search names no sources; nothing if every search is exact. ``example_queries``: at most
    three queries to try, which are headings or sentences of the index.
    """

    name: str
    version: int
    num_passages: int
    num_bytes: int
    bytes_per_passage: float
    vector_format: str
    vector_copies: int
    window_format: str | None
    token_format: str | None
    task: Task
    chunking: Chunking | None
    student: StudentResponse
    teacher: str | None
    writer: str | None
    fields: dict[str, str]
    has_ann: bool
    snapshots: list[str]
    num_shards: int | None
    missing_shards: MissingShards
    rescore: list[Rescore]
    score_parts: list[ScorePart]
    candidate_sources: list[str]
    example_queries: list[str]
    writable: bool
    d2llm: str


class ServedIndexResponse(ResponseBody):
    """An index and the version served, with its student and the engine that reads queries (``models.engines``).

    ``problem``: why a newer version cannot be read, or empty.
    """

    name: str
    version: int | None
    num_passages: int
    task: Task
    student: str
    fingerprint: str
    engine: EngineName
    problem: str


class IndexesResponse(ResponseBody):
    """The indexes that the key may use, in the order in which the server was given them."""

    indexes: list[ServedIndexResponse]


class ReloadResponse(ResponseBody):
    """The version that is served now, its student, and whether it changed."""

    version: int | None
    student: str
    fingerprint: str
    changed: bool


class EncodeResponse(ResponseBody):
    """Vectors as the student returns them, not of unit length, with token counts and places of truncated texts."""

    vectors: list[list[float] | str]
    num_tokens: list[int]
    truncated: list[int]
    dim: int
    student: str
    fingerprint: str


class RescoreResponse(ResponseBody):
    """The scores, in the order of the passages; ``truncated``: places of passage texts that were truncated."""

    scores: list[float]
    truncated: list[int]
    query_truncated: bool
    student: str
    fingerprint: str


class HealthResponse(ResponseBody):
    """Whether the server can answer, and with which student and indexes.

    ``engine`` reads queries. It and ``fingerprint`` are null if there are several students; ``indexes`` is null if the
    server has keys (``/v1/indexes``).
    """

    status: Literal["starting", "ready", "broken", "stopping"]
    message: str
    fingerprint: str | None
    engine: EngineName | None
    indexes: list[ServedIndexResponse] | None


class PassagesResponse(ResponseBody):
    """Counts of passages by outcome; ``left_out`` counts dropped metadata values by field, with lenient_metadata."""

    num_passages: int
    num_added: int
    num_updated: int
    num_metadata: int
    num_unchanged: int
    num_truncated: int
    left_out: dict[str, int]
    version: int
    seconds: float


class DocumentsResponse(PassagesResponse):
    """Counts of documents, and of their passages by outcome."""

    num_documents: int
    num_deleted: int


class SkippedPartResponse(ResponseBody):
    """A part of a file that was left out, and why."""

    file: str = Field(validation_alias="id")
    part: str
    reason: str


class FilesResponse(DocumentsResponse):
    """Counts of the documents in files, and what was left out of them."""

    skipped: list[SkippedPartResponse]


class DeletedResponse(ResponseBody):
    """How many passages were deleted, and the new version."""

    num_deleted: int
    version: int | None


class ListedDocumentResponse(ResponseBody):
    """A document, and how many passages it has."""

    id: str
    num_passages: int


class PassageListResponse(ResponseBody):
    """Ids of passages, in order; ``next_cursor`` is the cursor of the next page, null on the last one."""

    ids: list[str]
    next_cursor: str | None


class DocumentListResponse(ResponseBody):
    """Documents, in order; ``next_cursor`` is the cursor of the next page, null on the last one."""

    documents: list[ListedDocumentResponse]
    next_cursor: str | None


class DocumentPassagesResponse(ResponseBody):
    """A document's passages, ordered by position.

    ``repeated``: how many characters at the start of each passage's text repeat the end of the one before it.
    """

    id: str
    passages: list[PassageResponse]
    repeated: list[int]


class RestoredResponse(ResponseBody):
    """How many passages the restored index has, and the new version."""

    num_passages: int
    version: int | None


class SnapshotResponse(ResponseBody):
    """The names of all snapshots."""

    snapshots: list[str]


_FEW_ITEMS = 64  # passages or vectors, which are serialized within a few milliseconds


class FastJSONResponse(JSONResponse):
    """A ``JSONResponse`` that is several times faster on vectors and accepts numpy arrays."""

    def render(self, content: Any) -> bytes:
        """Serialize the body."""
        return to_json(content, fallback=_plain)


async def response_of(
    make: Callable[[], Any], num_items: int, headers: Mapping[str, str] | None = None
) -> FastJSONResponse:
    """The response with the content that ``make`` returns; one of many items is made and serialized in another thread.

    Vectors should be items of a list: between them, other threads can work.
    """

    def respond() -> FastJSONResponse:
        return FastJSONResponse(make(), headers=headers)

    return respond() if num_items <= _FEW_ITEMS else await asyncio.to_thread(respond)


def listed_vectors(vectors: NDArray[np.float32], encoding: str | None) -> list[Any]:
    """Vectors [n, dim] as the items of a body: arrays, or with "base64" texts of float32 numbers, little-endian."""
    if encoding != "base64":
        return list(vectors)
    return [base64.b64encode(vector).decode("ascii") for vector in np.ascontiguousarray(vectors, "<f4")]


def _plain(value: Any) -> Any:
    return value.tolist()


def search_response(
    ranking: Ranking, excerpts: Sequence[Excerpt] | None, probabilities: Sequence[float | None], **origin: Any
) -> SearchResponse:
    """A ranking with its excerpts, if they were requested, and the ``probabilities`` that its passages are relevant."""
    query_terms = frozenset(terms(ranking.query.text))
    passages = [
        RatedPassage(ranked, probability, _is_weak(ranked.explanation, probability, query_terms))
        for ranked, probability in zip(ranking.passages, probabilities, strict=True)
    ]
    facts = _facts(ranking) | origin
    return SearchResponse.model_validate(Joined(ranking, passages=passages, excerpts=excerpts, **facts))


def _is_weak(explanation: Explanation | None, probability: float | None, query_terms: Set[str]) -> bool | None:
    if explanation is None or probability is None:
        return None
    if not query_terms:  # only signs such as "???"
        return True
    if query_terms <= explanation.terms.keys():
        return False
    return probability < (WEAK if explanation.terms else WEAK_WITHOUT_WORDS)


def context_response(context: AnswerContext, **origin: Any) -> ContextResponse:
    """A context with facts about its ranking."""
    facts = _facts(context.ranking) | origin
    fields = {"sources": context.sources, "context_truncated": context.truncated}
    return ContextResponse.model_validate(Joined(context.ranking, context, **fields, **facts))


def _facts(ranking: Ranking) -> dict[str, Any]:
    return {"candidate_sources": ranking.sources, "shards": _answered(ranking)}


def _answered(ranking: Ranking) -> str | None:
    """How many shards gave an answer, as 7/8; None if the index is not sharded."""
    if ranking.num_shards is None:
        return None
    return f"{ranking.num_shards - len(ranking.missing_shards)}/{ranking.num_shards}"
