import numpy as np
import pytest

from d2llm.ops.selection import nth_highest, top_rows

IDS = np.array(["e", "d", "c", "b", "a"])


def ids_of(rows):
    return IDS[rows].tolist()


def test_ids_are_requested_only_for_ties():
    requested = []
    scores = np.array([3, 1, 2, 2, 5, 3, 1], np.float32)
    assert top_rows(
        scores, 4, lambda rows: requested.append(rows.tolist()) or [str(9 - row) for row in rows]
    ).tolist() == [4, 5, 0, 3]
    assert [sorted(rows) for rows in requested] == [[0, 2, 3, 5]]  # one call, without rows 1, 4 and 6
    top_rows(np.array([3, 1, 2], np.float32), 2, lambda rows: pytest.fail("no two scores are equal"))


@pytest.mark.parametrize("order", ["random", "ascending", "descending", "sample is high", "sample is low", "tied"])
@pytest.mark.parametrize("number", [1, 7, 100, 4_000, 9_999, 10_000])
def test_the_nth_highest_of_many(order, number):
    values = np.random.default_rng(0).standard_normal(10_000).astype(np.float32)
    match order:
        case "ascending" | "descending":
            values = np.sort(values)[:: 1 if order == "ascending" else -1]
        case "sample is high" | "sample is low":  # all of the sampled places, and no others
            values[::64] += 10 if order == "sample is high" else -10
        case "tied":
            values = np.round(values)
            values[:10] = np.inf
    assert nth_highest(values, number) == np.sort(values)[-number]


def test_a_large_corpus_with_constant_scores():
    ids = [f"{number * 7919 % 20_000:05d}" for number in range(20_000)]
    assert [ids[row] for row in top_rows(np.zeros(20_000, np.float32), 3, lambda rows: [ids[row] for row in rows])] == [
        "00000",
        "00001",
        "00002",
    ]
