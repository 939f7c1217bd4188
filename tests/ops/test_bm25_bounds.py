"""Bounds of what a term can give to a score: never below, and close, whatever the mean length becomes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2llm.ops.bm25_bounds import MIN_POSTINGS, RANGE, TermBounds, bounds_of, largest_share

K1, B = 1.2, 0.75


def norms_of(lengths: np.ndarray, mean: float) -> np.ndarray:
    return (K1 * (1 - B + B * lengths / mean)).astype(np.float32)


@given(st.integers(0, 1 << 30), st.floats(0.01, 100), st.integers(1, 3 * RANGE))
def test_no_share_is_above_its_bound(seed, change, num_rows):
    """Terms that every row, many, few and no rows have; the mean length changed afterwards."""
    random = np.random.default_rng(seed)
    lengths = random.integers(1, 400, num_rows)
    mean = float(lengths.mean())
    held = [np.flatnonzero(random.random(num_rows) < fraction) for fraction in (1, 0.3, 0.001, 0)]
    starts = np.cumsum([0, *map(len, held)])
    rows = np.concatenate(held).astype(np.uint32)
    counts = random.geometric(0.5, len(rows)).astype(np.uint16)
    bounds = bounds_of(starts, rows, counts, norms_of(lengths, mean), mean)
    terms = np.arange(4)
    assert bounds.terms.tolist() == [term for term in terms if len(held[term]) >= MIN_POSTINGS]
    num_ranges = -(-num_rows // RANGE)
    norms = norms_of(lengths, change * mean)
    for term, start in zip(terms, bounds.starts_of(terms, num_rows).tolist(), strict=True):
        assert (start < 0) == (term not in bounds.terms)
        for number in range(num_ranges if start >= 0 else 0):
            here = slice(*(starts[term] + np.searchsorted(held[term], [number * RANGE, (number + 1) * RANGE])))
            shares = counts[here] / (counts[here] + norms[rows[here]])
            bound = largest_share(int(bounds.shares[start + number]), 1 / change)
            assert shares.max(initial=0) <= bound * (1 + 1e-6)
            if 0.99 < change < 1.01:
                assert bound <= shares.max(initial=0) + 0.02


def test_a_term_without_bounds():
    assert TermBounds(np.zeros(0, np.uint32), np.zeros(0, np.uint8), 1.0).starts_of(np.array([3]), 10).tolist() == [-1]


@pytest.mark.parametrize("starts", [[0, 5, 3], [-1, 2, 3], [0, 1, 1 << 40]])
def test_postings_that_are_not_there_are_an_error(starts):
    rows = np.arange(4, dtype=np.uint32)
    with pytest.raises(ValueError, match="not where they should be"):
        bounds_of(np.array(starts), rows, np.ones(4, np.uint16), np.ones(4, np.float32), 1.0)
