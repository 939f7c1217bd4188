"""Is the difference between two systems more than chance?"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

_BLOCK = 1_000  # permutations drawn at once: bounds the memory at 1,000 x n signs


def paired_randomisation(
    first: ArrayLike, second: ArrayLike, *, num_permutations: int = 10_000, seed: int = 0
) -> float:
    """Two-sided p-value of the paired randomisation (sign-flip) test on the mean difference.

    Under the hypothesis that the systems are alike, each query's two values could as well be exchanged, which flips the
    sign of their difference. p = (1 + #{permutations with |mean| >= |observed mean|}) / (1 + num_permutations).

    Args:
        first: [n] values of one system, one per query.
        second: [n] values of the other, same queries in the same order.
        num_permutations: random sign vectors drawn; the smallest possible p is 1 / (1 + this).
        seed: of the random generator.

    Raises:
        ValueError: the lengths differ or are zero.

    Source: Smucker, Allan, Carterette, "A comparison of statistical significance tests for information retrieval
    evaluation", CIKM 2007, section 3.1; the added one: Phipson and Smyth 2010.
    """
    differences: NDArray[np.float64] = np.asarray(first, np.float64) - np.asarray(second, np.float64)
    if len(np.asarray(first)) != len(np.asarray(second)) or len(differences) == 0:
        raise ValueError("the test needs the same queries, at least one, for both systems")
    differences = differences[differences != 0]  # a zero keeps its value under a flip
    observed = abs(differences.sum())
    # Sums of the same numbers in another order differ in the last digits; these must count as ties.
    reached = observed - 1e-12 * max(1.0, float(np.abs(differences).sum()))
    generator = np.random.default_rng(seed)
    extreme = 0
    for start in range(0, num_permutations, _BLOCK):
        shape = (min(_BLOCK, num_permutations - start), len(differences))
        signs = generator.integers(0, 2, size=shape, dtype=np.int8) * 2 - 1
        extreme += int((np.abs(signs @ differences) >= reached).sum())
    return (1 + extreme) / (1 + num_permutations)
