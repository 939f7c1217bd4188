# ruff: noqa: E501 - markup is read best in one line
"""Office files, books and PDF files with the traits of real ones: every word of them is read, and none is made up."""

from __future__ import annotations

import io
import re
import struct
from pathlib import Path
from zipfile import ZipFile

import pytest

from d2llm.core.types import Section
from d2llm.data.contents import FileContents, SkippedPart, UnreadableFileError
from d2llm.data.documents import find_documents
from d2llm.data.file_contents import read_contents
from file_cases.case import Case, zipped
from file_cases.docx_cases import docx, docx_cases, p, part, r, table
from file_cases.epub_cases import epub, epub_cases, page
from file_cases.odt_cases import odt, odt_cases
from file_cases.pdf_cases import lines, pages, pdf_cases
from file_cases.pptx_cases import pptx, pptx_cases, shape
from file_cases.xlsx_cases import DATE, DURATION, PERCENT, TIME, sheet, xlsx, xlsx_cases

pytest.importorskip("lxml", reason="pip install 'd2llm[documents]'")

CASES = [*docx_cases(), *odt_cases(), *epub_cases(), *pdf_cases(), *xlsx_cases(), *pptx_cases()]


def read(folder: Path, name: str, data: bytes) -> FileContents:
    path = folder / name
    path.write_bytes(data)
    return read_contents(path)


def flat(text: str) -> str:
    return " ".join(text.replace("\N{SOFT HYPHEN}", "").replace("|", " ").split())


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_every_word_is_read(tmp_path, case: Case):
    contents = read(tmp_path, case.name, case.data)
    text = flat("\n".join(f"{' '.join(section.headings)}\n{section.text}" for section in contents.sections))
    assert [words for words in case.has if flat(words) not in text] == [], text
    assert [words for words in case.lacks if flat(words) in text] == [], text
    notices = [f"{each.name}: {each.reason}" for each in contents.skipped]
    assert len(notices) == len(case.notices), notices
    assert all(expected in notice for expected, notice in zip(case.notices, notices, strict=True)), notices


class TestWord:
    def test_headings_and_title(self, tmp_path):
        """Of styles with German names, by inheritance and by outline level; the title is not repeated."""
        data = next(case.data for case in CASES if case.name == "headings.docx")
        contents = read(tmp_path, "a.docx", data)
        assert contents.title == "Das & Buch"
        assert [(section.headings, section.text) for section in contents.sections] == [
            (("Das Buch", "Anfang"), "Eins."),
            (("Das Buch", "Anfang", "Mitte"), "Zwei."),
            (("Das Buch", "Anfang", "Mitte", "Rang"), "Drei."),
            (("Das Buch", "Ende"), "Vier."),
        ]

    def test_notes_follow_their_paragraph_and_comments_come_last(self, tmp_path):
        data = next(case.data for case in CASES if case.name == "notes.docx")
        (section,) = read(tmp_path, "a.docx", data).sections
        assert section.text.split("\n\n") == [
            "Bees sleep and dream",
            "As Klein & Sons wrote.",
            "Ants do not.",
            "Seen in May.",
        ]
        data = next(case.data for case in CASES if case.name == "comments.docx")
        assert read(tmp_path, "b.docx", data).sections == (Section("Ice melts."), Section("At 0 °C?", ("Comments",)))

    def test_tables(self, tmp_path):
        """A cell over several rows is repeated; rows that are repeated on each page are one header."""
        merged = next(case.data for case in CASES if case.name == "merged.docx")
        (section,) = read(tmp_path, "a.docx", merged).sections
        assert section.text == "| Wide head |  |\n| --- | --- |\n| Tall | one |\n| Tall | two |"
        head = "<w:trPr><w:tblHeader/></w:trPr>"
        rows = [("Kind", "Price"), ("", "in €"), ("Oak", "5")]
        cells = ["".join(f"<w:tc>{p(cell)}</w:tc>" for cell in row) for row in rows]
        body = f"<w:tbl><w:tr>{head}{cells[0]}</w:tr><w:tr>{head}{cells[1]}</w:tr><w:tr>{cells[2]}</w:tr></w:tbl>"
        (section,) = read(tmp_path, "b.docx", docx(body)).sections
        assert section.text == "| Kind | Price in € |\n| --- | --- |\n| Oak | 5 |"

    def test_a_frame_of_one_column_is_text(self, tmp_path):
        heading = p("Inside", '<w:pStyle w:val="berschrift1"/>')
        (section,) = read(tmp_path, "a.docx", docx(table((heading + p("One.") + p("Two."),)))).sections
        assert section == Section("One.\n\nTwo.", ("Inside",))

    def test_numbers_of_lists_and_headings(self, tmp_path):
        levels = "".join(
            f'<w:lvl w:ilvl="{n}"><w:start w:val="1"/><w:numFmt w:val="{kind}"/><w:lvlText w:val="{text}"/></w:lvl>'
            for n, (kind, text) in enumerate([("upperRoman", "%1."), ("decimal", "%1.%2"), ("lowerLetter", "(%3)")])
        )
        numbering = f'<w:abstractNum w:abstractNumId="0">{levels}</w:abstractNum><w:num w:numId="1"><w:abstractNumId w:val="0"/></w:num>'

        def item(text: str, level: int, style: str = "") -> str:
            return p(text, f'{style}<w:numPr><w:ilvl w:val="{level}"/><w:numId w:val="1"/></w:numPr>')

        heading = '<w:pStyle w:val="berschrift1"/>'
        body = (
            item("Terms", 0, heading)
            + item("Pay.", 1)
            + item("soon", 2)
            + item("fully", 2)
            + item("Go.", 1)
            + item("End", 0, heading)
            + item("Bye.", 1)
        )
        contents = read(tmp_path, "a.docx", docx(body, {"numbering.xml": part("numbering", numbering)}))
        assert contents.sections == (
            Section("  I.1 Pay.\n    (a) soon\n    (b) fully\n  I.2 Go.", ("I. Terms",)),
            Section("  II.1 Bye.", ("II. End",)),
        )

    def test_a_choice_of_an_older_form(self, tmp_path):
        entries = '<w:listEntry w:val="Red"/><w:listEntry w:val="Blue &amp; white"/>'
        form = f'<w:fldChar w:fldCharType="begin"><w:ffData><w:ddList><w:result w:val="1"/>{entries}</w:ddList></w:ffData></w:fldChar>'
        body = p(
            r("Colour: ")
            + r(form)
            + r("<w:instrText>FORMDROPDOWN</w:instrText>")
            + r('<w:fldChar w:fldCharType="end"/>')
            + r("!")
        )
        assert read(tmp_path, "a.docx", docx(body)).sections[0].text == "Colour: Blue & white!"


class TestOpenDocument:
    def test_sections(self, tmp_path):
        data = next(case.data for case in CASES if case.name == "headings.odt")
        contents = read(tmp_path, "a.odt", data)
        assert contents.title == "Of <things>"
        assert contents.sections == (
            Section("One.", ("Start & go",)),
            Section("Two.", ("Start & go", "Deep")),
            Section("Three.", ("End",)),
        )

    def test_a_table_with_spans_and_repetitions(self, tmp_path):
        merged = next(case.data for case in CASES if case.name == "merged.odt")
        (section,) = read(tmp_path, "a.odt", merged).sections
        assert section.text == "| Wide |  |\n| --- | --- |\n| Tall | one |\n| Tall | two |"
        repeated = next(case.data for case in CASES if case.name == "repeated.odt")
        (section,) = read(tmp_path, "b.odt", repeated).sections
        assert section.text == "| Day | Rain |  |\n| --- | --- | --- |\n| Monday | dry | dry |"

    def test_what_stands_for_a_million_is_read_a_thousand_times(self, tmp_path):
        """Rows and cells with text that are repeated, and spaces."""
        cell = '<table:table-cell table:number-columns-repeated="{}"><text:p>dry</text:p></table:table-cell>'
        row = '<table:table><table:table-row table:number-rows-repeated="{}">{}</table:table-row></table:table>'
        many = 10**6
        (section,) = read(tmp_path, "a.odt", odt(row.format(many, cell.format(1) * 2))).sections
        assert section.text.count("| dry | dry |") == 1_000
        (section,) = read(tmp_path, "b.odt", odt(row.format(2, cell.format(1) + cell.format(many)))).sections
        assert section.text.splitlines()[0].count("dry") == 1 + 1_000
        (section,) = read(tmp_path, "c.odt", odt(f'<text:p>a<text:s text:c="{many}"/>b</text:p>')).sections
        assert section.text == f"a{' ' * 1_000}b"

    def test_spaces_tabs_and_notes(self, tmp_path):
        data = next(case.data for case in CASES if case.name == "notes.odt")
        (section,) = read(tmp_path, "a.odt", data).sections
        assert section.text.split("\n\n") == [
            "Bees sleep and dream.",
            "As Klein & Sons wrote.",
            "Twice.",
            "Ants do not.",
            "Seen in May.",
        ]

    def test_encrypted(self, tmp_path):
        with ZipFile(io.BytesIO(odt("<text:p>x</text:p>"))) as archive:
            parts = {name: archive.read(name) for name in archive.namelist()}
        entry = (
            b'<manifest:file-entry manifest:full-path="content.xml"><manifest:encryption-data/></manifest:file-entry>'
        )
        manifest = parts["META-INF/manifest.xml"].replace(b"</manifest:manifest>", entry + b"</manifest:manifest>")
        with pytest.raises(UnreadableFileError, match=r"^it is encrypted$"):
            read(tmp_path, "a.odt", zipped({**parts, "META-INF/manifest.xml": manifest, "content.xml": b"\x01\x02"}))


class TestPresentation:
    def test_slides_have_titles_numbers_and_notes(self, tmp_path):
        first = shape("Tides", kind="title") + shape("The moon pulls.")
        contents = read(tmp_path, "a.pptx", pptx([first, shape("Alone.")], notes={1: "Say this."}, title="Sea"))
        assert contents.title == "Sea"
        assert contents.sections == (
            Section("The moon pulls.", ("Tides",), 1),
            Section("Say this.", ("Tides", "Notes"), 1),
            Section("Alone.", (), 2),
        )

    def test_the_order_is_that_of_the_presentation(self, tmp_path):
        data = next(case.data for case in CASES if case.name == "order.pptx")
        assert [section.text for section in read(tmp_path, "a.pptx", data).sections] == ["came first", "came second"]

    def test_a_missing_slide_is_named(self, tmp_path):
        with ZipFile(io.BytesIO(pptx([shape("One."), shape("Two.")]))) as archive:
            parts = {name: archive.read(name) for name in archive.namelist() if name != "ppt/slides/slide2.xml"}
        contents = read(tmp_path, "a.pptx", zipped(parts))
        assert [section.text for section in contents.sections] == ["One."]
        assert contents.skipped == (SkippedPart("ppt/slides/slide2.xml", "it is missing"),)


class TestWorkbook:
    def test_a_sheet_is_a_table_under_its_name(self, tmp_path):
        rows = [["Day", "At", "Took", "Share"], [(45292, DATE), (0.5, TIME), (1.0625, DURATION), (0.125, PERCENT)]]
        contents = read(tmp_path, "a.xlsx", xlsx({"Plan & more": sheet(rows)}, title="Year"))
        assert contents.title == "Year"
        assert contents.sections == (
            Section(
                "| Day | At | Took | Share |\n| --- | --- | --- | --- |\n| 2024-01-01 | 12:00 | 25:30:00 | 12.50% |",
                ("Plan & more",),
            ),
        )

    def test_several_tables_of_a_sheet(self, tmp_path):
        """A line above a table is its caption; rows after an empty one are of the same table if they have no header."""
        rows = [
            ["Prices"],
            [],
            ["Fruit", "Price"],
            ["Pear", 2],
            [],
            ["Plum", 3],
            [],
            ["City", "People"],
            ["Bonn", 330000],
        ]
        (section,) = read(tmp_path, "a.xlsx", xlsx({"S": sheet(rows)})).sections
        assert section.text.split("\n\n") == [
            "Prices",
            "| Fruit | Price |\n| --- | --- |\n| Pear | 2 |\n| Plum | 3 |",
            "| City | People |\n| --- | --- |\n| Bonn | 330000 |",
        ]

    def test_a_far_cell_takes_no_room(self, tmp_path):
        far = '<row r="1048576"><c r="XFD1048576"><v>7</v></c></row>'
        data = xlsx({"S": sheet([["a", "b"], [1, 2]]).replace("</sheetData>", f"{far}</sheetData>")})
        (section,) = read(tmp_path, "a.xlsx", data).sections
        assert section.text == "| a | b |\n| --- | --- |\n| 1 | 2 |\n\n7"

    def test_comments_say_where(self, tmp_path):
        data = next(case.data for case in CASES if case.name == "comments.xlsx")
        assert read(tmp_path, "a.xlsx", data).sections[-1] == Section("B2: Counted & checked", ("S", "Comments"))


class TestPdf:
    def test_pages_fields_and_notes(self, tmp_path):
        data = next(case.data for case in CASES if case.name == "text_field.pdf")
        assert read(tmp_path, "a.pdf", data).sections == (
            Section("An application.", (), 1),
            Section("Full name: Ada Löwe & Co\nRemark: two\nlines", ("Form fields",), 1),
        )
        data = next(case.data for case in CASES if case.name == "notes.pdf")
        note = Section("Check this number!\n\nTyped on the page\n\nA bold claim & more", ("Notes",), 1)
        assert read(tmp_path, "b.pdf", data).sections[1:] == (note,)

    def test_the_title_is_that_of_the_file(self, tmp_path):
        data = next(case.data for case in CASES if case.name == "titled.pdf")
        assert read(tmp_path, "a.pdf", data).title == "Clocks & time"

    def test_words_at_ends_of_lines_are_whole(self, tmp_path):
        """A hyphen is kept if the file has the word with one elsewhere."""
        words = lines(
            "The well-known experi-",
            "ment was well-",
            "known at Bonn-",
            "Beuel. A red wine, a vine-",
            "yard, red-",
            "wine stains.",
        )
        (section,) = read(tmp_path, "a.pdf", pages(words)).sections
        assert (
            section.text
            == "The well-known experiment was well-known at Bonn-Beuel. A red wine, a vineyard, red-wine stains."
        )

    def test_pages_that_are_pictures_are_named(self, tmp_path):
        image = b"q 100 0 0 100 0 0 cm BI /W 1 /H 1 /BPC 8 /CS /G ID \x00 EI Q"
        contents = read(tmp_path, "a.pdf", pages(lines("Text."), image, b"", image))
        assert contents.sections == (Section("Text.", (), 1),)
        assert contents.skipped == (
            SkippedPart("pages 2, 4", "it is a picture; to recognise its text (OCR), install the program tesseract"),
        )


class TestBook:
    def test_labels_of_the_contents_are_headings(self, tmp_path):
        data = next(case.data for case in CASES if case.name == "contents.epub")
        assert read(tmp_path, "a.epub", data).sections == (
            Section("Part text.", ("Part One",)),
            Section("Chapter text.", ("Part One", "Chapter 1")),
        )

    def test_encrypted_chapters_are_named(self, tmp_path):
        method = '<enc:EncryptionMethod Algorithm="http://www.w3.org/2001/04/xmlenc#aes128-cbc"/>'
        data = f'<enc:EncryptedData>{method}<enc:CipherData><enc:CipherReference URI="OEBPS/a.xhtml"/></enc:CipherData></enc:EncryptedData>'
        encryption = f'<encryption xmlns:enc="http://www.w3.org/2001/04/xmlenc#">{data}</encryption>'
        more = {"META-INF/encryption.xml": encryption}
        some = read(tmp_path, "a.epub", epub({"a.xhtml": b"\x01\x02", "b.xhtml": page("<p>Free.</p>")}, more=more))
        assert [section.text for section in some.sections] == ["Free."]
        assert some.skipped == (SkippedPart("a.xhtml", "it is encrypted"),)
        with pytest.raises(UnreadableFileError, match=r"^it is encrypted$"):
            read(tmp_path, "b.epub", epub({"a.xhtml": b"\x01\x02"}, more=more))

    def test_a_book_of_pictures_says_so(self, tmp_path):
        image = page('<img src="a.jpg" alt=""/>')
        with pytest.raises(UnreadableFileError, match=r"^it has no text \(a\.xhtml: it has no text, and 1 more\)$"):
            read(tmp_path, "a.epub", epub({"a.xhtml": image, "b.xhtml": image}))


class TestUnreadable:
    @pytest.mark.parametrize("suffix", ["docx", "xlsx", "pptx"])
    def test_encrypted_and_old_formats(self, tmp_path, suffix):
        compound = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + b"\0" * 600
        encrypted = compound + "EncryptedPackage".encode("utf-16-le") + b"\0" * 100
        with pytest.raises(UnreadableFileError, match=r"^it is encrypted$"):
            read(tmp_path, f"a.{suffix}", encrypted)
        with pytest.raises(UnreadableFileError, match=rf"^it is of a format before 2007; save it as \.{suffix} again$"):
            read(tmp_path, f"b.{suffix}", compound)

    @pytest.mark.parametrize(
        ("name", "data"),
        [
            ("a.docx", docx(p("x"))),
            ("a.odt", odt("<text:p>x</text:p>")),
            ("a.pptx", pptx([shape("x")])),
            ("a.xlsx", xlsx({"S": sheet([["x"]])})),
            ("a.epub", epub({"a.xhtml": page("<p>x</p>")})),
            ("a.pdf", pages(lines("x"))),
        ],
    )
    def test_files_that_end_too_early(self, tmp_path, name, data):
        for fraction in (0.05, 0.5, 0.9):
            with pytest.raises(UnreadableFileError, match=r"^it cannot be parsed"):
                read(tmp_path, name, data[: int(fraction * len(data))])

    @pytest.mark.parametrize(("num_bytes", "is_refused"), [((512 << 20) + 1, True), (512 << 20, False)])
    def test_a_part_that_unpacks_to_more_than_512_mib_is_refused(self, tmp_path, num_bytes, is_refused):
        """By the size that the archive states; of a part that is shorter than that, its text is read."""
        data = bytearray(docx(p("Body.")))
        (begin,) = [one.start() for one in re.finditer(rb"PK\x01\x02.{42}word/document\.xml", data, re.DOTALL)]
        struct.pack_into("<I", data, begin + 24, num_bytes)
        if is_refused:
            with pytest.raises(UnreadableFileError, match=r"it unpacks to 536,870,913 bytes, more than 536,870,912"):
                read(tmp_path, "a.docx", bytes(data))
        else:
            assert read(tmp_path, "a.docx", bytes(data)).sections[0].text == "Body."

    @pytest.mark.parametrize(
        ("name", "data"),
        [
            ("a.docx", docx("")),
            ("a.odt", odt("")),
            ("a.pptx", pptx([""])),
            ("a.xlsx", xlsx({"S": sheet([])})),
            ("a.epub", epub({"a.xhtml": page("")})),
            ("a.pdf", pages(b"")),
        ],
    )
    def test_files_without_text(self, tmp_path, name, data):
        with pytest.raises(UnreadableFileError, match=r"^it has no text"):
            read(tmp_path, name, data)

    def test_a_damaged_part_is_named_and_the_rest_is_read(self, tmp_path):
        data = docx(p("Body."), {"comments.xml": "<w:comments", "header1.xml": part("hdr", p("Letterhead"))})
        contents = read(tmp_path, "a.docx", data)
        assert [section.text for section in contents.sections] == ["Body.", "Letterhead"]
        assert [each.name for each in contents.skipped] == ["word/comments.xml"]
        assert contents.skipped[0].reason.startswith("it cannot be parsed")


def test_parts_that_are_left_out_are_listed_by_file(tmp_path):
    (tmp_path / "book.epub").write_bytes(epub({"a.xhtml": page("<p>Text.</p>"), "b.xhtml": page("")}))
    found = find_documents([tmp_path])
    assert [document.text for document in found] == ["Text."]
    (skipped,) = found.skipped
    assert (skipped.id, skipped.part, skipped.reason) == ("book.epub", "b.xhtml", "it has no text")
    assert str(skipped) == f"{tmp_path / 'book.epub'}, b.xhtml: it has no text"
