"""Passages as blocks of an index's table: columns, checks, hashes."""

# pyright: reportUnknownParameterType=false
# (pyarrow ships no types)

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from d2llm.core.errors import DuplicateIdError, InputError
from d2llm.core.types import Passage
from d2llm.index.schema import MetadataSchema

TEXT_COLUMNS = ("id", "title", "text", "document_id", "position")
GENERATION_SHIFT = 40
"""d2_row = generation << 40 | row."""
ROW_MASK = (1 << GENERATION_SHIFT) - 1
INTERNAL_COLUMNS = ("d2_row", "d2_hash", "d2_truncated", "d2_vector")


@dataclass(frozen=True, slots=True)
class Changes:
    """What a block of passages would change: ``texts`` are to be encoded, ``others`` have their row and its flag."""

    texts: list[Passage]
    num_new: int
    others: list[tuple[Passage, int, bool]]
    num_unchanged: int


def table_schema(metadata: Iterable[pa.Field], code_size: int) -> pa.Schema:
    """The Arrow schema of a table with these metadata columns and vector codes of ``code_size`` bytes."""
    return pa.schema(
        [
            *(pa.field(name, pa.string(), nullable=False) for name in ("id", "title", "text", "document_id")),
            pa.field("position", pa.int32(), nullable=False),
            *metadata,
            pa.field("d2_row", pa.int64(), nullable=False),
            pa.field("d2_hash", pa.string(), nullable=False),
            pa.field("d2_truncated", pa.bool_(), nullable=False),
            pa.field("d2_vector", pa.list_(pa.uint8(), code_size), nullable=False),
        ]
    )


def text_hash(passage: Passage) -> str:
    """What tells whether a text must be encoded again: a hash of title and text (xxh3, 128 bits)."""
    digest = xxhash.xxh3_128(len(passage.title).to_bytes(8, "little"))
    digest.update(passage.title.encode())
    digest.update(passage.text.encode())
    return digest.hexdigest()


def check_passages(passages: Sequence[Passage], metadata: MetadataSchema, folder: Path) -> None:
    """Make sure that a block of passages can be stored.

    Raises:
        DuplicateIdError: two share an id.
        InputError: an id is empty, a text is no valid Unicode, a position too large, or the metadata do not fit.
    """
    seen: set[str] = set()
    for passage in passages:
        if not passage.id:
            raise InputError(
                f"{folder}: a passage has an empty id (its text begins {passage.text[:60]!r}); give it one"
            )
        for name in ("id", "title", "text", "document_id"):
            if not is_text(getattr(passage, name)):
                raise InputError(f"passage {passage.id!r}: its {name} is not valid Unicode text; mend or remove it")
        position: object = passage.position
        if type(position) is not int or not -(2**31) <= position < 2**31:
            raise InputError(f"passage {passage.id!r}: its position is {position!r}; give a whole number of 32 bits")
        if passage.id in seen:
            raise DuplicateIdError(folder, f"two of the passages given share the id {passage.id!r}; keep one of them")
        seen.add(passage.id)
        metadata.check(passage)


def is_text(value: object) -> bool:
    """Whether a value is a string that can be written as UTF-8 (a lone surrogate cannot)."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def codes_of(rows: pa.RecordBatch | pa.Table) -> NDArray[np.uint8]:
    """The codes [n, code_size] in the vector column."""
    column = rows.column("d2_vector")
    whole = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    return np.asarray(whole.flatten()).reshape(len(whole), whole.type.list_size)


def compare(passages: Sequence[Passage], stored: Mapping[str, Mapping[str, Any]], metadata: MetadataSchema) -> Changes:
    """What passages would change; ``stored`` has the columns of those that are there, by id."""
    texts: list[Passage] = []
    others: list[tuple[Passage, int, bool]] = []
    num_unchanged = 0
    others_now = pa.table(other_columns(passages, metadata)).to_pylist()
    for passage, fields in zip(passages, others_now, strict=True):
        found = stored.get(passage.id)
        if found is None or found["d2_hash"] != text_hash(passage):
            texts.append(passage)
        elif any(found[name] != value for name, value in fields.items()):
            others.append((passage, found["d2_row"], found["d2_truncated"]))
        else:
            num_unchanged += 1
    return Changes(texts, sum(passage.id not in stored for passage in texts), others, num_unchanged)


def other_columns(passages: Sequence[Passage], metadata: MetadataSchema) -> dict[str, pa.Array]:
    """What is stored of passages besides id, title and text."""
    return {
        "document_id": pa.array([passage.document_id for passage in passages], pa.string()),
        "position": pa.array([passage.position for passage in passages], pa.int32()),
        **metadata.columns(passages),
    }


def table_block(
    passages: Sequence[Passage],
    schema: pa.Schema,
    metadata: MetadataSchema,
    rows: NDArray[np.int64],
    truncated: Sequence[bool],
    codes: NDArray[np.uint8],
) -> pa.Table:
    """Passages as rows of a table: with their row numbers, flags and codes [n, code_size]."""
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(codes.reshape(-1), pa.uint8()), codes.shape[1])
    columns = {
        "id": pa.array([passage.id for passage in passages], pa.string()),
        "title": pa.array([passage.title for passage in passages], pa.string()),
        "text": pa.array([passage.text for passage in passages], pa.string()),
        **other_columns(passages, metadata),
        "d2_row": pa.array(rows, pa.int64()),
        "d2_hash": pa.array([text_hash(passage) for passage in passages], pa.string()),
        "d2_truncated": pa.array(truncated, pa.bool_()),
        "d2_vector": vectors,
    }
    return pa.table([columns[name] for name in schema.names], schema=schema)
