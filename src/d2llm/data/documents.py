"""Reads files as documents: text, Markdown, reStructuredText, HTML, PDF, office files, e-books, tables and source code.

A document has a title and sections. A section has the headings that it is under and, in a PDF, its page. Text, tables
and source code are read here; all other formats by Kreuzberg, which turns them into Markdown.

A file without text (scanned pages), a damaged, encrypted or unreadable file, and one that is too large are skipped and
listed with the reason; they never end the work.
"""

from __future__ import annotations

import ast
import html
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, cast

import gitignore_parser

from d2llm.core.errors import InputError
from d2llm.core.extras import require
from d2llm.core.types import MetadataValue, Section, SectionedPassage

MAX_BYTES = 100 << 20
"""Larger files are skipped, unless another limit is given."""
EXCLUDED = (".*", "__pycache__/", "node_modules/", "site-packages/")
"""What is left out of folders besides what the user excludes, as in a ``.gitignore``."""
_TIMEOUT_SECONDS = 120  # for one file

_TEXT = frozenset({".txt", ".text"})
_MARKDOWN = frozenset({".md", ".markdown"})
_RST = frozenset({".rst"})
_CONVERTED = frozenset({".html", ".htm", ".xhtml", ".pdf", ".docx", ".pptx", ".xlsx", ".epub", ".odt"})
_TABLES = frozenset({".csv", ".tsv", ".jsonl", ".parquet"})
_CODE = frozenset(
    f".{suffix}"
    for suffix in [
        "py",
        "pyi",
        "c",
        "h",
        "cc",
        "cpp",
        "hpp",
        "cs",
        "go",
        "java",
        "js",
        "jsx",
        "kt",
        "lua",
        "m",
        "php",
        "pl",
        "r",
        "rb",
        "rs",
        "scala",
        "sh",
        "sql",
        "swift",
        "ts",
        "tsx",
    ]
)
SUFFIXES = _TEXT | _MARKDOWN | _RST | _CONVERTED | _TABLES | _CODE
"""The suffixes of files that can be read."""


class UnreadableFileError(InputError):
    """A file from which no text can be read; the message is the reason alone."""


@dataclass(frozen=True, slots=True)
class DocumentFile:
    """A file that was found: its path, the document's id, its size, and when it was last modified (UTC)."""

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

    Iterating reads the files one by one and yields their documents. ``skipped`` lists what could not be read so far,
    ``num_other`` counts files whose suffix is not among ``SUFFIXES``.
    """

    files: list[DocumentFile]
    skipped: list[SkippedFile] = field(default_factory=list[SkippedFile])
    num_other: int = 0

    def __iter__(self) -> Iterator[SectionedPassage]:
        for file in self.files:
            try:
                yield read_document(file)
            except UnreadableFileError as error:
                self.skipped.append(SkippedFile(str(file.path), str(error), file.id))


def find_documents(
    paths: Iterable[str | Path], *, exclude: Sequence[str] = (), max_bytes: int = MAX_BYTES
) -> DocumentFiles:
    """Find the files below some paths that can be read as documents.

    The id of a document is its path in the folder that was given, with "/"; if there are several folders, it starts
    with the folder's name. Symbolic links are followed, but no folder is read twice.

    Args:
        paths: files, and folders to search with all their folders.
        exclude: what to leave out of folders, as lines of a ``.gitignore``; ``EXCLUDED`` always is.
        max_bytes: larger files are skipped.

    Raises:
        InputError: a path does not exist, or nothing below the paths can be read.
    """
    roots = [Path(path) for path in paths]
    for root in roots:
        if not root.exists():
            raise InputError(f"{root}: there is no such file or folder")
    found = DocumentFiles([])
    seen: set[tuple[int, int]] = set()
    several = sum(root.is_dir() for root in roots) > 1
    for root in roots:
        if not root.is_dir():
            _add(found, root, root.name, max_bytes)
            continue
        prefix = f"{root.resolve().name}/" if several else ""
        for path, name in _walk(root, prefix, _matcher(root, exclude), found, seen):
            if path.suffix.lower() in SUFFIXES:
                _add(found, path, name, max_bytes)
            else:
                found.num_other += 1
    if not found.files:
        reasons = f", {len(found.skipped):,} were skipped ({found.skipped[0].reason})" if found.skipped else ""
        raise InputError(
            f"{', '.join(map(str, roots))}: there are no documents; {found.num_other:,} files have other suffixes than "
            f"{' '.join(sorted(SUFFIXES))}{reasons}"
        )
    found.files.sort(key=lambda file: file.id)
    return found


def read_document(file: DocumentFile) -> SectionedPassage:
    """Read a file as a document, with its path, size and time of modification as metadata.

    Raises:
        UnreadableFileError: it cannot be read, or has no text.
        MissingExtraError: its format needs a library that is not installed.
    """
    if not file.num_bytes:
        raise UnreadableFileError("it is empty")
    suffix = file.path.suffix.lower()
    title = ""
    if suffix in _CONVERTED:
        title, sections = _convert(file.path)
    else:
        try:
            data = b"" if suffix == ".parquet" else file.path.read_bytes()
        except OSError as error:
            raise UnreadableFileError(error.strerror or str(error)) from error
        if suffix in _TABLES:
            sections = [Section(_table_text(file.path, data, suffix))]
        else:
            text = _decode(data)
            if suffix in _MARKDOWN:
                sections = list(markdown_sections(text))
            elif suffix in _RST:
                sections = list(rst_sections(text))
            elif suffix in {".py", ".pyi"}:
                sections = list(python_sections(text))
            else:
                sections = [Section(text)]
    sections = [section for section in sections if section.text.strip()]
    if not sections:
        scanned = "; if it is scanned, recognise its pages (OCR)" if suffix == ".pdf" else ""
        raise UnreadableFileError(f"it has no text{scanned}")
    metadata: dict[str, MetadataValue] = {
        "path": file.id,
        "modified": file.modified,
        "file_bytes": file.num_bytes,
    }
    return SectionedPassage(
        id=file.id,
        text="\n\n".join(section.text for section in sections),
        title=title or ("" if suffix in _CODE else _common_heading(sections)) or file.path.name,
        metadata=metadata,
        sections=tuple(sections),
    )


def markdown_sections(text: str, *, page: int | None = None, above: Sequence[str] = ()) -> Iterator[Section]:
    """The sections of a Markdown text; ``#`` inside fenced code is no heading. ``above``: headings open before it."""
    headings = list(above)
    lines: list[str] = []
    fence = ""
    body = re.sub(r"\A---\n.*?\n---\n", "", text, count=1, flags=re.DOTALL)  # front matter
    for line in body.splitlines():
        marker = re.match(r" {0,3}(```+|~~~+)", line)
        if marker and (not fence or line.strip().startswith(fence)):
            fence = "" if fence else marker[1]
        heading = None if fence else re.fullmatch(r" {0,3}(#{1,6})[ \t]+(.*?)[ \t#]*", line)
        if heading is None:
            lines.append(line)
            continue
        yield Section("\n".join(lines).strip(), tuple(name for name in headings if name), page)
        lines = []
        headings[len(heading[1]) - 1 :] = []
        headings += [""] * (len(heading[1]) - 1 - len(headings)) + [_plain_heading(heading[2])]
    yield Section("\n".join(lines).strip(), tuple(name for name in headings if name), page)


def rst_sections(text: str) -> Iterator[Section]:
    """The sections of a reStructuredText, whose titles are underlined, and may be overlined, with punctuation."""
    styles: list[str] = []  # of the levels, in the order in which they first occur
    headings: list[str] = []
    lines: list[str] = []
    rows = text.splitlines()
    place = 0
    while place < len(rows):
        over = _is_adornment(rows[place]) and place + 2 < len(rows) and _is_adornment(rows[place + 2])
        title_at = place + 1 if over else place
        title = rows[title_at].strip()
        under = rows[title_at + 1] if title_at + 1 < len(rows) else ""
        if title and not _is_adornment(title) and _is_adornment(under) and len(under.rstrip()) >= len(title):
            style = under[0] * (2 if over else 1)
            if style not in styles:
                styles.append(style)
            yield Section("\n".join(lines).strip(), tuple(headings))
            lines = []
            headings[styles.index(style) :] = [title]
            place = title_at + 2
        else:
            lines.append(rows[place])
            place += 1
    yield Section("\n".join(lines).strip(), tuple(headings))


def python_sections(text: str) -> Iterator[Section]:
    """The functions and classes of a Python module, methods by themselves, and the text between them.

    A module that cannot be parsed is one section.
    """
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError):
        yield Section(text)
        return
    rows = text.splitlines(keepends=True)
    at = 0

    def until(end: int, headings: tuple[str, ...]) -> Iterator[Section]:
        nonlocal at
        if end > at:
            yield Section("".join(rows[at:end]).strip("\n"), headings)
            at = end

    for node in tree.body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        yield from until(_first_line(node), ())
        for part in node.body if isinstance(node, ast.ClassDef) else []:
            if isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef):
                yield from until(_first_line(part), (node.name,))
                yield from until(part.end_lineno or at, (node.name, part.name))
        yield from until(node.end_lineno or at, (node.name,))
    yield from until(len(rows), ())


def _walk(
    root: Path, prefix: str, is_excluded: Callable[[str], bool], found: DocumentFiles, seen: set[tuple[int, int]]
) -> Iterator[tuple[Path, str]]:
    """The files below a folder that are not excluded, each with its id."""

    def name_of(path: Path) -> str:
        return prefix + _plain_name(path.relative_to(root).as_posix())

    def refused(error: OSError) -> None:
        folder = Path(error.filename)
        found.skipped.append(SkippedFile(str(folder), error.strerror or str(error), name_of(folder)))

    for folder, folders, names in os.walk(root, followlinks=True, onerror=refused):
        status = Path(folder).stat()
        if (status.st_dev, status.st_ino) in seen:  # a link to a folder that was read
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not is_excluded(os.path.join(folder, name)))  # noqa: PTH118
        for name in sorted(names):
            if not is_excluded(os.path.join(folder, name)):  # noqa: PTH118
                path = Path(folder) / name
                yield path, name_of(path)


def _matcher(root: Path, exclude: Sequence[str]) -> Callable[[str], bool]:
    return gitignore_parser.parse_gitignore_str("\n".join([*EXCLUDED, *exclude]), base_dir=str(root.absolute()))


def _add(found: DocumentFiles, path: Path, name: str, max_bytes: int) -> None:
    try:
        status = path.stat()
    except OSError as error:
        found.skipped.append(SkippedFile(str(path), error.strerror or str(error), name))
        return
    if not path.is_file():
        found.skipped.append(SkippedFile(str(path), "it is not a regular file", name))
    elif path.suffix.lower() not in SUFFIXES:
        found.skipped.append(SkippedFile(str(path), f"files with the suffix '{path.suffix}' cannot be read", name))
    elif status.st_size > max_bytes:
        found.skipped.append(SkippedFile(str(path), f"it has {status.st_size:,} bytes, more than {max_bytes:,}", name))
    else:
        modified = datetime.fromtimestamp(status.st_mtime_ns // 1000 / 1e6, timezone.utc)
        found.files.append(DocumentFile(path, name, status.st_size, modified))


def _convert(path: Path) -> tuple[str, list[Section]]:
    """Title and sections of a file that Kreuzberg reads."""
    library: Any = require("kreuzberg", extra="documents", purpose=f"reading {path.suffix} files")
    settings = library.ExtractionConfig(
        output_format="markdown",
        pages=library.PageConfig(extract_pages=True),
        use_cache=False,
        disable_ocr=True,
        extraction_timeout_secs=_TIMEOUT_SECONDS,
    )
    try:
        result = library.extract_file_sync(str(path), config=settings)
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # a panic of its native code is not an Exception
        raise UnreadableFileError(_reason(error)) from error
    metadata: dict[str, Any] = result.metadata or {}
    title = html.unescape(str(metadata.get("title") or "")).strip()
    pages: list[Any] = list(result.pages or []) if path.suffix.lower() == ".pdf" else []
    if not pages:  # formats without fixed pages
        return title, list(markdown_sections(_plain_markdown(result.content)))
    sections: list[Section] = []
    above: tuple[str, ...] = ()
    for page in pages:
        text = _plain_markdown(page["content"])
        of_page = list(markdown_sections(text, page=int(page["page_number"]), above=above))
        above = of_page[-1].headings
        sections += of_page
    return title, sections


def _reason(error: BaseException) -> str:
    words = " ".join(str(error).split())
    if "password" in words.lower():
        return "it is encrypted"
    kind = type(error).__name__
    return f"it cannot be parsed ({words.removeprefix(f'{kind}: ')[:200] or kind})"


def _plain_markdown(text: str) -> str:
    """Markdown without pictures and escapes, which say nothing to a reader of the words."""
    without_pictures = re.sub(r"!\[([^\]]*)\]\([^)]*\)", r"\1", text)
    return re.sub(r"\\([\\`*_{}\[\]()#+.!<>|~-])", r"\1", without_pictures)


def _plain_heading(text: str) -> str:
    return re.sub(r"[*_`]|\[([^\]]*)\]\([^)]*\)", r"\1", text).strip()


def _table_text(path: Path, data: bytes, suffix: str) -> str:
    """Each row of a table as a paragraph of ``name: value`` lines."""
    import pyarrow as pa
    from pyarrow import csv, parquet

    try:
        if suffix == ".jsonl":
            rows = [json.loads(line) for line in _decode(data).splitlines() if line.strip()]
            return "\n\n".join(_row_text(row) for row in rows)
        if suffix == ".parquet":
            table: Any = parquet.read_table(path)
        else:
            options = csv.ParseOptions(delimiter="\t" if suffix == ".tsv" else ",", newlines_in_values=True)
            table = csv.read_csv(pa.BufferReader(_decode(data).encode()), parse_options=options)
    except (ValueError, pa.ArrowException, OSError, RecursionError) as error:
        raise UnreadableFileError(_reason(error)) from error
    return "\n\n".join(_row_text(row) for batch in table.to_batches(1024) for row in batch.to_pylist())


def _row_text(row: object) -> str:
    if not isinstance(row, dict):
        return str(row)
    values = cast("dict[str, object]", row)
    return "\n".join(f"{name}: {value}" for name, value in values.items() if value is not None and value != "")


def _decode(data: bytes) -> str:
    """Text in UTF-8, UTF-16 with a byte-order mark or, if it is neither, Windows-1252."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        encoding = "utf-16"
    elif b"\0" in data[:65536]:
        raise UnreadableFileError("it is not text")
    else:
        encoding = "utf-8-sig"
    try:
        return data.decode(encoding)
    except UnicodeDecodeError:
        return data.decode("cp1252", errors="replace")


def _plain_name(name: str) -> str:
    """A path as valid text: bytes of a name that are no UTF-8 are written as escapes."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _common_heading(sections: Sequence[Section]) -> str:
    """The outermost heading, if all sections that have headings are under the same one."""
    outermost = {section.headings[0] for section in sections if section.headings}
    return outermost.pop() if len(outermost) == 1 else ""


def _is_adornment(line: str) -> bool:
    line = line.rstrip()
    return len(line) > 1 and line[0] in "=-`:'\"~^_*+#<>.!$%&(),/;?@[\\]{|}" and line == line[0] * len(line)


def _first_line(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> int:
    """Number of lines before a definition and its decorators."""
    return min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]) - 1
