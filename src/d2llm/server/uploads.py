"""Uploaded files (multipart/form-data) and the documents in them."""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Iterator
from email import message_from_bytes
from email.message import Message
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

from d2llm.core.errors import DataFormatError
from d2llm.core.types import Passage
from d2llm.data.indexed_corpus import iter_corpus
from d2llm.data.text_sections import heading_title
from d2llm.server.errors import Problem, ServingError, invalid
from d2llm.server.settings import ServeSettings

FILES_PATH = "/v1/files"
FORM_TYPE = "multipart/form-data"
_CORPORA, _TEXTS = (".jsonl", ".jsonl.gz"), (".txt", ".md")
_HEADING = re.compile(r"^#[ \t]+(\S.*)$", re.MULTILINE)
_MOST_UNPACKED = 8  # limit of unpacked sizes, as a multiple of the maximum body size

UPLOAD_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            FORM_TYPE: {
                "schema": {
                    "type": "object",
                    "required": ["file"],
                    "properties": {
                        "file": {
                            "type": "array",
                            "minItems": 1,
                            "items": {"type": "string", "format": "binary"},
                            "description": "Files: .jsonl, .jsonl.gz, .txt or .md; repeat the field for several.",
                        }
                    },
                }
            }
        },
    }
}


def documents_of(body: bytes, content_type: str, limits: ServeSettings) -> list[Passage]:
    """The documents of all files of a form.

    Raises:
        ServingError: 415 if the body is not a form; 400 if it has no files, or if a file cannot be read (which the
            message names).
    """
    documents: list[Passage] = []
    for number, (name, content) in enumerate(_files_of(body, content_type), start=1):
        if not name:
            raise invalid(f"file number {number} of the form has no name; send it with one (filename=)", "file")
        documents += _documents_in(name, content, limits)
    if not documents:
        raise invalid("the form has no file; send one or more in the field 'file'", "file")
    for document in documents:
        if not document.text.strip():
            raise invalid(f"the document {document.id!r} has no text; leave it out", "file")
    return documents


def _files_of(body: bytes, content_type: str) -> Iterator[tuple[str, bytes]]:
    """Names and contents of a form's files. Forms have the format of MIME mails, which the standard library parses."""
    form = message_from_bytes(b"Content-Type: " + content_type.encode("latin-1", "replace") + b"\r\n\r\n" + body)
    if form.get_content_type() != FORM_TYPE:
        message = f"a body of type {content_type.partition(';')[0]!r} is not supported here; send files as {FORM_TYPE}"
        raise ServingError(Problem(415, "unsupported_media_type", message))
    if not form.is_multipart():
        raise invalid("the form cannot be parsed; its parts must be separated by the boundary in its header")
    for part in cast("list[Message]", form.get_payload()):
        disposition = _disposition(part)
        if disposition.get_param("name", header="content-disposition") == "file":
            content = part.get_payload(decode=True)
            yield disposition.get_filename() or "", content if isinstance(content, bytes) else b""


def _disposition(part: Message) -> Message:
    """A part's Content-Disposition header, decoded as UTF-8, which clients send; mail headers would be ASCII."""
    disposition = Message()
    for name, value in part.raw_items():
        if name.lower() == "content-disposition":
            text = str(value).encode("utf-8", "surrogateescape").decode("utf-8", "replace")
            disposition["content-disposition"] = text
    return disposition


def _documents_in(name: str, content: bytes, limits: ServeSettings) -> list[Passage]:
    kind = name.lower()
    if kind.endswith(_TEXTS):
        return [_text(name, content)]
    if not kind.endswith(_CORPORA):
        raise invalid(f"{name}: the file type is not supported; send one of {', '.join((*_CORPORA, *_TEXTS))}", "file")
    if kind.endswith(".gz"):
        content = _unpacked(name, content, _MOST_UNPACKED * limits.max_body_bytes)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "corpus.jsonl"
        path.write_bytes(content)
        try:
            return list(iter_corpus(path))
        except DataFormatError as error:
            where = name if error.line is None else f"{name}:{error.line}"
            raise invalid(f"{where}: {error.problem}", "file") from error


def _unpacked(name: str, content: bytes, most: int) -> bytes:
    try:
        with gzip.open(BytesIO(content)) as file:
            unpacked = file.read(most + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise invalid(f"{name}: damaged or truncated gzip ({error}); send the file again", "file") from error
    if len(unpacked) > most:
        raise invalid(f"{name}: has more than {most:,} bytes when unpacked; send it in parts", "file")
    return unpacked


def _text(name: str, content: bytes) -> Passage:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise invalid(f"{name}: is not UTF-8 text; save it as UTF-8", "file") from None
    heading = _HEADING.search(text) if name.lower().endswith(".md") else None
    return Passage(name, text, heading_title(heading[1].rstrip()) if heading else "")
