"""Title and sections of one file: text, pages, source code, what Kreuzberg makes Markdown of; the rows of tables."""

from __future__ import annotations

import codecs
import html
import re
import tempfile
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree
from zipfile import BadZipFile, ZipFile, is_zipfile

from d2llm.core.errors import InputError
from d2llm.core.extras import require
from d2llm.core.fallbacks import fell_back
from d2llm.core.types import MetadataValue, Passage, Section
from d2llm.data.code_sections import PARSED, code_sections, missing_grammar, python_sections
from d2llm.data.text_sections import markdown_sections

_TEXT = frozenset({".txt", ".text"})
_MARKDOWN = frozenset({".md", ".markdown"})
_RST = frozenset({".rst"})
_HTML = frozenset({".html", ".htm", ".xhtml"})
_CONVERTED = frozenset({".pdf", ".docx", ".pptx", ".xlsx", ".epub", ".odt"})
TABLES = frozenset({".csv", ".tsv", ".jsonl", ".parquet"})
"""The suffixes of files whose rows are documents."""
_PYTHON = frozenset({".py", ".pyi"})
_OTHER_CODE = frozenset({".m", ".pl", ".r", ".sql"})
CODE = _PYTHON | PARSED | _OTHER_CODE
"""The suffixes of source code."""
SUFFIXES = _TEXT | _MARKDOWN | _RST | _HTML | _CONVERTED | TABLES | CODE
"""The suffixes of files that can be read."""


_NO_TITLES = frozenset({"presentation", "powerpoint presentation", "untitled", "untitled document"})
"""What office programs write where nobody gave a title."""
_SAMPLE_BYTES = 1 << 16  # enough to guess an encoding from
_NOTES = {
    ".pptx": ((r"ppt/notesSlides/notesSlide\d+\.xml", "Notes"), (r"ppt/diagrams/data\d+\.xml", "Diagrams")),
    ".docx": ((r"word/comments\.xml", "Comments"), (r"word/diagrams/data\d+\.xml", "Diagrams")),
}
"""Parts of office files that Kreuzberg leaves out of its Markdown, and a heading for them."""


class UnreadableFileError(InputError):
    """A file from which no text can be read; the message is the reason alone."""


@dataclass(frozen=True, slots=True)
class FileContents:
    """What is in a file: the title that it gives itself ("" if none), and its sections, none of them blank.

    ``metadata`` are the fields of its front matter. A table has ``rows`` instead of sections: documents, whose ids are
    the numbers of the rows, or their own if the table ``is_corpus``.
    """

    title: str
    sections: tuple[Section, ...]
    metadata: Mapping[str, MetadataValue] = field(default_factory=dict[str, MetadataValue])
    rows: tuple[Passage, ...] = ()
    is_corpus: bool = False


def is_parsed(suffix: str) -> bool:
    """Whether files with this suffix are more than lines: a damaged one can crash a parser, or take it long."""
    return suffix not in _TEXT | _PYTHON | _OTHER_CODE and not (suffix in PARSED and missing_grammar(suffix))


def read_contents(path: Path) -> FileContents:
    """Read a file in this process.

    Raises:
        UnreadableFileError: it cannot be read, or has no text.
        MissingExtraError: its format needs a library that is not installed.
    """
    suffix = path.suffix.lower()
    title, metadata = "", dict[str, MetadataValue]()
    if suffix in TABLES:
        return _table(path, suffix)
    if suffix in _CONVERTED:
        title, sections = _convert(path)
    else:
        text = _decode(_read_bytes(path), with_declaration=suffix in _HTML)
        if suffix in _MARKDOWN:
            from d2llm.data.front_matter import read_front_matter

            front_matter = read_front_matter(text)
            title, metadata, text = front_matter.title, dict(front_matter.fields), text[front_matter.end :]
        if suffix in _HTML | _MARKDOWN | _RST:
            own_title, sections = _page(text, suffix)
            title = title or own_title
        else:
            sections = _sections(text, suffix)
    title = "" if title.casefold() in _NO_TITLES else title
    sections = [section for section in sections if section.text.strip()]
    if not sections:
        scanned = "; if it is scanned, recognise its pages (OCR)" if suffix == ".pdf" else ""
        raise UnreadableFileError(f"it has no text{scanned}")
    return FileContents(title, tuple(sections), metadata)


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UnreadableFileError(error.strerror or str(error)) from error


def _page(text: str, suffix: str) -> tuple[str, list[Section]]:
    """Title and sections of a page in HTML, or of a text in a language of which HTML can be made."""
    from d2llm.data.html_pages import html_page
    from d2llm.data.markdown import markdown_as_html
    from d2llm.data.rst import rst_as_html

    return html_page(markdown_as_html(text) if suffix in _MARKDOWN else rst_as_html(text) if suffix in _RST else text)


def _table(path: Path, suffix: str) -> FileContents:
    """A table's rows as documents."""
    from d2llm.data.table_files import TableError, csv_records, json_records, parquet_records, row_documents

    title = ""
    try:
        if suffix == ".parquet":
            records = parquet_records(path)
        elif suffix == ".jsonl":
            records = json_records(_decode(_read_bytes(path)))
        else:
            title, records = csv_records(_decode(_read_bytes(path)), "\t" if suffix == ".tsv" else None)
        is_corpus, rows = row_documents(records, path)
    except TableError as error:
        raise UnreadableFileError(str(error)) from error
    if not is_corpus:
        rows = [row for row in rows if row.full_text.strip()]
    if not rows:
        raise UnreadableFileError("it has no text")
    return FileContents(title, (), {}, tuple(rows), is_corpus)


def _sections(text: str, suffix: str) -> Iterable[Section]:
    """The sections of a text whose lines end in line feeds."""
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


def _decode(data: bytes, *, with_declaration: bool = False) -> str:
    """Text in UTF-8, UTF-16, UTF-32 with a byte-order mark or an older encoding; lines end in line feeds.

    ``with_declaration``: the text may name its encoding, as HTML does.
    """
    if data.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")):
        encoding = "utf-32"
    elif data.startswith((b"\xff\xfe", b"\xfe\xff")):
        encoding = "utf-16"
    elif b"\0" in data[:_SAMPLE_BYTES]:
        encoding = _wide_encoding(data[:_SAMPLE_BYTES])
    else:
        encoding = "utf-8-sig"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError:
        declared = _declared_encoding(data) if with_declaration else None
        text = data.decode(declared or _other_encoding(data), errors="replace")
    return _with_line_feeds(text)


def _wide_encoding(sample: bytes) -> str:
    """UTF-16 without a byte-order mark: every other byte of its spaces, digits and ASCII letters is 0."""
    for encoding, first in (("utf-16-le", 1), ("utf-16-be", 0)):
        zeros, others = sample[first::2].count(0), sample[1 - first :: 2].count(0)
        if len(sample) > 3 and zeros > len(sample) // 8 and not others:
            return encoding
    raise UnreadableFileError("it is not text")


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
    larger = {
        **dict.fromkeys(("ascii", "iso8859-1", "latin-1"), "cp1252"),
        **dict.fromkeys(("gb2312", "gbk"), "gb18030"),
        "shift_jis": "cp932",
        "euc_kr": "cp949",
        "big5": "big5hkscs",
        "iso8859-9": "cp1254",
        "iso8859-11": "cp874",
    }
    return None if name.startswith(("utf-", "unicode")) else larger.get(name, name)


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
