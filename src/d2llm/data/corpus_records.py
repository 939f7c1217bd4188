"""Records of a corpus as passages: ``_id`` (or ``id``), ``text`` and, if there are any, a title and metadata."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import tee
from pathlib import Path
from typing import Any, cast

from d2llm.core.errors import DataFormatError
from d2llm.core.plain_values import plain_value
from d2llm.core.types import MetadataValue, Passage
from d2llm.data.beir import iter_passages
from d2llm.data.lines import Fields, type_name, wrong_type

_KNOWN = ("_id", "id", "text", "title", "document_id", "position", "metadata")


def corpus_passages(
    file: Path, records: Iterable[tuple[int, Fields]], *, with_metadata: bool = True
) -> Iterator[tuple[int, Passage]]:
    """Numbered passages of numbered records; ``DataFormatError`` if one is malformed, or there are none."""
    records, again = tee(records)  # advanced together, so that only one record is held
    for (line, passage), (_, record) in zip(iter_passages(file, records), again, strict=True):
        yield line, _with_metadata(file, line, record, passage) if with_metadata else passage


def _with_metadata(file: Path, line: int, record: Fields, passage: Passage) -> Passage:
    if "_id" in record and str(record.get("id", passage.id)) != passage.id:
        problem = f"has '_id' {record['_id']!r} and 'id' {record['id']!r}; keep one of them"
        raise DataFormatError(file, problem, line=line)
    document_id, position = plain_value(record.get("document_id")), plain_value(record.get("position"))
    if isinstance(position, float) and position.is_integer():  # as pandas has those of a column with missing ones
        position = int(position)
    if isinstance(document_id, int) and not isinstance(document_id, bool):
        document_id = str(document_id)
    if not isinstance(document_id, str | None):
        raise wrong_type(file, line, "document_id", document_id)
    if not isinstance(position, int | None) or isinstance(position, bool):
        raise DataFormatError(file, f"field 'position' must be a whole number, found {position!r}", line=line)
    nested = plain_value(record.get("metadata"))
    if not isinstance(nested, dict | None):
        problem = f"field 'metadata' must be an object, found {type_name(nested)}; --no-metadata ignores all metadata"
        raise DataFormatError(file, problem, line=line)
    values: dict[str, Any] = {name: value for name, value in record.items() if name not in _KNOWN}
    for name, value in cast("dict[str, Any]", nested or {}).items():
        if name in values:
            raise DataFormatError(file, f"field '{name}' occurs twice, also in 'metadata'; keep one", line=line)
        values[name] = value
    metadata = cast("dict[str, MetadataValue]", values)
    return Passage(passage.id, passage.text, passage.title, document_id or "", position or 0, metadata)
