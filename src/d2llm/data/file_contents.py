"""Title and sections of one file: text, tables and source code, and what Kreuzberg turns into Markdown."""

from __future__ import annotations

import codecs
import csv
import html
import io
import json
import re
import sys
import tempfile
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast
from xml.etree import ElementTree
from zipfile import BadZipFile, ZipFile, is_zipfile

from d2llm.core.errors import InputError
from d2llm.core.extras import require
from d2llm.core.fallbacks import fell_back
from d2llm.core.types import Section
from d2llm.data.code_sections import PARSED, code_sections, missing_grammar, python_sections
from d2llm.data.text_sections import front_matter_title, markdown_sections, rst_sections

_TEXT = frozenset({".txt", ".text"})
_MARKDOWN = frozenset({".md", ".markdown"})
_RST = frozenset({".rst"})
_HTML = frozenset({".html", ".htm", ".xhtml"})
_CONVERTED = _HTML | frozenset({".pdf", ".docx", ".pptx", ".xlsx", ".epub", ".odt"})
_TABLES = frozenset({".csv", ".tsv", ".jsonl", ".parquet"})
_PYTHON = frozenset({".py", ".pyi"})
_OTHER_CODE = frozenset({".m", ".pl", ".r", ".sql"})
CODE = _PYTHON | PARSED | _OTHER_CODE
"""The suffixes of source code."""
SUFFIXES = _TEXT | _MARKDOWN | _RST | _CONVERTED | _TABLES | CODE
"""The suffixes of files that can be read."""


_NO_TITLES = frozenset({"presentation", "powerpoint presentation", "untitled", "untitled document"})
"""What office programs write where nobody gave a title."""
_SAMPLE_BYTES = 1 << 16  # enough to guess an encoding from
_NOTES = {
    ".pptx": ((r"ppt/notesSlides/notesSlide\d+\.xml", "Notes"), (r"ppt/diagrams/data\d+\.xml", "Diagrams")),
    ".docx": ((r"word/comments\.xml", "Comments"), (r"word/diagrams/data\d+\.xml", "Diagrams")),
}
"""Parts of office files that Kreuzberg leaves out of its Markdown, and a heading for them."""
_HTML_METADATA = re.compile(r"\A---\n(?:.+\n)*\n## (?:title|canonical|base-href|meta-\S+): .*\n")
"""What Kreuzberg writes before the text of a page."""


class UnreadableFileError(InputError):
    """A file from which no text can be read; the message is the reason alone."""


@dataclass(frozen=True, slots=True)
class FileContents:
    """The title that a file gives itself ("" if it gives none), and its sections, none of them blank."""

    title: str
    sections: tuple[Section, ...]


def has_native_parser(suffix: str) -> bool:
    """Whether files with this suffix are read by compiled code, which a damaged file can crash."""
    return suffix in _CONVERTED or suffix == ".parquet" or (suffix in PARSED and not missing_grammar(suffix))


def read_contents(path: Path) -> FileContents:
    """Read a file in this process.

    Raises:
        UnreadableFileError: it cannot be read, or has no text.
        MissingExtraError: its format needs a library that is not installed.
    """
    suffix = path.suffix.lower()
    title = ""
    if suffix in _CONVERTED:
        title, sections = _convert(path)
    elif suffix == ".parquet":
        sections = [Section(_parquet_text(path))]
    else:
        try:
            data = path.read_bytes()
        except OSError as error:
            raise UnreadableFileError(error.strerror or str(error)) from error
        text = _decode(data)
        title = front_matter_title(text) if suffix in _MARKDOWN else ""
        sections = _sections(text, suffix)
    sections = [section for section in sections if section.text.strip()]
    if not sections:
        scanned = "; if it is scanned, recognise its pages (OCR)" if suffix == ".pdf" else ""
        raise UnreadableFileError(f"it has no text{scanned}")
    return FileContents(title, tuple(sections))


def _sections(text: str, suffix: str) -> Iterable[Section]:
    """The sections of a text whose lines end in line feeds."""
    if suffix in _TABLES:
        return [Section(_json_lines_text(text) if suffix == ".jsonl" else _table_text(text, suffix))]
    if suffix in _MARKDOWN:
        return markdown_sections(text)
    if suffix in _RST:
        return rst_sections(text)
    if suffix in _PYTHON:
        return python_sections(text)
    if suffix in PARSED:
        missing = missing_grammar(suffix)
        if missing is None:
            return code_sections(text, suffix)
        reason = f"the package {missing.replace('_', '-')} is not installed (pip install 'd2llm[documents]')"
        fell_back("source code by function", f"{reason}; its files are read as plain text")
    return [Section(text)]


def _convert(path: Path) -> tuple[str, list[Section]]:
    """Title and sections of a file that Kreuzberg reads."""
    library: Any = require("kreuzberg", extra="documents", purpose=f"reading {path.suffix} files")
    settings = library.ExtractionConfig(
        output_format="markdown", pages=library.PageConfig(extract_pages=True), use_cache=False, disable_ocr=True
    )
    suffix = path.suffix.lower()
    try:
        if suffix in _HTML:  # Kreuzberg takes every page for UTF-8
            page = _decode(path.read_bytes(), with_declaration=True).encode()
            result = library.extract_bytes_sync(page, "text/html", config=settings)
        else:
            with _path_in_utf8(path) as name:
                result = library.extract_file_sync(name, config=settings)
    except (KeyboardInterrupt, SystemExit, MemoryError, UnreadableFileError):
        raise
    except BaseException as error:  # a panic of its native code is not an Exception
        raise UnreadableFileError(_reason(error)) from error
    metadata: dict[str, Any] = result.metadata or {}
    title = html.unescape(str(metadata.get("title") or "")).strip()
    title = "" if title.casefold() in _NO_TITLES else title.removeprefix("Microsoft Word - ")
    if suffix == ".pdf" and result.pages:  # plain text, unlike the whole
        return title, [
            Section(_with_line_feeds(page["content"]), (), int(page["page_number"])) for page in result.pages
        ]
    content = _with_line_feeds(result.content)
    if suffix in _HTML:
        content = re.sub(_HTML_METADATA, "", content, count=1)
    return title, [*map(_plain, markdown_sections(content)), *_notes(path)]


@contextmanager
def _path_in_utf8(path: Path) -> Generator[str]:
    """The path, or if it is no UTF-8, which Kreuzberg does not take, that of a link to it."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        with tempfile.TemporaryDirectory() as folder:
            link = Path(folder) / f"link{path.suffix}"
            link.symlink_to(path.absolute())
            yield str(link)
    else:
        yield str(path)


def _plain(section: Section) -> Section:
    """A section of Markdown without pictures and, outside code, without escapes: they say nothing to a reader."""
    parts = re.split(r"(^```.*?^```|`[^`\n]*`)", section.text, flags=re.MULTILINE | re.DOTALL)
    for number in range(0, len(parts), 2):
        without_pictures = re.sub(r"!\[([^\]]*)\]\([^)]*\)", r"\1", parts[number])
        parts[number] = re.sub(r"\\([\\`*_{}\[\]()#+.!<>|~-])", r"\1", without_pictures)
    return replace(section, text="".join(parts))


def _notes(path: Path) -> Iterator[Section]:
    """The notes of a presentation's slides, the comments on a text, and the texts of diagrams in either."""
    kinds = _NOTES.get(path.suffix.lower(), ())
    if not kinds or not is_zipfile(path):
        return
    try:
        with ZipFile(path) as archive:
            names = sorted(archive.namelist(), key=lambda name: (len(name), name))
            parts = [
                (heading, ElementTree.fromstring(archive.read(name)))
                for pattern, heading in kinds
                for name in names
                if re.fullmatch(pattern, name)
            ]
    except (BadZipFile, ElementTree.ParseError, NotImplementedError, OSError) as error:
        raise UnreadableFileError(_reason(error)) from error
    for heading, part in parts:
        paragraphs = (
            "".join(run.text or "" for run in paragraph.iterfind(".//{*}r/{*}t"))
            for paragraph in part.iterfind(".//{*}p")
        )
        yield Section("\n\n".join(filter(None, paragraphs)), (heading,))


def _reason(error: BaseException) -> str:
    words = " ".join(str(error).split())
    if "password" in words.lower():
        return "it is encrypted"
    kind = type(error).__name__
    return f"it cannot be parsed ({words.removeprefix(f'{kind}: ')[:200] or kind})"


def _table_text(text: str, suffix: str) -> str:
    """Each row of a table as a paragraph of ``name: value`` lines; every value as it is written."""
    first_line = text.partition("\n")[0]
    delimiter = "\t" if suffix == ".tsv" else max(",;\t|", key=first_line.count)
    csv.field_size_limit(sys.maxsize)
    try:
        rows = list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter))
    except csv.Error as error:
        raise UnreadableFileError(_reason(error)) from error
    names = rows[0] if rows else []
    paragraphs = (_row_text(zip(names + [""] * (len(row) - len(names)), row, strict=False)) for row in rows[1:])
    return "\n\n".join(filter(None, paragraphs)) or "\n".join(names)


def _json_lines_text(text: str) -> str:
    rows: list[object] = []
    for number, line in enumerate(text.split("\n"), start=1):
        try:
            rows += [json.loads(line)] if line.strip() else []
        except (ValueError, RecursionError) as error:
            raise UnreadableFileError(f"line {number}: {_reason(error)}") from error
    text = "\n\n".join(map(_record_text, rows))
    # JSON can hold halves of a character ("\ud83d"), which no encoding can write: they become U+FFFD.
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _parquet_text(path: Path) -> str:
    import pyarrow as pa
    from pyarrow import parquet

    def rows() -> Iterator[str]:
        with parquet.ParquetFile(path) as file:
            for batch in cast(Any, file).iter_batches(1024):
                yield from map(_record_text, batch.to_pylist())

    try:
        return "\n\n".join(rows())
    except (ValueError, pa.ArrowException, OSError) as error:
        raise UnreadableFileError(_reason(error)) from error


def _record_text(record: object) -> str:
    return _row_text(cast("dict[str, object]", record).items()) if isinstance(record, dict) else str(record)


def _row_text(values: Iterable[tuple[str, object]]) -> str:
    return "\n".join(f"{name}: {value}" if name else str(value) for name, value in values if value not in (None, ""))


def _decode(data: bytes, *, with_declaration: bool = False) -> str:
    """Text in UTF-8, UTF-16 with a byte-order mark or an older encoding; lines end in line feeds.

    ``with_declaration``: the text may name its encoding, as HTML does.
    """
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        encoding = "utf-16"
    elif b"\0" in data[:65536]:
        raise UnreadableFileError("it is not text")
    else:
        encoding = "utf-8-sig"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError:
        declared = _declared_encoding(data) if with_declaration else None
        text = data.decode(declared or _other_encoding(data), errors="replace")
    return _with_line_feeds(text)


def _with_line_feeds(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _declared_encoding(data: bytes) -> str | None:
    """The encoding that a page names, if it is known; as in browsers, those that others contain stand for these."""
    declaration = re.search(rb"(?:charset|encoding)\s*=\s*[\"']?([\w.:-]+)", data[:4096])
    if declaration is None:
        return None
    try:
        name = codecs.lookup(declaration[1].decode("ascii", errors="replace")).name
    except LookupError:
        return None
    larger = {"ascii": "cp1252", "iso8859-1": "cp1252", "gb2312": "gb18030", "gbk": "gb18030", "shift_jis": "cp932"}
    return None if name == "utf-8" else larger.get(name, name)


def _other_encoding(data: bytes) -> str:
    """The encoding of a text that is not valid UTF-8.

    UTF-8 if little of it is damaged, else Windows-1252; but as that has hardly ever four letters in a row that are not
    ASCII, a text which does is Chinese, Russian and so on, and charset-normalizer guesses its encoding.
    """
    text = data.decode("utf-8", errors="replace")
    num_damaged = text.count("\ufffd")
    if sum(not character.isascii() for character in text) > 10 * num_damaged:
        return "utf-8"
    letters = re.search(rb"[\x80-\xff]{4}", data)
    if letters is None:
        return "cp1252"
    try:
        from charset_normalizer import from_bytes
    except ImportError:
        reason = "the package charset-normalizer is not installed (pip install 'd2llm[documents]')"
        fell_back("encoding of text", f"{reason}; text that is not UTF-8 is read as Windows-1252")
        return "cp1252"
    sample = data[letters.start() : letters.start() + _SAMPLE_BYTES]
    guess = from_bytes(sample[: sample.rfind(b"\n") + 1] or sample).best()
    return guess.encoding if guess else "cp1252"
