"""The bodies of the routes about what an index holds: passages, documents, files, snapshots."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, StringConstraints

from d2llm.server.schemas import Answer, Body, NonEmpty, PassageAnswer, PassageId

Metadata = Annotated[
    dict[str, Any],
    Field(json_schema_extra={"additionalProperties": {"type": ["string", "number", "boolean", "null"]}}),
]
"""Values that cannot be kept are told by the index, which names passage and field, or leaves them out if asked to."""
SnapshotName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}$")]
_LENIENT = Field(False, description="Leave out metadata values that do not fit, and count them.")

# Requests ---------------------------------------------------------------------------------------------------------


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


# Answers ----------------------------------------------------------------------------------------------------------


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


class ListedDocument(Answer):
    """A document, and how many passages it has."""

    id: str
    num_passages: int


class PassageListAnswer(Answer):
    """Ids of passages, in order; ``next_cursor`` asks for those behind them, null where there are none."""

    ids: list[str]
    next_cursor: str | None


class DocumentListAnswer(Answer):
    """Documents, in order; ``next_cursor`` asks for those behind them, null where there are none."""

    documents: list[ListedDocument]
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
