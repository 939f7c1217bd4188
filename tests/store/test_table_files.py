"""Checksums of a table's files: detection of damage, commits, and repairs."""

from __future__ import annotations

import json
import shutil
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import xxhash

from d2llm.core.errors import DamagedFileError, DataFormatError, InputError, StorageError
from d2llm.core.types import Passage
from d2llm.store import checksums, table_files
from d2llm.store.checksums import FileSums, problem_of, read_checked, sample_blocks, take_sums
from d2llm.store.index_store import IndexStore
from d2llm.store.inspection import verify
from d2llm.store.lance_manifest import manifests
from d2llm.store.lancedb_import import import_lancedb
from d2llm.store.table_files import TableFiles
from d2llm.store.view import PassageView
from tiny_store import DIM, check_contents, few_passages, new_store, put, vectors_of

PASSAGES = few_passages(20)
LATER = few_passages(4, start=30, word="later")
QUERY = np.ones(DIM, np.float32)


@pytest.fixture
def store(tmp_path):
    store = new_store(tmp_path / "index")
    put(store, PASSAGES.values())
    store.update_indices()
    return store


def _reopen(store):
    return PassageView(IndexStore.open(store.folder))


def _files(store, pattern):
    return sorted((store.folder / "passages.lance").glob(pattern))


def _flip(path: Path, position: int = -1) -> None:
    """Flip a bit in a new file of the same name, because a snapshot may share the old one."""
    content = bytearray(path.read_bytes())
    content[position] ^= 4
    path.unlink()
    path.write_bytes(content)


def _newest_manifest(store):
    return store.folder / "passages.lance" / next(iter(manifests(store.folder / "passages.lance").values()))


@contextmanager
def _small_blocks(monkeypatch, sampled):
    """Make files look large: blocks of 64 bytes, of which ``sampled`` and the last are checked at opening."""
    with monkeypatch.context() as patch:
        patch.setattr(checksums, "BLOCK_BYTES", 64)
        patch.setattr(checksums, "_SAMPLED_BLOCKS", sampled)
        yield


# Checksums of a file


def test_checksums_of_a_file(tmp_path, monkeypatch):
    content = np.random.default_rng(0).bytes(64 * 3 + 10)
    (tmp_path / "file").write_bytes(content)
    with _small_blocks(monkeypatch, 0):
        sums = take_sums(tmp_path / "file")
        parts = [content[start : start + 64] for start in range(0, len(content), 64)]
        assert sums == FileSums(202, "".join(map(xxhash.xxh3_64_hexdigest, parts)))
        assert sums.num_blocks == 4
        assert problem_of(tmp_path / "file", sums) is None
        _flip(tmp_path / "file", 130)
        assert problem_of(tmp_path / "file", sums, [0, 1, 3]) is None
        assert problem_of(tmp_path / "file", sums) == "is not what was written (in the 64 bytes from 128 on)"
        (tmp_path / "file").write_bytes(content[:-1])
        assert problem_of(tmp_path / "file", sums, [0]) == "has 201 bytes where 202 were written"
        (tmp_path / "file").unlink()
        assert problem_of(tmp_path / "file", sums, [0]) == "is missing"
        (tmp_path / "empty").touch()
        assert take_sums(tmp_path / "empty") == FileSums(0, xxhash.xxh3_64_hexdigest(b""))


def test_sampled_blocks(monkeypatch):
    files = {"a": FileSums(0, "x" * 16 * 50), "b": FileSums(0, "x" * 16)}
    with _small_blocks(monkeypatch, 10):
        samples = [sample_blocks(files) for _ in range(30)]
    assert all(sample["b"] == [0] and sample["a"][0] == 49 and len(set(sample["a"])) == 11 for sample in samples)
    assert len({block for sample in samples for block in sample["a"]}) > 30  # different blocks each time


def test_the_record_lists_every_file_a_search_reads(store):
    record = read_checked(store.folder / "checksums.json")
    paths = [path for path in store.folder.rglob("*") if path.is_file()]
    excluded = ("_transactions", "latest_version_hint.json", "checksums.json", "vectors-0", "words-0", "write.lock")
    paths = [path for path in paths if not any(name in str(path) for name in excluded)]
    listed = {path.relative_to(store.folder).as_posix() for path in paths}
    assert record["files"].keys() == listed
    assert "manifest.json" in listed
    assert record["version"] == store.table().version == store.version
    for path, (num_bytes, sums) in record["files"].items():
        content = (store.folder / path).read_bytes()
        assert (num_bytes, sums) == (len(content), xxhash.xxh3_64_hexdigest(content))


# Detection


@pytest.mark.parametrize("pattern", ["data/*", "_versions/*.manifest", "_indices/*/page_data.lance"])
@pytest.mark.parametrize("damage", ["flipped", "cut", "removed", "empty"])
def test_damage_is_an_error_that_names_the_file(store, pattern, damage):
    store.table().optimize(timedelta(0))
    path = _newest_manifest(store) if "versions" in pattern else _files(store, pattern)[0]
    content = path.read_bytes()
    if damage == "flipped":
        _flip(path, len(content) // 2)
    else:
        path.unlink()
        if damage != "removed":
            path.write_bytes(content[: len(content) // 2] if damage == "cut" else b"")
    with pytest.raises(DamagedFileError) as caught:
        _reopen(store)
    assert caught.value.path == path
    assert "verify --repair" in str(caught.value)
    (problem,) = verify(IndexStore.open(store.folder)).problems
    assert problem.startswith(path.relative_to(store.folder).as_posix())


def test_the_index_manifest_is_checked_too(store):
    path = store.folder / "manifest.json"
    path.write_text(path.read_text().replace("asymmetric", "symmetric"))
    with pytest.raises(DamagedFileError, match=r"manifest.json: has .* put it back from a copy"):
        _reopen(store)


def test_large_files_are_sampled_first_and_checked_before_use(tmp_path, monkeypatch):
    with _small_blocks(monkeypatch, 0):
        store = new_store(tmp_path / "index")
        put(store, few_passages(200).values())
        store.update_indices()
        data, pages = _files(store, "data/*")[0], _files(store, "_indices/*/page_data.lance")[0]
        content = pages.read_bytes()
        _flip(pages, 70)
        view = _reopen(store)  # its last block is intact
        with pytest.raises(DamagedFileError, match=pages.name):
            view.rows(["p3"])
        pages.write_bytes(content)
        _reopen(store).rows(["p3"])
        _flip(data, 70)
        view = _reopen(store)
        for change in (lambda: store.compact(dense=True), lambda: store.snapshot("a"), store.compact):
            with pytest.raises(DamagedFileError, match=data.name):
                change()  # copies would get valid checksums
        assert store.snapshots() == []
        assert len(verify(IndexStore.open(store.folder)).problems) == 1
        assert len(view) == 200


def test_each_opening_samples_different_blocks(tmp_path, monkeypatch):
    with _small_blocks(monkeypatch, 20):
        store = new_store(tmp_path / "index")
        put(store, few_passages(200).values())
        (data,) = _files(store, "data/*")
        num_blocks = data.stat().st_size // 64
        assert num_blocks > 60
        # All 60 openings miss the damage once in 30 million runs.
        monkeypatch.setattr(checksums, "_SAMPLED_BLOCKS", num_blocks // 4)
        _flip(data, 70)
        num_detected = 0
        for _ in range(60):
            try:
                _reopen(store)
            except DamagedFileError:
                num_detected += 1
        assert 0 < num_detected < 60


def test_passages_are_checked_against_their_hashes(store):
    """Even if the checksums of the files do not show the damage."""
    table = store.table()
    rows = table.columns(table.schema.names).to_pylist()
    rows[3]["text"] = "another"
    table.replace_all(table.schema, iter(pa.Table.from_pylist(rows, schema=table.schema).to_batches()))
    view = PassageView(store)
    for read in (lambda: view.get([rows[3]["id"]]), lambda: view.passages(np.arange(20))):
        with pytest.raises(DamagedFileError, match="1 passages in its table are not what was written") as caught:
            read()
        assert repr(rows[3]["id"]) in str(caught.value)
    assert [passage.id for passage in view.get([rows[4]["id"]])] == [rows[4]["id"]]


def test_duplicate_row_numbers_are_an_error(store):
    table = store.table()
    rows = table.columns(table.schema.names).to_pylist()
    rows[3]["d2_row"] = rows[4]["d2_row"]
    table.replace_all(table.schema, iter(pa.Table.from_pylist(rows, schema=table.schema).to_batches()))
    with pytest.raises(DataFormatError, match="two passages of its table have the same row"):
        PassageView(store)


# Commits


def _commit_lance_only(store, passages):
    """Leave the state of a writer that is killed between the two commits."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TableFiles, "commit", lambda *_, **__: None)
        patch.setattr(TableFiles, "end", lambda _: None)
        put(store, passages)
    store.files._record = None


def test_readers_do_not_see_a_version_between_the_two_commits(store):
    before = store.version
    other = IndexStore.open(store.folder)
    with store.writing():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(TableFiles, "commit", lambda *_, **__: None)
            changes = store.compare(list(LATER.values()))
            store.write(changes, vectors_of(changes.texts))
        assert max(manifests(store.folder / "passages.lance")) == before + 1
        assert other.version == other.table().version == before
        check_contents(PassageView(other), PASSAGES)
        store.files.commit()
        assert other.version == before + 1
        check_contents(PassageView(other), PASSAGES | LATER)
    assert not (store.folder / "write.unfinished").exists()


def test_the_commit_of_a_killed_writer_is_completed(store):
    before = store.version
    _commit_lance_only(store, LATER.values())
    assert (store.folder / "write.unfinished").exists()
    check_contents(_reopen(store), PASSAGES | LATER)
    assert not (store.folder / "write.unfinished").exists()
    assert read_checked(store.folder / "checksums.json")["version"] == before + 1
    assert verify(store).problems == []


def test_after_a_crash_every_block_is_checked_once(tmp_path, monkeypatch):
    with _small_blocks(monkeypatch, 0):
        store = new_store(tmp_path / "index")
        put(store, few_passages(200).values())
        (data,) = _files(store, "data/*")
        content = data.read_bytes()
        _flip(data, 70)
        _reopen(store)  # the samples miss the damage
        (store.folder / "write.unfinished").touch()
        for _ in range(2):
            with pytest.raises(DamagedFileError, match=data.name):
                _reopen(store)
        with pytest.raises(DamagedFileError, match=data.name):
            put(IndexStore.open(store.folder), LATER.values())
        assert (store.folder / "write.unfinished").exists()
        data.write_bytes(content)
        _reopen(store)
        assert not (store.folder / "write.unfinished").exists()


def test_opening_after_a_crash_without_write_permission(store, monkeypatch):
    data = _files(store, "data/*")[0]
    (store.folder / "write.unfinished").touch()

    def deny(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("filelock.FileLock.acquire", deny)
    check_contents(_reopen(store), PASSAGES)
    _flip(data)
    with pytest.raises(DamagedFileError, match=data.name):
        _reopen(store)
    assert (store.folder / "write.unfinished").exists()


def test_a_change_is_undone_if_its_checksums_cannot_be_written(store, monkeypatch):
    """No part of the change remains in the index, as the error says."""
    version, manifests_before = store.version, manifests(store.folder / "passages.lance")

    def fail(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checksums, "write_checked", fail)
        for change in (lambda: put(store, LATER.values()), lambda: store.delete(["p1"])):
            with pytest.raises(StorageError, match="No space left"):
                change()
    assert manifests(store.folder / "passages.lance") == manifests_before
    assert not (store.folder / "write.unfinished").exists()
    assert store.version == version
    check_contents(_reopen(store), PASSAGES)
    put(store, LATER.values())
    check_contents(_reopen(store), PASSAGES | LATER)
    assert verify(store).problems == []


def test_checksums_of_existing_files_are_never_recomputed(store):
    path = _files(store, "data/*")[0]
    other = IndexStore.open(store.folder)
    with other.writing():
        table = other.table()
        row = table.columns(table.schema.names).to_pylist()[0]
        _flip(path)
        block = pa.Table.from_pylist([row | {"id": "new", "d2_row": 20}], schema=table.schema)
        table.put(block, replaces=False)
    assert [problem.split(":")[0] for problem in verify(other).problems] == [path.relative_to(store.folder).as_posix()]


def test_a_missing_file_is_still_an_error_after_a_write(store):
    other = IndexStore.open(store.folder)
    with other.writing():
        table = other.table()
        path = _files(store, "data/*")[0]
        path.unlink()
        table.add_columns([table.schema.field("year").with_name("month")])
    with pytest.raises(DamagedFileError, match=f"{path.name}: is missing"):
        _reopen(store)


def test_a_reader_waits_for_a_writer_that_removes_versions(store, monkeypatch):
    """It opens the index between the removal of the version in the record and the commit of the next."""
    monkeypatch.setattr(table_files, "_POLL_SECONDS", 0.0)
    other, files = IndexStore.open(store.folder), store.files
    with store.writing():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(TableFiles, "commit", lambda *_, **__: None)
            import_lancedb().connect(store.folder).open_table("passages").delete("id = 'p1'")
        for version, path in manifests(files.table).items():
            if version <= other.files.record().version:
                (files.table / path).unlink()
        waits = []

        def wait(_):
            waits.append(1)
            if len(waits) == 5:
                files.commit()

        monkeypatch.setattr(table_files.time, "sleep", wait)
        assert len(PassageView(other)) == len(PASSAGES) - 1
        assert len(waits) == 5


# Writes that bypass the checksums, and lost checksums


def test_lancedb_writes_to_an_index(store, caplog):
    import_lancedb().connect(store.folder).open_table("passages").delete("id = 'p1'")  # without our lock and commit
    remaining = {key: value for key, value in PASSAGES.items() if key != "p1"}
    check_contents(_reopen(store), remaining)
    assert "has no checksums; it was written by LanceDB directly" in caplog.text
    (problem,) = verify(store).problems
    assert f"version {store.version} was written by LanceDB directly and has no checksums" in problem
    put(store, LATER.values())
    check_contents(_reopen(store), remaining | LATER)
    assert verify(store).problems == []


def test_lancedb_compacts_an_index(store):
    put(store, LATER.values())
    for _ in range(3):
        with pytest.warns(UserWarning, match="removes every version"):
            import_lancedb().connect(store.folder).open_table("passages").optimize(cleanup_older_than=timedelta(0))
    check_contents(_reopen(store), PASSAGES | LATER)
    put(store, [Passage("new", "text")])
    assert verify(store).problems == []


@pytest.mark.parametrize("damage", ["lost", "flipped", "garbage"])
def test_lost_checksums_are_rebuilt_by_a_repair(store, damage):
    path = store.folder / "checksums.json"
    if damage == "lost":
        path.unlink()
    elif damage == "flipped":
        _flip(path, 40)
    else:
        path.write_text("{")
    with pytest.raises(DamagedFileError, match=r"checksums.json: (is missing|cannot be used).*verify --repair"):
        _reopen(store)
    with pytest.raises(DamagedFileError):
        put(IndexStore.open(store.folder), LATER.values())
    problem, outcome = verify(IndexStore.open(store.folder), repair=True).problems
    assert "checksums.json" in problem
    assert outcome == "the checksums and the table's indices were rebuilt after all of its rows were compared"
    assert verify(IndexStore.open(store.folder)).problems == []
    view = _reopen(store)
    check_contents(view, PASSAGES)
    assert view.ids(view.match("own3", 3).rows) == ["p3"]


def test_lost_checksums_are_not_rebuilt_from_damaged_texts(store):
    """The hashes of the rows show the damage."""
    table = store.table()
    rows = table.columns(table.schema.names).to_pylist()
    rows[3]["text"] = "another"
    table.replace_all(table.schema, iter(pa.Table.from_pylist(rows, schema=table.schema).to_batches()))
    (store.folder / "checksums.json").unlink()
    problems = verify(IndexStore.open(store.folder), repair=True).problems
    assert any("1 passages in the table are not what was written" in problem for problem in problems)
    with pytest.raises(DamagedFileError, match=r"checksums.json: is missing"):
        _reopen(store)


# Repair and restore


def test_a_damaged_file_is_replaced_from_a_snapshot(store):
    store.snapshot("a")
    put(store, LATER.values())
    (path,) = [path for path in _files(store, "data/*") if path.stat().st_nlink == 2]
    for damage in (lambda: path.unlink(), lambda: _flip(path)):
        damage()
        *_, outcome = verify(IndexStore.open(store.folder), repair=True).problems
        assert outcome == f"{path.relative_to(store.folder).as_posix()} was taken from 'a'"
        assert verify(IndexStore.open(store.folder)).problems == []
        check_contents(_reopen(store), PASSAGES | LATER)
    (store.folder / "snapshots" / "a" / path.relative_to(store.folder)).unlink()  # and the other way round
    *_, outcome = verify(IndexStore.open(store.folder), repair=True).problems
    assert outcome.endswith("was taken from 'index'")
    check_contents(PassageView(IndexStore.open(store.folder / "snapshots" / "a")), PASSAGES)


def test_going_back_to_the_last_intact_version(store):
    version = store.version
    put(store, LATER.values())
    store.delete(["p3"])
    damaged = _files(store, "_deletions/*")[-1]
    _flip(damaged)
    *_, suggestion, remaining = verify(IndexStore.open(store.folder), repair=True).problems
    assert f"version {version + 1} is the last intact one; `d2llm index ... verify --repair --go-back`" in suggestion
    assert damaged.name in remaining
    with pytest.raises(DamagedFileError):
        _reopen(store)
    with pytest.raises(InputError, match="add --repair"):
        verify(store, go_back=True)
    problem, outcome = verify(IndexStore.open(store.folder), repair=True, go_back=True).problems
    assert damaged.name in problem
    assert outcome == (
        f"the table is back at version {version + 1}, the last intact one; the changes of version "
        f"{version + 2} are lost: apply them again"
    )
    check_contents(_reopen(store), PASSAGES | LATER)
    assert verify(store).problems == []
    store.delete(["p4"])  # reuses the number of the lost version
    remaining = {key: value for key, value in (PASSAGES | LATER).items() if key != "p4"}
    check_contents(_reopen(store), remaining)
    assert verify(store).problems == []


def test_a_lost_newest_version_is_an_error(store):
    """Its file is gone, as after a power failure: this is an error, not a silent step back."""
    put(store, LATER.values())
    _newest_manifest(store).unlink()
    with pytest.raises(DamagedFileError, match=r"manifest: is missing"):
        _reopen(store)
    verify(IndexStore.open(store.folder), repair=True, go_back=True)
    check_contents(_reopen(store), PASSAGES)
    put(store, LATER.values())
    check_contents(_reopen(store), PASSAGES | LATER)
    assert verify(store).problems == []


def test_damaged_earlier_versions_are_removed_by_a_repair(store):
    store.delete(["p1"])
    old_version = store.version
    pinned = PassageView(IndexStore.open(store.folder))
    store.delete(["p2"])
    damaged = _files(store, "_deletions/*")
    (path,) = [path for path in damaged if path.name.startswith(f"0-{old_version - 1}-")]
    _flip(path)
    remaining = {key: value for key, value in PASSAGES.items() if key not in ("p1", "p2")}
    check_contents(_reopen(store), remaining)  # does not need the damaged file
    with pytest.raises(DamagedFileError, match=path.name):
        PassageView(IndexStore.open(store.folder), old_version)
    (problem,) = verify(IndexStore.open(store.folder)).problems
    assert f"only earlier versions need it: {old_version}" in problem
    *_, outcome = verify(IndexStore.open(store.folder), repair=True).problems
    assert outcome == f"earlier versions of the table were damaged and were removed: version {old_version}"
    assert verify(store).problems == []
    check_contents(_reopen(store), remaining)
    assert pinned.version == old_version


@pytest.mark.parametrize("damage", ["data", "manifest", "table", "checksums", "index"])
def test_a_snapshot_is_restored_over_damage(store, damage):
    store.snapshot("a")
    put(store, LATER.values())
    if damage == "table":
        shutil.rmtree(store.folder / "passages.lance")
    elif damage == "checksums":
        (store.folder / "checksums.json").unlink()
    else:
        damaged = {"data": _files(store, "data/*")[0], "index": _files(store, "_indices/*/*")[0]}
        _flip(damaged.get(damage, _newest_manifest(store)))
    damaged = IndexStore.open(store.folder)
    with pytest.raises(DamagedFileError):
        PassageView(damaged)
    assert damaged.restore("a") == len(PASSAGES)
    view = _reopen(store)
    check_contents(view, PASSAGES)
    assert view.ids(view.match("own3", 3).rows) == ["p3"]
    assert verify(store).problems == []
    put(store, LATER.values())
    check_contents(_reopen(store), PASSAGES | LATER)
    assert list(store.folder.glob(".passages*")) == []
    assert not (store.folder / "write.unfinished").exists()


def test_a_snapshot_has_only_the_files_of_its_version(store):
    put(store, LATER.values())
    store.delete(["p1"])
    folder = store.snapshot("a")
    snapshot = IndexStore.open(folder)
    assert snapshot.version == store.version
    assert list(manifests(folder / "passages.lance")) == [store.version]
    paths = [path for path in (folder / "passages.lance").rglob("*") if path.is_file()]
    assert all(path.stat().st_nlink == 2 for path in paths)
    record = json.loads((folder / "checksums.json").read_text())
    assert record["files"].keys() <= json.loads((store.folder / "checksums.json").read_text())["files"].keys()
    assert paths[0].samefile(store.folder / paths[0].relative_to(folder))
