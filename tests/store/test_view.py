"""A view shows one version of a store, whatever happens to the store in the meantime."""

from __future__ import annotations

from datetime import timedelta

import numpy as np
import pytest

from d2llm.core.errors import DataFormatError, FilterError, IndexMismatchError, InputError
from d2llm.core.types import Passage
from d2llm.store import vector_file
from d2llm.store import view as module
from d2llm.store.blocks import ROW_MASK
from d2llm.store.index_store import IndexStore
from d2llm.store.inspection import verify
from d2llm.store.vector_formats import make_format
from d2llm.store.view import PassageView
from tiny_store import DIM, check_contents, exact_products, few_passages, live_rows, new_store, put

PASSAGES = few_passages(30)
QUERY = np.random.default_rng(7).standard_normal(DIM).astype(np.float32)


@pytest.fixture(params=["bfloat16", "int8"])
def store(tmp_path, request):
    store = new_store(tmp_path / "index", request.param)
    put(store, PASSAGES.values())
    store.update_word_files()
    return store


def _ranked_ids(passages, vector_format):
    items = list(passages)
    scores = exact_products(items, vector_format, QUERY)
    return [items[position].id for position in sorted(range(len(items)), key=lambda n: (-scores[n], items[n].id))]


def test_view_properties(store):
    view = PassageView(store)
    assert (len(view), view.capacity, view.dim, view.task) == (30, 30, DIM, "asymmetric")
    assert view.live is None
    assert dict(view.metadata.fields) == {"year": "integer", "language": "string"}
    view.check_student("student")
    with pytest.raises(IndexMismatchError, match=r"made by student student, but .* other"):
        view.check_student("other")
    store.delete(["p3", "p7"])
    view = PassageView(store)
    assert (len(view), view.capacity) == (28, 30)
    assert np.flatnonzero(~view.live).tolist() == [3, 7]


def test_the_scan_is_exact(store):
    store.delete(["p3", "p7"])
    alive = {key: p for key, p in PASSAGES.items() if key not in ("p3", "p7")}
    view = PassageView(store)
    for top_k in (1, 5, 28, 1000):
        assert view.ids(view.scan(QUERY, top_k).rows) == _ranked_ids(alive.values(), store.format.kind)[:top_k]
    years = view.select("year BETWEEN 2003 AND 2010")
    chosen = [p for p in alive.values() if 2003 <= p.metadata["year"] <= 2010]
    assert view.ids(view.scan(QUERY, 100, years).rows) == _ranked_ids(chosen, store.format.kind)
    assert view.ids(view.scan(QUERY, 3, np.ones(30, np.bool_)).rows) == view.ids(view.scan(QUERY, 3).rows)


def test_bm25_ties_at_the_cutoff_are_broken_by_id(store):
    """Passages with equal BM25 scores are returned in order of their ids."""
    put(store, [Passage(f"t{n:03}", "unusual words here") for n in range(99, -1, -1)])
    view = PassageView(store)
    for top_k in (1, 7, 60, 100, 1000):
        assert view.ids(view.match("unusual", top_k).rows) == [f"t{n:03}" for n in range(min(top_k, 100))]


def test_word_search_with_a_filter(store):
    view = PassageView(store)
    assert view.ids(view.match("own4", 9).rows) == ["p4"]
    assert sorted(view.ids(view.match("common", 99, "year < 2003").rows)) == ["p0", "p1", "p2"]
    assert view.ids(view.match("own4", 9, "year < 2003").rows) == []
    assert len(view.match("nowhere", 5).rows) == len(view.match("", 5).rows) == 0
    store.delete(["p4"])
    assert view.ids(view.match("own4", 9).rows) == ["p4"]
    assert len(PassageView(store).match("own4", 9).rows) == 0


def test_the_rows_of_a_filter_are_kept_for_a_version(store):
    view = PassageView(store)
    first = view.select("year < 2003")
    assert view.select("year < 2003") is first
    with pytest.raises(ValueError, match="read-only"):
        first[0] = True
    for year in range(2010, 2030):  # more than are kept
        view.select(f"year < {year}")
    assert len(view._selected) == module._KEPT_FILTERS
    again = view.select("year < 2003")
    assert again is not first
    assert again.tolist() == first.tolist()
    store.delete(["p1"])
    assert sorted(PassageView(store).ids(PassageView(store).match("common", 99, "year < 2003").rows)) == ["p0", "p2"]


@pytest.mark.parametrize(
    "text", ["+", "a AND b", '"', "'", "a*", "(", "\\", "\0", "text:own4", "😀", "a" * 5000, "-- ; DROP"]
)
def test_any_text_is_a_valid_word_query(store, text):
    PassageView(store).match(text, 3)


def test_invalid_requests_are_rejected(store):
    view = PassageView(store)
    for top_k in (0, -1):
        with pytest.raises(InputError, match="top_k"):
            view.scan(QUERY, top_k)
        with pytest.raises(InputError, match="top_k"):
            view.match("own4", top_k)
    with pytest.raises(InputError, match="shape"):
        view.scan(QUERY[:-1], 3)
    with pytest.raises(InputError, match="finite"):
        view.scan(QUERY * np.nan, 3)
    with pytest.raises(InputError, match="valid Unicode"):
        view.match("\ud800", 3)
    with pytest.raises(FilterError):
        view.select("colour = 1")
    with pytest.raises(FilterError):
        view.match("own4", 3, "year = 'x")
    with pytest.raises(DataFormatError, match="lacks 1 of 2 requested rows"):
        view.ids(np.array([1, 99]))


def test_an_empty_store(tmp_path):
    store = new_store(tmp_path / "index")
    for _ in range(2):
        view = PassageView(store)
        assert len(view) == 0
        assert len(view.scan(QUERY, 3).rows) == len(view.match("word", 3).rows) == 0
        assert view.ids(np.zeros(0, np.int64)) == view.passages(np.zeros(0, np.int64)) == view.get(["p1"]) == []
        assert view.vectors(np.zeros(0, np.int64)).shape == (0, DIM)
        assert not view.select("year > 1").any()
        put(store, PASSAGES.values())
        store.compact(timedelta(0), dense=True)  # and again after everything has been deleted
        store.delete(list(PASSAGES))
        store.compact(timedelta(0), dense=True)
        assert verify(store).problems == []


def test_rows_are_returned_in_the_requested_order(store):
    store.delete(["p5"])
    put(store, few_passages(3, start=40, word="later").values())  # in another data file
    view = PassageView(store)
    stored = [record for batch in view._table.batches(["id", "d2_row"]) for record in batch]
    id_of = {record["d2_row"] & ROW_MASK: record["id"] for record in stored}
    rows = np.random.default_rng(0).permutation(np.tile(live_rows(view), 2))
    assert view.ids(rows) == [id_of[row] for row in rows.tolist()]
    assert [passage.id for passage in view.passages(rows)] == [id_of[row] for row in rows.tolist()]
    assert view.ids(np.zeros(0, np.int64)) == []
    dead_row = next(row for row in range(view.capacity) if row not in id_of)
    for bad_row in (dead_row, -1, view.capacity):
        with pytest.raises(DataFormatError, match="lacks 1 of 3 requested rows"):
            view.ids(np.array([1, 2, bad_row]))


def test_a_removed_version_is_reported(store):
    view = PassageView(store)
    view.scan(QUERY, 1)
    put(store, few_passages(5, start=50).values())
    store.compact(timedelta(0), dense=True)
    with pytest.raises(DataFormatError, match="open it again"):
        view.passages(np.array([0]))
    with pytest.raises(DataFormatError, match="cannot be opened"):
        PassageView(store, view.version)


@pytest.mark.parametrize("damage", ["missing", "no list", "garbage list", "truncated", "flipped", "another size"])
def test_damaged_vectors_are_read_from_the_table(store, damage):
    path = vector_file.path_of(store.folder, 0)
    opened_before = PassageView(store)
    if damage == "missing":
        path.unlink()
    elif damage == "no list":
        path.with_suffix(".json").unlink()
    elif damage == "garbage list":
        path.with_suffix(".json").write_text('{"extents": [["a", "b", "c"]], "since": "x"}')
    elif damage == "truncated":
        path.rename(path.with_suffix(".old"))  # not in place: other readers have the file mapped
        path.write_bytes(path.with_suffix(".old").read_bytes()[:-1])
        path.with_suffix(".old").unlink()
    elif damage == "flipped":
        content = bytearray(path.read_bytes())
        content[-5] ^= 64
        path.write_bytes(content)
    else:
        vector_file.VectorFile.create(store.folder, 0, 5).append(np.zeros((40, 5), np.uint8))
    check_contents(PassageView(store), PASSAGES)
    assert (
        PassageView(store).ids(PassageView(store).scan(QUERY, 4).rows)
        == _ranked_ids(PASSAGES.values(), store.format.kind)[:4]
    )
    assert verify(store).problems == []
    check_contents(opened_before, PASSAGES)


def test_damaged_vectors_followed_by_deleted_rows(store):
    """The rewritten file ends at the last live row, so it is shorter than the file that was opened."""
    store.delete(["p28", "p29"])
    path = vector_file.path_of(store.folder, 0)
    content = bytearray(path.read_bytes())
    content[0] ^= 64
    path.write_bytes(content)
    view = PassageView(store)
    alive = {key: p for key, p in PASSAGES.items() if key not in ("p28", "p29")}
    assert view.ids(view.scan(QUERY, 40).rows) == _ranked_ids(alive.values(), store.format.kind)
    assert view.ids(view.scan(QUERY, 40, view.select("year > 2020")).rows) == _ranked_ids(
        [p for p in alive.values() if p.metadata["year"] > 2020], store.format.kind
    )
    check_contents(view, alive)


def test_an_old_version_has_rows_that_the_new_file_lacks(store):
    version = PassageView(store).version
    store.delete(["p29", "p4"])
    vector_file.remove(store.folder, 0)
    alive = {key: p for key, p in PASSAGES.items() if key not in ("p29", "p4")}
    check_contents(PassageView(store), alive)
    put(store, few_passages(3, start=70).values())
    check_contents(PassageView(store, version), PASSAGES)
    check_contents(PassageView(store), alive | few_passages(3, start=70))


def test_a_rebuild_during_a_concurrent_write_stays_in_memory(store, monkeypatch):
    """A writer may delete rows after the latest version was read and before the lock is taken."""
    table = store.table()

    def delete_then_lock():
        store.delete(["p0"])
        return store.writing()

    monkeypatch.setattr(store.vectors, "_writing", lambda: delete_then_lock)
    rebuilt = store.vectors.recover(table, "lost")
    assert rebuilt.file is None
    np.testing.assert_array_equal(rebuilt.codes, table.codes(store.format.code_size))
    assert rebuilt.codes[0].any()


def test_readers_are_not_blocked_by_a_writer(store):
    vector_file.remove(store.folder, 0)
    other = IndexStore.open(store.folder)
    with other.writing():
        check_contents(PassageView(store), PASSAGES)
        assert list(vector_file.generations(store.folder)) == []
    check_contents(PassageView(store), PASSAGES)
    assert list(vector_file.generations(store.folder)) == [0]


def test_a_view_in_another_format(store):
    store.delete(["p3", "p7"])
    alive = [p for key, p in PASSAGES.items() if key not in ("p3", "p7")]
    view = PassageView(store)
    words = view.words
    assert view.ann_base is not None  # built over the vectors as the index stores them, not as the other view does
    other = view.stored_as("int3")
    assert (other.format.kind, view.format.kind) == ("int3", store.format.kind)
    assert other.ids(other.scan(QUERY, 100).rows) == _ranked_ids_by_int3(view, alive)
    np.testing.assert_array_equal(other.block(0, 30)[view.live], other.vectors(view.live_rows()))
    assert other.words is words
    assert other.ann_base is other.vector_file is None
    assert view.vector_file is not None
    assert len(other) == 28
    with pytest.raises(InputError, match="vector format 'int5' is unknown"):
        view.stored_as("int5")


def _ranked_ids_by_int3(view, passages):
    """Ids ranked by the int3 codes of the stored vectors, in float64."""
    ids = [p.id for p in passages]
    int3_format = make_format("int3", DIM)
    vectors = int3_format.decode(int3_format.encode(view.vectors(view.rows(ids)), ids)).astype(np.float64)
    scores = (vectors @ QUERY.astype(np.float64)).astype(np.float32)
    return [ids[position] for position in sorted(range(len(ids)), key=lambda n: (-scores[n], ids[n]))]
