"""Blocks of passages for an index's table: columns, checks and hashes."""

# pyright: reportUnknownParameterType=false
# (pyarrow ships no types)

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from d2llm.core.errors import DuplicateIdError, InputError
from d2llm.core.types import MAX_ID_CHARS, Passage, is_text
from d2llm.store.schema import MetadataSchema

GENERATION_SHIFT = 40
"""d2_row = generation << 40 | row."""
ROW_MASK = (1 << GENERATION_SHIFT) - 1
TEXT_HASH_LENGTH = 32
"""Length of the hash of id, title and text (xxh3, 128 bits)."""
ROW_HASH_LENGTH = 48
"""Length including the hash of the other columns (64 bits). The rest of d2_hash is the passage's context."""
COMPARED = ("id", "d2_row", "d2_hash")
"""The columns that ``compare`` uses."""
KEPT = ("d2_truncated", "d2_words")
"""The columns, besides that of the vector, that depend on a passage's text alone, as far as a table has them."""
INTERNAL_COLUMNS = ("d2_row", "d2_hash", *KEPT, "d2_vector")


@dataclass(frozen=True, slots=True)
class Changes:
    """Changes made by a block of passages: ``texts`` must be encoded, ``others`` come with their row and what it keeps.

    What it keeps are the values of the ``KEPT`` columns, by name.
    """

    texts: list[Passage]
    num_new: int
    others: list[tuple[Passage, int, dict[str, Any]]]
    num_unchanged: int


def table_schema(metadata: Iterable[pa.Field], code_size: int | None, *, with_words: bool = False) -> pa.Schema:
    """The Arrow schema of a table with these metadata columns and vector codes of ``code_size`` bytes.

    ``code_size=None``: the table has no vectors. ``with_words``: it has the added words of its passages.
    """
    return pa.schema(
        [
            *(pa.field(name, pa.string(), nullable=False) for name in ("id", "title", "text", "document_id")),
            pa.field("position", pa.int32(), nullable=False),
            *metadata,
            pa.field("d2_row", pa.int64(), nullable=False),
            pa.field("d2_hash", pa.string(), nullable=False),
            pa.field("d2_truncated", pa.bool_(), nullable=False),
            *([pa.field("d2_words", pa.string(), nullable=False)] if with_words else []),
            *([] if code_size is None else [pa.field("d2_vector", pa.list_(pa.uint8(), code_size), nullable=False)]),
        ]
    )


def row_hash(passage_id: str, title: str, text: str, others: Mapping[str, Any], context: str = "") -> str:
    """The hash that shows whether a passage has changed, or a row is damaged.

    The first TEXT_HASH_LENGTH characters are a hash of id, title and text; up to ROW_HASH_LENGTH follows a hash of the
    other columns (except those without a value) and of the context; then the context itself (``Passage.context``),
    which cannot be derived from the other columns. If the first or the last part differs, the text must be encoded
    again.
    """
    digest = xxhash.xxh3_128()
    for part in (passage_id.encode(), title.encode(), text.encode()):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    present = {name: value for name, value in others.items() if value is not None}
    rest = json.dumps(present, sort_keys=True, default=datetime.isoformat)
    return digest.hexdigest() + xxhash.xxh3_64_hexdigest((rest + context).encode()) + context


def is_as_written(record: Mapping[str, Any]) -> bool:
    """Whether a row with all user columns and its d2_hash is undamaged."""
    others = {name: value for name, value in record.items() if name not in ("id", "title", "text", "d2_hash")}
    stored: str = record["d2_hash"]
    return row_hash(record["id"], record["title"], record["text"], others, stored[ROW_HASH_LENGTH:]) == stored


def check_passages(passages: Sequence[Passage], metadata: MetadataSchema, folder: Path) -> None:
    """Check that a block of passages can be stored.

    Raises:
        DuplicateIdError: two passages share an id.
        InputError: an id is empty or too long, a text is not valid Unicode, a position is too large, or metadata do
            not fit.
    """
    seen: set[str] = set()
    for passage in passages:
        if not passage.id:
            raise InputError(
                f"{folder}: a passage has an empty id (its text begins {passage.text[:60]!r}); give it one"
            )
        for name in ("id", "document_id"):
            if len(getattr(passage, name)) > MAX_ID_CHARS:
                start = f"{getattr(passage, name)[:60]!r}..."
                raise InputError(
                    f"passage {start}: its {name} has {len(getattr(passage, name)):,} characters; {MAX_ID_CHARS:,} are "
                    "allowed, give it a shorter one"
                )
        for name in ("id", "title", "text", "document_id"):
            if not is_text(getattr(passage, name)):
                raise InputError(f"passage {passage.id!r}: its {name} is not valid Unicode text; correct or remove it")
        position: object = passage.position
        if type(position) is not int or not -(2**31) <= position < 2**31:
            raise InputError(f"passage {passage.id!r}: its position is {position!r}; give a whole number of 32 bits")
        if passage.id in seen:
            raise DuplicateIdError(folder, f"two of the passages given share the id {passage.id!r}; keep one of them")
        seen.add(passage.id)
        metadata.check(passage)


def codes_of(rows: pa.RecordBatch | pa.Table) -> NDArray[np.uint8]:
    """The codes [n, code_size] in the vector column."""
    column = rows.column("d2_vector")
    whole = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    return np.asarray(whole.flatten()).reshape(len(whole), whole.type.list_size)


def write_words(words: Mapping[str, float]) -> str:
    """Added words with their counts, as the table stores them."""
    return json.dumps(words, ensure_ascii=False, separators=(",", ":")) if words else ""


def read_words(stored: str) -> dict[str, float]:
    """What ``write_words`` wrote."""
    return json.loads(stored) if stored else {}


def compare(passages: Sequence[Passage], stored: Mapping[str, Mapping[str, Any]], metadata: MetadataSchema) -> Changes:
    """The changes made by passages; ``stored`` has the COMPARED and KEPT columns of the existing ones, by id."""
    texts: list[Passage] = []
    others: list[tuple[Passage, int, dict[str, Any]]] = []
    num_unchanged = 0
    hashes = _hashes(passages, other_columns(passages, metadata))
    for passage, now in zip(passages, hashes, strict=True):
        record = stored.get(passage.id)
        if record is None or _encoded_parts(record["d2_hash"]) != _encoded_parts(now):
            texts.append(passage)
        elif record["d2_hash"] != now:
            others.append((passage, record["d2_row"], {name: record[name] for name in KEPT if name in record}))
        else:
            num_unchanged += 1
    return Changes(texts, sum(passage.id not in stored for passage in texts), others, num_unchanged)


def other_columns(passages: Sequence[Passage], metadata: MetadataSchema) -> dict[str, pa.Array]:
    """The stored columns of passages besides id, title and text."""
    return {
        "document_id": pa.array([passage.document_id for passage in passages], pa.string()),
        "position": pa.array([passage.position for passage in passages], pa.int32()),
        **metadata.columns(passages),
    }


def _encoded_parts(stored_hash: str) -> tuple[str, str]:
    """The parts of a row's hash that determine its vector."""
    return stored_hash[:TEXT_HASH_LENGTH], stored_hash[ROW_HASH_LENGTH:]


def _hashes(passages: Sequence[Passage], others: Mapping[str, pa.Array]) -> list[str]:
    records = pa.table(dict(others)).to_pylist()
    return [row_hash(p.id, p.title, p.text, record, p.context) for p, record in zip(passages, records, strict=True)]


def table_block(
    passages: Sequence[Passage],
    schema: pa.Schema,
    metadata: MetadataSchema,
    rows: NDArray[np.int64],
    kept: Sequence[Mapping[str, Any]],
    codes: NDArray[np.uint8] | None,
) -> pa.Table:
    """Passages as rows of a table, with row numbers and codes [n, code_size] (None: a table without vectors).

    ``kept`` are the values of their KEPT columns, by name, those that ``schema`` has.
    """
    others = other_columns(passages, metadata)
    columns = {
        "id": pa.array([passage.id for passage in passages], pa.string()),
        "title": pa.array([passage.title for passage in passages], pa.string()),
        "text": pa.array([passage.text for passage in passages], pa.string()),
        **others,
        "d2_row": pa.array(rows, pa.int64()),
        "d2_hash": pa.array(_hashes(passages, others), pa.string()),
        **{
            name: pa.array([own[name] for own in kept], schema.field(name).type)
            for name in KEPT
            if name in schema.names
        },
    }
    if codes is not None:
        flat = pa.array(codes.reshape(-1), pa.uint8())
        columns["d2_vector"] = pa.FixedSizeListArray.from_arrays(flat, codes.shape[1])
    return pa.table([columns[name] for name in schema.names], schema=schema)
