"""Request and response bodies of d2llm's own interface: strict types, finite numbers, no unknown fields."""

from __future__ import annotations

from itertools import islice
from typing import Annotated, Any, ClassVar, Literal, cast

from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    StringConstraints,
    ValidationError,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema, InitErrorDetails, PydanticCustomError
from typing_extensions import Self

from d2llm.core.names import did_you_mean
from d2llm.core.settings import narrowed, shown_as
from d2llm.core.types import (
    DEFAULT_CONTEXT_TOKENS,
    DEFAULT_TEACHER_PASSAGES,
    MAX_ID_CHARS,
    CascadeReport,
    ContextOrder,
    Explanation,
    QueryExpansion,
    Selection,
    Task,
)
from d2llm.models.attribution import WordWeight
from d2llm.models.backbone import TextKind
from d2llm.retrieval.settings import ExpansionSettings, SearchSettings
from d2llm.server.errors import MOST_PROBLEMS
from d2llm.store.side_files import Chunking

Rescore = Literal["none", "iem", "teacher", "cascade"]
"""How candidates are ranked: by inner product, IEM, teacher, or the teacher where the IEM is unsure."""
_MOST_SUGGESTIONS = 3  # similar names are looked for only so often: a client may send a million unknown ones
ScorePart = Literal["anchor", "windows", "tokens", "lexical", "interaction"]
"""A part of a student's score in an index, by its name in an explanation."""
MAX_EXPANSIONS = 10
"""Maximum number of texts that a writer adds to one query of a client."""


def _with_text(text: str) -> str:
    if not text.strip():
        raise ValueError("the text is empty")
    return text


NonEmpty = Annotated[str, AfterValidator(_with_text), Field(json_schema_extra={"minLength": 1, "pattern": r"\S"})]
PassageId = Annotated[str, StringConstraints(min_length=1, max_length=MAX_ID_CHARS)]
Vector = Annotated[list[float], Field(min_length=1, fail_fast=True)]


class KnownFields(BaseModel):
    """Base class of bodies whose unknown fields are errors, the first of which suggest what may be meant.

    ``unknown`` are settings that a class inherits, but no client may send; nor may it those for Python only.
    """

    unknown: ClassVar[frozenset[str]] = frozenset()

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_fields(cls, body: Any) -> Any:
        names = cast("dict[str, Any]", body) if isinstance(body, dict) else {}
        known = accepted_names(cls)
        unknown = (name for name in names if name not in known)
        problems: list[InitErrorDetails] = []
        for number, name in enumerate(islice(unknown, 1 + MOST_PROBLEMS)):
            hint = did_you_mean(name, known) if number < _MOST_SUGGESTIONS else ""
            kind = PydanticCustomError("extra_forbidden", "{problem}", {"problem": f"there is no such field{hint}"})
            problems.append({"type": kind, "loc": (name,), "input": 0})
        if problems:
            raise ValidationError.from_exception_data(cls.__name__, problems)
        return body

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        described = handler.resolve_ref_schema(handler(schema))
        for name in cls.model_fields.keys() - sent_fields(cls).keys():
            del described["properties"][name]
        described["description"] = str(described.get("description", "")).partition("\n\nAttributes:")[0]
        return described


def sent_fields(model: type[BaseModel]) -> dict[str, FieldInfo]:
    """The fields that a client may send, by name."""
    unknown = model.unknown if issubclass(model, KnownFields) else frozenset[str]()
    fields = model.model_fields.items()
    return {name: each for name, each in fields if name not in unknown and not shown_as(each).python_only}


def field_names(name: str, field: FieldInfo) -> list[str]:
    """The names that a field may have in a body, the usual one first."""
    alias = field.validation_alias
    choices = alias.choices if isinstance(alias, AliasChoices) else [alias or name]
    return [each for each in choices if isinstance(each, str)]


def accepted_names(model: type[BaseModel]) -> list[str]:
    """The names that the fields of a body may have."""
    return [each for name, field in sent_fields(model).items() for each in field_names(name, field)]


class Body(KnownFields):
    """Base class of request bodies."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class Answer(BaseModel):
    """Base class of response bodies."""

    model_config = ConfigDict(extra="forbid")


# Requests ---------------------------------------------------------------------------------------------------------


class RankingRequest(SearchSettings, ExpansionSettings, Body):
    """A query with search settings."""

    query: NonEmpty = Field(description="The query text.", examples=["how do I read a file line by line?"])
    rescore: Rescore = Field(
        "iem",
        description="How candidates are ranked: none (inner product), iem, teacher (the teacher reads the top ones) or "
        "cascade (the teacher reads those that the IEM is unsure of).",
    )
    teacher_passages: int = Field(
        DEFAULT_TEACHER_PASSAGES, ge=1, le=200, description="Maximum number of passages that the teacher reads."
    )
    teacher_ms: float | None = Field(
        None, ge=0, description="Time limit of the teacher, in milliseconds; default and maximum: the server's."
    )
    neighbours: int = narrowed(SearchSettings, "neighbours", le=10)
    expansions: int | None = narrowed(ExpansionSettings, "expansions", le=MAX_EXPANSIONS)


class SearchRequest(RankingRequest):
    """A query with search settings, for a ranking."""

    excerpts: bool = Field(
        False,
        description="Also return the results with their neighbours as parts of documents, neighbouring ones merged.",
    )


class ContextRequest(RankingRequest):
    """A query with search settings, for a context. Near duplicates are left out, by default from a cosine of 0.95."""

    unknown: ClassVar[frozenset[str]] = frozenset({"explain", "group"})
    max_tokens: int = Field(DEFAULT_CONTEXT_TOKENS, ge=1, description="Maximum number of the student's tokens.")
    order: ContextOrder = Field(
        "rank", description="rank: the best source first. document: sources of a document together, in its order."
    )


class ExplainRequest(Body):
    """A query and a passage of the index."""

    query: NonEmpty
    passage_id: PassageId
    task: Task | None = None
    teacher: bool = Field(False, description="Also ask the teacher.")


class EncodeRequest(Body):
    """Texts to encode."""

    texts: list[NonEmpty] = Field(min_length=1, fail_fast=True)
    kind: TextKind


class RescoreRequest(Body):
    """A query and passages, each as text or as an encoded vector."""

    query: NonEmpty | None = None
    query_vector: Vector | None = None
    passages: list[NonEmpty] | None = Field(None, min_length=1, fail_fast=True)
    passage_ids: list[PassageId] | None = Field(None, min_length=1, fail_fast=True)
    passage_vectors: list[Vector] | None = Field(None, min_length=1, fail_fast=True)
    task: Task | None = None

    @model_validator(mode="after")
    def _one_of_each(self) -> Self:
        if (self.query is None) == (self.query_vector is None):
            raise ValueError("give either query or query_vector")
        sources = [part for part in (self.passages, self.passage_ids, self.passage_vectors) if part is not None]
        if len(sources) != 1:
            raise ValueError("give one of passages, passage_ids and passage_vectors")
        return self


# Answers ----------------------------------------------------------------------------------------------------------


class ErrorDetail(Answer):
    """What was wrong."""

    kind: str
    message: str
    field: str | None
    request_id: str


class ErrorAnswer(Answer):
    """Every error of this interface."""

    error: ErrorDetail


class ShortPassage(Answer):
    """A neighbour of a passage in its document."""

    id: str
    title: str
    text: str
    score: float | None = None


class DocumentAnswer(Answer):
    """The document of a ranked passage, with its next best passages."""

    id: str
    passage_score: float
    num_scored: int
    others: list[ShortPassage]


class PassageAnswer(Answer):
    """A passage of the index."""

    id: str
    title: str
    text: str
    document_id: str
    position: int
    metadata: dict[str, str | int | float | bool | None]


class RankedAnswer(PassageAnswer):
    """One place of a ranking.

    With explain, ``probability`` is that the passage is relevant, by the student's own score without words, windows and
    tokens. It is ``weak`` if that is low and the passage lacks words of the query, so that it probably does not fit:
    below 0.15, or below 0.5 if it has none of them. Both are null if the student's scores are not calibrated, if the
    ranking does not have its score, or if a teacher has judged the passage.
    """

    rank: int
    score: float
    probability: float | None
    weak: bool | None
    anchor_score: float | None
    log_odds: float | None
    student_rank: int | None
    explanation: Explanation | None
    document: DocumentAnswer | None
    before: list[ShortPassage]
    after: list[ShortPassage]


class CertificateAnswer(Answer):
    """What is proved about a ranking; null stands for minus infinity."""

    num_scored: int
    num_left: int
    highest_bound_left: float | None
    kth_score: float | None
    proved: int


class IndexVersion(Answer):
    """The index that answered, its version, and the name and content hash of its student."""

    name: str
    version: int | None
    student: str
    fingerprint: str


class RankingAnswer(Answer):
    """Facts about a ranking. ``truncated``: the end of the query was not read. ``seconds``: time by stage.

    ``expansion``: what a language model added to the query; or null. ``selection``: the results were
    selected from a longer ranking, with mmr or near_duplicates; the certificate then proves that ranking, not their
    order. ``missing_shards``: numbers of the shards of the index that gave no answer, whose passages may be missing.
    ``shards``: how many gave one, as 7/8; null if the index is not sharded. ``candidate_sources``: what proposed
    the candidates; nothing in an exact search, which considers every passage.
    """

    query: str
    truncated: bool
    num_candidates: int
    seconds: dict[str, float]
    certificate: CertificateAnswer | None
    cascade: CascadeReport | None
    selection: Selection | None
    expansion: QueryExpansion | None
    missing_shards: list[int]
    shards: str | None
    candidate_sources: list[str]
    index: IndexVersion
    request_id: str


class ExcerptAnswer(Answer):
    """Consecutive passages of a document around the results with these ranks; ``text`` has each part once."""

    document_id: str
    passage_ids: list[str]
    ranks: list[int]
    text: str


class SearchAnswer(RankingAnswer):
    """A ranking, best first, and its excerpts if they were requested."""

    passages: list[RankedAnswer]
    excerpts: list[ExcerptAnswer] | None


class SourceAnswer(Answer):
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
    metadata: dict[str, str | int | float | bool | None]


class ContextAnswer(RankingAnswer):
    """The best passages for a query as one text of at most ``max_tokens`` tokens, with numbered sources.

    ``left_out`` are the results that did not fit, ``num_neighbours_left_out`` counts neighbours that did not fit.
    ``context_truncated``: the best result alone was longer than the limit, and its end was cut off.
    """

    text: str
    sources: list[SourceAnswer]
    num_tokens: int
    max_tokens: int
    left_out: list[str]
    num_neighbours_left_out: int
    context_truncated: bool


class TeacherAnswer(Answer):
    """The teacher's judgement of a query and a passage."""

    log_odds: float
    probability: float
    seconds: float
    truncated: bool


class ExplainAnswer(Answer):
    """A passage's score for a query, in parts; word positions count characters of title, line break and text.

    ``truncated``: the end of the passage was not read; ``query_truncated``: the end of the query was not read.
    ``no_interaction`` says why the interaction is 0 for every pair, if it is.
    """

    id: str
    title: str
    text: str
    score: float
    anchor: float | None
    interaction: float | None
    words: tuple[WordWeight, ...]
    truncated: bool
    query_truncated: bool
    no_interaction: str | None
    teacher: TeacherAnswer | None


class StudentAnswer(Answer):
    """The student."""

    name: str
    fingerprint: str
    dim: int
    head: str
    backbone: str
    max_query_tokens: int
    max_passage_tokens: int
    relevance_score: str = Field(description="How rerank endpoints turn its scores into numbers in [0, 1].")


class IndexAnswer(Answer):
    """Facts about the index. ``num_shards``: null if it is not sharded. ``missing_shards``: left out of searches.

    ``score_parts``: what the student's score adds up in this index, for its task. ``candidate_sources``: what
    proposes candidates if a search names no sources; nothing if every search is exact.
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
    student: StudentAnswer
    teacher: str | None
    writer: str | None
    fields: dict[str, str]
    has_ann: bool
    snapshots: list[str]
    num_shards: int | None
    missing_shards: list[int]
    rescore: list[Rescore]
    score_parts: list[ScorePart]
    candidate_sources: list[str]
    writable: bool
    d2llm: str


class ServedIndexAnswer(Answer):
    """An index and the version served, with its student; ``problem``: why a newer version cannot be read, or empty."""

    name: str
    version: int | None
    num_passages: int
    task: Task
    student: str
    fingerprint: str
    problem: str


class IndexesAnswer(Answer):
    """The indexes that the key may use, in the order in which the server was given them."""

    indexes: list[ServedIndexAnswer]


class ReloadAnswer(Answer):
    """The version that is served now, its student, and whether it changed."""

    version: int | None
    student: str
    fingerprint: str
    changed: bool


class EncodeAnswer(Answer):
    """Vectors as the student returns them, not of unit length, with token counts and places of truncated texts."""

    vectors: list[list[float]]
    num_tokens: list[int]
    truncated: list[int]
    dim: int
    student: str
    fingerprint: str


class RescoreAnswer(Answer):
    """The IEM's logits, in the order of the passages; ``truncated``: places of passage texts that were truncated."""

    scores: list[float]
    truncated: list[int]
    query_truncated: bool
    student: str
    fingerprint: str


class HealthAnswer(Answer):
    """Whether the server can answer, and with which student and indexes.

    ``fingerprint`` is null if there are several students; ``indexes`` is null if the server has keys (``/v1/indexes``).
    """

    status: Literal["starting", "ready", "broken", "stopping"]
    message: str
    fingerprint: str | None
    indexes: list[ServedIndexAnswer] | None


Metadata = Annotated[
    dict[str, Any],
    Field(json_schema_extra={"additionalProperties": {"type": ["string", "number", "boolean", "null"]}}),
]
"""If a value does not fit, the index reports passage and field, or drops the value on request."""
SnapshotName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}$")]
_LENIENT = Field(False, description="Drop metadata values that do not fit, and count them.")

# Requests that change the index: passages, documents, snapshots ----------------------------------------------------


class PassageBody(Body):
    """A passage."""

    id: PassageId = Field(examples=["bread"])
    text: NonEmpty = Field(examples=["Bread is baked from flour, water and salt."])
    title: str = Field("", examples=["Bread"])
    document_id: str = Field("", max_length=MAX_ID_CHARS)
    position: int = Field(0, ge=0, le=2**31 - 1)
    metadata: Metadata = Field(default_factory=dict, examples=[{"year": 2021}])


class PassagesRequest(Body):
    """Passages to add, or to update if the id exists."""

    passages: list[PassageBody] = Field(min_length=1, fail_fast=True)
    lenient_metadata: bool = _LENIENT


class DocumentBody(Body):
    """A text of any length."""

    id: PassageId = Field(examples=["ships"])
    text: NonEmpty = Field(examples=["Ships sail over the sea. They carry goods to far ports."])
    title: str = Field("", examples=["Ships"])
    metadata: Metadata = Field(default_factory=dict, examples=[{"year": 1999}])


class DocumentsRequest(Body):
    """Long texts to split into passages."""

    documents: list[DocumentBody] = Field(min_length=1, fail_fast=True)
    lenient_metadata: bool = _LENIENT
    chunk_tokens: int | None = Field(
        None, ge=8, description="Maximum tokens per passage; null: the index's value, or 128 for its first documents."
    )
    chunk_overlap: int | None = Field(
        None, ge=0, description="Tokens that a passage repeats from the previous one; null: the index's value, or 0."
    )


class SnapshotRequest(Body):
    """The name of a snapshot to take."""

    name: SnapshotName


# Answers to these ----------------------------------------------------------------------------------------------------


class PassagesAnswer(Answer):
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


class DocumentsAnswer(PassagesAnswer):
    """Counts of documents, and of their passages by outcome."""

    num_documents: int
    num_deleted: int


class SkippedPartAnswer(Answer):
    """A part of a file that was left out, and why."""

    file: str
    part: str
    reason: str


class FilesAnswer(DocumentsAnswer):
    """Counts of the documents in files, and what was left out of them."""

    skipped: list[SkippedPartAnswer]


class DeletedAnswer(Answer):
    """How many passages were deleted, and the new version."""

    num_deleted: int
    version: int | None


class ListedDocumentAnswer(Answer):
    """A document, and how many passages it has."""

    id: str
    num_passages: int


class PassageListAnswer(Answer):
    """Ids of passages, in order; ``next_cursor`` is the cursor of the next page, null on the last one."""

    ids: list[str]
    next_cursor: str | None


class DocumentListAnswer(Answer):
    """Documents, in order; ``next_cursor`` is the cursor of the next page, null on the last one."""

    documents: list[ListedDocumentAnswer]
    next_cursor: str | None


class DocumentPassagesAnswer(Answer):
    """A document's passages, ordered by position.

    ``repeated``: how many characters at the start of each passage's text repeat the end of the one before it.
    """

    id: str
    passages: list[PassageAnswer]
    repeated: list[int]


class RestoredAnswer(Answer):
    """How many passages the restored index has, and the new version."""

    num_passages: int
    version: int | None


class SnapshotAnswer(Answer):
    """The names of all snapshots."""

    snapshots: list[str]
