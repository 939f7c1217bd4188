"""Statistics are correct, and verify finds each kind of damage."""

from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
import pyarrow as pa
import pytest

from d2llm.core.types import Passage
from d2llm.store import vector_file
from d2llm.store.index_store import IndexStore
from d2llm.store.inspection import stats, verify
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
    table_files = [path for path in (store.folder / "passages.lance").rglob("*") if path.is_file()]
    assert summary.table_bytes == sum(path.stat().st_size for path in table_files)
    assert summary.vector_file_bytes == 22 * 16 + (store.folder / "vectors-0.json").stat().st_size
    assert summary.unindexed == {}
    assert json.loads(json.dumps(asdict(summary)))["version"] == store.table().version
    store.update_indices()
    put(store, few_passages(3, start=90).values())
    assert stats(store).unindexed == {"id_idx": 3, "d2_row_idx": 3, "document_id_idx": 3}


def test_stats_of_an_empty_index(tmp_path):
    summary = stats(new_store(tmp_path / "index"))
    assert (summary.num_passages, summary.num_rows, summary.num_truncated, summary.snapshots) == (0, 0, 0, [])


def test_an_intact_index_has_no_problems(store):
    store.update_indices()
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


@pytest.mark.parametrize("column", ["title", "text", "year", "document_id", "position", "language", "id"])
def test_changed_columns_are_found(store, column):
    """The hash covers every column that the user supplies, so flipped bytes in any of them are found."""
    table = store.table()
    rows = table.columns(table.schema.names).to_pylist()
    rows[3][column] = {"year": 7, "position": 9}.get(column, "other")
    table.replace_all(table.schema, iter(pa.Table.from_pylist(rows, schema=table.schema).to_batches()))
    name = "other" if column == "id" else rows[3]["id"]
    assert verify(store).problems == [f"1 passages in the table are not what was written, the first is {name!r}"]


def test_duplicate_ids_and_rows_are_found(store):
    table = store.table()
    rows = table.columns(table.schema.names).to_pylist()
    table.replace_all(table.schema, iter(pa.Table.from_pylist([*rows, rows[0]], schema=table.schema).to_batches()))
    assert verify(store).problems[:2] == [
        "1 ids occur twice in the table",
        "row numbers in the table are not distinct, or belong to several generations",
    ]


def test_a_damaged_table_is_found(store):
    (path,) = (store.folder / "passages.lance" / "data").iterdir()
    path.write_bytes(path.read_bytes()[:100])
    (problem,) = verify(store).problems
    assert problem.startswith(f"passages.lance/data/{path.name}: has 100 bytes where ")
    (store.folder / "checksums.json").unlink()
    problem, no_checksums = verify(IndexStore.open(store.folder), repair=True).problems
    assert "checksums.json: is missing" in no_checksums
    assert f"{store.folder}: version 2 of its table cannot be read" in problem


def test_damaged_indices_are_found_and_rebuilt(store):
    store.update_indices()
    for path in (store.folder / "passages.lance" / "_indices").rglob("*.lance"):
        path.write_bytes(b"")
    problems = verify(store).problems
    assert len(problems) == 6
    assert all("/_indices/" in problem and "verify --repair` rebuilds it" in problem for problem in problems)
    *_, rebuilt, removed = verify(store, repair=True).problems
    assert rebuilt == "6 of the table's files were damaged indices, which were rebuilt"
    assert removed == "earlier versions of the table were damaged and were removed: versions 3, 4, 5, 6, 7"
    assert verify(store).problems == []
    view = PassageView(store)
    check_contents(view, PASSAGES)
    assert view.ids(view.match("own3", 3).rows) == ["p3"]


def test_a_damaged_snapshot_is_found(store):
    folder = store.snapshot("a")
    store.snapshot("b")
    _damage_vectors(folder)
    assert verify(store).problems == ["snapshot 'a': vectors-0.bin: 1 of 1 parts are not what was written"]
    (folder / "manifest.json").write_text("{")
    (problem,) = verify(store).problems
    assert problem.startswith("snapshot 'a': ")
    assert "not valid JSON" in problem
