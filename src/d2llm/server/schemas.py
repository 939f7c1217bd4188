"""Bodies of requests and answers of d2llm's own interface. Types are strict, unknown fields errors, numbers finite."""

from __future__ import annotations

from typing import Annotated, Any, Literal, cast

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError
from typing_extensions import Self

from d2llm.core.names import did_you_mean
from d2llm.core.types import DEFAULT_NUM_CANDIDATES, DEFAULT_TEACHER_PASSAGES, DEFAULT_TOP_K, Grouping, SourceName, Task
from d2llm.server.index_service import Rescore
from d2llm.server.model_service import TextKind
from d2llm.store.side_files import Chunking


def _with_text(text: str) -> str:
    if not text.strip():
        raise ValueError("there is no text")
    return text


NonEmpty = Annotated[str, AfterValidator(_with_text), Field(json_schema_extra={"minLength": 1, "pattern": r"\S"})]
PassageId = Annotated[str, StringConstraints(min_length=1)]
Vector = Annotated[list[float], Field(min_length=1)]


class Body(BaseModel):
    """What requests have in common."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _name_the_field_that_is_meant(cls, body: Any) -> Any:
        names = cast("dict[str, Any]", body) if isinstance(body, dict) else {}
        problems: list[InitErrorDetails] = []
        for name in names:
            if name in cls.model_fields:
                continue
            problem = {"problem": f"there is no such field{did_you_mean(name, cls.model_fields)}"}
            kind = PydanticCustomError("extra_forbidden", "{problem}", problem)
            problems.append({"type": kind, "loc": (name,), "input": 0})
        if problems:
            raise ValidationError.from_exception_data(cls.__name__, problems)
        return body


class Answer(BaseModel):
    """What answers have in common."""

    model_config = ConfigDict(extra="forbid")


# Requests ---------------------------------------------------------------------------------------------------------


class SearchRequest(Body):
    """A query, and how to search for it."""

    query: NonEmpty = Field(description="What to look for.", examples=["how do I read a file line by line?"])
    top_k: int = Field(DEFAULT_TOP_K, ge=1, description="Length of the ranking.")
    num_candidates: int = Field(DEFAULT_NUM_CANDIDATES, ge=1, description="Passages that get the full score.")
    filter: str | None = Field(
        None, description="A condition on metadata.", examples=["year >= 2020 AND language = 'en'"]
    )
    sources: list[SourceName] | None = Field(
        None,
        min_length=1,
        max_length=3,
        description="Who proposes candidates; by default vectors, and bm25 where the student's score counts words; "
        "with hybrid bm25 always does.",
    )
    hybrid: float | None = Field(
        None, ge=0, le=1, description="Rank by fusion with BM25, and BM25's share in it; null: by the score alone."
    )
    exact: bool = Field(False, description="The exact ranking of all passages, with its certificate.")
    explain: bool = Field(False, description="Say of each passage why it stands where it does.")
    rescore: Rescore = Field(
        "iem",
        description="Who orders the candidates: none (the inner product), iem, teacher (it reads the first of them) or "
        "cascade (it reads those that the IEM is unsure of).",
    )
    budget_ms: float | None = Field(None, ge=0, description="Time of an exact search, in milliseconds.")
    teacher_passages: int = Field(
        DEFAULT_TEACHER_PASSAGES, ge=1, le=200, description="Most passages that the teacher reads."
    )
    teacher_ms: float | None = Field(
        None, ge=0, description="Longest time that it reads, in milliseconds; null, or more: the server's teacher_ms."
    )
    task: Task | None = Field(None, description="What is asked; null: what the index is made for.")
    group: Grouping = Field("passage", description="Rank passages, or documents by their best or summed passages.")
    neighbours: int = Field(0, ge=0, le=10, description="Passages before and after each, of its document.")


class ExplainRequest(Body):
    """A query and a passage of the index."""

    query: NonEmpty
    passage_id: PassageId
    task: Task | None = None
    teacher: bool = Field(False, description="Also ask the teacher.")


class EncodeRequest(Body):
    """Texts to encode."""

    texts: list[NonEmpty] = Field(min_length=1)
    kind: TextKind


class RescoreRequest(Body):
    """A query and passages, each as text or as the vector that it was encoded to."""

    query: NonEmpty | None = None
    query_vector: Vector | None = None
    passages: list[NonEmpty] | None = Field(None, min_length=1)
    passage_ids: list[PassageId] | None = Field(None, min_length=1)
    passage_vectors: list[Vector] | None = Field(None, min_length=1)
    task: Task | None = None

    @model_validator(mode="after")
    def _one_of_each(self) -> Self:
        if (self.query is None) == (self.query_vector is None):
            raise ValueError("give either query or query_vector")
        given = [part for part in (self.passages, self.passage_ids, self.passage_vectors) if part is not None]
        if len(given) != 1:
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


class ExplanationAnswer(Answer):
    """The parts of a passage's score, which is ``anchor`` + ``interaction`` + ``lexical`` + ``windows``."""

    anchor: float | None
    interaction: float | None
    lexical: float | None
    windows: float | None
    source_ranks: dict[str, int]
    source_scores: dict[str, float]
    terms: dict[str, int]


class DocumentAnswer(Answer):
    """The document that a place stands for, with its next best passages."""

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
    """One place of a ranking."""

    rank: int
    score: float
    anchor_score: float | None
    log_odds: float | None
    student_rank: int | None
    explanation: ExplanationAnswer | None
    document: DocumentAnswer | None
    before: list[ShortPassage]
    after: list[ShortPassage]


class CertificateAnswer(Answer):
    """What is proved of a ranking; null stands for minus infinity."""

    num_scored: int
    num_left: int
    highest_bound_left: float | None
    kth_score: float | None
    proved: int


class CascadeAnswer(Answer):
    """What the teacher changed, in the student's ranks; ``out_of_time``: its time ended before it had read all."""

    read: list[int]
    unsure: list[int]
    moved: list[tuple[int, int]]
    num_truncated: int
    seconds: float
    out_of_time: bool


class IndexVersion(Answer):
    """Which index answered, and the student that made it, by its name and the hash of its content."""

    version: int | None
    student: str
    fingerprint: str


class SearchAnswer(Answer):
    """A ranking, best first. ``truncated``: the query's end was not read. ``seconds`` by stage: queue to teacher."""

    query: str
    truncated: bool
    passages: list[RankedAnswer]
    num_candidates: int
    seconds: dict[str, float]
    certificate: CertificateAnswer | None
    cascade: CascadeAnswer | None
    index: IndexVersion
    request_id: str


class WordAnswer(Answer):
    """Characters of the passage's full text, and what they add to the score."""

    start: int
    end: int
    weight: float


class TeacherAnswer(Answer):
    """What the teacher says of a pair."""

    log_odds: float
    probability: float
    seconds: float
    truncated: bool


class ExplainAnswer(Answer):
    """A query's score with a passage, in parts; places count in title, line break and text.

    ``truncated``: the passage's end was not read; ``query_truncated``: the query's. ``no_interaction`` says why the
    interaction is 0 for every pair, where it is.
    """

    id: str
    title: str
    text: str
    score: float
    anchor: float | None
    interaction: float | None
    words: list[WordAnswer]
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
    relevance_score: str = Field(description="How rerankers' numbers in [0, 1] are made of its scores.")


class IndexAnswer(Answer):
    """Facts about the index."""

    name: str
    version: int
    num_passages: int
    num_bytes: int
    bytes_per_passage: float
    vector_format: str
    vector_copies: int
    window_format: str | None
    task: Task
    chunking: Chunking | None
    student: StudentAnswer
    teacher: str | None
    fields: dict[str, str]
    has_ann: bool
    has_projections: bool
    snapshots: list[str]
    rescore: list[Rescore]
    writable: bool
    d2llm: str


class ReloadAnswer(Answer):
    """Whether another version, or another student's index, is served now, and which."""

    version: int | None
    student: str
    fingerprint: str
    changed: bool


class EncodeAnswer(Answer):
    """Vectors as the student gives them, not of unit length, and what of the texts was read."""

    vectors: list[list[float]]
    num_tokens: list[int]
    truncated: list[int]
    dim: int
    student: str
    fingerprint: str


class RescoreAnswer(Answer):
    """The IEM's logits, in the passages' order, and the places of the passages that were given as texts and cut."""

    scores: list[float]
    truncated: list[int]
    query_truncated: bool
    student: str
    fingerprint: str


class HealthAnswer(Answer):
    """Whether the server can answer, and with which student."""

    status: Literal["starting", "ready", "broken", "stopping"]
    message: str
    fingerprint: str | None


Metadata = Annotated[
    dict[str, Any],
    Field(json_schema_extra={"additionalProperties": {"type": ["string", "number", "boolean", "null"]}}),
]
"""For a value that does not fit the index names passage and field, or leaves it out where that is asked for."""
SnapshotName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}$")]
_LENIENT = Field(False, description="Leave out metadata values that do not fit, and count them.")

# Requests about what the index holds: passages, documents, files, snapshots -------------------------------------------


class PassageBody(Body):
    """A passage."""

    id: PassageId = Field(examples=["bread"])
    text: NonEmpty = Field(examples=["Bread is baked from flour, water and salt."])
    title: str = Field("", examples=["Bread"])
    document_id: str = ""
    position: int = Field(0, ge=0, le=2**31 - 1)
    metadata: Metadata = Field(default_factory=dict, examples=[{"year": 2021}])


class PassagesRequest(Body):
    """Passages to add, or to change where the id is there."""

    passages: list[PassageBody] = Field(min_length=1)
    lenient_metadata: bool = _LENIENT


class DocumentBody(Body):
    """A text of any length."""

    id: PassageId = Field(examples=["ships"])
    text: NonEmpty = Field(examples=["Ships sail over the sea. They carry goods to far ports."])
    title: str = Field("", examples=["Ships"])
    metadata: Metadata = Field(default_factory=dict, examples=[{"year": 1999}])


class DocumentsRequest(Body):
    """Long texts to split into passages."""

    documents: list[DocumentBody] = Field(min_length=1)
    lenient_metadata: bool = _LENIENT
    chunk_tokens: int | None = Field(
        None, ge=8, description="Most tokens of a passage; null: as the index cuts, or 128 for its first documents."
    )
    chunk_overlap: int | None = Field(
        None, ge=0, description="Tokens that a passage repeats of the one before; null: as the index cuts, or none."
    )


class SnapshotRequest(Body):
    """The name of a snapshot to take."""

    name: SnapshotName


# Answers about it -----------------------------------------------------------------------------------------------------


class PassagesAnswer(Answer):
    """What became of the passages given; ``left_out`` counts metadata values by field, where that was asked for."""

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
    """What became of the documents given and of their passages."""

    num_documents: int
    num_deleted: int


class DeletedAnswer(Answer):
    """How many passages were deleted, and the version since."""

    num_deleted: int
    version: int | None


class ListedDocumentAnswer(Answer):
    """A document, and how many passages it has."""

    id: str
    num_passages: int


class PassageListAnswer(Answer):
    """Ids of passages, in order; ``next_cursor`` asks for those behind them, null where there are none."""

    ids: list[str]
    next_cursor: str | None


class DocumentListAnswer(Answer):
    """Documents, in order; ``next_cursor`` asks for those behind them, null where there are none."""

    documents: list[ListedDocumentAnswer]
    next_cursor: str | None


class DocumentPassagesAnswer(Answer):
    """A document's passages, by their positions."""

    id: str
    passages: list[PassageAnswer]


class RestoredAnswer(Answer):
    """How many passages the index has again, and the version since."""

    num_passages: int
    version: int | None


class SnapshotAnswer(Answer):
    """All snapshots."""

    snapshots: list[str]
