# ruff: noqa: E501 - markup is read best in one line
"""PDF files, written by hand: objects of the format, joined with a table of their places."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

from file_cases.case import Case


def pdf(objects: Sequence[str | bytes], *, trailer: str = "") -> bytes:
    """A file of objects numbered from 1, of which the first is the catalogue."""
    data = bytearray(b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n")
    offsets: list[int] = []
    for number, content in enumerate(objects, start=1):
        offsets.append(len(data))
        body = content.encode("latin-1") if isinstance(content, str) else content
        data += f"{number} 0 obj\n".encode() + body + b"\nendobj\n"
    start = len(data)
    data += f"xref\n0 {len(offsets) + 1}\n0000000000 65535 f \n".encode()
    data += b"".join(f"{offset:010} 00000 n \n".encode() for offset in offsets)
    data += f"trailer\n<</Size {len(offsets) + 1}/Root 1 0 R{trailer}>>\nstartxref\n{start}\n%%EOF\n".encode()
    return bytes(data)


def stream(content: bytes, entries: str = "") -> bytes:
    """An object with a compressed content."""
    packed = zlib.compress(content, 9)
    return f"<</Length {len(packed)}/Filter/FlateDecode{entries}>>stream\n".encode() + packed + b"\nendstream"


def text(value: str) -> str:
    """A string of any script."""
    return "<" + value.encode("utf-16-be").hex().join(["feff", ""]) + ">"


def pages(
    *contents: bytes,
    annotations: Sequence[str] = (),
    more: Sequence[str | bytes] = (),
    catalog: str = "",
    page: str = "",
    trailer: str = "",
    font: str = "/WinAnsiEncoding",
) -> bytes:
    """A file of pages with a font; the objects ``more`` follow those of the pages, the first being number
    4 + 2 * pages; ``annotations`` are the first page's, ``catalog`` and ``page`` further entries."""
    count = len(contents)
    kids = " ".join(f"{4 + 2 * n} 0 R" for n in range(count))
    objects: list[str | bytes] = [
        f"<</Type/Catalog/Pages 2 0 R{catalog}>>",
        f"<</Type/Pages/Kids[{kids}]/Count {count}>>",
        f"<</Type/Font/Subtype/Type1/BaseFont/Helvetica/Encoding{font}>>",
    ]
    for n, content in enumerate(contents):
        notes = f"/Annots[{' '.join(annotations)}]" if annotations and not n else ""
        objects += [
            f"<</Type/Page/Parent 2 0 R/MediaBox[0 0 600 800]/Resources<</Font<</F 3 0 R>>>>/Contents {5 + 2 * n} 0 R{notes}{page}>>",
            stream(content),
        ]
    return pdf([*objects, *more], trailer=trailer)


def line(words: str, x: int = 50, y: int = 700, size: int = 12) -> bytes:
    """A line on a page."""
    escaped = words.replace("\\", "\\\\").replace("(", "\\(").replace(")", "\\)")
    return f"BT /F {size} Tf {x} {y} Td ({escaped}) Tj ET\n".encode("cp1252")


def lines(*words: str, x: int = 50, y: int = 700) -> bytes:
    """Lines below each other."""
    return b"".join(line(each, x, y - 14 * n) for n, each in enumerate(words))


def _field(kind: str, name: str, entries: str) -> str:
    return f"<</Type/Annot/Subtype/Widget/Rect[50 500 300 520]/FT/{kind}/T{text(name)}{entries}>>"


def _note(kind: str, contents: str, entries: str = "") -> str:
    return f"<</Type/Annot/Subtype/{kind}/Rect[50 400 90 420]/Contents{text(contents)}{entries}>>"


def pdf_cases() -> list[Case]:
    """PDF files."""
    form = "/AcroForm<</Fields[{}]/NeedAppearances true/DR<</Font<</F 3 0 R>>>>/DA(/F 12 Tf)>>"

    def with_fields(*fields: str, also: Sequence[str | bytes] = (), roots: Sequence[int] = ()) -> bytes:
        references = [f"{6 + n} 0 R" for n in range(len(fields))]
        top = [f"{n} 0 R" for n in roots] or references
        return pages(
            line("An application."), annotations=references, more=[*fields, *also], catalog=form.format(" ".join(top))
        )

    def with_notes(*notes: str) -> bytes:
        return pages(line("The text."), annotations=[f"{6 + n} 0 R" for n in range(len(notes))], more=notes)

    attached = pages(
        line("See the attachment."),
        more=[
            f"<</Type/Filespec/F(data.csv)/UF{text('Zahlen für Mai.csv')}/EF<</F 7 0 R>>>>",
            stream(b"a,b\n1,2\n", "/Type/EmbeddedFile"),
        ],
        catalog=f"/Names<</EmbeddedFiles<</Names[{text('x')} 6 0 R]>>>>",
    )
    two_columns = lines("The left column", "is read first and", "to its end.", x=50) + lines(
        "The right one", "comes after it", "and stops.", x=320
    )
    turned = b"BT /F 12 Tf 0 1 -1 0 100 50 Tm (Turned by ninety) Tj ET BT /F 12 Tf 0 1 -1 0 114 50 Tm (degrees.) Tj ET"
    words = lines("A well-known fact: the experi-", "ment was well-", "known.")
    return [
        Case(
            "signs.pdf",
            pages(line("pressure < 5 bar & R&D (50 €) \\ 'so' \"it\"")),
            ("pressure < 5 bar & R&D (50 €) \\ 'so' \"it\"",),
        ),
        Case(
            "text_field.pdf",
            with_fields(
                _field("Tx", "Full name", f"/V{text('Ada Löwe & Co')}"),
                _field("Tx", "Remark", "/V(two\\rlines)/Ff 4096"),
            ),
            ("An application.", "Full name: Ada Löwe & Co", "Remark: two lines"),
        ),
        Case(
            "choice_field.pdf",
            with_fields(
                _field("Ch", "Country", "/Ff 131072/Opt[[(de)(Germany)][(fr)(France)]]/V(fr)"),
                _field("Ch", "Colours", "/Ff 2097152/Opt[(red)(green)(blue)]/V[(red)(blue)]"),
            ),
            ("Country: France", "Colours: red", "blue"),
            ("Germany", "green"),
        ),
        Case(
            "checkbox.pdf",
            with_fields(_field("Btn", "Smoker", "/V/Yes/AS/Yes"), _field("Btn", "Member", "/V/Off/AS/Off")),
            ("Smoker: Yes",),
        ),
        Case(
            "radio.pdf",
            with_fields(
                "<</Type/Annot/Subtype/Widget/Rect[1 1 9 9]/Parent 8 0 R/AS/Off/AP<</N<</Small 5 0 R/Off 5 0 R>>>>>>",
                "<</Type/Annot/Subtype/Widget/Rect[11 1 19 9]/Parent 8 0 R/AS/Large/AP<</N<</Large 5 0 R/Off 5 0 R>>>>>>",
                also=[f"<</FT/Btn/Ff 49152/T{text('Size')}/V/Large/Kids[6 0 R 7 0 R]>>"],
                roots=[8],
            ),
            ("Size: Large",),
            ("Size: Small",),
        ),
        Case(
            "named_field.pdf",
            with_fields(
                f"<</Type/Annot/Subtype/Widget/Rect[1 1 90 9]/Parent 7 0 R/T{text('street')}/TU{text('Street and number')}/V(Elm 5)>>",
                also=[f"<</FT/Tx/T{text('address')}/Kids[6 0 R]>>"],
                roots=[7],
            ),
            ("Street and number: Elm 5",),
        ),
        Case(
            "password_field.pdf",
            with_fields(_field("Tx", "Secret", "/Ff 8192/V(hunter2)")),
            ("An application.",),
            ("hunter2",),
        ),
        Case(
            "notes.pdf",
            with_notes(
                _note("Text", "Check this number!"),
                _note("FreeText", "Typed on the page"),
                _note("Highlight", "A bold claim & more", "/QuadPoints[50 700 90 700 50 690 90 690]"),
            ),
            ("The text.", "Check this number!", "Typed on the page", "A bold claim & more"),
        ),
        Case(
            "links.pdf",
            with_notes(
                "<</Type/Annot/Subtype/Link/Rect[1 1 9 9]/Contents(click here)/A<</S/URI/URI(http://a.b/c)>>>>",
                "<</Type/Annot/Subtype/Popup/Rect[1 1 9 9]/Contents(popup words)>>",
            ),
            ("The text.",),
            ("http://a.b", "popup words"),
        ),
        Case(
            "stamps.pdf",
            with_notes(
                _note("Square", "Wrong figure"), _note("StrikeOut", "Delete this"), _note("Caret", "Insert that")
            ),
            ("Wrong figure", "Delete this", "Insert that"),
        ),
        Case("attachment.pdf", attached, ("See the attachment.",), notices=("Zahlen für Mai.csv",)),
        Case(
            "hyphens.pdf",
            pages(lines("The experi-", "ment shows well-", "known work", "and e-mail.")),
            ("The experiment shows", "and e-mail."),
        ),
        Case("compounds.pdf", pages(words), ("the experiment was well-known.",)),
        Case(
            "columns.pdf",
            pages(two_columns),
            ("The left column is read first and to its end.", "The right one comes after it and stops."),
        ),
        Case("rotated.pdf", pages(turned, page="/Rotate 90"), ("Turned by ninety degrees.",)),
        Case(
            "titled.pdf",
            pages(line("Body."), more=[f"<</Title{text('Clocks & time')}>>"], trailer="/Info 6 0 R"),
            ("Body.",),
        ),
        Case("several.pdf", pages(line("Page one."), line("Page two."), b""), ("Page one.", "Page two.")),
        Case(
            "spaced.pdf", pages(b"BT /F 12 Tf 50 700 Td [(Wo)-20(rds)-600(with)-600(gaps)] TJ ET"), ("Words with gaps",)
        ),
        Case(
            "moved.pdf",
            pages(b"BT /F 12 Tf 50 700 Td (Every) Tj 40 0 Td (word) Tj 40 0 Td (apart) Tj ET"),
            ("Every word apart",),
        ),
        Case(
            "ligatures.pdf",
            pages(b"BT /F 12 Tf 50 700 Td (e\x01cient) Tj ET", font="<</Differences[1/ffi]>>"),
            ("efficient",),
        ),
        Case(
            "form_object.pdf",
            pages(
                b"/X Do\n" + line("Outside."),
                more=[
                    stream(
                        line("Inside a form."),
                        "/Type/XObject/Subtype/Form/BBox[0 0 600 800]/Resources<</Font<</F 3 0 R>>>>",
                    )
                ],
                page="",
            ).replace(
                b"/Resources<</Font<</F 3 0 R>>>>/Contents",
                b"/Resources<</Font<</F 3 0 R>>/XObject<</X 6 0 R>>>>/Contents",
                1,
            ),
            ("Outside.",),
        ),
        Case(
            "form_only.pdf",
            pages(
                b"", annotations=["6 0 R"], more=[_field("Tx", "Name", "/V(Only here)")], catalog=form.format("6 0 R")
            ),
            ("Name: Only here",),
        ),
    ]
