"""Keeping an index in step with folders of documents: read what is new or has changed, forget what is gone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from d2llm.core.types import DEFAULT_SECONDS_PER_FILE
from d2llm.data.documents import MAX_BYTES, SkippedFile, find_documents
from d2llm.retrieval.index import Index
from d2llm.retrieval.upserting_documents import DocumentsReport
from d2llm.store.side_files import Chunking


@dataclass(frozen=True, slots=True)
class SyncReport:
    """What ``sync_documents`` did.

    ``num_files`` were found, of which ``num_unchanged`` were not read; ``written`` says what became of the others.
    ``gone`` are documents that were deleted because their files are gone. Of a file in ``skipped``, which could not be
    read, the index keeps what it had. ``num_other`` files have suffixes that cannot be read.
    """

    num_files: int
    num_unchanged: int
    num_other: int
    gone: tuple[str, ...]
    skipped: tuple[SkippedFile, ...]
    written: DocumentsReport


def sync_documents(
    index: Index,
    paths: Iterable[str | Path],
    *,
    exclude: Sequence[str] = (),
    max_bytes: int = MAX_BYTES,
    seconds_per_file: float = DEFAULT_SECONDS_PER_FILE,
    chunking: Chunking | None = None,
) -> SyncReport:
    """Make an index hold the documents below some paths as they are now.

    A file whose size and time of modification are those of its document in the index is not read. Documents of other
    files, which were indexed earlier, are deleted; passages that came from no file stay. After an interruption, repeat
    the call. Arguments: ``data.documents.find_documents`` and ``Index.upsert_documents``.

    Raises:
        InputError: a path does not exist, there are no documents, or a document has the id of a passage that came from
            no file.
    """
    documents = find_documents(paths, exclude=exclude, max_bytes=max_bytes, seconds_per_file=seconds_per_file)
    known = _known_files(index)
    unchanged = [file for file in documents.files if known.get(file.id) == (file.modified, file.num_bytes)]
    changed = replace(documents, files=sorted(set(documents.files) - set(unchanged), key=lambda file: file.id))
    written = index.upsert_documents(changed, chunking, num_documents=len(changed.files))
    names = {file.id for file in documents.files}
    unread = tuple(skipped.id for skipped in documents.skipped)
    gone = tuple(
        sorted(
            name
            for name in known.keys() - names
            if not any(name == each or name.startswith(f"{each}/") for each in unread)
        )
    )
    if gone:
        index.delete_documents(gone)
    return SyncReport(len(documents.files), len(unchanged), documents.num_other, gone, tuple(changed.skipped), written)


def _known_files(index: Index) -> dict[str, tuple[datetime, int] | None]:
    """The documents of an index that came from files: id -> time of modification (UTC) and size.

    None stands for a document of which an interrupted call has written only a part.
    """
    table = index.storage.table()
    names = ["path", "modified", "file_bytes", "num_passages"]
    fields = {item.name for item in table.metadata_fields}
    if not len(table) or not set(names[:3]) <= fields:
        return {}
    columns = table.columns([name for name in names if name in fields], "path IS NOT NULL").to_pydict()
    counts = Counter(columns["path"])
    expected = columns.get("num_passages", [None] * len(columns["path"]))  # None if documents are not split
    facts: dict[str, set[tuple[datetime, int, int]]] = {}
    rows: Any = zip(columns["path"], columns["modified"], columns["file_bytes"], expected, strict=True)
    for path, modified, size, number in rows:
        facts.setdefault(path, set()).add((modified, size, number or 1))
    known: dict[str, tuple[datetime, int] | None] = {}
    for path, (first, *others) in facts.items():  # others: passages of an earlier state of the file
        modified, size, number = first
        is_whole = not others and counts[path] == number
        known[path] = (modified.replace(tzinfo=timezone.utc), size) if is_whole else None
    return known
