"""Keeping an index in step with folders of documents: read what is new or has changed, forget what is gone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from itertools import chain
from pathlib import Path
from typing import Any

from d2llm.core.inputs import check_kind
from d2llm.core.settings import shows
from d2llm.core.types import Passage
from d2llm.data.documents import DocumentFile, SkippedFile, find_documents
from d2llm.data.ocr import OFF
from d2llm.data.settings import ReadingSettings
from d2llm.retrieval.index import Index
from d2llm.retrieval.upserting import DocumentsReport
from d2llm.store.index_manifest import Chunking


@dataclass(frozen=True, slots=True)
class SyncReport:
    """What ``sync_documents`` did.

    ``num_files`` were found, of which ``num_unchanged`` were not read; ``written`` says what became of the others,
    and how many passages were deleted in all.
    ``gone`` are files whose documents were deleted because they are gone. Of a file in ``skipped``, which could not be
    read, the index keeps what it had; entries with a ``part`` name what was left out of a file that was read.
    ``num_other`` files have suffixes that cannot be read, and the symbolic ``links`` were not followed.
    """

    num_files: int
    num_unchanged: int
    num_other: int
    gone: tuple[str, ...]
    skipped: tuple[SkippedFile, ...]
    written: DocumentsReport
    links: tuple[str, ...] = ()


@shows(ReadingSettings)
def sync_documents(
    index: Index,
    paths: Iterable[str | Path] | str | Path,
    settings: ReadingSettings | None = None,
    *,
    chunking: Chunking | None = None,
    **changes: Any,
) -> SyncReport:
    """Make an index hold the documents below some paths as they are now.

    A file whose size and time of modification are those of its document in the index is not read, unless text in its
    pictures is now recognised in other languages (``ocr``), or was not before. If tesseract is no longer there, what it
    has recognised stays; with ``ocr="none"`` it goes. Documents of other files, indexed earlier, are deleted; passages
    of no file stay. Repeat an interrupted call. Arguments: ``find_documents``, ``Index.upsert_documents``.

    Raises:
        InputError: a path does not exist, there are no documents, or a document has the id of a passage that came from
            no file.

    Example:
        >>> from d2llm import Index, sync_documents
        >>> with Index.create("docs.index", "d2llm-minilm") as index:
        ...     print(sync_documents(index, "docs").num_files)
        ...     print(index.search("what do bees make?")[0].passage.id)
        2
        bees.md
    """
    known = _known_files(index)
    documents = find_documents(paths, settings, **changes)
    keeps_recognised = documents.settings.ocr is None and not documents.ocr

    def is_unchanged(file: DocumentFile) -> bool:
        before = known.get(file.id, _Known())
        is_current = before.ocr in (None, documents.ocr or OFF) or keeps_recognised
        return is_current and before.state == (file.modified, file.num_bytes)

    unchanged = list(filter(is_unchanged, documents.files))
    changed = replace(documents, files=sorted(set(documents.files) - set(unchanged), key=lambda file: file.id))
    read_ids: set[str] = set()
    before: list[dict[str, str]] = []  # what the index had of the files that were read or are gone

    def read() -> Iterator[Passage]:
        for contents in changed.by_file():
            before.append(known.get(contents.file.id, _Known()).passages)
            read_ids.update(name for document in contents.documents for name in (document.id, document.document_id))
            yield from contents.documents

    written = index.upsert_documents(read(), chunking, lenient_metadata=True, num_documents=changed.num_documents)
    names = {*(file.id for file in documents.files), *(documents.pictures if keeps_recognised else ())}
    unread = tuple(skipped.id for skipped in documents.skipped)
    gone = sorted(
        name for name in known.keys() - names if not any(name == path or name.startswith(f"{path}/") for path in unread)
    )
    before += [known[name].passages for name in gone]
    # A row may have moved to another file.
    left_over = [passage for passages in before for passage, name in passages.items() if name not in read_ids]
    if left_over:
        written = replace(written, num_deleted=written.num_deleted + index.delete(left_over))
    return SyncReport(
        len(documents.files),
        len(unchanged),
        documents.num_other,
        tuple(gone),
        tuple(changed.skipped),
        written,
        tuple(documents.links),
    )


@dataclass(slots=True)
class _Known:
    """What an index has of a file: its passages with their documents, and its state (time of modification, size).

    Without a state, an interrupted call has written only a part. ``ocr``: the languages in which text in its pictures
    was recognised, or ``none``; None if it has no such pictures.
    """

    passages: dict[str, str] = field(default_factory=dict[str, str])
    state: tuple[datetime, int] | None = None
    ocr: str | None = None


_FILE = ("path", "modified", "file_bytes")
_OTHERS = ("num_passages", "row", "num_rows", "ocr")


def _known_files(index: Index) -> dict[str, _Known]:
    """The files whose documents an index has, by their ids."""
    check_kind(index, "index", Index)
    tables = index.storage.tables()
    fields = set(tables[0].metadata.fields)
    if not any(map(len, tables)) or not set(_FILE) <= fields:
        return {}
    names = ["id", "document_id", *_FILE, *(name for name in _OTHERS if name in fields)]
    known: dict[str, _Known] = {}
    states: dict[str, set[tuple[datetime, int, int, str | None]]] = {}
    counts: dict[str, Counter[tuple[int, int]]] = {}  # passages of each row, with how many it should have
    for record in chain.from_iterable(chain.from_iterable(table.batches(names) for table in tables)):
        path: str | None = record["path"]
        if path is None:
            continue
        passage: str = record["id"]
        num_passages, row, num_rows, ocr = map(record.get, _OTHERS)
        known.setdefault(path, _Known()).passages[passage] = record["document_id"] or passage
        states.setdefault(path, set()).add((record["modified"], record["file_bytes"], num_rows or 1, ocr))
        counts.setdefault(path, Counter())[row or 0, num_passages or 1] += 1
    for path, (first, *others) in states.items():  # others: passages of an earlier state of the file
        modified, size, num_rows, known[path].ocr = first
        is_whole = len(counts[path]) == num_rows and all(
            count == num_passages for (_, num_passages), count in counts[path].items()
        )
        if is_whole and not others:
            known[path].state = (modified.replace(tzinfo=timezone.utc), size)
    return known
