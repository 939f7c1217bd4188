"""File systems of several machines, tables that another program holds, and what a killed writer leaves."""

from __future__ import annotations

import os
import signal
import sqlite3
from contextlib import closing

import pytest

from campaign.histories import fork
from d2llm.core.errors import IndexLockedError
from d2llm.core.types import Passage
from d2llm.store import storage
from d2llm.store.index_spec import StoredSpec
from d2llm.store.index_store import IndexStore
from d2llm.store.inspection import verify
from d2llm.store.passage_table import NAME
from d2llm.store.storage import file_system
from d2llm.store.view import PassageView
from tiny_store import check_contents, few_passages, new_store, put

MOUNTS = """\
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/root rw
40 22 0:35 / /mnt/team\\040share rw - nfs4 server:/export rw
41 40 0:36 / /mnt/team\\040share/local rw - xfs /dev/sdb rw
42 22 0:37 / /data rw - tmpfs tmpfs rw
43 22 0:38 / /data rw - cifs //server/data rw
"""


@pytest.fixture
def mounts(tmp_path, monkeypatch):
    file = tmp_path / "mountinfo"
    file.write_text(MOUNTS)
    monkeypatch.setattr(storage, "_MOUNTS", file)
    return file


@pytest.mark.parametrize(
    ("folder", "kind"),
    [
        ("/somewhere/docs.index", "ext4"),
        ("/mnt/team share/docs.index", "nfs4"),
        ("/mnt/team share", "nfs4"),
        ("/mnt/team shared/docs.index", "ext4"),  # only begins alike
        ("/mnt/team share/local/docs.index", "xfs"),
        ("/data/docs.index", "cifs"),  # mounted over another
    ],
)
def test_the_file_system_is_that_of_the_deepest_mount(mounts, folder, kind):
    assert file_system(folder) == kind


def test_other_systems_say_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(storage, "_MOUNTS", tmp_path / "missing")
    assert file_system(tmp_path) is None


def test_an_index_on_a_network_file_system_is_warned_of_once(mounts, tmp_path, caplog):
    mounts.write_text(MOUNTS + f"50 22 0:40 / {tmp_path} rw - nfs4 server:/home rw\n")
    IndexStore.create(tmp_path / "i", StoredSpec(student="student", dim=8))
    IndexStore.open(tmp_path / "i")
    [record] = [record for record in caplog.records if "network file system" in record.message]
    assert "(nfs4)" in record.message
    assert "copy a snapshot" in record.message


def test_an_index_on_a_disk_is_not(tmp_path, caplog):
    IndexStore.create(tmp_path / "i", StoredSpec(student="student", dim=8))
    assert caplog.text == ""


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(storage, "_BUSY_S", 0.05)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("begin", ["BEGIN IMMEDIATE", "BEGIN EXCLUSIVE"])
def test_a_table_that_another_program_writes_to_is_not_written_and_the_same_call_writes_it_later(tmp_path, begin):
    passages = few_passages(3)
    store = new_store(tmp_path / "i")
    put(store, passages.values())
    added = {**passages, "new": Passage("new", "a new text")}
    with closing(sqlite3.connect(store.folder / NAME, isolation_level=None)) as other:
        other.execute(begin)
        with pytest.raises(IndexLockedError, match=r"(?s)nothing was written.*locked.*close that program.*again"):
            put(store, added.values())
        check_contents(PassageView(IndexStore.open(store.folder)), passages)  # a writer keeps no reader out
        other.execute("ROLLBACK")
    put(store, added.values())
    check_contents(PassageView(IndexStore.open(store.folder)), added)
    assert verify(store).problems == []


@pytest.mark.usefixtures("impatient")
def test_a_table_that_another_program_keeps_for_itself_is_not_read_and_not_called_damaged(tmp_path):
    store = new_store(tmp_path / "i")
    put(store, few_passages(3).values())
    del store
    with closing(sqlite3.connect(tmp_path / "i" / NAME, isolation_level=None)) as other:
        other.execute("PRAGMA locking_mode=EXCLUSIVE")
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(IndexLockedError, match=r"no damage: another program holds it locked"):
            PassageView(IndexStore.open(tmp_path / "i"))


def test_what_was_committed_is_read_from_the_wal_that_a_killed_writer_left(tmp_path):
    passages = few_passages(12)
    new_store(tmp_path / "i")

    def write():
        store = IndexStore.open(tmp_path / "i")
        view = PassageView(store)  # the last connection that is closed would move the WAL into the table
        put(store, passages.values())
        assert len(view) == 0
        os.kill(os.getpid(), signal.SIGKILL)

    _, status = os.waitpid(fork(write), 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert (tmp_path / "i" / f"{NAME}-wal").stat().st_size > 0
    with closing(sqlite3.connect(f"file:{tmp_path}/i/{NAME}?immutable=1", uri=True)) as without:
        assert without.execute("SELECT count(*) FROM passages").fetchone() == (0,)
    store = IndexStore.open(tmp_path / "i")
    check_contents(PassageView(store), passages)
    assert verify(store).problems == []
