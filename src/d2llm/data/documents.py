"""Reads files as documents: text, Markdown, reStructuredText, HTML, PDF, office files, e-books, tables and source code.

A document has a title and sections (``data.file_contents``). A section has the headings that it is under and, in a PDF,
its page.

A file without text (scanned pages), a damaged, encrypted or unreadable file, one that crashes its parser, takes too
long or is too large are skipped and listed with the reason; they never end the work.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from datetime import datetime, timezone
from itertools import compress
from pathlib import Path

import gitignore_parser

from d2llm.core.errors import InputError
from d2llm.core.types import DEFAULT_SECONDS_PER_FILE, MetadataValue, Section, SectionedPassage
from d2llm.data.file_contents import CODE, SUFFIXES, FileContents, UnreadableFileError, has_native_parser, read_contents
from d2llm.data.parser_workers import read_in_workers

MAX_BYTES = 100 << 20
"""Larger files are skipped, unless another limit is given."""
EXCLUDED = (".*", "__pycache__/", "node_modules/", "site-packages/")
"""What is left out of folders besides what the user excludes, as in a ``.gitignore``."""


@dataclass(frozen=True, slots=True)
class DocumentFile:
    """A file below the paths: its path, the document's id, its size, and when it was last modified (UTC)."""

    path: Path
    id: str
    num_bytes: int
    modified: datetime


@dataclass(frozen=True, slots=True)
class SkippedFile:
    """A file or folder that could not be read, and why.

    ``id`` is the document's id, or what the ids of the documents in the folder begin with.
    """

    path: str
    reason: str
    id: str

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


@dataclass
class DocumentFiles:
    """The documents below some files and folders, in the order of their ids.

    Iterating reads the files and yields their documents; those that compiled code parses are read by other processes
    (``data.parser_workers``), each within ``seconds_per_file``. ``skipped`` lists what could not be read so far,
    ``num_other`` counts files whose suffix is not among ``SUFFIXES``.
    """

    files: list[DocumentFile]
    skipped: list[SkippedFile] = field(default_factory=list[SkippedFile])
    num_other: int = 0
    seconds_per_file: float = DEFAULT_SECONDS_PER_FILE

    def __iter__(self) -> Iterator[SectionedPassage]:
        native = [file.num_bytes > 0 and has_native_parser(file.path.suffix.lower()) for file in self.files]
        paths = [file.path for file in compress(self.files, native)]
        with closing(read_in_workers(paths, seconds=self.seconds_per_file)) as outcomes:
            for file, is_native in zip(self.files, native, strict=True):
                try:
                    document = _parsed(file, next(outcomes)) if is_native else read_document(file)
                except UnreadableFileError as error:
                    self.skipped.append(SkippedFile(str(file.path), str(error), file.id))
                else:
                    yield document


def find_documents(
    paths: Iterable[str | Path],
    *,
    exclude: Sequence[str] = (),
    max_bytes: int = MAX_BYTES,
    seconds_per_file: float = DEFAULT_SECONDS_PER_FILE,
) -> DocumentFiles:
    """Find the files below some paths that can be read as documents.

    The id of a document is its path in the folder that was given, with "/"; if there are several folders, it starts
    with the folder's name. Symbolic links are followed, but no folder is read twice.

    Args:
        paths: files, and folders to search with all their folders.
        exclude: what to leave out of folders, as lines of a ``.gitignore``; ``EXCLUDED`` always is.
        max_bytes: larger files are skipped.
        seconds_per_file: files that take longer to read are skipped.

    Raises:
        InputError: a path does not exist, a pattern is malformed, or nothing below the paths can be read.
    """
    roots = [Path(path) for path in paths]
    for root in roots:
        if not root.exists():
            raise InputError(f"{root}: there is no such file or folder")
    documents = DocumentFiles([], seconds_per_file=seconds_per_file)
    known_folders: set[tuple[int, int]] = set()
    several = sum(root.is_dir() for root in roots) > 1
    for root in roots:
        if not root.is_dir():
            _add(documents, root, root.name, max_bytes)
            continue
        prefix = f"{root.resolve().name}/" if several else ""
        for path, name in _walk(root, prefix, _matcher(root, exclude), documents, known_folders):
            if path.suffix.lower() in SUFFIXES:
                _add(documents, path, name, max_bytes)
            else:
                documents.num_other += 1
    if not documents.files:
        skipped = documents.skipped
        reasons = f", {len(skipped):,} were skipped ({skipped[0].reason})" if skipped else ""
        raise InputError(
            f"{', '.join(map(str, roots))}: there are no documents; {documents.num_other:,} files have other suffixes "
            f"than {' '.join(sorted(SUFFIXES))}{reasons}"
        )
    documents.files.sort(key=lambda file: file.id)
    return documents


def read_document(file: DocumentFile) -> SectionedPassage:
    """Read a file, in this process, as a document with its path, size and time of modification as metadata.

    Raises:
        UnreadableFileError: it cannot be read, or has no text.
        MissingExtraError: its format needs a library that is not installed.
    """
    if not file.num_bytes:
        raise UnreadableFileError("it is empty")
    return _as_document(file, read_contents(file.path))


def _parsed(file: DocumentFile, outcome: FileContents | UnreadableFileError) -> SectionedPassage:
    if isinstance(outcome, UnreadableFileError):
        raise outcome
    return _as_document(file, outcome)


def _as_document(file: DocumentFile, contents: FileContents) -> SectionedPassage:
    sections = contents.sections
    common_heading = "" if file.path.suffix.lower() in CODE else _common_heading(sections)
    metadata: dict[str, MetadataValue] = {
        "path": file.id,
        "modified": file.modified,
        "file_bytes": file.num_bytes,
    }
    return SectionedPassage(
        id=file.id,
        text="\n\n".join(section.text for section in sections),
        title=contents.title or common_heading or file.path.name,
        metadata=metadata,
        sections=sections,
    )


def _walk(
    root: Path,
    prefix: str,
    is_excluded: Callable[[str], bool],
    documents: DocumentFiles,
    known_folders: set[tuple[int, int]],
) -> Iterator[tuple[Path, str]]:
    """The files below a folder that are not excluded, each with its id."""

    def name_of(path: Path) -> str:
        return prefix + _plain_name(path.relative_to(root).as_posix())

    def refused(error: OSError) -> None:
        folder = Path(error.filename)
        name = prefix.rstrip("/") if folder == root else name_of(folder)
        documents.skipped.append(SkippedFile(str(folder), error.strerror or str(error), name))

    for folder, folders, names in os.walk(root, followlinks=True, onerror=refused):
        status = Path(folder).stat()
        if (status.st_dev, status.st_ino) in known_folders:  # a link to a folder that was read
            folders.clear()
            continue
        known_folders.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not is_excluded(os.path.join(folder, name)))  # noqa: PTH118
        for name in sorted(names):
            if not is_excluded(os.path.join(folder, name)):  # noqa: PTH118
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


def _add(documents: DocumentFiles, path: Path, name: str, max_bytes: int) -> None:
    def skip(reason: str) -> None:
        documents.skipped.append(SkippedFile(str(path), reason, name))

    try:
        status = path.stat()
    except OSError as error:
        skip(error.strerror or str(error))
        return
    if not path.is_file():
        skip("it is not a regular file")
    elif path.suffix.lower() not in SUFFIXES:
        skip(f"files with the suffix '{path.suffix}' cannot be read")
    elif status.st_size > max_bytes:
        skip(f"it has {status.st_size:,} bytes, more than {max_bytes:,}")
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
