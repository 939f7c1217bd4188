"""How an epoch is made of several data sets, and which queries meet in a batch."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from d2llm.data.collation import Draw, LabelledSource, batches_per_epoch, epoch_batches, queries_by_set
from d2llm.data.labels import LabelStore
from d2llm.data.plan import PlanEntry
from tiny_data import make_source

Batches = list[tuple[LabelledSource, list[Draw]]]


def labelled(folder: Path, name: str, num_queries: int) -> LabelledSource:
    """Query n has a text of n % 40 words and one passage of its own, two more it draws one of."""
    entries = [PlanEntry(f"{name}{n}", (f"p{n}",), (f"h{n}", f"h{n + 1}"), ()) for n in range(num_queries)]
    queries = {entry.query_id: "word " * (n % 40) + "end" for n, entry in enumerate(entries)}
    passages = {f"{kind}{n}": "text" for n in range(num_queries + 1) for kind in "ph"}
    store = LabelStore(folder, teacher="T", prompt="P", dataset=name)
    return LabelledSource.join(make_source(passages, queries, entries, name=name), store, keep_unlabelled=True)


@pytest.fixture
def three(tmp_path: Path) -> list[LabelledSource]:
    """27, 8 and 1 batches of 4 queries."""
    return [labelled(tmp_path, name, size) for name, size in (("large", 108), ("middle", 31), ("small", 3))]


def drawn(sources: list[LabelledSource], epoch: int = 0, **options: object) -> Batches:
    settings = {"batch_queries": 4, "num_hard": 1, "num_easy": 0, "seed": 0} | options
    return epoch_batches(sources, epoch=epoch, **settings)


def names(batches: Batches) -> Counter[str]:
    return Counter(source.source.dataset.name for source, _ in batches)


def ids(batches: Batches, name: str) -> list[str]:
    return [draw.entry.query_id for source, draws in batches if source.source.dataset.name == name for draw in draws]


@pytest.mark.parametrize(
    ("temperature", "shares"),
    [
        (1, {"large": 27, "middle": 8, "small": 1}),
        # 27^(1/3), 8^(1/3), 1: 3 : 2 : 1 of 36
        (3, {"large": 18, "middle": 12, "small": 6}),
        # square roots 5.196, 2.828, 1 of 9.025: 20.73, 11.28, 3.99; rounded down 20, 11, 3, and the two left to the
        # largest remainders, those of small and large
        (2, {"large": 21, "middle": 11, "small": 4}),
        (1e9, {"large": 12, "middle": 12, "small": 12}),
    ],
)
def test_shares_by_hand(three: list[LabelledSource], temperature: float, shares: dict[str, int]) -> None:
    for epoch in range(3):
        batches = drawn(three, epoch, temperature=temperature)
        assert names(batches) == shares
        assert len(batches) == batches_per_epoch(three, 4) == 36


def test_queries_are_counted(three: list[LabelledSource]) -> None:
    assert queries_by_set(drawn(three)) == {"large": 108, "middle": 31, "small": 3}
    # six rounds of one batch of three; twelve of eight batches: one round and four batches of 4
    counts = queries_by_set(drawn(three, temperature=3))
    assert counts["small"] == 18
    assert counts["large"] == 72
    assert 45 <= counts["middle"] <= 47


def test_no_query_comes_twice_before_all_have_come(three: list[LabelledSource]) -> None:
    """Over three epochs of 18 batches the large set is gone through exactly twice, whatever an epoch begins with."""
    epochs = [drawn(three, epoch, temperature=3) for epoch in range(3)]
    seen = Counter(query_id for batches in epochs for query_id in ids(batches, "large"))
    assert set(seen.values()) == {2}
    assert len(seen) == 108
    first = set(ids(epochs[0], "large"))
    assert len(first) == 72


def test_a_query_that_comes_again_draws_anew(three: list[LabelledSource]) -> None:
    draws = [d for source, ds in drawn(three, temperature=3) if source.source.dataset.name == "small" for d in ds]
    assert len({(draw.entry.query_id, tuple(draw.hard)) for draw in draws}) > 3


@pytest.mark.parametrize("options", [{}, {"temperature": 2.5}])
def test_an_epoch_depends_on_seed_and_number_alone(three: list[LabelledSource], options: dict[str, object]) -> None:
    assert drawn(three, 4, **options) == drawn(three, 4, **options)
    assert drawn(three, 4, **options) != drawn(three, 5, **options)
    assert drawn(three, 4, **options) != drawn(three, 4, seed=1, **options)


def test_an_empty_set_has_no_share(three: list[LabelledSource], tmp_path: Path) -> None:
    assert names(drawn([*three, labelled(tmp_path, "none", 0)], temperature=3)) == names(drawn(three, temperature=3))
    assert drawn([]) == []
