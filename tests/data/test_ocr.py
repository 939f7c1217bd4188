"""Scans and pictures of text: drawn here, turned a little and with noise, and recognised by tesseract itself."""

from __future__ import annotations

import shutil
from typing import Any, cast

import numpy as np
import pytest

from d2llm.core.errors import InputError
from d2llm.data import ocr
from d2llm.data.contents import SkippedPart, UnreadableFileError
from d2llm.data.documents import find_documents
from d2llm.data.file_contents import read_contents
from d2llm.data.ocr import Recogniser, languages_of
from d2llm.data.pdf_files import read_pdf
from file_cases.pdf_cases import lines, pages

pytest.importorskip("pypdfium2", reason="needs pypdfium2: pip install 'd2llm[documents]'")
image_library = pytest.importorskip("PIL.Image", reason="needs Pillow")
drawing = pytest.importorskip("PIL.ImageDraw", reason="needs Pillow")
fonts = pytest.importorskip("PIL.ImageFont", reason="needs Pillow")

needs_tesseract = pytest.mark.skipif(
    shutil.which("tesseract") is None, reason="needs tesseract: apt-get install tesseract-ocr"
)
WARRANTY = ("The warranty of the pump covers three", "years. Keep the receipt for recog-", "nition by our service.")
AS_TEXT = "The warranty of the pump covers three\nyears. Keep the receipt for recognition by our service."
PICTURE = b"q 100 0 0 100 0 0 cm BI /W 1 /H 1 /BPC 8 /CS /G ID \x00 EI Q"


def scan(*words: str, degrees: float = 1.2):
    """A picture of printed lines, as a scanner makes it: not quite straight, and with noise."""
    image = image_library.new("L", (1100, 450), 255)
    for number, line in enumerate(words):
        drawing.Draw(image).text((80, 90 + 58 * number), line, fill=20, font=fonts.load_default(size=44))
    turned = np.asarray(image.rotate(degrees, expand=True, fillcolor=255), np.float64)
    noisy = turned + np.random.default_rng(5).normal(0, 20, turned.shape)
    return image_library.fromarray(noisy.clip(0, 255).astype(np.uint8)).convert("RGB")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A scan whose second page was put in the wrong way and whose third is blank; pictures; text beside a picture."""
    folder = tmp_path_factory.mktemp("scans")
    others = [scan("Call the hotline before you", "send the pump.", degrees=91), scan()]
    scan(*WARRANTY).save(folder / "scan.pdf", save_all=True, append_images=others, resolution=150)
    for suffix in ("png", "jpg", "webp"):
        scan(*WARRANTY).save(folder / f"one.{suffix}")
    copies = [image.copy() for image in others]  # without what the first file has set
    scan(*WARRANTY).save(folder / "two.tiff", save_all=True, append_images=copies)
    (folder / "mixed.pdf").write_bytes(pages(lines("Text of its own."), PICTURE))
    (folder / "blank.png").write_bytes((folder / "one.png").read_bytes()[:300])
    return folder


@pytest.fixture
def without_tesseract(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    ocr._installed_languages.cache_clear()
    yield
    ocr._installed_languages.cache_clear()


@needs_tesseract
def test_scans_are_read_and_pages_without_text_are_named(folder):
    found = find_documents(folder)
    texts = {document.id: [(one.page, one.text) for one in document.sections] for document in found}
    hotline = (2, "Call the hotline before you\nsend the pump.")
    assert texts == {
        "mixed.pdf": [(1, "Text of its own.")],
        "one.jpg": [(None, AS_TEXT)],
        "one.png": [(None, AS_TEXT)],
        "one.webp": [(None, AS_TEXT)],
        "scan.pdf": [(1, AS_TEXT), hotline],
        "two.tiff": [(1, AS_TEXT), hotline],
    }
    skipped = {(one.id, one.part): one.reason for one in found.skipped}
    assert skipped.pop(("blank.png", "")).startswith("its text cannot be recognised (tesseract: ")
    assert skipped == {
        ("mixed.pdf", "page 2"): "no text was recognised in it",
        ("scan.pdf", "page 3"): "no text was recognised in it",
        ("two.tiff", "page 3"): "no text was recognised in it",
    }


def test_without_recognition_pictures_are_counted_and_pages_named(folder):
    found = find_documents(folder, ocr="none")
    assert [document.id for document in found] == ["mixed.pdf"]
    assert found.num_other == 5
    reason = "it is a picture; to recognise its text (OCR), install the program tesseract"
    assert {(one.id, one.part): one.reason for one in found.skipped} == {
        ("mixed.pdf", "page 2"): reason,
        ("scan.pdf", ""): f"it has no text (pages 1, 2, 3: {reason})",
    }
    named = find_documents([folder / "one.png", folder / "mixed.pdf"], ocr="none")
    assert [document.id for document in named] == ["mixed.pdf"]
    assert named.skipped[0].reason == reason


def test_without_tesseract_nothing_is_recognised_unless_asked_for(folder, without_tesseract):
    assert languages_of(None) == languages_of("none") == ""
    assert find_documents(folder).num_other == 5
    with pytest.raises(
        InputError, match=r"^text in eng\+deu cannot be recognised: the program tesseract is not instal"
    ):
        find_documents(folder, ocr="eng+deu")


def test_a_tesseract_that_cannot_be_started_is_named(folder, monkeypatch, without_tesseract):
    """With little memory, Python 3.13 cannot start a program where earlier ones can."""
    monkeypatch.setattr("shutil.which", str)
    for read in (lambda: find_documents(folder, ocr="eng"), lambda: Recogniser("eng", 9).read(b"P5 ")):
        with pytest.raises(InputError, match=r"^tesseract cannot be started \(No such file or directory\)"):
            read()
    assert languages_of("none") == ""


@needs_tesseract
def test_languages_that_are_not_installed_are_named(folder):
    with pytest.raises(InputError, match=r"^text in xx, --help cannot be recognised: tesseract has only .*\beng\b"):
        find_documents(folder, ocr="eng+xx+--help")
    assert languages_of(None) == languages_of("eng") == "eng"


@needs_tesseract
def test_a_list_of_pictures_is_no_picture(folder, tmp_path):
    """Tesseract would read the pictures that it names, wherever they are."""
    (tmp_path / "list.png").write_text(f"{folder / 'one.png'}\n")
    found = find_documents(tmp_path)
    assert list(found) == []
    assert found.skipped[0].reason == "it is no picture in PNG, JPEG, TIFF or WebP"


@needs_tesseract
def test_pages_for_which_there_is_no_time_are_named(folder):
    late = "there was no time to recognise its text; allow more than 0 s for a file"
    assert read_contents(folder / "mixed.pdf", Recogniser("eng", 0)).skipped == (SkippedPart("page 2", late),)
    with pytest.raises(UnreadableFileError, match=rf"^it has no text \(pages 1, 2, 3: {late}\)$"):
        read_contents(folder / "scan.pdf", Recogniser("eng", 0))
    with pytest.raises(UnreadableFileError, match=r"^there was no time .* more than 0.1 s for a file$"):
        read_contents(folder / "one.png", Recogniser("eng", 0.1))


def test_chinese_is_written_without_spaces_and_illegible_pages_are_left_out():
    def word(page, line, text, confidence):
        return f"5\t{page}\t1\t1\t{line}\t1\t0\t0\t9\t9\t{confidence}\t{text}"

    legible = [word(1, 1, "保修", 93), word(1, 1, "三", 90), word(1, 1, "年", 91), word(1, 1, "iPhone", 95)]
    table = [*legible, word(1, 2, "，请", 88), word(2, 1, "SUILOY", 39), word(2, 1, "Buy", 60), "4\t3" + "\t0" * 10]
    assert ocr._pages_of("\n".join(["level\tpage_num", *table])) == ["保修三年 iPhone\n，请", "", ""]


def test_a_large_page_is_recognised_with_fewer_dots(tmp_path):
    scan(*WARRANTY).save(tmp_path / "large.pdf", resolution=1)  # 28 by 11 metres
    seen: list[bytes] = []

    class Sizes:
        def seconds_left(self) -> float:
            return 60.0

        def read(self, image: bytes) -> list[str]:
            seen.append(image)
            return ["some text"]

    read_pdf(tmp_path / "large.pdf", cast("Any", Sizes()))
    (image,) = seen
    assert 30e6 < len(image) < 41e6
