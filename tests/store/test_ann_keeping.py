"""An approximate index as part of a store: statistics, verification and snapshots."""

import shutil

import numpy as np
import pytest

from d2llm.core.errors import InputError
from d2llm.retrieval import build_ann as module
from d2llm.retrieval.build_ann import build_ann, renew_ann
from d2llm.store.index_manifest import read_errors, write_errors
from d2llm.store.index_spec import StoredSpec
from d2llm.store.index_store import IndexStore
from d2llm.store.inspection import stats, verify
from d2llm.store.view import PassageView
from tiny_ann import DIM, PlainStudent, clustered, new_ann_store, put_vectors

NUM = 2_000


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MIN_PASSAGES", 500)
        patch.setattr(module, "MAX_EFFORT", 0.25)
        store = new_ann_store(tmp_path_factory.mktemp("ann") / "i", clustered(NUM))
        build_ann(store, PlainStudent(), recall=0.8, depth=20)
    return store.folder


@pytest.fixture
def store(built, tmp_path):
    return IndexStore.open(shutil.copytree(built, tmp_path / "i"))


def test_stats_report_the_indexed_passages(store, tmp_path):
    assert (stats(store).ann_passages, stats(store).ann_recall) == (NUM, 0.8)
    put_vectors(store, NUM, clustered(3, seed=8))
    assert (stats(store).num_passages, stats(store).ann_passages) == (NUM + 3, NUM)
    without = new_ann_store(tmp_path / "without", clustered(20))
    assert (stats(without).ann_passages, stats(without).ann_recall) == (0, None)


def test_a_snapshot_includes_the_ann_index(store):
    write_errors(store.folder, {"teacher": {"slope": 2.0}})
    before = PassageView(store)
    folder = store.snapshot("then")
    put_vectors(store, NUM, clustered(3, seed=8))
    snapshot = IndexStore.open(folder)
    assert read_errors(folder) == {"teacher": {"slope": 2.0}}
    assert stats(snapshot).ann_passages == NUM
    copy, original = PassageView(snapshot).ann, before.ann
    assert copy.record == original.record
    query = clustered(1, seed=3)[0]
    np.testing.assert_array_equal(copy.nearest(query, 10, 50), original.nearest(query, 10, 50))
    assert verify(store).problems == []


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("ann-0.faiss", b"x", "not what was written"),
        ("ann-0.json", b"{}", "not what was written"),
        ("ann-0.json", None, "No such file"),
        ("ann-0.faiss", None, "No such file"),
    ],
)
def test_damaged_files_are_reported_and_removed(store, name, content, expected):
    file = store.folder / name
    file.write_bytes(content) if content is not None else file.unlink()
    (problem,) = verify(store).problems
    assert problem.startswith("ann-0.faiss: ")
    assert expected in problem
    (repaired,) = verify(store, repair=True).problems
    assert repaired == f"{problem}; it was removed"
    assert verify(store).problems == []
    assert list(store.folder.glob("ann-*")) == []
    assert PassageView(store).ann is None


@pytest.fixture
def wanted(tmp_path, monkeypatch):
    """A store without passages that wants an approximate index, and what the builds of one were given."""
    builds = []
    monkeypatch.setattr(module, "MIN_PASSAGES", 40)
    monkeypatch.setattr(module, "build_ann", lambda store, student: builds.append((store, student)))
    return IndexStore.create(tmp_path / "wanted", StoredSpec(student="student", dim=DIM, approximate=True)), builds


def test_an_index_that_wants_it_gets_it_when_enough_was_encoded(wanted, tmp_path):
    store, builds = wanted
    student = PlainStudent()
    put_vectors(store, 0, clustered(39))
    renew_ann(store, student, 39)
    assert builds == []  # below 40 passages the exact scan is faster
    put_vectors(store, 39, clustered(1))
    for num_encoded, is_due in ((1, False), (2, True), (40, True)):  # a twentieth of 40
        builds.clear()
        renew_ann(store, student, num_encoded)
        assert builds == [(store, student)] * is_due
    builds.clear()
    renew_ann(store, PlainStudent(has_dot=False), 40)
    without = IndexStore.create(tmp_path / "without", StoredSpec(student="student", dim=DIM, approximate=False))
    put_vectors(without, 0, clustered(50))
    renew_ann(without, student, 50)
    assert builds == []


def test_what_covers_four_fifths_of_the_rows_is_not_built_again(store, monkeypatch):
    builds = []
    monkeypatch.setattr(module, "MIN_PASSAGES", 500)
    monkeypatch.setattr(module, "build_ann", lambda store, student: builds.append(store))
    monkeypatch.setitem(store.manifest, "approximate", True)
    put_vectors(store, NUM, clustered(NUM // 4, seed=8))
    renew_ann(store, PlainStudent(), NUM)
    assert builds == []
    put_vectors(store, NUM + NUM // 4, clustered(1, seed=9))
    renew_ann(store, PlainStudent(), NUM)
    assert builds == [store]


def test_where_it_cannot_be_built_the_passages_are_kept_and_the_log_says_why(wanted, caplog, monkeypatch):
    store, _ = wanted

    def fails(store, student):
        raise InputError("no room")

    monkeypatch.setattr(module, "build_ann", fails)
    put_vectors(store, 0, clustered(40))
    with caplog.at_level("INFO", logger="d2llm"):
        renew_ann(store, PlainStudent(), 40)
    assert "no approximate index: no room" in caplog.text
    assert len(store.table()) == 40
