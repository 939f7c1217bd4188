"""Scans with FAISS and with numpy give the same rows and bit-identical scores."""

import importlib
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import numpy as np
import pytest

from d2llm.core.errors import InputError
from d2llm.store import scan as module
from d2llm.store.index_spec import FORMATS
from d2llm.store.scan import RowScan, load_faiss
from d2llm.store.vector_formats import make_format

pytest.importorskip("faiss")
faiss = load_faiss()


def row_ids(rows):
    return [str(row) for row in rows.tolist()]


def random_codes(name, num, dim):
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((num, dim))
    vectors *= np.sqrt(dim) / np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors[num // 2 :: 7] = vectors[0]  # ties
    kind = make_format(name, dim)
    return kind, kind.encode(vectors.astype(np.float32), [""] * num), rng


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dim", [20, 384])
def test_the_empty_faiss_index_accepts_our_codes(name, dim):
    kind, codes, rng = random_codes(name, 500, dim)
    index = kind.empty_faiss_index(faiss)
    assert index.sa_code_size() == kind.code_size
    index.add_sa_codes(codes)
    query = rng.standard_normal(dim).astype(np.float32)
    scores, rows = index.search(kind.faiss_query(query), 500)
    expected = kind.decode(codes).astype(np.float64) @ query
    assert sorted(rows[0].tolist()) == list(range(500))
    np.testing.assert_allclose(scores[0], expected[rows[0]], atol=1e-5 * dim)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dim", [20, 384])
@pytest.mark.parametrize("top_k", [1, 10, 1000])
def test_faiss_and_numpy_agree(name, dim, top_k):
    kind, codes, rng = random_codes(name, 5000, dim)
    fast, plain = RowScan(codes, kind), RowScan(codes, kind, use_faiss=False)
    assert fast._index is not None
    assert plain._index is None
    for fraction in (None, 0.01, 0.6):
        query = rng.standard_normal(dim).astype(np.float32)
        mask = None if fraction is None else rng.random(5000) < fraction
        results = [scan.search(query, top_k, mask, ids_of=row_ids) for scan in (fast, plain)]
        np.testing.assert_array_equal(results[0][0], results[1][0])
        np.testing.assert_array_equal(results[0][1], results[1][1])


@pytest.mark.parametrize("name", FORMATS)
def test_the_error_of_faiss_is_within_the_bound(name):
    kind, codes, rng = random_codes(name, 5000, 384)
    scan = RowScan(codes, kind)
    for scale in (0.01, 1, 100):
        query = (scale * rng.standard_normal(384)).astype(np.float32)
        scores, rows = scan._index.search(kind.faiss_query(query), 5000)
        exact = scan.products(query, rows[0])
        assert np.abs(scores[0] - exact).max() < scan._error(query)


@pytest.mark.parametrize("rounds", [False, True])
def test_a_faiss_that_rounds_queries_is_noticed(rounds, monkeypatch):
    """FAISS on CPUs with AVX512-FP16 rounds a query to bfloat16, where rows are bfloat16."""
    kind, codes, rng = random_codes("bfloat16", 5000, 384)
    search = faiss.IndexScalarQuantizer.search

    def rounding_search(index, query, *arguments, **options):
        return search(index, kind.decode(kind.encode(query, [""] * len(query))), *arguments, **options)

    plain = RowScan(codes, kind, use_faiss=False)
    exact = RowScan(codes, kind)._rounding == 0.0
    if rounds:
        monkeypatch.setattr(faiss.IndexScalarQuantizer, "search", rounding_search)
    scan = RowScan(codes, kind)
    assert (scan._rounding == 0.0) == (exact and not rounds)
    query = rng.standard_normal(384).astype(np.float32)
    scores, rows = scan._index.search(query[None], 5000)
    assert np.abs(scores[0] - scan.products(query, rows[0])).max() < scan._error(query)
    for one, other in zip(*(each.search(query, 10, ids_of=row_ids) for each in (scan, plain)), strict=True):
        np.testing.assert_array_equal(one, other)


def test_faiss_multiplies_in_float32_once_it_is_loaded():
    """In a process of its own, where nothing else has imported FAISS."""
    code = (
        "import numpy as np; from d2llm.store.scan import load_faiss; faiss = load_faiss(); "
        "index = faiss.IndexScalarQuantizer(384, faiss.ScalarQuantizer.QT_bf16, faiss.METRIC_INNER_PRODUCT); "
        "index.add(np.ones((1, 384), np.float32)); "
        "print(index.search(np.full((1, 384), 1 + 2**-12, np.float32), 1)[0][0, 0])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert float(done.stdout) == 384 + 384 / 2**12


def test_concurrent_searches_and_faiss_threads_change_nothing():
    kind, codes, rng = random_codes("bfloat16", 20_000, 64)
    scan = RowScan(codes, kind)
    queries = rng.standard_normal((24, 64)).astype(np.float32)
    expected = [scan.search(query, 300, ids_of=row_ids) for query in queries]
    before = faiss.omp_get_max_threads()
    try:
        faiss.omp_set_num_threads(5)
        with ThreadPoolExecutor(4) as pool:
            results = list(pool.map(lambda query: scan.search(query, 300, ids_of=row_ids), queries))
        assert scan.search(queries[0], 300, ids_of=row_ids)[0].tolist() == expected[0][0].tolist()
        assert faiss.omp_get_max_threads() == 5  # the caller's setting is kept
    finally:
        faiss.omp_set_num_threads(before)
    for actual, reference in zip(results, expected, strict=True):
        np.testing.assert_array_equal(actual[0], reference[0])
        np.testing.assert_array_equal(actual[1], reference[1])


def test_numpy_is_used_if_faiss_or_its_type_is_missing(monkeypatch):
    kind, codes, rng = random_codes("bfloat16", 1000, 32)
    query = rng.standard_normal(32).astype(np.float32)
    expected = RowScan(codes, kind).search(query, 20, ids_of=row_ids)
    monkeypatch.delattr(faiss.ScalarQuantizer, "QT_bf16")
    without_type = RowScan(codes, kind)
    monkeypatch.setattr(importlib, "import_module", lambda name: (_ for _ in ()).throw(ImportError(name)))
    for scan in (without_type, RowScan(codes, kind)):
        assert scan._index is None
        rows, scores = scan.search(query, 20, ids_of=row_ids)
        np.testing.assert_array_equal(rows, expected[0])
        np.testing.assert_array_equal(scores, expected[1])


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("top_k", [1, 10, 1000])
def test_batched_queries_equal_single_queries(name, top_k, monkeypatch):
    monkeypatch.setattr(module, "_MIN_TOGETHER", 3)
    kind, codes, rng = random_codes(name, 5000, 40)
    queries = rng.standard_normal((21, 40)).astype(np.float32)
    queries[1] = queries[0]
    part = np.zeros(5000, bool)
    part[1100:1400] = True  # whole blocks of rows are masked out
    for use_faiss in (True, False):
        scan = RowScan(codes, kind, use_faiss=use_faiss)
        for mask in (None, rng.random(5000) < 0.01, rng.random(5000) < 0.6, part, np.zeros(5000, bool)):
            expected = [scan.search(query, top_k, mask, ids_of=row_ids) for query in queries]
            results = scan.search_together(queries, top_k, mask, ids_of=row_ids)
            for (rows, scores), (right_rows, right_scores) in zip(results, expected, strict=True):
                np.testing.assert_array_equal(rows, right_rows)
                np.testing.assert_array_equal(scores, right_scores)


def test_batched_queries_fall_back_to_single_ones_on_ties(monkeypatch):
    monkeypatch.setattr(module, "_MIN_TOGETHER", 1)
    codes = np.tile(make_format("bfloat16", 8).encode(np.ones((1, 8), np.float32), [""]), (3000, 1))
    scan = RowScan(codes, make_format("bfloat16", 8))
    single_search = mock.Mock(wraps=scan.search)
    monkeypatch.setattr(scan, "search", single_search)
    ((rows, _),) = scan.search_together(np.ones((1, 8), np.float32), 5, ids_of=lambda rows: [f"{n:04}" for n in rows])
    assert rows.tolist() == [0, 1, 2, 3, 4]
    assert single_search.call_count == 1


def test_invalid_batched_queries_are_rejected():
    scan = RowScan(np.zeros((3, 16), np.uint8), make_format("bfloat16", 8))
    with pytest.raises(InputError, match="top_k is 0"):
        scan.search_together(np.ones((2, 8), np.float32), 0, ids_of=row_ids)
    with pytest.raises(InputError, match="must be 8 finite numbers"):
        scan.search_together(np.full((2, 8), np.nan, np.float32), 1, ids_of=row_ids)
