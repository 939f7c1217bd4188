"""Reads files as documents: text, Markdown, reStructuredText, HTML, PDF, office files, e-books, tables, source code and
pictures of text.

A document has a title and sections (``data.file_contents``). A section has the headings that it is under and, in a PDF,
its page. Each row of a table is a document.

A file without text, a damaged, encrypted or unreadable file, one that crashes its parser, takes too
long or is too large are skipped and listed with the reason; they never end the work.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import closing
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from itertools import compress
from pathlib import Path, PurePosixPath
from typing import Any

import gitignore_parser

from d2llm.core.errors import InputError
from d2llm.core.inputs import paths_of
from d2llm.core.names import counted, nearest
from d2llm.core.plain_values import UntypedText
from d2llm.core.settings import shows
from d2llm.core.types import MetadataValue, Passage, Section, SectionedPassage
from d2llm.data.contents import FileContents, SkippedPart, UnreadableFileError
from d2llm.data.file_contents import (
    CODE,
    SUFFIXES,
    TABLES,
    UNTYPED,
    is_parsed,
    read_contents,
    readable_suffixes,
)
from d2llm.data.ocr import OFF, PICTURES, languages_of
from d2llm.data.parser_workers import TextLimits, read_in_workers
from d2llm.data.settings import ReadingSettings

_log = logging.getLogger(__name__)
_LONG_BYTES = 1 << 20  # larger files are read by other processes, too, within the time that a file may take
_FACTS = ("path", "modified", "file_bytes", "heading", "page", "num_passages", "row", "num_rows", "ocr")
_TEXT_NAMES = ("text", "content", "contents", "body", "passage", "document", "page_content")
_ID_NAMES = ("id", "_id", "doc_id", "docid", "document_id", "passage_id", "pid", "key", "uuid")
"""What other libraries call the text and the id of a passage."""
EXCLUDED = (".*", "__pycache__/", "node_modules/", "site-packages/")
"""What is left out of folders besides what the user excludes, as in a ``.gitignore``."""


@dataclass(frozen=True, slots=True)
class DocumentFile:
    """A file below the paths: its path, the document's id, its size, and when it was last modified (UTC).

    Without a time (None), its documents do not say from which file they are: it was uploaded.
    """

    path: Path
    id: str
    num_bytes: int
    modified: datetime | None


@dataclass(frozen=True, slots=True)
class SkippedFile:
    """A file or folder that could not be read, or the ``part`` of a file that was left out, and why.

    ``id`` is the document's id, or what the ids of the documents in the folder begin with. ``part`` is "" for a whole
    file, else what the file calls the part: a chapter of a book, an attached file, the pages that are pictures.
    """

    path: str
    reason: str
    id: str
    part: str = ""

    def __str__(self) -> str:
        return f"{self.path}, {self.part}: {self.reason}" if self.part else f"{self.path}: {self.reason}"


def skipped_by_kind(skipped: Iterable[SkippedFile]) -> Iterator[tuple[str, list[SkippedFile]]]:
    """In words how many files could not be read, and how many parts of files were left out, with these."""
    files: list[SkippedFile] = []
    file_parts: list[SkippedFile] = []
    for file in skipped:
        (file_parts if file.part else files).append(file)
    for some, noun, problem in ((files, "file", "could not be read"), (file_parts, "part", "of files left out")):
        if some:
            yield f"{counted(len(some), noun)} {problem}", some


@dataclass(frozen=True, slots=True)
class FileDocuments:
    """The documents of a file: one, or one for each row of a table, which may be a corpus."""

    file: DocumentFile
    documents: Sequence[Passage]
    is_corpus: bool = False
    skipped: tuple[SkippedPart, ...] = ()


@dataclass
class DocumentFiles:
    """The documents below some files and folders, in the order of their ids.

    Iterating reads the files and yields their documents; all but short plain texts are read by other processes
    (``data.parser_workers``), each within the time and memory of the ``settings``, and ``text_limits``, the most text
    that they may have. ``ocr`` are the languages of text in pictures (``data.ocr.languages_of``), "" if it is not
    recognised. ``skipped`` lists what could not be read so far, files and parts of files; ``num_other`` counts files
    whose suffix is not among ``suffixes``, of which ``pictures`` has the ids of pictures, and ``links`` are symbolic
    links that were not followed.
    """

    files: list[DocumentFile]
    skipped: list[SkippedFile] = field(default_factory=list[SkippedFile])
    num_other: int = 0
    settings: ReadingSettings = field(default_factory=ReadingSettings)
    links: list[str] = field(default_factory=list[str])
    text_limits: TextLimits | None = None
    ocr: str = ""
    pictures: list[str] = field(default_factory=list[str])

    @property
    def suffixes(self) -> Set[str]:
        """The suffixes of files that can be read."""
        return readable_suffixes(self.ocr)

    @property
    def num_documents(self) -> int | None:
        """How many documents there are at most; None if some files are tables, whose rows are not counted yet."""
        return None if any(file.path.suffix.lower() in TABLES for file in self.files) else len(self.files)

    def __iter__(self) -> Iterator[Passage]:
        return (document for of_file in self.by_file() for document in of_file.documents)

    def by_file(self) -> Iterator[FileDocuments]:
        """The documents of each file that can be read."""
        elsewhere = [file.num_bytes > 0 and _is_read_elsewhere(file) for file in self.files]
        paths = [file.path for file in compress(self.files, elsewhere)]
        rows: dict[str, str] = {}  # ids of the rows of corpora, and their files
        with closing(read_in_workers(paths, self.settings, chars=self.text_limits, ocr=self.ocr)) as outcomes:
            for file, is_elsewhere in zip(self.files, elsewhere, strict=True):
                try:
                    read = _parsed(file, next(outcomes), self.ocr) if is_elsewhere else read_documents(file)
                    _refuse_known_rows(read, rows)
                except UnreadableFileError as error:
                    self.skipped.append(SkippedFile(str(file.path), str(error), file.id))
                else:
                    self.skipped += [
                        SkippedFile(str(file.path), part.reason, file.id, part.name) for part in read.skipped
                    ]
                    yield read


@shows(ReadingSettings)
def find_documents(
    paths: Iterable[str | Path] | str | Path, settings: ReadingSettings | None = None, **changes: Any
) -> DocumentFiles:
    """Find the files below some paths that can be read as documents.

    The id of a document is its path in the folder that was given, with "/"; if there are several folders, it starts
    with the folder's name. No folder is read twice. A row of a table has the file's id, "/" and its number, or if the
    table is a corpus (``data.table_files``), the id that it names.

    Args:
        paths: files, and folders to search with all their folders.
        settings: what to leave out besides ``EXCLUDED``, limits of each file, and the languages of text in pictures.
        changes: single fields of the settings, as in ``find_documents("docs", ocr="none")``.

    Raises:
        InputError: a path does not exist, a pattern is malformed, nothing below the paths can be read, or tesseract
            does not know the languages.

    Example:
        >>> from d2llm import find_documents
        >>> [file.id for file in find_documents("docs").files]
        ['bees.md', 'tea.md']
    """
    roots, settings = paths_of(paths, "paths"), ReadingSettings.of(settings, **changes)
    for root in roots:
        if not root.exists():
            raise InputError(f"{root}: there is no such file or folder")
    documents = DocumentFiles([], settings=settings, ocr=languages_of(settings.ocr))
    known_folders: set[tuple[int, int]] = set()
    several = sum(root.is_dir() for root in roots) > 1
    for root in roots:
        if not root.is_dir():
            _add(documents, root, root.name)
            continue
        prefix = f"{root.resolve().name}/" if several else ""
        for path, name in _walk(root, prefix, _matcher(root, settings.exclude), documents, known_folders):
            if path.suffix.lower() in documents.suffixes:
                _add(documents, path, name)
            else:
                documents.num_other += 1
                documents.pictures += [name] if path.suffix.lower() in PICTURES else []
    if not documents.files:
        skipped = documents.skipped
        reasons = f", {len(skipped):,} were skipped ({skipped[0].reason})" if skipped else ""
        raise InputError(
            f"{', '.join(map(str, roots))}: there are no documents; "
            f"{counted(documents.num_other, 'file has', 'files have')} other suffixes than "
            f"{' '.join(sorted(documents.suffixes))}{reasons}"
        )
    documents.files.sort(key=lambda file: file.id)
    return documents


def read_documents(file: DocumentFile) -> FileDocuments:
    """Read a file, in this process, as documents with its path, size and time of modification as metadata.

    A table has a document for each row, any other file is one (a ``SectionedPassage``).

    Raises:
        UnreadableFileError: it cannot be read, or has no text.
        MissingExtraError: its format needs a library that is not installed.
    """
    if not file.num_bytes:
        raise UnreadableFileError("it is empty")
    return _as_documents(file, read_contents(file.path))


def _is_read_elsewhere(file: DocumentFile) -> bool:
    return file.num_bytes > _LONG_BYTES or is_parsed(file.path.suffix.lower())


def _parsed(file: DocumentFile, outcome: FileContents | UnreadableFileError, ocr: str) -> FileDocuments:
    if isinstance(outcome, UnreadableFileError):
        raise outcome
    return _as_documents(file, outcome, ocr)


def _as_documents(file: DocumentFile, contents: FileContents, ocr: str = "") -> FileDocuments:
    facts: dict[str, MetadataValue] = {}
    if file.modified is not None:
        facts = {"path": file.id, "modified": file.modified, "file_bytes": file.num_bytes}
    if contents.has_pictures:
        facts["ocr"] = ocr or OFF
    # A field of the text with the name of one of ours keeps its value under another name.
    fields = {(f"own_{name}" if name.lower() in _FACTS else name): value for name, value in contents.metadata.items()}
    if contents.rows:
        if not contents.is_corpus and (advice := _misnamed_column(contents.columns)):
            _log.warning("%s: each row is a document of all its values, because %s", file.path, advice)
        return FileDocuments(file, tuple(_row_documents(file, contents, facts)), contents.is_corpus)
    sections = contents.sections
    common_heading = "" if file.path.suffix.lower() in CODE else _common_heading(sections)
    document = SectionedPassage(
        id=file.id,
        text="\n\n".join(section.text for section in sections),
        title=contents.title or common_heading or PurePosixPath(file.id).name,
        metadata={**fields, **facts},
        sections=sections,
    )
    return FileDocuments(file, (document,), skipped=contents.skipped)


def _misnamed_column(names: Sequence[str]) -> str | None:
    """Why a table is no corpus, if a column of its first row may be meant for the id or the text that it lacks."""
    meant: dict[str, str] = {}
    for wanted, others in (("id", _ID_NAMES), ("text", _TEXT_NAMES)):
        if not {wanted, f"_{wanted}"} & {*names}:
            similar = (name for name in names if name.lower() in others or (wanted == nearest(name.lower(), ["text"])))
            meant[wanted] = next(similar, "")
    if not meant or "" in meant.values():
        return None
    renamed = " and ".join(f"'{name}' to '{wanted}'" for wanted, name in meant.items())
    return f"there is no '{' and no '.join(meant)}'; if it is one of passages, rename {renamed}"


def _row_documents(file: DocumentFile, contents: FileContents, facts: Mapping[str, MetadataValue]) -> Iterator[Passage]:
    """The documents of a table's rows; those of no corpus say which row they are."""
    has_types = file.path.suffix.lower() not in UNTYPED
    for row_number, row in enumerate(contents.rows, start=1):
        values = row.metadata if has_types else {name: UntypedText(value) for name, value in row.metadata.items()}
        columns = {(f"own_{name}" if name.lower() in _FACTS else name): value for name, value in values.items()}
        row_facts = {"row": row_number, "num_rows": len(contents.rows)} if facts or not contents.is_corpus else {}
        metadata = {**columns, **facts, **row_facts}
        if contents.is_corpus and (row.document_id or row.position):
            yield replace(row, metadata=metadata)
            continue
        name = row.id if contents.is_corpus else f"{file.id}/{row.id}"
        title = row.title if contents.is_corpus else row.title or contents.title or PurePosixPath(file.id).name
        yield SectionedPassage(name, row.text, title, metadata=metadata, sections=(Section(row.text),))


def _refuse_known_rows(read: FileDocuments, known: dict[str, str]) -> None:
    """Refuse a corpus with an id that another one has; ids of all other documents begin with the names of their files.

    Raises:
        UnreadableFileError: there is one; none of the documents counts as known then.
    """
    ids = [document.id for document in read.documents] if read.is_corpus else []
    if earlier := next((name for name in ids if name in known), None):
        problem = f"its id {earlier!r} is one of {known[earlier]}, too; give its rows other ids, or leave the file out"
        raise UnreadableFileError(problem)
    known.update(dict.fromkeys(ids, read.file.id))


def _walk(
    root: Path,
    prefix: str,
    is_excluded: Callable[[str], bool],
    documents: DocumentFiles,
    known_folders: set[tuple[int, int]],
) -> Iterator[tuple[Path, str]]:
    """The files below a folder that are not excluded, each with its id."""
    follow_links = documents.settings.follow_links

    def is_wanted(folder: str, name: str) -> bool:
        path = Path(folder) / name
        if is_excluded(str(path)):
            return False
        if not follow_links and path.is_symlink():
            documents.links.append(str(path))
            return False
        return True

    def name_of(path: Path) -> str:
        return prefix + _plain_name(path.relative_to(root).as_posix())

    def refused(error: OSError) -> None:
        folder = Path(error.filename)
        name = prefix.rstrip("/") if folder == root else name_of(folder)
        documents.skipped.append(SkippedFile(str(folder), error.strerror or str(error), name))

    for folder, folders, names in os.walk(root, followlinks=follow_links, onerror=refused):
        status = Path(folder).stat()
        if (status.st_dev, status.st_ino) in known_folders:  # a link to a folder that was read
            folders.clear()
            continue
        known_folders.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if is_wanted(folder, name))
        for name in sorted(names):
            if is_wanted(folder, name):
                path = Path(folder) / name
                yield path, name_of(path)


def _matcher(root: Path, exclude: Sequence[str]) -> Callable[[str], bool]:
    for pattern in exclude:
        try:  # it is compiled when it is first matched
            gitignore_parser.parse_gitignore_str(pattern, base_dir=str(root.absolute()))(str(root.absolute() / "any"))
        except re.error as error:
            raise InputError(
                f"what to exclude: {pattern!r} is not a pattern of a .gitignore ({error}); write a letter between "
                "brackets as it is, or a range in ascending order, such as [a-z]"
            ) from error
    return gitignore_parser.parse_gitignore_str("\n".join([*EXCLUDED, *exclude]), base_dir=str(root.absolute()))


def _add(documents: DocumentFiles, path: Path, name: str) -> None:
    def skip(reason: str) -> None:
        documents.skipped.append(SkippedFile(str(path), reason, name))

    try:
        status = path.stat()
    except OSError as error:
        skip(error.strerror or str(error))
        return
    if not path.is_file():
        skip("it is not a regular file")
    elif path.suffix.lower() not in SUFFIXES | PICTURES:
        skip(f"files with the suffix '{path.suffix}' cannot be read")
    elif status.st_size > documents.settings.max_bytes:
        skip(f"it has {status.st_size:,} bytes, more than {documents.settings.max_bytes:,}")
    else:
        modified = datetime.fromtimestamp(status.st_mtime_ns // 1000 / 1e6, timezone.utc)
        documents.files.append(DocumentFile(path, name, status.st_size, modified))


def _plain_name(name: str) -> str:
    """A path as valid text: bytes of a name that are no UTF-8 are written as escapes."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _common_heading(sections: Sequence[Section]) -> str:
    """The outermost heading, if all sections that have headings are under the same one."""
    outermost = {section.headings[0] for section in sections if section.headings}
    return outermost.pop() if len(outermost) == 1 else ""
