"""Reads a corpus for an index as a stream of passages with their documents and metadata: corpus.jsonl, or documents.

A line of ``corpus.jsonl[.gz]``: ``{"_id": ..., "text": ..., "title": ..., "document_id": ..., "position": ...,
"metadata": {...}}``; only ``_id`` (or ``id``) and ``text`` are required. Fields with other names are metadata too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from d2llm.core.errors import DataFormatError
from d2llm.core.fingerprint import fingerprint_files, fingerprint_json
from d2llm.core.types import Passage
from d2llm.data.documents import SkippedFile, find_documents
from d2llm.data.file_contents import SUFFIXES
from d2llm.data.lines import read_records, refuse_duplicate
from d2llm.data.ocr import PICTURES
from d2llm.data.python_records import corpus_passages
from d2llm.data.settings import ReadingSettings
from d2llm.data.table_files import is_corpus_record

_FILES = ("corpus.jsonl", "corpus.jsonl.gz")


@dataclass(frozen=True, slots=True)
class Corpus:
    """The texts of a corpus, read while ``passages`` is iterated, once.

    ``num_documents`` is None if they are not counted yet. ``fingerprint`` changes with the content. ``skipped`` are
    files that could not be read, and parts that were left out; it is complete after the iteration. The texts may be
    ``from_files`` of many kinds, so that values of metadata which do not fit each other are to be expected; ``links``
    to others were not followed.
    """

    passages: Iterable[Passage]
    num_documents: int | None
    fingerprint: str
    skipped: Sequence[SkippedFile] = ()
    from_files: bool = False
    links: Sequence[str] = ()


def open_corpus(
    paths: Sequence[Path], settings: ReadingSettings | None = None, *, with_metadata: bool = True
) -> Corpus:
    """Open a corpus file (or a folder that holds one), or files and folders of documents (``data.documents``).

    Args:
        paths: one corpus, or any number of documents and folders.
        settings: how to find and read documents.
        with_metadata: without: id, title and text only.

    Raises:
        InputError: a path does not exist, or there are no documents.
        DataFormatError: the corpus file is missing, empty or malformed.
        DuplicateIdError: two lines of it have the same id.
    """
    if is_corpus_file(paths):
        file = corpus_file(paths[0])
        passages = iter_corpus(file, with_metadata=with_metadata)
        return Corpus(passages, check_corpus(file, with_metadata=with_metadata), fingerprint_files([file]))
    documents = find_documents(paths, settings)
    state = [[file.id, file.num_bytes, str(file.modified)] for file in documents.files]
    passages = documents if with_metadata else (replace(document, metadata={}) for document in documents)
    return Corpus(
        passages,
        documents.num_documents,
        fingerprint_json(state),
        documents.skipped,
        from_files=True,
        links=documents.links,
    )


def is_corpus_file(paths: Sequence[Path]) -> bool:
    """Whether the paths are a single corpus file, or a folder that holds one, rather than documents.

    JSON lines are a corpus if the first has an id and a text, or if the file has the name of one.
    """
    if len(paths) != 1:
        return False
    path = paths[0]
    if path.is_dir():
        return any((path / name).is_file() for name in _FILES)
    if path.suffix.lower() != ".jsonl" or path.name in _FILES:
        return path.suffix.lower() not in SUFFIXES | PICTURES or path.name in _FILES
    try:
        return all(is_corpus_record(record) for _, record in islice(read_records(path), 1))
    except DataFormatError:
        return True  # whoever reads it says what is wrong with it


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
    return corpus_passages(file, read_records(file), with_metadata=with_metadata)
