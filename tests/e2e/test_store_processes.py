"""Other processes read a store while it is being written, and without permission to write."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from d2llm.store import vector_file
from d2llm.store.inspection import verify
from d2llm.store.view import PassageView
from store_reader import read, search
from tiny_store import check_contents, few_passages, new_store, put

TESTS = Path(__file__).parents[1]
NOBODY = 65_534


class Reader:
    """A separate reader process, possibly run as another user."""

    def __init__(self, user: int | None = None) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(TESTS / "store_reader.py"), *([str(user)] if user else [])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS.parent / "src"), str(TESTS)])},
        )
        assert self.answer() == "ready"

    def answer(self) -> Any:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def ask(self, line: str) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self.answer()

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


def test_readers_keep_their_version_while_a_writer_continues(tmp_path):
    store, passages = new_store(tmp_path / "index"), few_passages(20)
    put(store, passages.values())
    store.update_word_files()
    readers = [Reader() for _ in range(2)]
    try:
        assert [reader.ask(f"open {store.folder}") for reader in readers] == [20] * 2
        versions = [read(PassageView(store))] * 2
        for step in range(4):
            put(store, few_passages(6, start=5 * step, word=f"step{step}").values())
            store.delete([f"p{3 * step}"])
            store.compact(dense=step % 2 == 0)
            store.snapshot(f"s{step}")
            current = read(PassageView(store))
            for number, reader in enumerate(readers):
                assert reader.ask("read") == versions[number]
                assert reader.ask("search common")[1]
            fresh = readers[step % 2]
            assert fresh.ask("open") == len(current)
            versions[step % 2] = current
            assert fresh.ask("read") == current
            assert fresh.ask(f"search own{5 * step + 1}") == search(PassageView(store), f"own{5 * step + 1}")
        with store.writing():
            refused = readers[0].ask("write")
        assert refused
        assert all("IndexLockedError" in answer for answer in refused)
        assert not any("IndexLockedError" in answer for answer in readers[0].ask("write"))  # the lock has been released
        assert verify(store).problems == []
    finally:
        for reader in readers:
            reader.end()


@pytest.fixture(scope="module")
def stranger() -> Iterator[Reader]:
    """A reader that runs as a user who owns nothing, if these tests may switch users."""
    reader = Reader(NOBODY if os.geteuid() == 0 else None)
    yield reader
    reader.end()


@pytest.mark.parametrize("vectors", ["whole", "missing", "damaged"])
def test_users_without_write_permission_can_read(stranger, vectors):
    folder = Path(tempfile.mkdtemp(prefix="store-"))  # other users cannot enter pytest's own folders
    store, passages = new_store(folder / "index"), few_passages(20)
    put(store, passages.values())
    store.update_word_files()
    store.snapshot("a")
    expected, expected_hits = read(PassageView(store)), search(PassageView(store), "own7")
    if vectors == "missing":
        for suffix in (".bin", ".json"):
            vector_file.path_of(store.folder, 0).with_suffix(suffix).unlink()
    elif vectors == "damaged":
        path = vector_file.path_of(store.folder, 0)
        content = path.read_bytes()
        path.unlink()
        path.write_bytes(content[:-3] + b"xyz")
    files = sorted(folder.rglob("*"))
    as_root = os.geteuid() == 0
    for path in [folder, *files]:
        path.chmod((0o755 if path.is_dir() else 0o644) & (0o777 if as_root else 0o555))
    try:
        assert stranger.ask(f"open {store.folder}") == 20
        assert stranger.ask("read") == expected
        assert stranger.ask("search own7") == expected_hits
        answers = stranger.ask("write")
        assert answers
        for answer in answers:
            assert answer.startswith("StorageError: ")
            assert str(store.folder) in answer
            assert "Permission denied" in answer
            assert "What was committed before is kept" in answer
        assert sorted(folder.rglob("*")) == files
    finally:
        for path in [folder, *files]:
            path.chmod(0o755)
    check_contents(PassageView(store), passages)
    assert verify(store).problems == []
    shutil.rmtree(folder)
