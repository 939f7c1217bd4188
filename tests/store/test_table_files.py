"""Checksums of a table's files: what they find and when, how they are committed, and what a repair does."""

from __future__ import annotations

import json
import shutil
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import lancedb
import numpy as np
import pyarrow as pa
import pytest
import xxhash

from d2llm.core.errors import DamagedFileError, DataFormatError, InputError, StorageError
from d2llm.core.types import Passage
from d2llm.store import checksums, table_files
from d2llm.store.checksums import FileSums, problem_of, read_checked, sample_blocks, take_sums
from d2llm.store.index_store import IndexStore
from d2llm.store.inspection import stats, verify
from d2llm.store.lance_manifest import manifests
from d2llm.store.table_files import TableFiles
from d2llm.store.view import PassageView
from tiny_store import DIM, check_contents, few_passages, forget_checksums, new_store, put, vectors_of

PASSAGES = few_passages(20)
LATER = few_passages(4, start=30, word="later")
QUERY = np.ones(DIM, np.float32)


@pytest.fixture
def store(tmp_path):
    made = new_store(tmp_path / "index")
    put(made, PASSAGES.values())
    made.settle()
    return made


def _opened(store):
    return PassageView(IndexStore.open(store.folder))


def _files(store, pattern):
    return sorted((store.folder / "passages.lance").glob(pattern))


def _flip(path: Path, place: int = -1) -> None:
    """In another file of the same name: a snapshot may share the old one."""
    content = bytearray(path.read_bytes())
    content[place] ^= 4
    path.unlink()
    path.write_bytes(content)


def _newest(store):
    return store.folder / "passages.lance" / next(iter(manifests(store.folder / "passages.lance").values()))


@contextmanager
def _small_blocks(monkeypatch, sampled):
    """As if the files were large: a block is 64 bytes, and so many are compared at opening besides the last."""
    with monkeypatch.context() as patch:
        patch.setattr(checksums, "BLOCK_BYTES", 64)
        patch.setattr(checksums, "_SAMPLED_BLOCKS", sampled)
        yield


# Sums


def test_sums_of_a_file(tmp_path, monkeypatch):
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


def test_what_is_sampled(monkeypatch):
    files = {"a": FileSums(0, "x" * 16 * 50), "b": FileSums(0, "x" * 16)}
    with _small_blocks(monkeypatch, 10):
        chosen = [sample_blocks(files) for _ in range(30)]
    assert all(some["b"] == [0] and some["a"][0] == 49 and len(set(some["a"])) == 11 for some in chosen)
    assert len({place for some in chosen for place in some["a"]}) > 30  # others each time
    assert sorted(sample_blocks(files)["a"])[:3] == [0, 1, 2] or len(sample_blocks(files)["a"]) == 33


def test_the_record_lists_all_that_a_search_reads(store):
    record = read_checked(store.folder / "checksums.json", required=True)
    paths = [path for path in store.folder.rglob("*") if path.is_file()]
    others = ("_transactions", "latest_version_hint.json", "checksums.json", "vectors-0", "words-0", "write.lock")
    paths = [path for path in paths if not any(name in str(path) for name in others)]
    listed = {path.relative_to(store.folder).as_posix() for path in paths}
    assert record["files"].keys() == listed
    assert "manifest.json" in listed
    assert record["version"] == store.table().version == store.version
    for path, (num_bytes, sums) in record["files"].items():
        content = (store.folder / path).read_bytes()
        assert (num_bytes, sums) == (len(content), xxhash.xxh3_64_hexdigest(content))


# What is found, and when


@pytest.mark.parametrize("pattern", ["data/*", "_versions/*.manifest", "_indices/*/page_data.lance"])
@pytest.mark.parametrize("how", ["flipped", "cut", "removed", "empty"])
def test_damage_is_an_error_that_names_the_file(store, pattern, how):
    store.table().optimize(timedelta(0))
    path = _newest(store) if "versions" in pattern else _files(store, pattern)[0]
    content = path.read_bytes()
    if how == "flipped":
        _flip(path, len(content) // 2)
    else:
        path.unlink()
        if how != "removed":
            path.write_bytes(content[: len(content) // 2] if how == "cut" else b"")
    with pytest.raises(DamagedFileError) as caught:
        _opened(store)
    assert caught.value.path == path
    assert "verify --repair" in str(caught.value)
    (problem,) = verify(IndexStore.open(store.folder)).problems
    assert problem.startswith(path.relative_to(store.folder).as_posix())


def test_the_manifest_of_the_index_is_compared_too(store):
    path = store.folder / "manifest.json"
    path.write_text(path.read_text().replace("asymmetric", "symmetric"))
    with pytest.raises(DamagedFileError, match=r"manifest.json: has .* put it back from a copy"):
        _opened(store)


def test_large_files_are_sampled_at_opening_and_compared_wholly_before_they_matter(tmp_path, monkeypatch):
    with _small_blocks(monkeypatch, 0):
        store = new_store(tmp_path / "index")
        put(store, few_passages(200).values())
        store.settle()
        data, pages = _files(store, "data/*")[0], _files(store, "_indices/*/page_data.lance")[0]
        content = pages.read_bytes()
        _flip(pages, 70)
        view = _opened(store)  # its last block is whole
        with pytest.raises(DamagedFileError, match=pages.name):
            view.rows(["p3"])
        pages.write_bytes(content)
        _opened(store).rows(["p3"])
        _flip(data, 70)
        view = _opened(store)
        for change in (lambda: store.compact(dense=True), lambda: store.snapshot("a"), store.compact):
            with pytest.raises(DamagedFileError, match=data.name):
                change()  # copies would get checksums that fit
        assert store.snapshots() == []
        assert len(verify(IndexStore.open(store.folder)).problems) == 1
        assert len(view) == 200


def test_samples_are_others_each_time(tmp_path, monkeypatch):
    with _small_blocks(monkeypatch, 20):
        store = new_store(tmp_path / "index")
        put(store, few_passages(200).values())
        (data,) = _files(store, "data/*")
        num_blocks = data.stat().st_size // 64
        assert num_blocks > 60
        monkeypatch.setattr(
            checksums, "_SAMPLED_BLOCKS", num_blocks // 4
        )  # not found in sixty: once in 30 million times
        _flip(data, 70)
        found = 0
        for _ in range(60):
            try:
                _opened(store)
            except DamagedFileError:
                found += 1
        assert 0 < found < 60


def test_a_passage_is_compared_with_its_hash(store):
    """Where samples do not find it: as if damage kept the checksum."""
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


def test_rows_given_twice(store):
    table = store.table()
    rows = table.columns(table.schema.names).to_pylist()
    rows[3]["d2_row"] = rows[4]["d2_row"]
    table.replace_all(table.schema, iter(pa.Table.from_pylist(rows, schema=table.schema).to_batches()))
    with pytest.raises(DataFormatError, match="two passages of its table have the same row"):
        PassageView(store)


# The commit


def _commit_of_lance_alone(store, passages):
    """What a writer leaves that is killed between the two commits."""
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


def test_what_a_killed_writer_had_committed_is_taken_over(store):
    before = store.version
    _commit_of_lance_alone(store, LATER.values())
    assert (store.folder / "write.unfinished").exists()
    check_contents(_opened(store), PASSAGES | LATER)
    assert not (store.folder / "write.unfinished").exists()
    assert read_checked(store.folder / "checksums.json")["version"] == before + 1
    assert verify(store).problems == []


def test_after_a_crash_everything_is_compared_once(tmp_path, monkeypatch):
    with _small_blocks(monkeypatch, 0):
        store = new_store(tmp_path / "index")
        put(store, few_passages(200).values())
        (data,) = _files(store, "data/*")
        content = data.read_bytes()
        _flip(data, 70)
        _opened(store)  # the samples do not find it
        (store.folder / "write.unfinished").touch()
        for _ in range(2):
            with pytest.raises(DamagedFileError, match=data.name):
                _opened(store)
        with pytest.raises(DamagedFileError, match=data.name):
            put(IndexStore.open(store.folder), LATER.values())
        assert (store.folder / "write.unfinished").exists()
        data.write_bytes(content)
        _opened(store)
        assert not (store.folder / "write.unfinished").exists()


def test_after_a_crash_without_the_right_to_write(store, monkeypatch):
    data = _files(store, "data/*")[0]
    (store.folder / "write.unfinished").touch()

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("filelock.FileLock.acquire", refuse)
    check_contents(_opened(store), PASSAGES)
    _flip(data)
    with pytest.raises(DamagedFileError, match=data.name):
        _opened(store)
    assert (store.folder / "write.unfinished").exists()


def test_checksums_that_cannot_be_written(store, monkeypatch):
    """The change is undone: nothing of it is in the index, as the error says."""
    version, there = store.version, manifests(store.folder / "passages.lance")

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checksums, "write_checked", full)
        for change in (lambda: put(store, LATER.values()), lambda: store.delete(["p1"])):
            with pytest.raises(StorageError, match="No space left"):
                change()
    assert manifests(store.folder / "passages.lance") == there
    assert not (store.folder / "write.unfinished").exists()
    assert store.version == version
    check_contents(_opened(store), PASSAGES)
    put(store, LATER.values())
    check_contents(_opened(store), PASSAGES | LATER)
    assert verify(store).problems == []


def test_a_checksum_is_never_taken_anew(store):
    path = _files(store, "data/*")[0]
    other = IndexStore.open(store.folder)
    with other.writing():
        table = other.table()
        row = table.columns(table.schema.names).to_pylist()[0]
        _flip(path)
        block = pa.Table.from_pylist([row | {"id": "new", "d2_row": 20}], schema=table.schema)
        table.put(block, replaces=False)
    assert [problem.split(":")[0] for problem in verify(other).problems] == [path.relative_to(store.folder).as_posix()]


def test_a_file_that_went_missing_stays_damage(store):
    other = IndexStore.open(store.folder)
    with other.writing():
        table = other.table()
        path = _files(store, "data/*")[0]
        path.unlink()
        table.add_columns([table.schema.field("year").with_name("month")])
    with pytest.raises(DamagedFileError, match=f"{path.name}: is missing"):
        _opened(store)


def test_a_reader_waits_for_a_writer_that_removes_versions(store, monkeypatch):
    """Between the removal of the version that readers open and the commit of another."""
    monkeypatch.setattr(table_files, "_LOOK_S", 0.0)
    other, files = IndexStore.open(store.folder), store.files
    with store.writing():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(TableFiles, "commit", lambda *_, **__: None)
            lancedb.connect(store.folder).open_table("passages").delete("id = 'p1'")
        for version, path in manifests(files.table).items():
            if version <= other.files.record().version:
                (files.table / path).unlink()
        looks = []

        def look(_):
            looks.append(1)
            if len(looks) == 5:
                files.commit()

        monkeypatch.setattr(table_files.time, "sleep", look)
        assert len(PassageView(other)) == len(PASSAGES) - 1
        assert len(looks) == 5


# Of an earlier d2llm


@pytest.fixture
def old(store):
    """An index with a snapshot that a d2llm without checksums made."""
    store.snapshot("a")
    forget_checksums(store.folder)
    forget_checksums(store.folder / "snapshots" / "a")
    return IndexStore.open(store.folder)


def test_an_index_without_checksums_is_searched_and_says_so(old):
    check_contents(PassageView(old), PASSAGES)
    assert not stats(old).checksums
    problems = verify(old).problems
    assert len(problems) == 2
    assert all("have no checksums" in problem and "the next write" in problem for problem in problems)
    assert problems[1].startswith("snapshot 'a': ")
    assert not (old.folder / "checksums.json").exists()


def test_the_next_write_takes_them(old):
    put(old, LATER.values())
    assert stats(old).checksums
    assert len(verify(old).problems) == 1  # the snapshot's
    check_contents(_opened(old), PASSAGES | LATER)
    _flip(_files(old, "data/*")[0])
    with pytest.raises(DamagedFileError):
        _opened(old)


def test_a_repair_takes_them(old):
    assert len(verify(old, repair=True).problems) == 2
    assert verify(old).problems == []
    assert stats(old).checksums
    assert (old.folder / "snapshots" / "a" / "checksums.json").exists()


def test_an_earlier_d2llm_writes_to_an_index_that_has_some(store, caplog):
    lancedb.connect(store.folder).open_table("passages").delete("id = 'p1'")  # without our lock and our commit
    left = {key: value for key, value in PASSAGES.items() if key != "p1"}
    check_contents(_opened(store), left)
    assert "has no checksums; it was written by an earlier d2llm" in caplog.text
    (problem,) = verify(store).problems
    assert f"version {store.version} was written by an earlier d2llm and has no checksums" in problem
    put(store, LATER.values())
    check_contents(_opened(store), left | LATER)
    assert verify(store).problems == []


def test_an_earlier_d2llm_compacts_an_index_that_has_some(store):
    put(store, LATER.values())
    for _ in range(3):
        with pytest.warns(UserWarning, match="removes every version"):
            lancedb.connect(store.folder).open_table("passages").optimize(cleanup_older_than=timedelta(0))
    check_contents(_opened(store), PASSAGES | LATER)
    put(store, [Passage("new", "text")])
    assert verify(store).problems == []


@pytest.mark.parametrize("how", ["lost", "flipped", "garbage"])
def test_checksums_that_are_lost(store, how):
    path = store.folder / "checksums.json"
    if how == "lost":
        path.unlink()
    elif how == "flipped":
        _flip(path, 40)
    else:
        path.write_text("{")
    with pytest.raises(DamagedFileError, match=r"checksums.json: (is missing|cannot be used).*verify --repair"):
        _opened(store)
    with pytest.raises(DamagedFileError):
        put(IndexStore.open(store.folder), LATER.values())
    problem, done = verify(IndexStore.open(store.folder), repair=True).problems
    assert "checksums.json" in problem
    assert done == "the checksums and the table's indices were rebuilt after all of its rows were compared"
    assert verify(IndexStore.open(store.folder)).problems == []
    view = _opened(store)
    check_contents(view, PASSAGES)
    assert view.ids(view.match("own3", 3).rows) == ["p3"]


def test_lost_checksums_are_not_made_of_damaged_texts(store):
    """The hashes of the rows tell."""
    table = store.table()
    rows = table.columns(table.schema.names).to_pylist()
    rows[3]["text"] = "another"
    table.replace_all(table.schema, iter(pa.Table.from_pylist(rows, schema=table.schema).to_batches()))
    (store.folder / "checksums.json").unlink()
    problems = verify(IndexStore.open(store.folder), repair=True).problems
    assert any("1 passages in the table are not what was written" in problem for problem in problems)
    with pytest.raises(DamagedFileError, match=r"checksums.json: is missing"):
        _opened(store)


# Repair and restore


def test_a_damaged_file_is_taken_from_a_snapshot(store):
    store.snapshot("a")
    put(store, LATER.values())
    (path,) = [path for path in _files(store, "data/*") if path.stat().st_nlink == 2]
    for damage in (lambda: path.unlink(), lambda: _flip(path)):
        damage()
        *_, done = verify(IndexStore.open(store.folder), repair=True).problems
        assert done == f"{path.relative_to(store.folder).as_posix()} was taken from 'a'"
        assert verify(IndexStore.open(store.folder)).problems == []
        check_contents(_opened(store), PASSAGES | LATER)
    (store.folder / "snapshots" / "a" / path.relative_to(store.folder)).unlink()  # and the other way round
    *_, done = verify(IndexStore.open(store.folder), repair=True).problems
    assert done.endswith("was taken from 'index'")
    check_contents(PassageView(IndexStore.open(store.folder / "snapshots" / "a")), PASSAGES)


def test_going_back(store):
    version = store.version
    put(store, LATER.values())
    store.delete(["p3"])
    damaged = _files(store, "_deletions/*")[-1]
    _flip(damaged)
    *_, said, left = verify(IndexStore.open(store.folder), repair=True).problems
    assert f"version {version + 1} is the last intact one; `d2llm index ... verify --repair --go-back`" in said
    assert damaged.name in left
    with pytest.raises(DamagedFileError):
        _opened(store)
    with pytest.raises(InputError, match="add --repair"):
        verify(store, go_back=True)
    problem, done = verify(IndexStore.open(store.folder), repair=True, go_back=True).problems
    assert damaged.name in problem
    assert done == (
        f"the table is back at version {version + 1}, the last intact one; the changes of version "
        f"{version + 2} are lost: apply them again"
    )
    check_contents(_opened(store), PASSAGES | LATER)
    assert verify(store).problems == []
    store.delete(["p4"])  # under the number of the version that is lost
    left = {key: value for key, value in (PASSAGES | LATER).items() if key != "p4"}
    check_contents(_opened(store), left)
    assert verify(store).problems == []


def test_the_newest_version_is_lost(store):
    """Its file is gone, as after power failure: that is said, not passed over."""
    put(store, LATER.values())
    _newest(store).unlink()
    with pytest.raises(DamagedFileError, match=r"manifest: is missing"):
        _opened(store)
    verify(IndexStore.open(store.folder), repair=True, go_back=True)
    check_contents(_opened(store), PASSAGES)
    put(store, LATER.values())
    check_contents(_opened(store), PASSAGES | LATER)
    assert verify(store).problems == []


def test_an_earlier_version_that_is_damaged(store):
    store.delete(["p1"])
    old = store.version
    pinned = PassageView(IndexStore.open(store.folder))
    store.delete(["p2"])
    damaged = _files(store, "_deletions/*")
    (path,) = [path for path in damaged if path.name.startswith(f"0-{old - 1}-")]
    _flip(path)
    left = {key: value for key, value in PASSAGES.items() if key not in ("p1", "p2")}
    check_contents(_opened(store), left)  # nobody needs it
    with pytest.raises(DamagedFileError, match=path.name):
        PassageView(IndexStore.open(store.folder), old)
    (problem,) = verify(IndexStore.open(store.folder)).problems
    assert f"only earlier versions need it: {old}" in problem
    *_, done = verify(IndexStore.open(store.folder), repair=True).problems
    assert done == f"earlier versions of the table were damaged and were removed: version {old}"
    assert verify(store).problems == []
    check_contents(_opened(store), left)
    assert pinned.version == old


@pytest.mark.parametrize("how", ["data", "manifest", "table", "checksums", "index"])
def test_a_snapshot_is_restored_over_damage(store, how):
    store.snapshot("a")
    put(store, LATER.values())
    if how == "table":
        shutil.rmtree(store.folder / "passages.lance")
    elif how == "checksums":
        (store.folder / "checksums.json").unlink()
    else:
        damaged = {"data": _files(store, "data/*")[0], "index": _files(store, "_indices/*/*")[0]}
        _flip(damaged.get(how, _newest(store)))
    damaged = IndexStore.open(store.folder)
    with pytest.raises(DamagedFileError):
        PassageView(damaged)
    assert damaged.restore("a") == len(PASSAGES)
    view = _opened(store)
    check_contents(view, PASSAGES)
    assert view.ids(view.match("own3", 3).rows) == ["p3"]
    assert verify(store).problems == []
    put(store, LATER.values())
    check_contents(_opened(store), PASSAGES | LATER)
    assert list(store.folder.glob(".passages*")) == []
    assert not (store.folder / "write.unfinished").exists()


def test_a_snapshot_has_the_files_of_its_version_and_no_others(store):
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
