"""Reads a corpus for an index as a stream of passages with their documents and metadata: corpus.jsonl, or documents.

A line of ``corpus.jsonl[.gz]``: ``{"_id": ..., "text": ..., "title": ..., "document_id": ..., "position": ...,
"metadata": {...}}``; only ``_id`` (or ``id``) and ``text`` are required. Fields with other names are metadata too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import tee
from pathlib import Path
from typing import Any, cast

from d2llm.core.errors import DataFormatError
from d2llm.core.fingerprint import fingerprint_files, fingerprint_json
from d2llm.core.types import DEFAULT_SECONDS_PER_FILE, MetadataValue, Passage
from d2llm.data.beir import iter_passages
from d2llm.data.documents import SkippedFile, find_documents
from d2llm.data.file_contents import SUFFIXES
from d2llm.data.lines import Fields, read_records, refuse_duplicate, type_name, wrong_type

_FILES = ("corpus.jsonl", "corpus.jsonl.gz")
_KNOWN = ("_id", "id", "text", "title", "document_id", "position", "metadata")


@dataclass(frozen=True, slots=True)
class Corpus:
    """The texts of a corpus, read while ``passages`` is iterated, once.

    ``fingerprint`` changes with the content. ``skipped`` are files that could not be read; it is complete after the
    iteration.
    """

    passages: Iterable[Passage]
    num_documents: int
    fingerprint: str
    skipped: Sequence[SkippedFile] = ()


def open_corpus(
    paths: Sequence[Path],
    *,
    with_metadata: bool = True,
    exclude: Sequence[str] = (),
    seconds_per_file: float = DEFAULT_SECONDS_PER_FILE,
) -> Corpus:
    """Open a corpus file (or a folder that holds one), or files and folders of documents (``data.documents``).

    Args:
        paths: one corpus, or any number of documents and folders.
        with_metadata: without: id, title and text only.
        exclude: what to leave out of folders of documents, as in a ``.gitignore``.
        seconds_per_file: documents that take longer to read are skipped.

    Raises:
        InputError: a path does not exist, or there are no documents.
        DataFormatError: the corpus file is missing, empty or malformed.
        DuplicateIdError: two lines of it have the same id.
    """
    if is_corpus_file(paths):
        file = corpus_file(paths[0])
        passages = iter_corpus(file, with_metadata=with_metadata)
        return Corpus(passages, check_corpus(file, with_metadata=with_metadata), fingerprint_files([file]))
    documents = find_documents(paths, exclude=exclude, seconds_per_file=seconds_per_file)
    state = [[file.id, file.num_bytes, file.modified.isoformat()] for file in documents.files]
    passages = documents if with_metadata else (replace(document, metadata={}) for document in documents)
    return Corpus(passages, len(documents.files), fingerprint_json(state), documents.skipped)


def is_corpus_file(paths: Sequence[Path]) -> bool:
    """Whether the paths are a single corpus file, or a folder that holds one, rather than documents."""
    if len(paths) != 1:
        return False
    path = paths[0]
    if path.is_dir():
        return any((path / name).is_file() for name in _FILES)
    return path.suffix.lower() not in SUFFIXES - {".jsonl"}


def corpus_file(path: Path) -> Path:
    """The path itself, or the corpus file in that folder; ``DataFormatError`` if it has none."""
    if not path.is_dir():
        return path
    for name in _FILES:
        if (path / name).is_file():
            return path / name
    raise DataFormatError(path, f"has no {' or '.join(_FILES)}; give the file or a folder that holds one")


def iter_corpus(path: Path, *, with_metadata: bool = True) -> Iterator[Passage]:
    """The passages of a corpus file (or of a folder that holds one), in order; without metadata: id, title and text.

    Raises:
        DataFormatError: the file is missing or empty, or a line is malformed (the message names the line).
    """
    return (passage for _, passage in _numbered(corpus_file(path), with_metadata=with_metadata))


def check_corpus(path: Path, *, with_metadata: bool = True) -> int:
    """Read a corpus once, to detect errors before hours of encoding; returns the number of passages.

    Errors as for ``iter_corpus``, and ``DuplicateIdError`` if two lines have the same id.
    """
    file, first_lines = corpus_file(path), dict[str, int]()
    for line, passage in _numbered(file, with_metadata=with_metadata):
        refuse_duplicate(file, line, passage.id, first_lines)
    return len(first_lines)


def _numbered(file: Path, *, with_metadata: bool) -> Iterator[tuple[int, Passage]]:
    records, again = tee(read_records(file))  # advanced together, so that only one record is held
    for (line, passage), (_, record) in zip(iter_passages(file, records), again, strict=True):
        yield line, _with_metadata(file, line, record, passage) if with_metadata else passage


def _with_metadata(file: Path, line: int, record: Fields, passage: Passage) -> Passage:
    if "_id" in record and str(record.get("id", passage.id)) != passage.id:
        problem = f"has '_id' {record['_id']!r} and 'id' {record['id']!r}; keep one of them"
        raise DataFormatError(file, problem, line=line)
    document_id, position = record.get("document_id"), record.get("position")
    if isinstance(document_id, int) and not isinstance(document_id, bool):
        document_id = str(document_id)
    if not isinstance(document_id, str | None):
        raise wrong_type(file, line, "document_id", document_id)
    if not isinstance(position, int | None) or isinstance(position, bool):
        raise DataFormatError(file, f"field 'position' must be a whole number, found {position!r}", line=line)
    nested = record.get("metadata")
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
