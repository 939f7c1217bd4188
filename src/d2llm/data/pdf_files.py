"""Reads PDF files: the text of each page, and the values of form fields and the notes on it.

PDFium, the library of Chromium, reads the pages in the order in which they were written, which is that of reading but
for few files. Links are no text. Pages that are pictures are recognised (``data.ocr``), or reported, as attached files
are.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from d2llm.core.extras import require
from d2llm.core.types import Section
from d2llm.data.contents import FileContents, SkippedPart, UnreadableFileError
from d2llm.data.ocr import NO_TEXT, NOT_RECOGNISED, Recogniser, page_names, with_whole_words

_PASSWORD_FIELD = 1 << 13
_NO_NOTES = (
    "LINK",
    "POPUP",
    "WIDGET",
    "SOUND",
    "MOVIE",
    "SCREEN",
    "PRINTERMARK",
    "TRAPNET",
    "THREED",
    "RICHMEDIA",
    "XFAWIDGET",
)
_DOTS_PER_POINT = 300 / 72  # at which pages are drawn for recognition
_MAX_DOTS = 40e6  # of a page that is larger


def read_pdf(path: Path, recogniser: Recogniser | None) -> FileContents:
    """Title and sections of a file, at least one for each page with text; a recogniser reads those that are pictures.

    Raises:
        UnreadableFileError: it cannot be read.
    """
    library: Any = require("pypdfium2", extra="documents", purpose="reading .pdf files")
    try:
        document = library.PdfDocument(path.read_bytes())
    except OSError as error:
        raise UnreadableFileError(error.strerror or str(error)) from error
    except library.PdfiumError as error:
        encrypted = getattr(error, "err_code", None) == library.raw.FPDF_ERR_PASSWORD
        raise UnreadableFileError("it is encrypted" if encrypted else f"it cannot be parsed ({error})") from error
    with closing(document):
        return _Reader(library, document, recogniser).read()


class _Reader:
    """A file that is being read."""

    def __init__(self, library: Any, document: Any, recogniser: Recogniser | None) -> None:
        self._raw, self._document = library.raw, document
        self._error: type[Exception] = library.PdfiumError
        self._recogniser = recogniser
        self._skipped: list[SkippedPart] = []
        self._known_fields: set[str] = set()
        self._form: Any = None
        if document.get_formtype() != self._raw.FORMTYPE_NONE:
            document.init_forms()
            self._form = document.formenv
        if document.get_formtype() == self._raw.FORMTYPE_XFA_FULL:
            self._skipped.append(
                SkippedPart("form", "it is in a format (XFA) of which only the plain part can be read")
            )

    def read(self) -> FileContents:
        pages: list[tuple[str, str, str]] = []
        unread: dict[str, list[int]] = {}
        has_pictures = False
        for page_number in range(1, len(self._document) + 1):
            try:
                page = self._document[page_number - 1]
            except self._error as error:
                self._skipped.append(SkippedPart(f"page {page_number}", f"it cannot be parsed ({error})"))
                pages.append(("", "", ""))
                continue
            with closing(page):
                page_texts = self._read_page(page)
                if not "".join(page_texts).strip() and self._has_picture(page):
                    has_pictures = True
                    try:
                        page_texts = (self._recognise(page), "", "")
                    except UnreadableFileError as error:
                        unread.setdefault(str(error), []).append(page_number)
            pages.append(page_texts)
        texts = with_whole_words([text for text, _, _ in pages])
        sections: list[Section] = []
        for page_number, (text, (_, fields, notes)) in enumerate(zip(texts, pages, strict=True), start=1):
            contents = ((text, ()), (fields, ("Form fields",)), (notes, ("Notes",)))
            sections += [Section(part, headings, page_number) for part, headings in contents if part.strip()]
        self._skip_attachments()
        pictures = [SkippedPart(page_names(numbers), reason) for reason, numbers in unread.items()]
        if pictures and not sections:
            raise UnreadableFileError(f"it has no text ({pictures[0].name}: {pictures[0].reason})")
        self._skipped += pictures
        title = " ".join(self._document.get_metadata_value("Title").replace("\0", "").split())
        return FileContents(title, tuple(sections), skipped=tuple(self._skipped), has_pictures=has_pictures)

    def _read_page(self, page: Any) -> tuple[str, str, str]:
        """The text of a page, the fields of its form, and its notes."""
        with closing(page.get_textpage()) as text_page:
            text: str = text_page.get_text_range(errors="replace")
        text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\0", "")
        fields: list[str] = []
        notes: list[str] = []
        for annotation in self._annotations(page):
            kind = self._raw.FPDFAnnot_GetSubtype(annotation)
            if kind == self._raw.FPDF_ANNOT_WIDGET:
                fields += self._field(annotation)
            elif kind == self._raw.FPDF_ANNOT_FILEATTACHMENT:
                self._skip_attachment(self._raw.FPDFAnnot_GetFileAttachment(annotation))
            if kind not in (getattr(self._raw, f"FPDF_ANNOT_{name}") for name in _NO_NOTES):
                note = self._string(self._raw.FPDFAnnot_GetStringValue, annotation, b"Contents").strip()
                if note and " ".join(note.split()) not in " ".join(text.split()):
                    notes.append(note)
        return text, "\n".join(fields), "\n\n".join(dict.fromkeys(notes))

    def _recognise(self, page: Any) -> str:
        """The text of a page that is a picture."""
        if self._recogniser is None:
            raise UnreadableFileError(NOT_RECOGNISED)
        self._recogniser.seconds_left()  # before work is spent on it
        width, height = page.get_size()
        scale = min(_DOTS_PER_POINT, (_MAX_DOTS / (width * height)) ** 0.5)
        image = page.render(scale=scale, grayscale=True).to_numpy()
        header = f"P5 {image.shape[1]} {image.shape[0]} 255\n".encode()
        text = "".join(self._recogniser.read(header + image.tobytes()))
        if not text:
            raise UnreadableFileError(NO_TEXT)
        return text

    def _annotations(self, page: Any) -> Iterator[Any]:
        for index in range(self._raw.FPDFPage_GetAnnotCount(page)):
            annotation = self._raw.FPDFPage_GetAnnot(page, index)
            if annotation:
                try:
                    yield annotation
                finally:
                    self._raw.FPDFPage_CloseAnnot(annotation)

    def _field(self, annotation: Any) -> Iterator[str]:
        """The name and value of a field, once if it is in several places."""
        raw, form = self._raw, self._form
        if form is None:
            return
        kind = raw.FPDFAnnot_GetFormFieldType(form, annotation)
        is_secret = (
            kind == raw.FPDF_FORMFIELD_TEXTFIELD and raw.FPDFAnnot_GetFormFieldFlags(form, annotation) & _PASSWORD_FIELD
        )
        if is_secret or kind in (
            raw.FPDF_FORMFIELD_PUSHBUTTON,
            raw.FPDF_FORMFIELD_SIGNATURE,
            raw.FPDF_FORMFIELD_UNKNOWN,
        ):
            return
        path = self._string(raw.FPDFAnnot_GetFormFieldName, form, annotation)
        name = self._string(raw.FPDFAnnot_GetFormFieldAlternateName, form, annotation).strip() or path
        value = self._string(raw.FPDFAnnot_GetFormFieldValue, form, annotation)
        chosen = [
            self._string(raw.FPDFAnnot_GetOptionLabel, form, annotation, index)
            for index in range(max(0, raw.FPDFAnnot_GetOptionCount(form, annotation)))
            if raw.FPDFAnnot_IsOptionSelected(form, annotation, index)
        ]
        value = ", ".join(chosen) or value
        if value.strip() and path not in self._known_fields:
            self._known_fields.add(path)
            yield f"{name}: {value.strip()}".replace("\r\n", "\n").replace("\r", "\n")

    def _string(self, function: Callable[..., int], *arguments: Any) -> str:
        """A text of PDFium, whose functions say how many bytes it has if they are given no room for it."""
        size = function(*arguments, None, 0)
        if size < 2:
            return ""
        room = ctypes.create_string_buffer(size)
        function(*arguments, ctypes.cast(room, ctypes.POINTER(ctypes.c_ushort)), size)
        return room.raw[: size - 2].decode("utf-16-le", errors="replace")

    def _skip_attachments(self) -> None:
        for index in range(self._raw.FPDFDoc_GetAttachmentCount(self._document)):
            self._skip_attachment(self._raw.FPDFDoc_GetAttachment(self._document, index))

    def _skip_attachment(self, attachment: Any) -> None:
        if attachment:
            size = self._raw.FPDFAttachment_GetName(attachment, None, 0)
            room = ctypes.create_string_buffer(max(size, 2))
            self._raw.FPDFAttachment_GetName(attachment, ctypes.cast(room, ctypes.POINTER(ctypes.c_ushort)), size)
            name = room.raw[: max(size - 2, 0)].decode("utf-16-le", errors="replace") or "attached file"
            part = SkippedPart(name, "it is a file attached to the document")
            if part not in self._skipped:
                self._skipped.append(part)

    def _has_picture(self, page: Any) -> bool:
        kinds = [self._raw.FPDF_PAGEOBJ_IMAGE]
        return next(iter(page.get_objects(filter=kinds, max_depth=3)), None) is not None
