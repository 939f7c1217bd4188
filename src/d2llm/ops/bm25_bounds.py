"""How much a term can give to the BM25 of any row of a range: bounds, by which a search skips ranges and terms.

A term gives a row its weight times a share, tf / (tf + k1 (1 - b + b |p| / mean length)), that is below 1. The largest
share in each range of rows is computed when words are written, by the mean length of then, and kept in a byte. Of
another mean length it follows by ``largest_share``: the inverse of a share is a linear function of 1 / mean length, so
the inverse of the largest is a concave one, which is at least 1 where 1 / mean length is 0.

Source: block maxima, Ding and Suel, Faster top-k document retrieval using block-max indexes, SIGIR 2011.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from d2llm.ops.selection import ranges

RANGE = 1 << 15
"""Rows of a range, whose scores fit a processor's second cache. Smaller ranges skip more, but each costs something."""
MIN_POSTINGS = 256
"""Of terms with fewer postings in a segment, reading all is as fast as bounds are."""
_STEPS = 255


class TermBounds(NamedTuple):
    """Bounds of the frequent terms of consecutive rows.

    Attributes:
        terms: [b] the terms that have bounds, ascending.
        shares: [b * ranges] the largest share of each in each range, in 255ths, rounded up.
        mean_length: the mean length of a row, by which they were computed.
    """

    terms: NDArray[np.uint32]
    shares: NDArray[np.uint8]
    mean_length: float

    def fit(self, num_rows: int) -> bool:
        """Whether there is a share for each term and range of ``num_rows`` rows."""
        return len(self.shares) == len(self.terms) * count_ranges(num_rows)

    def starts_of(self, terms: NDArray[np.int64], num_rows: int) -> NDArray[np.int64]:
        """Where the shares of some terms start among those of ``num_rows`` rows; -1 for terms that have none."""
        if not len(self.terms):
            return np.full(len(terms), -1, np.int64)
        positions = np.minimum(np.searchsorted(self.terms, terms), len(self.terms) - 1)
        return np.where(self.terms[positions] == terms, positions * count_ranges(num_rows), -1)


def count_ranges(num_rows: int) -> int:
    """The ranges of so many rows."""
    return -(-num_rows // RANGE)


def bounds_of(
    starts: NDArray[np.int64],
    rows: NDArray[np.uint32],
    counts: NDArray[np.uint16],
    norms: NDArray[np.float32],
    mean_length: float,
) -> TermBounds:
    """The bounds of the terms of some rows.

    Args:
        starts: [v + 1] where the postings of each term start.
        rows: [p] the rows that have a term, ascending for each term.
        counts: [p] how often they have it.
        norms: [n] k1 (1 - b + b |p| / mean length) of each row.
        mean_length: the mean length in the norms.

    Example:
        >>> starts, rows = np.array([0, 256]), np.arange(256, dtype=np.uint32)
        >>> bounds_of(starts, rows, np.ones(256, np.uint16), np.ones(256, np.float32), 9.0).shares.tolist()
        [128]

    Raises:
        ValueError: the postings are not where they should be.
    """
    if len(starts) and (starts[0] < 0 or starts[-1] > len(rows) or (np.diff(starts) < 0).any()):
        raise ValueError("the postings of a term are not where they should be")
    terms = np.flatnonzero(np.diff(starts) >= MIN_POSTINGS)
    num_ranges = count_ranges(len(norms))
    largest = np.zeros(len(terms) * num_ranges, np.float32)
    if len(terms):
        sizes = starts[terms + 1] - starts[terms]
        postings = ranges(starts[terms], sizes)
        cells = np.repeat(np.arange(len(terms)), sizes) * num_ranges + rows[postings] // RANGE
        times = counts[postings].astype(np.float32)
        firsts = np.flatnonzero(np.diff(cells, prepend=-1))
        largest[cells[firsts]] = np.maximum.reduceat(times / (times + norms[rows[postings]]), firsts)
    return TermBounds(terms.astype(np.uint32), np.ceil(largest * _STEPS).astype(np.uint8), mean_length)


def largest_share(kept: int, factor: float) -> float:
    """An upper bound of the shares in a range.

    Args:
        kept: the largest one, as ``TermBounds`` has it.
        factor: the mean length by which that was computed, divided by today's.

    Example:
        >>> round(largest_share(128, 1.0), 3), round(largest_share(128, 0.5), 3), largest_share(0, 1.0)
        (0.502, 0.668, 0.0)
    """
    if kept == 0:
        return 0.0
    return 1.0 / (1.0 + (_STEPS / kept - 1.0) * min(factor, 1.0))
