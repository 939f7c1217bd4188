"""Statistics are correct, and verify finds each kind of damage."""

from __future__ import annotations

import json
import sqlite3
from dataclasses import asdict
from datetime import timedelta

import numpy as np
import pytest

from d2llm.core.errors import StorageError
from d2llm.core.types import Passage
from d2llm.store import passage_table, vector_file
from d2llm.store.index_store import IndexStore
from d2llm.store.inspection import repair_table, stats, verify
from d2llm.store.storage import connect
from d2llm.store.view import PassageView
from tiny_store import check_contents, few_passages, new_store, put, vectors_of

PASSAGES = few_passages(20)


@pytest.fixture
def store(tmp_path):
    store = new_store(tmp_path / "index")
    put(store, PASSAGES.values())
    return store


def test_stats(store):
    with store.writing():
        changes = store.compare([Passage("long", "x"), Passage("p1", "y")])
        store.write(changes, vectors_of(changes.texts), truncated=[0])
    store.delete(["p2", "p3"])
    store.snapshot("a")
    summary = stats(store)
    assert summary.num_passages == 19
    assert summary.num_rows == 22
    assert summary.num_truncated == 1
    assert summary.snapshots == ["a"]
    assert (summary.dim, summary.vector_format, summary.vector_bytes) == (8, "bfloat16", 16)
    assert summary.metadata == {"year": "integer", "language": "string"}
    files = [path for path in store.folder.rglob("*") if path.is_file()]
    sizes = {path.stat().st_ino: path.stat().st_size for path in files}
    assert summary.bytes_per_passage == round(sum(sizes.values()) / 19, 1)
    assert summary.table_bytes == (store.folder / "passages.db").stat().st_size
    assert summary.vector_file_bytes == 22 * 16 + (store.folder / "vectors-0.json").stat().st_size
    assert json.loads(json.dumps(asdict(summary)))["version"] == store.table().version


def test_stats_of_an_empty_index(tmp_path):
    summary = stats(new_store(tmp_path / "index"))
    assert (summary.num_passages, summary.num_rows, summary.num_truncated, summary.snapshots) == (0, 0, 0, [])


def test_an_intact_index_has_no_problems(store):
    store.snapshot("a")
    report = verify(store)
    assert report.problems == []
    assert (report.num_passages, report.num_snapshots) == (20, 1)
    assert json.loads(json.dumps(asdict(report)))["problems"] == []


def _damage_vectors(folder):
    path = vector_file.path_of(folder, 0)
    content = bytearray(path.read_bytes())
    content[50] ^= 1
    path.unlink()  # a snapshot may share the file
    path.write_bytes(content)


def test_damaged_vectors_are_found_and_repaired(store):
    _damage_vectors(store.folder)
    assert verify(store).problems == ["vectors-0.bin: 1 of 1 parts are not what was written"]
    (problem,) = verify(store, repair=True).problems
    assert problem.endswith("it was rewritten")
    assert verify(store).problems == []
    check_contents(PassageView(store), PASSAGES)


def test_vectors_that_differ_from_the_table_are_found(store):
    """The file is intact and its checksums are right, but its vectors are not those of the table."""
    file = vector_file.VectorFile.create(store.folder, 0, 16)
    file.append(np.zeros((20, 16), np.uint8))
    assert verify(store).problems == ["vectors-0.bin: 20 vectors are not those of the table"]
    verify(store, repair=True)
    check_contents(PassageView(store), PASSAGES)


def _all_records(table):
    return [record for batch in table.batches() for record in batch]


@pytest.mark.parametrize("column", ["title", "text", "year", "document_id", "position", "language", "id"])
def test_changed_columns_are_found(store, column):
    """The hash covers every column that the user supplies, so flipped bytes in any of them are found."""
    table = store.table()
    rows = _all_records(table)
    rows[3][column] = {"year": 7, "position": 9}.get(column, "other")
    table.replace_all(table.metadata, [rows])
    name = "other" if column == "id" else rows[3]["id"]
    [problem] = verify(store).problems
    assert problem.startswith(f"passages.db: 1 damaged passage, the first is {name!r}")


def test_duplicate_ids_and_rows_are_found(store):
    table = store.table()
    rows = _all_records(table)
    table.replace_all(table.metadata, [[*rows, rows[0]]])
    first, second = verify(store).problems
    assert first.startswith("passages.db: 1 id occurs twice")
    assert second.startswith("passages.db: row numbers are not distinct, or belong to several generations")


def test_damaged_passages_are_taken_from_a_snapshot(store):
    store.snapshot("a")
    put(store, few_passages(2, start=50).values())
    _replace_bytes(store.folder / "passages.db", b"own3", b"own9")
    [problem] = verify(store).problems
    assert "1 damaged passage, the first is 'p3'" in problem
    _, rebuilt, taken = verify(store, repair=True).problems
    assert rebuilt == "passages.db was rebuilt with the 21 passages read from it, without earlier versions"
    assert taken == "1 damaged passage was taken from snapshots"
    assert verify(store).problems == []
    check_contents(PassageView(store), PASSAGES | few_passages(2, start=50))


def test_lost_passages_are_named_and_left_out_only_on_request(store):
    before = _replace_bytes(store.folder / "passages.db", b"own3", b"own9")
    _, lost, *_ = verify(store, repair=True).problems
    assert lost.startswith("passages.db: 1 of 20 passages are lost and in no snapshot, the first is 'p3'")
    assert (store.folder / "passages.db").read_bytes() == before  # nothing was changed
    assert verify(store, repair=True, drop_lost=True).problems[-1] == "1 passage is lost: 'p3'"
    assert verify(store).problems == []
    left = {name: passage for name, passage in PASSAGES.items() if name != "p3"}
    check_contents(PassageView(store), left)
    put(store, [PASSAGES["p3"]])
    check_contents(PassageView(store), PASSAGES)


@pytest.mark.parametrize("page", range(1, 12))
def test_a_table_with_a_destroyed_page_is_rebuilt(store, page):
    store.snapshot("a")
    path = store.folder / "passages.db"
    content = bytearray(path.read_bytes())
    content[page * 8_192 : (page + 1) * 8_192] = bytes(8_192)
    path.write_bytes(content)
    problems = verify(store).problems
    if page * 8_192 < len(content) and problems:
        verify(store, repair=True)
    assert verify(store).problems == []
    check_contents(PassageView(IndexStore.open(store.folder)), PASSAGES)


def test_what_is_left_of_a_table_that_was_cut_is_kept_on_request(store):
    passages = PASSAGES | few_passages(1500, start=20)
    put(store, passages.values())
    path = store.folder / "passages.db"
    store.table().remove_older(timedelta(0))  # which also empties the WAL
    half = path.read_bytes()[: path.stat().st_size // 2]
    path.write_bytes(half)
    store = IndexStore.open(store.folder)
    assert "of 1,520 passages are lost and in no snapshot" in verify(store, repair=True).problems[-1]
    assert path.read_bytes() == half
    assert verify(store, repair=True, drop_lost=True).num_passages > 500
    assert verify(store).problems == []
    left = {record["id"] for record in store.table().by_ids([*passages], ["id"])}
    check_contents(PassageView(store), {name: passages[name] for name in left})


def test_a_table_that_cannot_be_opened_is_replaced_by_a_snapshot(store):
    (store.folder / "passages.db").write_bytes(b"no database")
    [problem] = verify(store).problems
    assert "passages.db: cannot be read" in problem
    assert "no snapshot has a whole copy: index the corpus again" in verify(store, repair=True).problems[1]
    (store.folder / "passages.db").unlink()
    assert "is missing" in verify(store).problems[0]


def test_the_newest_whole_snapshot_takes_the_place_of_a_lost_table(store):
    store.snapshot("older")
    put(store, few_passages(2, start=50).values())
    store.snapshot("newer")
    (store.folder / "passages.db").write_bytes(b"no database")
    assert "the table of 'newer' took its place" in verify(store, repair=True).problems[1]
    check_contents(PassageView(IndexStore.open(store.folder)), PASSAGES | few_passages(2, start=50))


def _replace_bytes(path, old, new):
    content = path.read_bytes().replace(old, new)
    path.write_bytes(content)
    return content


def test_a_damaged_snapshot_is_found(store):
    folder = store.snapshot("a")
    store.snapshot("b")
    _damage_vectors(folder)
    assert verify(store).problems == ["snapshot 'a': vectors-0.bin: 1 of 1 parts are not what was written"]
    (folder / "manifest.json").write_text("{")
    (problem,) = verify(store).problems
    assert problem.startswith("snapshot 'a': ")
    assert "not valid JSON" in problem


def test_a_table_that_cannot_be_opened_now_is_not_repaired(tmp_path, monkeypatch):
    """A process with too many open files must not replace it by that of an older snapshot."""
    store = new_store(tmp_path / "index")
    put(store, few_passages(3).values())
    store.snapshot("a")
    put(store, few_passages(5).values())

    def refuse(path):
        if path.parent == store.folder:
            raise sqlite3.OperationalError("unable to open database file")
        return connect(path, "rw")

    with monkeypatch.context() as patch:
        patch.setattr(passage_table, "open_to_read", refuse)
        with pytest.raises(StorageError, match="no damage; allow this process more open files"):
            repair_table(store.folder, [store.snapshot_folder("a")])
    assert len(IndexStore.open(store.folder).table()) == 5
