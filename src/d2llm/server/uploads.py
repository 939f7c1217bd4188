"""Uploaded files (multipart/form-data) and the documents in them."""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from io import BytesIO
from pathlib import Path, PurePath
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import unquote

from d2llm.core.errors import MissingExtraError
from d2llm.core.extras import require
from d2llm.core.types import Passage
from d2llm.data.documents import DocumentFile, DocumentFiles, SkippedFile
from d2llm.data.file_contents import readable_suffixes
from d2llm.data.ocr import languages_of
from d2llm.data.parser_workers import TextLimits
from d2llm.server.batching import Stop
from d2llm.server.errors import Problem, ServingError, invalid, shortened
from d2llm.server.settings import ServeSettings

FILES_PATH = "/v1/files"
FORM_TYPE = "multipart/form-data"
_MAX_HEADER_BYTES = 16 << 10  # of each header of a part: a name may be long, and its letters take several bytes
_MAX_NAME_CHARS = 1_024  # it becomes an id, with the number of a row or of a passage
_ENCODED_NAME = re.compile(r";\s*filename\*=(?P<charset>[\w-]*)'[^']*'(?P<name>[^;\s]+)", re.IGNORECASE)
_MAX_UNPACKED = 8  # limit of unpacked sizes, as a multiple of the maximum body size

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
                            "description": "Files of all kinds that are read from folders, and .jsonl.gz; "
                            "repeat the field for several.",
                        }
                    },
                }
            }
        },
    }
}


def file_types(settings: ServeSettings) -> list[str]:
    """What the names of files end with that can be read."""
    return [*sorted(readable_suffixes(languages_of(settings.ocr))), ".jsonl.gz"]


class Upload(list[Passage]):
    """The documents of an upload. Metadata of texts and tables, unlike those of a corpus, need not fit each other.

    ``skipped`` are parts of the files that were left out.
    """

    is_corpus = True
    skipped: Sequence[SkippedFile] = ()


def documents_of(body: bytes, content_type: str, limits: ServeSettings, stop: Stop | None = None) -> Upload:
    """The documents of all files of a form, as ``data.documents`` reads them from a folder.

    Raises:
        ServingError: 415 if the body is not a form; 400 if it has no files, or if a file cannot be read (which the
            message names), or has too much text; 503 if this is to ``stop``.
    """
    most, num_chars, stop = _MAX_UNPACKED * limits.max_body_bytes, 0, stop or Stop()
    with TemporaryDirectory() as folder:
        stored = _stored(_files_of(body, content_type, limits), Path(folder), limits)
        files = DocumentFiles(
            stored, text_limits=TextLimits(limits.max_document_chars, most), ocr=languages_of(limits.ocr)
        )
        if not files.files:
            raise invalid("the form has no file; send one or more in the field 'file'", "file")
        upload = Upload()
        try:
            for read in stop.between(files.by_file()):
                upload += read.documents
                num_chars += sum(len(document.text) for document in read.documents)
                if num_chars > most:
                    problem = f"with {read.file.id}, the files have more than {most:,} characters; send fewer at a time"
                    raise invalid(problem, "file")
                upload.is_corpus = upload.is_corpus and read.is_corpus
                if _unread(files):
                    break
        except MissingExtraError as error:
            raise invalid(f"a file cannot be read here: {error}", "file") from error
        for skipped in _unread(files):
            where = re.match(r"line (\d+): (?:it cannot be parsed: )?", skipped.reason)
            line, reason = (f":{where[1]}", skipped.reason[where.end() :]) if where else ("", skipped.reason)
            raise invalid(f"{skipped.id}{line}: {reason}", "file")
        upload.skipped = files.skipped
    for document in upload:
        if not document.text.strip():
            raise invalid(f"the document {document.id!r} has no text; leave it out", "file")
    return upload


def _unread(files: DocumentFiles) -> list[SkippedFile]:
    return [skipped for skipped in files.skipped if not skipped.part]


def _files_of(body: bytes, content_type: str, limits: ServeSettings) -> Iterator[tuple[str, bytes]]:
    """Names and contents of a form's files: bytes as they were sent, whatever their own type is.

    Raises:
        ServingError: 415 if the body is not a form; 400 if it cannot be parsed, or has too many or too long parts.
    """
    multipart = require("multipart", extra="serve", purpose="reading uploaded files")
    kind, options = multipart.parse_options_header(content_type)
    if kind != FORM_TYPE:
        message = f"a body of type {shortened(kind)!r} is not supported here; send files as {FORM_TYPE}"
        raise ServingError(Problem(415, "unsupported_media_type", message))
    try:
        parser = multipart.PushMultipartParser(
            options.get("boundary", ""),
            max_header_size=_MAX_HEADER_BYTES,
            max_segment_count=limits.max_texts,
            strict=True,
        )
        part, content = None, b""
        for event in parser.parse(body):
            if isinstance(event, bytes):
                content += event
            elif event is not None:
                part, content = event, b""
            elif part is not None and part.name == "file":
                yield _name_of(part), content
        parser.close()
    except multipart.ParserLimitReached as error:
        raise invalid(
            f"the form has more or longer parts than this server reads ({error}): at most {limits.max_texts:,} "
            f"(max_texts), each with 8 headers of {_MAX_HEADER_BYTES:,} bytes; send fewer files at a time",
            "file",
        ) from error
    except multipart.MultipartError as error:
        message = f"the form cannot be parsed ({error}); its parts must be separated by the boundary in its header"
        raise invalid(message, "file") from error


def _name_of(part: Any) -> str:
    """The file name of a part, "" if it has none."""
    coding = part.header("Content-Transfer-Encoding", "binary").strip().lower()
    if coding not in ("binary", "8bit", "7bit"):
        raise invalid(f"a part of the form is encoded as {shortened(coding)!r}; send files as they are", "file")
    name = part.filename or ""
    if not name and (encoded := _ENCODED_NAME.search(part.header("Content-Disposition", ""))):
        charset = "iso-8859-1" if encoded["charset"].lower() == "iso-8859-1" else "utf-8"  # what RFC 5987 knows
        name = unquote(encoded["name"], charset, "replace")
    if len(name) > _MAX_NAME_CHARS:
        problem = f"its name has {len(name):,} characters, more than {_MAX_NAME_CHARS:,}"
        raise invalid(f"file {shortened(name)}: {problem}; send it with a shorter one", "file")
    return name


def _stored(names_and_contents: Iterable[tuple[str, bytes]], folder: Path, limits: ServeSettings) -> list[DocumentFile]:
    """The files of an upload in a folder, under their numbers; the ids are the names that they were sent with."""
    files: list[DocumentFile] = []
    known = file_types(limits)
    for file_number, (name, content) in enumerate(names_and_contents, start=1):
        if not name:
            raise invalid(f"file number {file_number} of the form has no name; send it with one (filename=)", "file")
        suffix = PurePath(name.lower().removesuffix(".gz")).suffix
        if suffix not in known or (name.lower().endswith(".gz") and suffix != ".jsonl"):
            raise invalid(f"{name}: files of this type cannot be read; send one of {' '.join(known)}", "file")
        if name.lower().endswith(".gz"):
            content = _unpacked(name, content, _MAX_UNPACKED * limits.max_body_bytes)
        path = folder / f"{file_number}{suffix}"
        path.write_bytes(content)
        files.append(DocumentFile(path, name, len(content), None))
    return files


def _unpacked(name: str, content: bytes, most: int) -> bytes:
    try:
        with gzip.open(BytesIO(content)) as file:
            unpacked = file.read(most + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise invalid(f"{name}: damaged or truncated gzip ({error}); send the file again", "file") from error
    if len(unpacked) > most:
        raise invalid(f"{name}: has more than {most:,} bytes when unpacked; send it in parts", "file")
    return unpacked
