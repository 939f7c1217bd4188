"""Files that are read in other processes, some of which die."""

from __future__ import annotations

import os
import shutil
import sys
from contextlib import closing
from pathlib import Path

import pytest

from d2llm.core.errors import MissingExtraError
from d2llm.core.types import Section
from d2llm.data import documents, parser_workers
from d2llm.data.contents import FileContents, SkippedPart, UnreadableFileError
from d2llm.data.documents import find_documents
from d2llm.data.parser_workers import read_in_workers
from d2llm.data.settings import ReadingSettings
from file_cases.docx_cases import docx, p
from file_cases.epub_cases import epub, page
from file_cases.pdf_cases import lines, pages
from unreliable_reader import read_unreliably
from waiting import until

FILES = Path(__file__).parent / "files"


def write_all(folder: Path, texts: list[str]) -> list[Path]:
    paths = [folder / f"{number:02}.txt" for number in range(len(texts))]
    for path, text in zip(paths, texts, strict=True):
        path.write_text(text)
    return paths


def summary(outcome: FileContents | UnreadableFileError) -> str:
    return str(outcome) if isinstance(outcome, UnreadableFileError) else outcome.sections[0].text


def test_deaths_and_hangs_cost_one_file_each(tmp_path):
    """A worker that dies is replaced, and what another file did to it is not blamed on the next."""
    texts = ["one", "die", "print", "sleep", "two", "refuse", "die unless first", "three"]
    outcomes = list(
        read_in_workers(write_all(tmp_path, texts), ReadingSettings(seconds_per_file=4), reader=read_unreliably)
    )
    assert [summary(outcome) for outcome in outcomes] == [
        "one",
        "its parser was ended by SIGKILL, perhaps because memory ran out: the last words",
        "print",
        "it takes more than 4 s to read",
        "two",
        "it says so",
        "die unless first",
        "three",
    ]
    assert outcomes[0] == FileContents("00.txt", (Section("one", ("Heading",), 3),))


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc")
def test_what_a_worker_has_started_ends_with_it(tmp_path):
    (outcome,) = read_in_workers(
        write_all(tmp_path, ["start a program"]), ReadingSettings(seconds_per_file=1), reader=read_unreliably
    )
    assert summary(outcome) == "it takes more than 1 s to read"
    program = Path("/proc", (tmp_path / "00.pid").read_text(), "status")
    until(lambda: not program.exists() or "\nState:\tZ" in program.read_text(), "the end of the program")


def test_several_workers_keep_the_order_and_read_few_files_ahead(tmp_path, monkeypatch):
    monkeypatch.setattr(parser_workers, "_PATIENCE_SECONDS", -1.0)  # the second worker starts at once
    monkeypatch.setattr(parser_workers, "usable_cores", lambda: 2)
    texts = ["slow", *(str(number) for number in range(1, 12))]
    paths = write_all(tmp_path, texts)
    log = tmp_path / "log"
    monkeypatch.setenv("UNRELIABLE_READER_LOG", str(log))
    with closing(read_in_workers(paths, reader=read_unreliably)) as outcomes:
        assert summary(next(outcomes)) == "slow"

        def started_by() -> list[str]:
            return [line.split()[0] for line in log.read_text().splitlines()]

        until(lambda: len(set(started_by())) == 2, "the second worker")
        assert len(started_by()) <= 5
        assert [summary(outcome) for outcome in outcomes] == texts[1:]


@pytest.mark.parametrize("ending", [KeyboardInterrupt, GeneratorExit])
def test_workers_end_with_the_work(tmp_path, monkeypatch, ending):
    log = tmp_path / "log"
    monkeypatch.setenv("UNRELIABLE_READER_LOG", str(log))
    outcomes = read_in_workers(write_all(tmp_path, ["one", "sleep"]), reader=read_unreliably)
    assert summary(next(outcomes)) == "one"
    with pytest.raises(ending):
        outcomes.throw(ending)
    process = int(log.read_text().split()[0])
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


def test_a_missing_library_ends_the_work(tmp_path):
    with pytest.raises(MissingExtraError, match=r"pip install 'd2llm\[documents\]'"):
        list(read_in_workers(write_all(tmp_path, ["miss"]), reader=read_unreliably))


def test_documents_are_read_by_workers(tmp_path, monkeypatch):
    """Text is not; a document whose parser dies is skipped; the order stays."""
    for name in ("clocks.pdf", "tides.pptx"):
        shutil.copy(FILES / name, tmp_path)
    (tmp_path / "damaged.docx").write_text("die")
    (tmp_path / "note.txt").write_text("a note")
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "clocks.pdf").touch()
    same_name = find_documents([tmp_path / "more" / "clocks.pdf", tmp_path / "clocks.pdf"])
    assert [document.id for document in same_name] == ["clocks.pdf"]
    assert [skipped.reason for skipped in same_name.skipped] == ["it is empty"]
    shutil.rmtree(tmp_path / "more")
    plain = [document.id for document in find_documents([tmp_path])]
    assert plain == ["clocks.pdf", "note.txt", "tides.pptx"]

    def with_unreliable_reader(paths, settings, **options):
        return read_in_workers(paths, settings, reader=read_unreliably, **options)

    (tmp_path / "clocks.pdf").write_text("a clock")
    (tmp_path / "tides.pptx").write_text("sleep")
    monkeypatch.setattr(documents, "read_in_workers", with_unreliable_reader)
    found = find_documents([tmp_path], seconds_per_file=0.7, ocr="none")
    assert [document.text for document in found] == ["a clock", "a note"]
    assert [(skipped.id, skipped.reason.split(",")[0]) for skipped in found.skipped] == [
        ("damaged.docx", "its parser was ended by SIGKILL"),
        ("tides.pptx", "it takes more than 0.7 s to read"),
    ]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not enforce the limit")
def test_a_limit_of_memory_costs_one_file(tmp_path):
    """Python's own MemoryError, and compiled code that ends its process; the other files are read."""
    bomb = pages(100_000_000 * b" ")
    files = {
        "a.docx": docx(1_000_000 * "<w:p><w:r><w:t>x</w:t></w:r></w:p>"),
        "b.docx": docx(p("Fine.")),
        "c.epub": epub({"a.xhtml": page(3_000_000 * "<p>x</p>")}),
        "d.pdf": bomb,
        "e.pdf": pages(lines("Fine.")),
    }
    paths = [tmp_path / name for name in files]
    for path, data in zip(paths, files.values(), strict=True):
        path.write_bytes(data)
    large, fine, book, bomb_outcome, last = read_in_workers(paths, ReadingSettings(memory_per_file=150 << 20))
    assert summary(large) == summary(book) == "it takes more than 0.146 GiB of memory to read"
    assert summary(fine) == summary(last) == "Fine."
    assert "more than 0.146 GiB of memory" in summary(bomb_outcome)
    roomy = list(read_in_workers(paths[:1], ReadingSettings(memory_per_file=4 << 30)))
    assert summary(roomy[0]).startswith("x")


def test_parts_that_are_left_out_come_back_from_the_worker(tmp_path):
    path = tmp_path / "a.epub"
    path.write_bytes(epub({"a.xhtml": page("<p>Text.</p>"), "b.xhtml": page("")}))
    (outcome,) = read_in_workers([path])
    assert isinstance(outcome, FileContents)
    assert outcome.skipped == (SkippedPart("b.xhtml", "it has no text"),)
