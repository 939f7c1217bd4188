"""Title and sections of one file: text, pages, source code, office files, books, pictures; rows of tables."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path

from d2llm.core.fallbacks import fell_back
from d2llm.core.types import MetadataValue, Section
from d2llm.data.code_sections import PARSED, code_sections, missing_grammar, python_sections
from d2llm.data.contents import FileContents, SkippedPart, UnreadableFileError
from d2llm.data.ocr import PICTURES, Recogniser, read_picture

_TEXT = frozenset({".txt", ".text"})
_MARKDOWN = frozenset({".md", ".markdown"})
_RST = frozenset({".rst"})
_HTML = frozenset({".html", ".htm", ".xhtml"})
_READERS: dict[str, tuple[str, str]] = {  # suffix -> module with its reader, and the reader
    ".docx": ("word_files", "read_word"),
    ".odt": ("opendocument_files", "read_opendocument"),
    ".pptx": ("slide_files", "read_slides"),
    ".xlsx": ("sheet_files", "read_sheets"),
    ".epub": ("epub_files", "read_book"),
}
"""What is imported if there is a file of that kind."""
UNTYPED = frozenset({".csv", ".tsv"})
"""The suffixes of tables whose values are all texts."""
TABLES = UNTYPED | {".jsonl", ".parquet"}
"""The suffixes of files whose rows are documents."""
_PYTHON = frozenset({".py", ".pyi"})
_OTHER_CODE = frozenset({".m", ".pl", ".r", ".sql"})
CODE = _PYTHON | PARSED | _OTHER_CODE
"""The suffixes of source code."""
_PDF = frozenset({".pdf"})
SUFFIXES = _TEXT | _MARKDOWN | _RST | _HTML | _PDF | _READERS.keys() | TABLES | CODE
"""The suffixes of files that can be read, whether or not text is recognised."""


_NO_TITLES = frozenset({"presentation", "powerpoint presentation", "untitled", "untitled document"})
"""What office programs write where nobody gave a title."""
_SAMPLE_BYTES = 1 << 16  # enough to guess an encoding from
_OF_NO_PAGE = ("utf-", "unicode", "raw", "punycode")  # a page that is not UTF-8 is none of them, whatever it says


def readable_suffixes(ocr: str) -> frozenset[str]:
    """The suffixes of files that can be read: pictures, too, if their text is recognised in some languages."""
    return SUFFIXES | PICTURES if ocr else SUFFIXES


def is_parsed(suffix: str) -> bool:
    """Whether files with this suffix are more than lines: a damaged one can crash a parser, or take it long."""
    return suffix not in _TEXT | _PYTHON | _OTHER_CODE and not (suffix in PARSED and missing_grammar(suffix))


def read_contents(path: Path, recogniser: Recogniser | None = None) -> FileContents:
    """Read a file in this process; a recogniser reads its pictures of text.

    Raises:
        UnreadableFileError: it cannot be read, or has no text.
        MissingExtraError: its format needs a library that is not installed.
    """
    suffix = path.suffix.lower()
    title, metadata = "", dict[str, MetadataValue]()
    if suffix in TABLES:
        return _table(path, suffix)
    skipped, has_pictures = tuple[SkippedPart, ...](), False
    if suffix in _READERS or suffix in _PDF | PICTURES:
        contents = _read_by_format(path, suffix, recogniser)
        title, sections, skipped = contents.title.removeprefix("Microsoft Word - "), contents.sections, contents.skipped
        has_pictures = contents.has_pictures
    else:
        text = decoded_text(_read_bytes(path), with_declaration=suffix in _HTML)
        if suffix in _MARKDOWN:
            from d2llm.data.markdown import read_front_matter

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
        raise UnreadableFileError("it has no text")
    return FileContents(title, tuple(sections), metadata, skipped=skipped, has_pictures=has_pictures)


def _read_by_format(path: Path, suffix: str, recogniser: Recogniser | None) -> FileContents:
    if suffix in PICTURES:
        return read_picture(path, recogniser)
    if suffix in _PDF:
        from d2llm.data.pdf_files import read_pdf

        return read_pdf(path, recogniser)
    module, reader = _READERS[suffix]
    return getattr(import_module(f"d2llm.data.{module}"), reader)(path)


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
            records = json_records(decoded_text(_read_bytes(path)))
        else:
            title, records = csv_records(decoded_text(_read_bytes(path)), "\t" if suffix == ".tsv" else None)
        is_corpus, columns, rows = row_documents(records, path)
    except TableError as error:
        raise UnreadableFileError(str(error)) from error
    if not is_corpus:
        rows = [row for row in rows if row.full_text.strip()]
    if not rows:
        raise UnreadableFileError("it has no text")
    return FileContents(title, (), {}, tuple(rows), is_corpus, columns)


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


def decoded_text(data: bytes, *, with_declaration: bool = False) -> str:
    """Text in UTF-8, UTF-16, UTF-32 with a byte-order mark or an older encoding; lines end in line feeds.

    ``with_declaration``: the text may name its encoding, as HTML does.
    """
    wide = _wide_encoding(data[:_SAMPLE_BYTES])
    try:
        text = data.decode(wide, errors="replace") if wide else data.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = (_as_declared(data) if with_declaration else None) or _as_guessed(data)
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _wide_encoding(sample: bytes) -> str | None:
    """UTF-32 or UTF-16 by its byte-order mark, or UTF-16 without one; None if it is neither.

    In UTF-16, every other byte of spaces, digits and ASCII letters is 0.
    """
    if sample.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")):
        return "utf-32"
    if sample.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "utf-16"
    if b"\0" not in sample:
        return None
    for encoding, first in (("utf-16-le", 1), ("utf-16-be", 0)):
        zeros, others = sample[first::2].count(0), sample[1 - first :: 2].count(0)
        if len(sample) > 3 and zeros > len(sample) // 8 and not others:
            return encoding
    raise UnreadableFileError("it is not text")


def _as_declared(data: bytes) -> str | None:
    """A page in the encoding that it names; None if it names none of text, or one that it cannot have.

    As in browsers, encodings that others contain stand for these.
    """
    declaration = re.search(rb"(?:charset|encoding)\s*=\s*[\"']?([\w.:-]+)", data[:4096])
    if declaration is None:
        return None
    larger = {
        **dict.fromkeys(("ascii", "iso8859-1"), "cp1252"),
        **dict.fromkeys(("gb2312", "gbk"), "gb18030"),
        "shift_jis": "cp932",
        "euc_kr": "cp949",
        "big5": "big5hkscs",
        "iso8859-9": "cp1254",
        "iso8859-11": "cp874",
    }
    try:
        name = codecs.lookup(declaration[1].decode("ascii", errors="replace")).name
        if name.startswith(_OF_NO_PAGE):
            return None
        return data.decode(larger.get(name, name), errors="replace")
    except (LookupError, ValueError):  # Python also has codecs that are no encodings of text, such as hex
        return None


def _as_guessed(data: bytes) -> str:
    """A text that is not valid UTF-8, and does not say what it is.

    UTF-8 if little of it is damaged, else Windows-1252; but as that has hardly ever four letters in a row that are not
    ASCII, a text which does is Chinese, Russian and so on, and charset-normalizer guesses its encoding.
    """
    text = data.decode("utf-8-sig", errors="replace")
    num_damaged = text.count("\ufffd")
    if sum(not character.isascii() for character in text) > 10 * num_damaged:
        return text
    return data.decode(_guessed_encoding(data), errors="replace")


def _guessed_encoding(data: bytes) -> str:
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
