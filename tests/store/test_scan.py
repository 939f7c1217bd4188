import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2llm.core.errors import InputError
from d2llm.store.index_spec import FORMATS
from d2llm.store.scan import RowScan
from d2llm.store.vector_formats import make_format


def no_ids(rows):
    raise AssertionError(f"ids of {rows} were asked for, but no two products are equal")


def ids_in_reverse_row_order(rows):
    """Ids whose order is the reverse of the order of the rows."""
    return [f"{100_000 - row:06d}" for row in rows.tolist()]


def make_scan(vectors, name="float32", **options):
    vectors = np.asarray(vectors, np.float32)
    vector_format = make_format(name, vectors.shape[1])
    return RowScan(vector_format.encode(vectors, [""] * len(vectors)), vector_format, **options)


def random_vectors(num, dim, seed=0):
    vectors = np.random.default_rng(seed).standard_normal((num, dim))
    return (vectors * np.sqrt(dim) / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


with_and_without_faiss = pytest.mark.parametrize("use_faiss", [True, False])


@with_and_without_faiss
def test_products_match_hand_computed_values(use_faiss):
    scan = make_scan([[1, 0], [0, 3], [3, 1], [-1, -1]], use_faiss=use_faiss)
    rows, scores = scan.search(np.array([2, 1], np.float32), 3, ids_of=no_ids)
    assert (rows.tolist(), scores.tolist()) == ([2, 1, 0], [7, 3, 2])
    assert (rows.dtype, scores.dtype) == (np.int64, np.float32)
    allowed = np.array([True, True, False, True])
    assert scan.search(np.array([2, 1], np.float32), 2, allowed, ids_of=no_ids)[0].tolist() == [1, 0]
    assert scan.search(np.array([2, 1], np.float32), 9, allowed, ids_of=no_ids)[0].tolist() == [1, 0, 3]
    assert len(scan.search(np.array([2, 1], np.float32), 9, np.zeros(4, bool), ids_of=no_ids)[0]) == 0


@with_and_without_faiss
@pytest.mark.parametrize("num_equal", [40, 3000])
def test_rows_tied_at_the_cutoff_are_chosen_by_id(use_faiss, num_equal):
    """FAISS may return any of the tied rows, but the last rows have the smallest ids and must win."""
    vectors = np.tile(random_vectors(1, 16), (num_equal, 1))
    vectors[5] *= 2
    rows, scores = make_scan(vectors, use_faiss=use_faiss).search(vectors[0], 4, ids_of=ids_in_reverse_row_order)
    assert rows.tolist() == [5, num_equal - 1, num_equal - 2, num_equal - 3]
    assert len(set(scores[1:].tolist())) == 1


@with_and_without_faiss
def test_products_equal_in_float32_are_still_ordered_correctly(use_faiss):
    """2^24 + 1 - 2^24 is 0, 1 or 2 in float32, depending on summation order; the small parts decide the true order."""
    big = 2.0**24
    small = np.arange(200, dtype=np.float32)
    vectors = np.stack([np.full(200, big), small / 1024, np.full(200, -big)], axis=1)
    rows, scores = make_scan(vectors, use_faiss=use_faiss).search(np.ones(3, np.float32), 3, ids_of=no_ids)
    assert rows.tolist() == [199, 198, 197]
    assert scores.tolist() == [199 / 1024, 198 / 1024, 197 / 1024]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("fraction", [None, 0.0003, 0.02, 0.5, 0.98])
def test_best_rows_match_brute_force_in_every_format(name, fraction):
    vectors, query = random_vectors(9000, 48), random_vectors(1, 48, seed=7)[0]
    scan = make_scan(vectors, name)
    vector_format = make_format(name, 48)
    products = vector_format.decode(vector_format.encode(vectors, [""] * 9000)).astype(np.float64) @ query
    mask = None if fraction is None else np.random.default_rng(3).random(9000) < fraction
    allowed = np.flatnonzero(mask) if mask is not None else np.arange(9000)
    rows, scores = scan.search(query, 50, mask, ids_of=ids_in_reverse_row_order)
    assert len(rows) == min(50, len(allowed))
    np.testing.assert_allclose(scores, np.sort(products[allowed])[::-1][:50], atol=2e-5)
    np.testing.assert_allclose(products[rows], scores, atol=2e-5)
    assert np.isin(rows, allowed).all()


def test_mapped_rows_are_searched_in_place(tmp_path):
    """A mapped file is neither copied nor changed, so a row written to it later is found."""
    vectors = random_vectors(300, 32)
    vector_format = make_format("bfloat16", 32)
    path = tmp_path / "vectors.bin"
    path.write_bytes(b"\0" * 4096 + vector_format.encode(vectors, [""] * 300).tobytes())
    before = path.read_bytes()
    scan = RowScan(np.memmap(path, np.uint8, "r", offset=4096, shape=(300, 64)), vector_format)
    assert scan.search(vectors[17], 1, ids_of=no_ids)[0].tolist() == [17]
    assert path.read_bytes() == before
    with path.open("r+b") as stream:
        stream.seek(4096 + 64 * 200)
        stream.write(vector_format.encode(vectors[17:18] * 1.2, [""]).tobytes())
    assert scan.search(vectors[17], 2, ids_of=no_ids)[0].tolist() == [200, 17]


@with_and_without_faiss
def test_a_scan_without_rows_finds_nothing(use_faiss):
    vector_format = make_format("int3", 16)
    scan = RowScan(np.zeros((0, vector_format.code_size), np.uint8), vector_format, use_faiss=use_faiss)
    rows, scores = scan.search(np.ones(16, np.float32), 3, ids_of=no_ids)
    assert (rows.shape, scores.shape) == ((0,), (0,))


def test_invalid_queries_are_rejected():
    scan = make_scan([[1, 0], [0, 3]])
    for query in ([1, 2, 3], [np.nan, 1], [np.inf, 1]):
        with pytest.raises(InputError, match="must be 2 finite numbers"):
            scan.search(np.array(query, np.float32), 1, ids_of=no_ids)
    with pytest.raises(InputError, match="top_k is 0"):
        scan.search(np.ones(2, np.float32), 0, ids_of=no_ids)


@given(
    st.sampled_from(FORMATS),
    st.integers(1, 130),
    st.integers(1, 140),
    st.integers(0, 2**32 - 1),
    st.sampled_from([None, 0.1, 0.5, 0.9]),
    st.booleans(),
)
def test_smaller_top_k_returns_a_prefix_with_equal_scores(name, num, top_k, seed, fraction, use_faiss):
    rng = np.random.default_rng(seed)
    # Rows are drawn with repeats, so products tie both above and at the cutoff.
    scan = make_scan(random_vectors(20, 32, seed)[rng.integers(0, 20, num)], name, use_faiss=use_faiss)
    mask = None if fraction is None else rng.random(num) < fraction
    query = random_vectors(1, 32, seed + 1)[0]
    rows, scores = scan.search(query, top_k, mask, ids_of=ids_in_reverse_row_order)
    all_rows, all_scores = scan.search(query, num, mask, ids_of=ids_in_reverse_row_order)
    assert rows.tolist() == all_rows[:top_k].tolist()
    assert scores.tolist() == all_scores[:top_k].tolist()
    expected = sorted(all_rows.tolist(), key=lambda row: (-scan.products(query, np.array([row]))[0], -row))
    assert all_rows.tolist() == expected
