"""Token-budget batches, by hand."""

from __future__ import annotations

import pytest
import torch

from d2llm.ops.batching import even_batches, pad_left, pad_right, token_budget_batches


def test_batches_are_longest_first_within_both_limits():
    # Longest 6: 12 // 6 = 2 texts. Then longest 4: 3 texts. Then longest 1: 12 fit, but at most 4 items.
    lengths = [1, 6, 4, 1, 4, 5, 3, 1]
    assert token_budget_batches(lengths, max_tokens=12, max_items=4) == [[1, 5], [2, 4, 6], [0, 3, 7]]


def test_a_batch_with_enough_tokens_takes_no_narrower_texts():
    # Widths, rounded up to 8: 24, 24, 16, 16, 8, 8, 8. For 40 tokens, two texts of 24 suffice, or three of 16.
    lengths = [20, 24, 16, 9, 8, 2, 5]
    assert token_budget_batches(lengths, max_tokens=1000, max_items=9, enough_tokens=40) == [[1, 0], [2, 3, 4], [6, 5]]
    assert token_budget_batches(lengths, max_tokens=1000, max_items=9, enough_tokens=1) == [[1, 0], [2, 3], [4, 6, 5]]
    assert token_budget_batches(lengths, max_tokens=24, max_items=9, enough_tokens=40)[:3] == [[1], [0], [2]]


@pytest.mark.parametrize(("max_tokens", "max_items"), [(0, 1), (1, 0), (-5, 3)])
def test_limits_below_one_are_refused(max_tokens: int, max_items: int) -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        token_budget_batches([1], max_tokens=max_tokens, max_items=max_items)


def test_even_batches_are_balanced() -> None:
    assert [even_batches(count, 32) for count in (97, 96, 64, 33, 32, 1, 0)] == [
        (4, 25),
        (3, 32),
        (2, 32),
        (2, 17),
        (1, 32),
        (1, 1),
        (0, 32),
    ]
    for num_items in range(1, 200):
        for most in range(1, 40):
            count, size = even_batches(num_items, most)
            assert size <= most
            assert (count - 1) * size < num_items <= count * size  # exactly count batches, none of them empty


def test_rows_are_padded_to_a_multiple_of_eight_on_either_side() -> None:
    rows = [[5, 6, 7], [8]]
    left, left_mask = pad_left(rows, 0, torch.device("cpu"))
    assert left.tolist() == [[0, 0, 0, 0, 0, 5, 6, 7], [0, 0, 0, 0, 0, 0, 0, 8]]
    assert left_mask.tolist() == [[False] * 5 + [True] * 3, [False] * 7 + [True]]
    right, right_mask = pad_right(rows, 0, torch.device("cpu"))
    assert right.tolist() == [[5, 6, 7, 0, 0, 0, 0, 0], [8, 0, 0, 0, 0, 0, 0, 0]]
    assert torch.equal(right_mask.sum(1), left_mask.sum(1))
