"""An index in step with folders of documents: what is read, kept, replaced and forgotten."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from d2llm.core.errors import InputError
from d2llm.core.types import Passage, Section, SectionedPassage
from d2llm.data import documents, ocr
from d2llm.models.student import Student
from d2llm.retrieval import upserting
from d2llm.retrieval.chunking import Chunker, Chunking
from d2llm.retrieval.index import Index
from d2llm.retrieval.sync import sync_documents
from file_cases.pdf_cases import lines, pages
from tiny_models import tiny_student_config, write_tiny_model

PICTURE = b"q 100 0 0 100 0 0 cm BI /W 1 /H 1 /BPC 8 /CS /G ID \x00 EI Q"


@pytest.fixture(scope="module")
def student(tmp_path_factory) -> Student:
    model = write_tiny_model(tmp_path_factory.mktemp("model"), "bert")
    return Student.create(tiny_student_config(model), device="cpu", dtype="float32")


@pytest.fixture
def index(student, tmp_path) -> Index:
    return Index.create(tmp_path / "index", student)


@pytest.fixture
def folder(tmp_path) -> Path:
    for name, text in {"a.md": "# A\nthe cat\n## B\nthe dog", "b.txt": "the house", "c.txt": "the river"}.items():
        write(tmp_path / "docs" / name, text)
    return tmp_path / "docs"


def write(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)


def contents(index: Index) -> dict[str, str]:
    return {passage.id: passage.text for passage in index.get(index.list_passages())}


def test_pieces_have_the_headings_they_are_under(student):
    sections = (Section("the cat", ("Animals",), 1), Section("the river", ("Nature", "Water"), 2))
    document = SectionedPassage("d", "", "Animals", metadata={"path": "d"}, sections=sections)
    first, second = Chunker(student, Chunking(24)).split(document)
    assert (first.id, first.title, first.metadata) == ("d#1", "Animals", {"path": "d", "page": 1, "num_passages": 2})
    assert (second.id, second.title, second.position) == ("d#2", "Animals > Nature > Water", 2)
    assert second.metadata == {"path": "d", "page": 2, "heading": "Nature > Water", "num_passages": 2}


def test_only_changes_are_read(index, folder, monkeypatch):
    first = sync_documents(index, [folder])
    assert (first.num_files, first.num_unchanged, first.gone) == (3, 0, ())
    assert contents(index) == {"a.md#1": "the cat", "a.md#2": "the dog", "b.txt": "the house", "c.txt": "the river"}
    read: list[str] = []
    original = documents._as_documents
    monkeypatch.setattr(
        documents, "_as_documents", lambda file, *made: (read.append(file.id), original(file, *made))[1]
    )
    assert sync_documents(index, [folder]).num_unchanged == 3
    assert read == []
    write(folder / "a.md", "# A\nthe cat")
    (folder / "b.txt").unlink()
    write(folder / "d.txt", "the music")
    report = sync_documents(index, [folder])
    assert read == ["a.md", "d.txt"]
    assert (report.num_files, report.num_unchanged, report.gone) == (3, 1, ("b.txt",))
    assert report.written.num_deleted == 3  # a.md#1, a.md#2 and b.txt
    assert contents(index) == {"a.md": "the cat", "c.txt": "the river", "d.txt": "the music"}


def test_other_passages_stay(index, folder):
    index.upsert([Passage("mine", "the light")])
    sync_documents(index, [folder])
    (folder / "b.txt").unlink()
    sync_documents(index, [folder])
    assert contents(index).keys() == {"mine", "a.md#1", "a.md#2", "c.txt"}


def test_a_file_that_can_no_longer_be_read_keeps_its_document(index, folder):
    sync_documents(index, [folder])
    (folder / "b.txt").write_bytes(b"a\0b")
    (folder / "c.txt").write_text("x" * 5000)
    report = sync_documents(index, [folder], max_bytes=1000)
    assert {skipped.id for skipped in report.skipped} == {"b.txt", "c.txt"}
    assert contents(index)["b.txt"] == "the house"
    assert contents(index)["c.txt"] == "the river"


def test_an_interrupted_sync_continues(index, folder, monkeypatch):
    original = documents.read_documents

    def interrupted(file):
        if file.id == "c.txt":
            raise KeyboardInterrupt
        return original(file)

    with monkeypatch.context() as patch:
        patch.setattr(documents, "read_documents", interrupted)
        with pytest.raises(KeyboardInterrupt):
            sync_documents(index, [folder])
    sync_documents(index, [folder])
    assert contents(index).keys() == {"a.md#1", "a.md#2", "b.txt", "c.txt"}


def sync_until(index, folder, passage, monkeypatch):
    """Sync with each passage as a commit; the process ends before the one with this id."""
    original = upserting._Upsert._compare

    def ends(upsert, shard, block):
        if block[0].id == passage:
            raise KeyboardInterrupt
        return original(upsert, shard, block)

    monkeypatch.setattr(upserting, "BLOCK_PASSAGES", 1)
    with monkeypatch.context() as patch:
        patch.setattr(upserting._Upsert, "_compare", ends)
        with pytest.raises(KeyboardInterrupt):
            sync_documents(index, [folder])


def test_a_document_written_in_part_is_read_again(index, folder, monkeypatch):
    sync_until(index, folder, "a.md#2", monkeypatch)
    assert contents(index).keys() == {"a.md#1"}
    sync_documents(index, [folder])
    assert contents(index).keys() == {"a.md#1", "a.md#2", "b.txt", "c.txt"}


def test_a_document_changed_in_part_is_read_again(index, folder, monkeypatch):
    sync_documents(index, [folder])
    write(folder / "a.md", "# A\nthe cow\n## B\nthe pig")
    sync_until(index, folder, "a.md#2", monkeypatch)
    assert [contents(index)[name] for name in ("a.md#1", "a.md#2")] == ["the cow", "the dog"]
    assert sync_documents(index, [folder]).num_unchanged == 2
    assert [contents(index)[name] for name in ("a.md#1", "a.md#2")] == ["the cow", "the pig"]


def test_a_folder_that_cannot_be_listed_keeps_its_documents(index, folder, tmp_path, monkeypatch):
    write(tmp_path / "more" / "d.txt", "the sea")
    sync_documents(index, [folder, tmp_path / "more"])
    before = contents(index)
    original = os.scandir

    def refused(path):
        if Path(path) == tmp_path / "more":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return original(path)

    monkeypatch.setattr(os, "scandir", refused)
    (folder / "b.txt").unlink()
    report = sync_documents(index, [folder, tmp_path / "more"])
    assert report.gone == ("docs/b.txt",)
    assert [skipped.id for skipped in report.skipped] == ["more"]
    assert contents(index).keys() == before.keys() - {"docs/b.txt"}


def test_whole_documents(index, folder):
    sync_documents(index, [folder], chunking=Chunking(None))
    assert contents(index).keys() == {"a.md", "b.txt", "c.txt"}
    assert sync_documents(index, [folder]).num_unchanged == 3


def test_a_folder_without_documents_deletes_nothing(index, folder, tmp_path):
    sync_documents(index, [folder])
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="there are no documents"):
        sync_documents(index, [tmp_path / "empty"])
    assert len(contents(index)) == 4


class TestTables:
    """Each row is a document; the file is what is read again, and what is gone."""

    @pytest.fixture
    def folder(self, tmp_path) -> Path:
        write(tmp_path / "docs" / "a.csv", "name,size\ncat,1\ndog,2\nbird,3\n")
        write(tmp_path / "docs" / "b.jsonl", '{"_id": "x", "text": "the house"}\n{"_id": "y", "text": "the river"}\n')
        return tmp_path / "docs"

    def test_rows_are_documents(self, index, folder):
        report = sync_documents(index, [folder])
        assert (report.num_files, report.written.num_documents) == (2, 5)
        assert contents(index) == {
            "a.csv/1": "name: cat\nsize: 1",
            "a.csv/2": "name: dog\nsize: 2",
            "a.csv/3": "name: bird\nsize: 3",
            "x": "the house",
            "y": "the river",
        }
        assert sync_documents(index, [folder]).num_unchanged == 2

    def test_rows_that_are_gone(self, index, folder):
        sync_documents(index, [folder])
        write(folder / "a.csv", "name,size\ncat,1\n")
        write(folder / "b.jsonl", '{"_id": "y", "text": "the river"}\n{"_id": "z", "text": "the light"}\n')
        report = sync_documents(index, [folder])
        assert (report.num_unchanged, report.gone) == (0, ())
        assert contents(index).keys() == {"a.csv/1", "y", "z"}
        (folder / "b.jsonl").unlink()
        assert sync_documents(index, [folder]).gone == ("b.jsonl",)
        assert contents(index).keys() == {"a.csv/1"}

    def test_rows_that_move_to_another_file(self, index, folder):
        sync_documents(index, [folder])
        (folder / "b.jsonl").rename(folder / "c.jsonl")
        assert sync_documents(index, [folder]).gone == ("b.jsonl",)
        assert {"x", "y"} <= contents(index).keys()
        assert sync_documents(index, [folder]).num_unchanged == 2

    def test_a_table_written_in_part_is_read_again(self, index, folder):
        sync_documents(index, [folder])
        index.delete(["a.csv/2"])
        assert sync_documents(index, [folder]).num_unchanged == 1
        assert "a.csv/2" in contents(index)

    def test_a_long_row_is_split_and_known(self, index, folder):
        write(folder / "a.csv", "name,note\ncat," + "The cat sleeps. " * 100 + "\ndog,x\n")
        sync_documents(index, [folder])
        assert {"a.csv/1#1", "a.csv/1#2", "a.csv/2"} <= contents(index).keys()
        assert sync_documents(index, [folder]).num_unchanged == 2


class TestFrontMatter:
    def test_fields_are_metadata_and_misfits_are_named(self, index, tmp_path, caplog):
        write(tmp_path / "docs" / "a.md", "---\ntitle: First\nyear: 2020\ntags: [x, y]\nid: one\npage: 7\n---\nthe cat")
        write(tmp_path / "docs" / "b.md", "---\nyear: long ago\n---\n# Second\nthe dog")
        report = sync_documents(index, [tmp_path / "docs"])
        first, second = index.get(["a.md", "b.md"])
        assert (first.title, second.title) == ("First", "Second")
        wanted = {"year": 2020, "tags": "x, y", "own_page": 7}
        assert {name: first.metadata[name] for name in wanted} == wanted
        assert "year" not in second.metadata
        assert report.written.left_out == {"id": 1, "year": 1}
        assert "2 metadata values did not fit and were dropped: id (1), year (1)" in caplog.text


class TestLinks:
    @pytest.fixture
    def linked(self, folder, tmp_path) -> Path:
        write(tmp_path / "outside" / "secret.txt", "the light")
        write(tmp_path / "outside" / "one.txt", "the music")
        (folder / "inside").symlink_to(tmp_path / "outside")
        (folder / "one.txt").symlink_to(tmp_path / "outside" / "one.txt")
        (folder / "again.txt").symlink_to(folder / "b.txt")
        return folder

    def test_are_followed(self, index, linked):
        report = sync_documents(index, [linked])
        assert {"inside/secret.txt", "one.txt"} <= contents(index).keys()
        assert report.links == ()

    def test_are_left_alone_and_named(self, index, linked):
        sync_documents(index, [linked])
        report = sync_documents(index, [linked], follow_links=False)
        assert contents(index).keys() == {"a.md#1", "a.md#2", "b.txt", "c.txt"}
        assert sorted(Path(link).name for link in report.links) == ["again.txt", "inside", "one.txt"]
        assert set(report.gone) == {"again.txt", "inside/one.txt", "inside/secret.txt", "one.txt"}

    def test_a_folder_that_is_given_may_be_a_link(self, index, linked, tmp_path):
        (tmp_path / "link").symlink_to(tmp_path / "outside")
        assert sync_documents(index, [tmp_path / "link"], follow_links=False).num_files == 2


_TESSERACT = """#!/bin/sh
if [ "$1" = --list-langs ]; then printf 'languages:\\neng\\ndeu\\n'; exit; fi
cat > /dev/null
printf 'level\\n5\\t1\\t1\\t1\\t1\\t1\\t0\\t0\\t9\\t9\\t95\\trecognised-in-%s\\n' "$4"
"""


@pytest.fixture
def install_tesseract(tmp_path, monkeypatch) -> Iterator[Callable[[bool], None]]:
    """Puts a program in the place of tesseract, which recognises its languages in every picture, or takes it away."""
    program = tmp_path / "bin" / "tesseract"
    program.parent.mkdir()

    def install(there: bool) -> None:
        if there:
            program.write_text(_TESSERACT)
            program.chmod(0o755)
        else:
            program.unlink(missing_ok=True)
        # Where there is a real one, it must not be found instead.
        monkeypatch.setenv("PATH", f"{program.parent}:/bin" if there else str(program.parent))
        ocr._installed_languages.cache_clear()

    install(False)
    yield install
    ocr._installed_languages.cache_clear()


def test_files_with_pictures_are_read_again_when_recognition_changes(index, folder, install_tesseract):
    pytest.importorskip("pypdfium2", reason="needs pypdfium2: pip install 'd2llm[documents]'")
    (folder / "mixed.pdf").write_bytes(pages(lines("The cat."), PICTURE))
    (folder / "plain.pdf").write_bytes(pages(lines("The dog.")))
    (folder / "one.png").write_bytes(b"\x89PNG\r\n")

    def recognised(**settings: str) -> tuple[int, list[str]]:
        report = sync_documents(index, [folder], **settings)
        texts = contents(index).items()
        return report.num_files - report.num_unchanged, sorted(f"{n}: {t}" for n, t in texts if "recognised" in t)

    in_english, in_german = (
        [f"mixed.pdf#2: recognised-in-{language}", f"one.png: recognised-in-{language}"] for language in ("eng", "deu")
    )
    assert recognised() == (5, [])
    assert {p.id: p.metadata.get("ocr") for p in index.get(["mixed.pdf", "plain.pdf", "b.txt"])} == {
        "mixed.pdf": "none",
        "plain.pdf": None,
        "b.txt": None,
    }
    install_tesseract(True)
    assert recognised() == (2, in_english)
    assert recognised() == recognised(ocr="eng") == (0, in_english)
    assert recognised(ocr="deu") == (2, in_german)
    install_tesseract(False)
    assert recognised() == (0, in_german)
    assert recognised(ocr="none") == (1, [])
    assert "one.png" not in contents(index)
