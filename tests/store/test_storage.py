"""A file system of several machines is warned of; it is recognised by what Linux says of its mounts."""

from __future__ import annotations

import pytest

from d2llm.store import storage
from d2llm.store.index_spec import StoredSpec
from d2llm.store.index_store import IndexStore
from d2llm.store.storage import file_system

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
