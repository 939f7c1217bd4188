"""Files as documents. ``files`` holds small ones that office programs' libraries wrote."""

from __future__ import annotations

import os
import shutil
import sys
import zipfile
from pathlib import Path

import pytest

from d2llm.core.errors import InputError
from d2llm.core.types import Section
from d2llm.data.documents import find_documents, read_documents
from d2llm.data.file_contents import decoded_text
from d2llm.data.indexed_corpus import open_corpus
from file_cases.pdf_cases import lines, pages

pytest.importorskip("lxml", reason="pip install 'd2llm[documents]'")

RUSSIAN = "Семантический поиск находит информацию по смыслу, а не по ключевым словам. "
FILES = Path(__file__).parent / "files"
NO_ENCODINGS = ("hex", "rot13", "idna", "punycode", "undefined", "raw_unicode_escape", "unicode_escape", "no-such")
"""Names of codecs that no page is written in, and of none."""


def read(path: Path):
    (file,) = find_documents([path]).files
    (document,) = read_documents(file).documents
    return document


def write(folder: Path, name: str, content: str | bytes = "Some words.") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def with_parts(source: Path, folder: Path, texts: dict[str, str], paragraph: str) -> Path:
    """A copy of an office file with more parts, each a paragraph."""
    path = shutil.copy(source, folder)
    with zipfile.ZipFile(path, "a") as archive:
        for name, text in texts.items():
            archive.writestr(name, f'<x xmlns:a="urn:a">{paragraph.format(text)}</x>')
    return Path(path)


def ids(*paths: Path, **options) -> list[str]:
    return [file.id for file in find_documents(paths, **options).files]


class TestFormats:
    def test_word(self):
        document = read(FILES / "bees.docx")
        assert document.title == "Care of bees"
        feeding, winter = document.sections
        assert feeding == Section("Bees drink sugar water in late autumn.", ("Feeding",))
        assert winter.headings == ("Feeding", "Winter")
        assert "fifteen kilograms" in winter.text
        assert "| October | Syrup |" in winter.text

    def test_pdf_has_pages(self):
        document = read(FILES / "clocks.pdf")
        assert document.title == "A history of clocks"
        assert [section.page for section in document.sections] == [1, 2]
        assert "Huygens built the first pendulum clock" in document.sections[1].text

    def test_pages_are_plain_text(self, tmp_path):
        """What looks like a heading of Markdown on a page is a comment, or a prompt."""
        titled = pages(
            b"", lines("Run", "# make \\* all", "Well", "---"), more=["<</Title(Untitled)>>"], trailer="/Info 8 0 R"
        )
        document = read(write(tmp_path, "clocks.pdf", titled))
        assert document.title == "clocks.pdf"
        assert document.sections == (Section("Run\n# make \\* all\nWell\n---", (), 2),)

    @pytest.mark.parametrize(
        ("name", "title", "words"),
        [
            ("tides.pptx", "tides.pptx", "The moon pulls the sea twice a day."),
            ("trees.xlsx", "Trees", "Willow"),
            ("birds.epub", "Songs of birds", "The wren sings loudly for its size."),
        ],
    )
    def test_office_files_and_books(self, name, title, words):
        document = read(FILES / name)
        assert document.title == title
        assert words in document.text

    def test_html(self, tmp_path):
        head = "<html><head><title>Stars &amp; moons</title><script>var hidden</script></head>"
        page = f"{head}<body><h1>Mars</h1><p>Two moons.</p>"
        document = read(write(tmp_path, "page.html", page))
        assert document.title == "Stars & moons"
        assert document.sections[-1] == Section("Two moons.", ("Mars",))
        assert "hidden" not in document.text

    @pytest.mark.parametrize(
        ("data", "text"),
        [
            ("Käse".encode(), "Käse"),
            (b"\xef\xbb\xbfK\xc3\xa4se", "Käse"),
            ("Käse".encode("utf-16"), "Käse"),
            ("Käse".encode("utf-32"), "Käse"),
            ("Käse und Brot".encode("utf-16-le"), "Käse und Brot"),
            ("Käse und Brot".encode("utf-16-be"), "Käse und Brot"),
            ("Käse".encode("cp1252"), "Käse"),
            ("语义搜索根据含义查找信息，而不是关键词。".encode("gb18030"), "语义搜索根据含义查找信息，而不是关键词。"),
            (3 * RUSSIAN.encode("koi8_r"), 3 * RUSSIAN),
            ("Käse ".encode() * 20 + b"\xff", "Käse " * 20 + "\ufffd"),
        ],
    )
    def test_encodings_of_text(self, tmp_path, data, text):
        document = read(write(tmp_path, "a.txt", data))
        assert document.text == text
        assert document.title == "a.txt"

    def test_ends_of_lines(self, tmp_path):
        assert read(write(tmp_path, "a.txt", b"a\r\nb\rc\n")).text == "a\nb\nc\n"

    def test_front_matter_has_the_title(self, tmp_path):
        document = read(write(tmp_path, "a.md", "---\ntitle: 'Set up'\ntags: x\n---\n\n# Disk\nFree it.\n"))
        assert (document.title, document.sections) == ("Set up", (Section("Free it.", ("Disk",)),))
        assert read(write(tmp_path, "b.md", "---\nkept\n---\nalso\n")).sections == (Section("also", ("kept",)),)

    def test_metadata_name_the_file(self, tmp_path):
        path = write(tmp_path, "a.txt", "abc")
        os.utime(path, (1_700_000_000, 1_700_000_000))
        metadata = read(path).metadata
        assert (metadata["path"], metadata["file_bytes"]) == ("a.txt", 3)
        assert str(metadata["modified"]) == "2023-11-14 22:13:20+00:00"

    @pytest.mark.parametrize(
        ("name", "encoding", "text"),
        [
            ("iso-8859-1", "cp1252", "Größe “unbekannt”"),
            ("GB2312", "gb18030", "语义搜索"),
            ("koi8-r", "koi8_r", "поиск"),
            ("utf-8", "utf-8", "Größe"),
            ("unknown-1", "cp1252", "Größe"),
            ("utf-16", "utf-8", "Größe"),
            ("iso-8859-1", "utf-8", "Größe"),
            ("utf-8", "cp1252", "Größe “unbekannt”"),
            ("euc-kr", "cp949", "의미 검색"),
            ("utf-16", "utf-16", "Größe"),
            *((codec, "cp1252", "Größe “unbekannt”") for codec in NO_ENCODINGS),
        ],
    )
    def test_encodings_of_html(self, tmp_path, name, encoding, text):
        page = f'<html><head><meta charset="{name}"><title>{text}</title></head><body><p>{text}</p></body></html>'
        document = read(write(tmp_path, "page.html", page.encode(encoding)))
        assert (document.title, document.text) == (text, text)

    @pytest.mark.parametrize(
        ("name", "decoded"),
        [("koi8-r", ["utf-8-sig", "koi8-r"]), ("utf-8", ["utf-8-sig"]), ("latin-1", ["utf-8-sig", "cp1252"])],
    )
    def test_a_text_is_decoded_once_in_the_encoding_that_it_names(self, name, decoded):
        class Counted(bytes):
            def decode(self, encoding="utf-8", errors="strict"):
                calls.append(encoding)
                return super().decode(encoding, errors)

        calls: list[str] = []
        text = f'<meta charset="{name}"><p>{"поиск" if name == "koi8-r" else "Größe"}</p>\n'
        assert decoded_text(Counted(text.encode(name)), with_declaration=True) == text
        assert calls == decoded

    @pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32"])
    def test_a_text_that_lacks_its_last_byte_has_all_letters_but_one(self, tmp_path, encoding):
        text = "The tide comes in twice a day."
        assert read(write(tmp_path, "a.txt", text.encode(encoding)[:-1])).text == f"{text[:-1]}\ufffd"

    def test_a_page_s_title_and_rules_are_no_headings(self, tmp_path):
        head = '<head><title>Stars</title><meta name="description" content="Of the sky"></head>'
        page = f"<html>{head}<body><p>Mars is red.</p><hr><p>Venus is white.</p></body></html>"
        (section,) = read(write(tmp_path, "page.html", page)).sections
        assert section.headings == ()
        assert section.text == "Mars is red.\n\nVenus is white."

    def test_pictures_and_escapes_but_code_as_it_is(self, tmp_path):
        page = r'<p>A <img src="a.png" alt="red fox"> is*not*_shy_.</p><p>Use <code>\*</code>.</p><pre>a\.b\*c</pre>'
        text = read(write(tmp_path, "page.html", page)).text
        assert text == "A red fox is*not*_shy_.\n\nUse \\*.\n\na\\.b\\*c"

    def test_notes_comments_and_diagrams(self, tmp_path):
        run = "<a:p><a:r><a:t>{}</a:t></a:r><a:fld type='slidenum'><a:t>7</a:t></a:fld></a:p>"
        parts = {"ppt/notesSlides/notesSlide10.xml": "Say ten.", "ppt/notesSlides/notesSlide2.xml": "Say two."}
        tides = with_parts(FILES / "tides.pptx", tmp_path, parts | {"ppt/diagrams/data1.xml": "Sun"}, run)
        texts = [(section.headings, section.text) for section in read(tides).sections]
        assert texts[-3:] == [(("Notes",), "Say two."), (("Notes",), "Say ten."), (("Diagrams",), "Sun")]
        bees = with_parts(
            FILES / "bees.docx", tmp_path, {"word/comments.xml": "Is that so?"}, "<a:p><a:r><a:t>{}</a:t></a:r></a:p>"
        )
        assert read(bees).sections[-1] == Section("Is that so?", ("Comments",))


class TestSkipped:
    @pytest.mark.parametrize(
        ("name", "reason"), [("locked.pdf", "it is encrypted"), ("scanned.pdf", "it has no text (page 1: ")]
    )
    def test_encrypted_and_scanned(self, name, reason):
        found = find_documents([FILES / name])
        assert list(found) == []
        assert found.skipped[0].reason.startswith(reason)
        assert str(FILES / name) in str(found.skipped[0])

    @pytest.mark.parametrize("name", ["a.pdf", "a.docx", "a.xlsx", "a.pptx", "a.epub", "a.csv", "a.jsonl", "a.parquet"])
    def test_damaged_files_do_not_end_the_work(self, tmp_path, name):
        source = FILES / {".docx": "bees.docx", ".pdf": "clocks.pdf", ".xlsx": "trees.xlsx"}.get(name[1:], "tides.pptx")
        write(tmp_path, name, source.read_bytes()[:700] + b"\x00\xff\x80" * 50)
        write(tmp_path, "b.txt", "fine")
        found = find_documents([tmp_path])
        assert "b.txt" in [document.id for document in found]
        assert all(skipped.id == name for skipped in found.skipped)

    def test_empty_binary_and_large_files(self, tmp_path):
        write(tmp_path, "empty.md", "")
        write(tmp_path, "binary.txt", b"a\0b")
        write(tmp_path, "large.txt", "x" * 2000)
        found = find_documents([tmp_path], max_bytes=1000)
        assert list(found) == []
        reasons = {skipped.id: skipped.reason for skipped in found.skipped}
        assert reasons == {
            "large.txt": "it has 2,000 bytes, more than 1,000",
            "empty.md": "it is empty",
            "binary.txt": "it is not text",
        }

    @pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
    def test_no_rights(self, tmp_path):
        write(tmp_path, "a.txt")
        write(tmp_path, "private/b.txt").parent.chmod(0)
        found = find_documents([tmp_path])
        assert [document.id for document in found] == ["a.txt"]
        assert [skipped.id for skipped in found.skipped] == ["private"]


class TestFolders:
    def test_ids_are_paths_in_the_folder(self, tmp_path):
        write(tmp_path, "docs/b/c.md")
        write(tmp_path, "docs/a.txt")
        write(tmp_path, "more/a.txt")
        assert ids(tmp_path / "docs") == ["a.txt", "b/c.md"]
        assert ids(tmp_path / "docs", tmp_path / "more") == ["docs/a.txt", "docs/b/c.md", "more/a.txt"]
        assert ids(tmp_path / "docs" / "a.txt") == ["a.txt"]

    def test_excluded(self, tmp_path):
        for name in (
            "a.txt",
            ".git/x.txt",
            "node_modules/y.js",
            "build/z.txt",
            "deep/build/z.txt",
            "draft-1.md",
            "keep.md",
        ):
            write(tmp_path, name)
        assert ids(tmp_path) == ["a.txt", "build/z.txt", "deep/build/z.txt", "draft-1.md", "keep.md"]
        assert ids(tmp_path, exclude=["/build/", "draft-*"]) == ["a.txt", "deep/build/z.txt", "keep.md"]

    def test_a_malformed_pattern_is_named(self, tmp_path):
        (tmp_path / "a.txt").write_text("a")
        with pytest.raises(InputError, match=r"'\[z-a\]\.txt' is not a pattern of a \.gitignore \(bad character range"):
            find_documents([tmp_path], exclude=["*.md", "[z-a].txt"])

    def test_links_in_circles(self, tmp_path):
        write(tmp_path, "a/x.txt")
        (tmp_path / "a" / "again").symlink_to(tmp_path)
        (tmp_path / "gone.txt").symlink_to(tmp_path / "nothing")
        found = find_documents([tmp_path])
        assert [file.id for file in found.files] == ["a/x.txt"]
        assert [(skipped.id, skipped.reason) for skipped in found.skipped] == [
            ("gone.txt", "No such file or directory")
        ]

    @pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
    def test_names_that_are_no_utf8(self, tmp_path):
        for name in (b"caf\xe9.txt", b"caf\xe9.html"):
            write(tmp_path, os.fsdecode(name))
        shutil.copy(FILES / "bees.docx", tmp_path / os.fsdecode(b"b\xe9es.docx"))
        documents = list(find_documents([tmp_path]))
        assert [document.id for document in documents] == ["b\\xe9es.docx", "caf\\xe9.html", "caf\\xe9.txt"]

    @pytest.mark.parametrize("names", [(), ("photo.heic", "film.mp4")])
    def test_nothing_to_read(self, tmp_path, names):
        for name in names:
            write(tmp_path, name)
        with pytest.raises(InputError, match=f"there are no documents; {len(names)} files have other suffixes than"):
            find_documents([tmp_path])
        with pytest.raises(InputError, match="there is no such file or folder"):
            find_documents([tmp_path / "nothing"])

    def test_a_corpus_file_is_no_document(self, tmp_path):
        write(tmp_path, "corpus.jsonl", '{"_id": "a", "text": "one"}\n')
        assert [passage.id for passage in open_corpus([tmp_path]).passages] == ["a"]
        write(tmp_path, "other/note.md", "# T\nx")
        corpus = open_corpus([tmp_path / "other"], with_metadata=False)
        assert [(passage.id, passage.metadata) for passage in corpus.passages] == [("note.md", {})]
        before = corpus.fingerprint
        write(tmp_path, "other/note.md", "# T\nxy")
        assert open_corpus([tmp_path / "other"]).fingerprint != before
