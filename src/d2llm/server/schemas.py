"""Request bodies of d2llm's own interface: strict types, finite numbers, no unknown fields."""

from __future__ import annotations

from functools import cache
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

from d2llm.core.names import did_you_mean, suggestion
from d2llm.core.settings import LENIENT_HELP, narrowed, shown_as
from d2llm.core.types import MAX_ID_CHARS, Task
from d2llm.models.tokens import TextKind
from d2llm.retrieval.reranker import Reranker, TeacherReranker
from d2llm.retrieval.settings import (
    ChunkingSettings,
    ContextSettings,
    ConversationSettings,
    ExcerptSettings,
    ExpansionSettings,
    SearchSettings,
)
from d2llm.server.errors import MAX_PROBLEMS

BY_STUDENT = ("none", "iem")
"""The values of ``rescore`` that are no rerankers: by inner product, and by the student's score."""
VectorEncoding = Literal["float", "base64"]
"""How a body writes a vector."""
BASE64 = "base64: float32, little-endian."
_MAX_SUGGESTIONS = 3  # similar names are looked for only so often: a client may send a million unknown ones
MAX_EXPANSIONS = 10
"""Maximum number of texts that a writer adds to one query of a client."""


def _with_text(text: str) -> str:
    if not text.strip():
        raise ValueError("the text is empty")
    return text


def _known_rescore(kind: str) -> str:
    known = [*BY_STUDENT, *Reranker.kinds.kinds]
    if kind not in known:
        raise ValueError(f"there is no reranker '{kind}'; {suggestion(kind, known, 'there are')}")
    return kind


NonEmpty = Annotated[str, AfterValidator(_with_text), Field(json_schema_extra={"minLength": 1, "pattern": r"\S"})]
Rescore = Annotated[
    str,
    AfterValidator(_known_rescore),
    Field(json_schema_extra=lambda schema: schema.update(enum=[*BY_STUDENT, *Reranker.kinds.kinds])),
]
"""How candidates are ranked: by the student, or by a reranker of some kind."""
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
        for position, name in enumerate(islice(unknown, 1 + MAX_PROBLEMS)):
            hint = did_you_mean(name, known) if position < _MAX_SUGGESTIONS else ""
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
    return {name: field for name, field in fields if name not in unknown and not shown_as(field).python_only}


def field_names(name: str, field: FieldInfo) -> list[str]:
    """The names that a field may have in a body, the usual one first."""
    alias = field.validation_alias
    choices = alias.choices if isinstance(alias, AliasChoices) else [alias or name]
    return [choice for choice in choices if isinstance(choice, str)]


@cache
def accepted_names(model: type[BaseModel]) -> tuple[str, ...]:
    """The names that the fields of a body may have."""
    return tuple(alias for name, field in sent_fields(model).items() for alias in field_names(name, field))


class Body(KnownFields):
    """Base class of request bodies."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


# Requests ---------------------------------------------------------------------------------------------------------


class RankingRequest(SearchSettings, ExpansionSettings, ConversationSettings, Body):
    """A query with search settings."""

    query: NonEmpty = Field(description="The query text.", examples=["how do I read a file line by line?"])
    rescore: Rescore = Field(
        "iem",
        title="Ranked by",
        description="How candidates are ranked: none (inner product), iem, or a kind of reranker, which scores the top "
        "ones again; GET /v1/index lists what is available.",
    )
    teacher_passages: int = narrowed(TeacherReranker, "num_passages", ge=1, le=200)
    teacher_ms: float | None = narrowed(TeacherReranker, "max_ms", note="default and maximum: the server's")
    neighbours: int = narrowed(SearchSettings, "neighbours", le=10)
    expansions: int | None = narrowed(ExpansionSettings, "expansions", le=MAX_EXPANSIONS)


class SearchRequest(RankingRequest, ExcerptSettings):
    """A query with search settings, for a ranking."""


class ContextRequest(RankingRequest, ContextSettings):
    """A query with search settings, for a context. Near duplicates are left out, by default from a cosine of 0.95."""

    unknown: ClassVar[frozenset[str]] = frozenset({"explain", "group", "sort", "facets"})


class ExplainRequest(Body):
    """A query and a passage of the index."""

    query: NonEmpty
    passage_id: PassageId
    task: Task | None = narrowed(SearchSettings, "task")
    teacher: bool = Field(False, description="Also ask the teacher.")


class EncodeRequest(Body):
    """Texts to encode."""

    texts: list[NonEmpty] = Field(min_length=1, fail_fast=True)
    kind: TextKind
    encoding_format: VectorEncoding = Field("float", description=BASE64)


class RescoreRequest(Body):
    """A query and passages, each as text or as an encoded vector."""

    query: NonEmpty | None = None
    query_vector: Vector | None = None
    passages: list[NonEmpty] | None = Field(None, min_length=1, fail_fast=True)
    passage_ids: list[PassageId] | None = Field(None, min_length=1, fail_fast=True)
    passage_vectors: list[Vector] | None = Field(None, min_length=1, fail_fast=True)
    task: Task | None = narrowed(SearchSettings, "task")

    @model_validator(mode="after")
    def _one_of_each(self) -> Self:
        if (self.query is None) == (self.query_vector is None):
            raise ValueError("give either query or query_vector")
        sources = [part for part in (self.passages, self.passage_ids, self.passage_vectors) if part is not None]
        if len(sources) != 1:
            raise ValueError("give one of passages, passage_ids and passage_vectors")
        return self


Metadata = Annotated[
    dict[str, Any],
    Field(json_schema_extra={"additionalProperties": {"type": ["string", "number", "boolean", "null"]}}),
]
"""If a value does not fit, the index reports passage and field, or drops the value on request."""
SnapshotName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}$")]
_LENIENT = Field(False, description=LENIENT_HELP)

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
    chunk_tokens: int | None = narrowed(ChunkingSettings, "chunk_tokens")
    chunk_overlap: int | None = narrowed(ChunkingSettings, "chunk_overlap")


class SnapshotRequest(Body):
    """The name of a snapshot to take."""

    name: SnapshotName
