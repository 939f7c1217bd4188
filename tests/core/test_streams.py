"""Files that are no files: pipes, devices, standard output, and links to them. They are opened, never replaced."""

from __future__ import annotations

import gzip
import hashlib
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from d2llm.core.errors import InputError
from d2llm.core.files import copy_of_stream, descriptor_of, is_stream, new_folder, write_bytes

CONTENT = b"a line\n" * 50_000  # more than a pipe holds
WRITE = "import sys; from pathlib import Path; from d2llm.core.files import write_bytes; print('first');"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def read_in_background(path: Path) -> tuple[threading.Thread, list[bytes]]:
    received: list[bytes] = []
    thread = threading.Thread(target=lambda: received.append(path.read_bytes()))
    thread.start()
    return thread, received


@pytest.mark.parametrize("through_link", [False, True])
def test_a_named_pipe_is_written_to(tmp_path: Path, through_link: bool):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    path = tmp_path / "link" if through_link else pipe
    if through_link:
        path.symlink_to("pipe")
    before = names(tmp_path)
    thread, received = read_in_background(pipe)
    write_bytes(path, CONTENT)
    thread.join(20)
    assert received == [CONTENT]
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert path.is_symlink() == through_link
    assert names(tmp_path) == before


def test_a_device_stays_one(tmp_path: Path):
    link = tmp_path / "link"
    link.symlink_to("/dev/null")
    write_bytes(link, CONTENT)
    assert link.readlink() == Path("/dev/null")
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)


def test_a_full_device_is_named():
    with pytest.raises(OSError, match="No space left") as caught:
        write_bytes(Path("/dev/full"), CONTENT)
    assert caught.value.filename == "/dev/full"


@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1", "LINK"])
def test_standard_output_keeps_what_was_printed_before(tmp_path: Path, name: str):
    if name == "LINK":
        (tmp_path / "to-stdout").symlink_to("/dev/stdout")
        (tmp_path / "LINK").symlink_to("to-stdout")
        name = str(tmp_path / "LINK")
    output = tmp_path / "output"
    code = f"{WRITE} write_bytes(Path({name!r}), b'second\\n'); print('third')"
    with output.open("wb") as file:
        subprocess.run([sys.executable, "-c", code], stdout=file, check=True, timeout=120)
    assert output.read_text() == "first\nsecond\nthird\n"
    assert "output" in names(tmp_path)
    assert not any(each.startswith(".") for each in names(tmp_path))


def test_an_open_file_with_another_number_is_written_to(tmp_path: Path):
    reading, writing = os.pipe()
    try:
        assert descriptor_of(Path(f"/dev/fd/{writing}")) == writing
        write_bytes(Path(f"/dev/fd/{writing}"), b"content")
        assert os.read(reading, 100) == b"content"
    finally:
        os.close(reading)
        os.close(writing)


def test_nothing_is_written_to_a_stream_if_the_content_is_not_complete(tmp_path: Path):
    from d2llm.core.files import new_file

    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)

    def fail() -> None:
        with new_file(pipe) as file:
            file.write(b"half")
            raise ValueError

    with pytest.raises(ValueError):  # and it does not wait for somebody to read the pipe
        fail()


def test_a_link_to_a_file_stays_and_the_file_is_replaced(tmp_path: Path):
    (tmp_path / "folder").mkdir()
    target = tmp_path / "folder" / "target"
    target.write_bytes(b"old")
    (tmp_path / "link").symlink_to("folder/target")
    (tmp_path / "second").symlink_to("link")
    write_bytes(tmp_path / "second", b"new")
    assert target.read_bytes() == b"new"
    assert (tmp_path / "second").is_symlink()
    assert (tmp_path / "link").is_symlink()
    assert names(tmp_path / "folder") == ["target"]


def test_a_link_to_nothing_makes_the_file_that_it_leads_to(tmp_path: Path):
    (tmp_path / "link").symlink_to("new-file")
    write_bytes(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "new-file").read_bytes() == b"new"


def test_a_link_in_a_circle_is_refused(tmp_path: Path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    assert not is_stream(tmp_path / "a")
    with pytest.raises(InputError, match="leads to itself"):
        write_bytes(tmp_path / "a", b"new")
    assert names(tmp_path) == ["a", "b"]


def test_no_folder_replaces_a_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    for path in (Path("-"), Path("pipe"), Path("/dev/stdout"), Path("/dev/null")):
        with pytest.raises(InputError, match="cannot be written to a pipe"), new_folder(path):
            pass
    assert names(tmp_path) == ["pipe"]


@pytest.mark.parametrize("path", ["file", "folder", "missing", "link"])
def test_files_and_folders_are_no_streams(tmp_path: Path, path: str):
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("file")
    assert not is_stream(tmp_path / path)


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (b'{"id": "1"}\n', "standard-input-HASH.jsonl"),
        (b'\xef\xbb\xbf\n {"id": "1"}\n', "standard-input-HASH.jsonl"),
        (gzip.compress(b'{"id": "1"}\n' * 1000, mtime=0), "standard-input-HASH.jsonl.gz"),
        (b"\x1f\x8b, but not compressed", "standard-input-HASH.txt.gz"),
        (b"<!DOCTYPE html><p>text", "standard-input-HASH.html"),
        (b"%PDF-1.7 ...", "standard-input-HASH.pdf"),
        (b"plain text", "standard-input-HASH.txt"),
        (b"", "standard-input-HASH.txt"),
    ],
)
def test_a_stream_is_copied_and_named_by_its_content(tmp_path: Path, content: bytes, name: str):
    reading, writing = os.pipe()
    os.write(writing, content)
    os.close(writing)
    try:
        copy = copy_of_stream(Path(f"/dev/fd/{reading}"), tmp_path)
    finally:
        os.close(reading)
    name = name.replace("HASH", hashlib.sha256(content).hexdigest()[:8])
    assert (copy.name, copy.read_bytes()) == (name, content)
    assert names(tmp_path) == [name]


def test_a_named_pipe_is_copied_whole_under_its_own_name(tmp_path: Path):
    (tmp_path / "copies").mkdir()
    pipe = tmp_path / "queries.tsv"
    os.mkfifo(pipe)
    thread = threading.Thread(target=pipe.write_bytes, args=[CONTENT])
    thread.start()
    copy = copy_of_stream(pipe, tmp_path / "copies")
    thread.join(20)
    assert (copy.name, copy.read_bytes()) == ("queries.tsv", CONTENT)
