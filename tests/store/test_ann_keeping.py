"""An approximate index as part of a store: statistics, verification and snapshots."""

import shutil

import numpy as np
import pytest

from d2llm.retrieval import build_ann as module
from d2llm.retrieval.build_ann import build_ann
from d2llm.store.index_store import IndexStore
from d2llm.store.inspection import stats, verify
from d2llm.store.side_files import ERRORS_FILE
from d2llm.store.view import PassageView
from tiny_ann import PlainStudent, clustered, new_ann_store, put_vectors

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
    (store.folder / ERRORS_FILE).write_text("{}")
    before = PassageView(store)
    folder = store.snapshot("then")
    put_vectors(store, NUM, clustered(3, seed=8))
    snapshot = IndexStore.open(folder)
    assert (folder / ERRORS_FILE).read_text() == "{}"
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
