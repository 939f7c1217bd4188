"""Blocks of passages for an index's table: records, checks and hashes."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
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
_to_json = json.JSONEncoder(sort_keys=True, default=datetime.isoformat).encode
_HASHED_APART = ("id", "title", "text", *INTERNAL_COLUMNS, "d2_seal")
WRONG_TYPES = (TypeError, ValueError, OverflowError, AttributeError)
"""What reading a damaged column raises, whose value has another type."""
_LEVEL = 6  # of compression: .61 of English texts of 500 characters, 12 µs


@dataclass(frozen=True, slots=True)
class Changes:
    """Changes made by a block of passages: ``texts`` must be encoded, ``others`` come with their row and what it keeps.

    What it keeps are the values of the ``KEPT`` columns, by name.
    """

    texts: list[Passage]
    num_new: int
    others: list[tuple[Passage, int, dict[str, Any]]]
    num_unchanged: int


def row_hash(passage_id: str, title: str, text: str, others: Mapping[str, Any], context: str = "") -> str:
    """The hash that shows whether a passage has changed, or a row is damaged.

    The first TEXT_HASH_LENGTH characters are a hash of id, title and text; up to ROW_HASH_LENGTH follows a hash of the
    other columns (except those without a value) and of the context; then the context itself (``Passage.context``),
    which cannot be derived from the other columns. If the first or the last part differs, the text must be encoded
    again.
    """
    fields = (passage_id.encode(), title.encode(), text.encode())
    content = b"".join([piece for part in fields for piece in (len(part).to_bytes(8, "little"), part)])
    rest = _to_json({name: value for name, value in others.items() if value is not None})
    return xxhash.xxh3_128_hexdigest(content) + xxhash.xxh3_64_hexdigest((rest + context).encode()) + context


def is_as_written(record: Mapping[str, Any]) -> bool:
    """Whether a row with all user columns and its d2_hash is undamaged."""
    others = {name: value for name, value in record.items() if name not in _HASHED_APART}
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
    for passage in passages:
        others_of = _others_of(passage, metadata)
        now = row_hash(passage.id, passage.title, passage.text, others_of, passage.context)
        record = stored.get(passage.id)
        if record is None or _hashes_of_encoded_fields(record["d2_hash"]) != _hashes_of_encoded_fields(now):
            texts.append(passage)
        elif record["d2_hash"] != now:
            others.append((passage, record["d2_row"], {name: record[name] for name in KEPT}))
        else:
            num_unchanged += 1
    return Changes(texts, sum(passage.id not in stored for passage in texts), others, num_unchanged)


def record_of(passage: Passage, metadata: MetadataSchema, row: int, kept: Mapping[str, Any]) -> dict[str, Any]:
    """A passage as a row of the table; ``kept`` are the values of its KEPT columns and of its vector, if stored."""
    others = _others_of(passage, metadata)
    return {
        "id": passage.id,
        "title": passage.title,
        "text": passage.text,
        **others,
        "d2_row": row,
        "d2_hash": row_hash(passage.id, passage.title, passage.text, others, passage.context),
        **kept,
    }


def _others_of(passage: Passage, metadata: MetadataSchema) -> dict[str, object]:
    """The columns of a passage besides id, title and text."""
    return {"document_id": passage.document_id, "position": passage.position, **metadata.values(passage)}


def _hashes_of_encoded_fields(stored_hash: str) -> tuple[str, str]:
    """The parts of a row's hash that determine its vector."""
    return stored_hash[:TEXT_HASH_LENGTH], stored_hash[ROW_HASH_LENGTH:]


def seal_of(record: Mapping[str, Any]) -> int:
    """A hash of the columns of a passage that d2_hash does not cover, as a signed number of 64 bits."""
    digest = xxhash.xxh3_64(f"{record['d2_row']} {record['d2_hash']} {bool(record['d2_truncated'])} ".encode())
    digest.update(record.get("d2_words", "").encode())
    digest.update(record.get("d2_vector") or b"")
    return int.from_bytes(digest.digest(), "big", signed=True)


def is_intact(record: Mapping[str, Any]) -> bool:
    """Whether a passage with all columns, and its seal, is what was written."""
    try:
        return record["d2_seal"] == seal_of(record) and is_as_written(record)
    except WRONG_TYPES:
        return False


def codes_of(records: Sequence[Mapping[str, Any]], code_size: int) -> NDArray[np.uint8]:
    """The codes [n, code_size] in the column of vectors."""
    joined = b"".join(record["d2_vector"] for record in records)
    return np.frombuffer(joined, np.uint8).reshape(len(records), code_size)


def rows_of(records: Sequence[Mapping[str, Any]]) -> NDArray[np.int64]:
    """The rows [n] in the vector file, without their generation."""
    return np.fromiter((record["d2_row"] & ROW_MASK for record in records), np.int64, len(records))


def pack_text(text: str) -> str | bytes:
    """A text as it takes fewer bytes: itself, or compressed."""
    plain = text.encode()
    packed = zlib.compress(plain, _LEVEL)
    return packed if len(packed) < len(plain) else text


def unpack_text(stored: str | bytes) -> str:
    """The text that ``pack_text`` packed."""
    return stored if isinstance(stored, str) else zlib.decompress(stored).decode()
