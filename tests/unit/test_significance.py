import itertools

import numpy as np
import pytest

from d2llm.ops.significance import paired_randomisation

FIRST = [0.9, 0.4, 0.8, 0.55, 0.3, 1.0, 0.7, 0.2]
SECOND = [0.5, 0.45, 0.5, 0.35, 0.1, 0.7, 0.75, 0.1]


def enumerated(first, second):
    """The exact p-value: all 2^n sign vectors."""
    differences = [a - b for a, b in zip(first, second, strict=True)]
    observed = abs(sum(differences))
    sums = [
        abs(sum(sign * difference for sign, difference in zip(signs, differences, strict=True)))
        for signs in itertools.product((-1, 1), repeat=len(differences))
    ]
    return sum(value >= observed - 1e-9 for value in sums) / len(sums)


def test_close_to_exact_enumeration():
    exact = enumerated(FIRST, SECOND)
    assert 0.005 < exact < 0.2  # a case in which the p-value says something
    # 50,000 draws: standard error sqrt(p (1 - p) / 50,000) < .0018
    assert paired_randomisation(FIRST, SECOND, num_permutations=50_000) == pytest.approx(exact, abs=0.006)


def test_same_systems_differ_by_chance_only():
    assert paired_randomisation(FIRST, FIRST) == 1.0


def test_two_sided():
    assert paired_randomisation(FIRST, SECOND, seed=3) == pytest.approx(
        paired_randomisation(SECOND, FIRST, seed=3), abs=1e-12
    )


def test_smallest_p_value_when_no_permutation_reaches():
    first = np.ones(60)
    assert paired_randomisation(first, first * 0, num_permutations=999) == 1 / 1000


def test_seeded():
    one, other = (paired_randomisation(FIRST, SECOND, num_permutations=5_000, seed=seed) for seed in (1, 2))
    assert one == paired_randomisation(FIRST, SECOND, num_permutations=5_000, seed=1)
    assert one != other


@pytest.mark.parametrize(("first", "second"), [([], []), ([1.0], [1.0, 2.0])])
def test_needs_the_same_queries(first, second):
    with pytest.raises(ValueError, match="same queries"):
        paired_randomisation(first, second)
