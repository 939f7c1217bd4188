from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from d2llm.ops.ranking import top_k

# Few distinct values, so that ties are common
tied_scores = st.sampled_from([-1.5, -0.0, 0.0, 1.0, 1.0000001, float("inf"), float("-inf")])
items = st.dictionaries(st.text(max_size=3), tied_scores | st.floats(allow_nan=False, width=32), max_size=30)


@given(items=items, k=st.integers(0, 35))
def test_top_k_equals_the_full_sort(items: dict[str, float], k: int) -> None:
    expected = sorted(items.items(), key=lambda item: (-item[1], item[0]))[:k]
    assert top_k(np.array(list(items.values())), list(items), k) == expected


@given(items=items, k=st.integers(0, 35))
def test_top_k_is_a_prefix_of_top_k_plus_one(items: dict[str, float], k: int) -> None:
    scores = torch.tensor(list(items.values()), dtype=torch.bfloat16)  # rounding makes more ties
    shorter, longer = top_k(scores, list(items), k), top_k(scores, list(items), k + 1)
    assert longer[:k] == shorter
    assert len(longer) == min(k + 1, len(items))


@given(items=items, k=st.integers(0, 35), data=st.data())
def test_the_order_of_items_does_not_matter(items: dict[str, float], k: int, data: st.DataObject) -> None:
    shuffled = dict(data.draw(st.permutations(list(items.items()))))
    expected = top_k(np.array(list(items.values())), list(items), k)
    assert top_k(np.array(list(shuffled.values())), list(shuffled), k) == expected


def test_a_large_corpus_equals_the_full_sort() -> None:
    scores = np.random.default_rng(0).integers(0, 500, 20_000).astype(np.float32)  # about 40 items per value
    ids = [f"p{number * 7919 % 20_000}" for number in range(20_000)]
    expected = sorted(((ids[i], float(scores[i])) for i in range(20_000)), key=lambda pair: (-pair[1], pair[0]))
    for k in (1, 39, 100, 19_999):
        assert top_k(scores, ids, k) == expected[:k]
