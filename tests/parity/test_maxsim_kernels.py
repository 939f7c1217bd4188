"""The compiled loop of MaxSim against NumPy, bit for bit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from llvmlite.binding import get_host_cpu_features

from compiled_loops import compiled
from d2llm.ops.kernels import MAXSIM
from d2llm.store.part_vectors import PartVectors
from d2llm.store.vector_formats import make_format

loops = MAXSIM.load()
NOTHING_NEEDED = np.zeros(9, np.int64), np.zeros(0, np.int64)


def random_parts(random: np.random.Generator, vector_format: str, dim: int, num_rows: int) -> PartVectors:
    """Rows of 0 to 20 parts."""
    counts = random.integers(0, 21, num_rows)
    vectors = random.standard_normal((int(counts.sum()), dim)).astype(np.float32)
    vectors *= dim**0.5 / np.linalg.norm(vectors, axis=1, keepdims=True)  # the norm that codes are made for
    return PartVectors.of_texts(vectors, counts, make_format(vector_format, dim))


def by_both(parts: PartVectors, queries: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    results: list[np.ndarray] = []
    for is_compiled in (False, True):
        with compiled(is_compiled):
            results.append(parts.sum_of_best(queries, rows))
    by_numpy, by_kernel = results
    assert by_numpy.dtype == by_kernel.dtype
    return by_numpy, by_kernel


@given(
    st.integers(0, 1 << 30),
    st.sampled_from(["int4", "int8", "int3", "float32"]),
    st.sampled_from([8, 20, 33, 64, 100]),
    st.integers(0, 40),
)
def test_sums_are_those_of_numpy(seed, vector_format, dim, num_queries):
    """int3 and float32 have no loop: they go on as they are."""
    random = np.random.default_rng(seed)
    parts = random_parts(random, vector_format, dim, 30)
    queries = (random.standard_normal((num_queries, dim)) * random.uniform(1e-3, 1e3)).astype(np.float32)
    by_numpy, by_kernel = by_both(parts, queries, random.integers(0, 30, 25))
    np.testing.assert_array_equal(by_kernel, by_numpy)


@given(
    st.integers(0, 1 << 30),
    st.sampled_from(["int4", "int8", "float32"]),
    st.sampled_from([20, 33, 64]),
    st.integers(1, 40),
    st.floats(0, 1),
)
def test_sums_below_what_is_needed_are_between(seed, vector_format, dim, num_queries, share):
    random = np.random.default_rng(seed)
    parts = random_parts(random, vector_format, dim, 30)
    queries = (random.standard_normal((num_queries, dim)) * random.uniform(1e-3, 1e3)).astype(np.float32)
    rows = random.integers(0, 30, 25)
    sums = parts.sum_of_best(queries, rows)
    needed = np.quantile(sums, share) + random.standard_normal(25) * sums.std() / 8
    for is_compiled in (False, True):
        with compiled(is_compiled):
            between = parts.sum_of_best(queries, rows, needed)
        is_of_interest = sums >= needed
        np.testing.assert_array_equal(between[is_of_interest], sums[is_of_interest])
        assert (between >= sums).all()
        error = 1e-5 * np.abs(sums).max()
        assert (between[~is_of_interest] <= needed[~is_of_interest] + error).all()


def test_rows_are_left_after_the_first_queries():
    """Of 32 queries, 24 are not multiplied with most rows: their bounds are above their sums."""
    random = np.random.default_rng(0)
    parts = random_parts(random, "int4", 64, 300)
    queries = random.standard_normal((32, 64)).astype(np.float32)
    with compiled(True):
        sums = parts.sum_of_best(queries, np.arange(300))
        needed = np.full(300, 0.8 * np.linalg.norm(queries, axis=1).sum() * 64**0.5)  # a mean cosine of .8
        between = parts.sum_of_best(queries, np.arange(300), needed)
    assert (between < needed).all()
    has_parts = sums > 0
    assert (between[has_parts] > 2 * sums[has_parts]).all()


@pytest.mark.parametrize("vector_format", ["int4", "int8"])
def test_the_largest_norm_is_that_of_the_levels(vector_format):
    parts = random_parts(np.random.default_rng(0), vector_format, 64, 30)
    made = make_format(vector_format, 64)
    expected = np.linalg.norm(made.levels(parts.codes), axis=1).max()
    assert 0.5 * made.step * loops.largest_square(parts.codes, made.bits) ** 0.5 == pytest.approx(expected)


@pytest.mark.parametrize("vector_format", ["int4", "int8"])
def test_the_largest_numbers_do_not_overflow(vector_format):
    """Queries and parts with the highest and lowest numbers in every dimension, and products below 0 only."""
    made = make_format(vector_format, 64)
    for code, sign in ((255, 1), (255, -1), (0, 1), (0, -1)):
        parts = PartVectors(np.array([[0, 2]]), np.full((2, made.code_size), code, np.uint8), made)
        turned = np.full((1, 64), 1e4 * sign, np.float32)
        # The query whose rotation is the same number everywhere: the rotation keeps inner products.
        basis = np.array([made.turn(row) for row in np.eye(64, dtype=np.float32)])
        queries = (turned @ basis.T).astype(np.float32)
        by_numpy, by_kernel = by_both(parts, np.repeat(queries, 3, axis=0), np.array([0]))
        np.testing.assert_array_equal(by_kernel, by_numpy)
        expected = 3 * float((made.levels(parts.codes[:1]) @ turned[0])[0])
        np.testing.assert_allclose(by_kernel, expected, rtol=3e-3)  # a query is rounded to 8 bits


def test_queries_are_arranged_in_blocks_and_halves():
    queries = np.arange(17 * 5, dtype=np.int8).reshape(17, 5)
    of_pairs, of_bytes = (loops.arranged(queries, bits) for bits in (4, 8))
    num_blocks = 16 // loops.LANES + 1
    assert of_pairs.shape == (num_blocks, 2, 1, loops.LANES, loops.SIDE, 4)
    assert of_pairs[-1, :, 0, 0, 0].tolist() == [[80, 82, 84, 0], [81, 83, 0, 0]]
    assert of_bytes.shape == (num_blocks, 2, 2, loops.LANES, loops.SIDE, 4)
    assert of_bytes[-1, :, 1, 0, 0].tolist() == [[84, 0, 0, 0]] * 2
    for queries in (of_pairs, of_bytes):  # once for each token in a register
        np.testing.assert_array_equal(queries, np.repeat(queries[:, :, :, :, :1], loops.SIDE, axis=4))
    assert not of_pairs[-1, :, :, 1:].any()


@pytest.mark.parametrize(("starts", "counts"), [([-1], [2]), ([3], [2]), ([0], [0]), ([0], [-1]), ([5], [1])])
def test_rows_without_their_parts_are_an_error(starts, counts):
    codes, queries = np.zeros((4, 4), np.uint8), loops.arranged(np.ones((3, 8), np.int8), 4)
    with pytest.raises(ValueError, match="not where they should be"):
        loops.sum_of_best(codes, np.array(starts), np.array(counts), queries, 4, *NOTHING_NEEDED, np.zeros(1, np.int64))


@pytest.mark.parametrize(("bits", "width"), [(4, 4), (4, 9), (8, 8), (8, 13)])
def test_another_width_is_an_error(bits, width):
    queries = loops.arranged(np.ones((3, 10), np.int8), bits)
    codes, first, one = np.zeros((4, width), np.uint8), np.zeros(1, int), np.ones(1, int)
    with pytest.raises(ValueError, match="different widths"):
        loops.sum_of_best(codes, first, one, queries, bits, *NOTHING_NEEDED, np.zeros(1, np.int64))


@pytest.mark.parametrize(
    "features", ["", "+avx,+avx2", "+avx,+avx2,+avxvnni", "+avx,+avx2,+avx512f,+avx512vl,+avx512bw"]
)
def test_processors_that_can_do_less_sum_alike(tmp_path, features):
    here = get_host_cpu_features()
    if not all(here[feature[1:]] for feature in features.split(",") if feature):
        pytest.skip("this processor cannot do it")
    processor = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": features, "NUMBA_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--basetemp={tmp_path / 'tests'}"]
    asked = "numpy or overflow or between"
    done = subprocess.run(
        [*command, "-k", asked, __file__],
        cwd=Path(__file__).parents[2],
        env=os.environ | processor,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    assert "4 passed" in done.stdout
