"""Token-budget batches: every item exactly once, within the limits."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from d2llm.ops.batching import token_budget_batches

LENGTHS = st.lists(st.integers(0, 200), max_size=60)


@given(lengths=LENGTHS, max_tokens=st.integers(1, 400), max_items=st.integers(1, 10))
def test_every_index_appears_once_within_the_limits(lengths: list[int], max_tokens: int, max_items: int) -> None:
    batches = token_budget_batches(lengths, max_tokens=max_tokens, max_items=max_items)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        assert 1 <= len(batch) <= max_items
        assert len(batch) == 1 or len(batch) * max(lengths[index] for index in batch) <= max_tokens
    ordered = [lengths[index] for batch in batches for index in batch]
    assert ordered == sorted(lengths, reverse=True)


@given(lengths=LENGTHS, max_tokens=st.integers(1, 400), max_items=st.integers(1, 10))
def test_no_batch_could_have_taken_the_next_text(lengths: list[int], max_tokens: int, max_items: int) -> None:
    batches = token_budget_batches(lengths, max_tokens=max_tokens, max_items=max_items)
    for batch in batches[:-1]:
        longest = lengths[batch[0]]
        assert len(batch) == max_items or (len(batch) + 1) * max(1, longest) > max_tokens


@given(lengths=LENGTHS, max_tokens=st.integers(1, 400), enough_tokens=st.integers(1, 400))
def test_enough_tokens_cuts_batches_only_to_save_padding(lengths: list[int], max_tokens: int, enough_tokens: int):
    plain = token_budget_batches(lengths, max_tokens=max_tokens, max_items=100)
    cut = token_budget_batches(lengths, max_tokens=max_tokens, max_items=100, enough_tokens=enough_tokens)
    assert [index for batch in cut for index in batch] == [index for batch in plain for index in batch]
    for batch in cut:
        assert len(batch) == 1 or len(batch) * max(lengths[index] for index in batch) <= max_tokens
    for batch, following in itertools.pairwise(cut):
        longest = max(1, lengths[batch[0]])
        is_full = (len(batch) + 1) * longest > max_tokens or len(batch) == 100
        is_narrower = -(-lengths[following[0]] // 8) < -(-longest // 8)
        assert is_full or (is_narrower and len(batch) * longest >= enough_tokens)
