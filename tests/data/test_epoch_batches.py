"""Epochs over several data sets: the fraction of each set and the queries of each batch."""

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
    """Query n has n % 40 + 1 words, one positive, and two hard negatives of which it draws one."""
    entries = [PlanEntry(f"{name}{n}", (f"p{n}",), (f"h{n}", f"h{n + 1}"), ()) for n in range(num_queries)]
    queries = {entry.query_id: "word " * (n % 40) + "end" for n, entry in enumerate(entries)}
    passages = {f"{kind}{n}": "text" for n in range(num_queries + 1) for kind in "ph"}
    store = LabelStore(folder, teacher="T", prompt="P", dataset=name)
    return LabelledSource.join(make_source(passages, queries, entries, name=name), store, keep_unlabelled=True)


@pytest.fixture
def three_sets(tmp_path: Path) -> list[LabelledSource]:
    """Data sets of 27, 8 and 1 batches of 4 queries."""
    return [labelled(tmp_path, name, size) for name, size in (("large", 108), ("middle", 31), ("small", 3))]


def drawn(sources: list[LabelledSource], epoch: int = 0, **options: object) -> Batches:
    settings = {"batch_queries": 4, "num_hard": 1, "num_easy": 0, "seed": 0} | options
    return epoch_batches(sources, epoch=epoch, **settings)


def names(batches: Batches) -> Counter[str]:
    return Counter(source.source.dataset.name for source, _ in batches)


def ids(batches: Batches, name: str) -> list[str]:
    return [draw.entry.query_id for source, draws in batches if source.source.dataset.name == name for draw in draws]


@pytest.mark.parametrize(
    ("temperature", "fractions"),
    [
        (1, {"large": 27, "middle": 8, "small": 1}),
        # cube roots 3 : 2 : 1 of 36 batches
        (3, {"large": 18, "middle": 12, "small": 6}),
        # square roots 5.196, 2.828, 1 of 9.025: 20.73, 11.28, 3.99; rounded down to 20, 11, 3, and the remaining two
        # batches go to the largest remainders, those of small and large
        (2, {"large": 21, "middle": 11, "small": 4}),
        (1e9, {"large": 12, "middle": 12, "small": 12}),
    ],
)
def test_shares_match_hand_calculation(three_sets, temperature: float, fractions: dict[str, int]):
    for epoch in range(3):
        batches = drawn(three_sets, epoch, temperature=temperature)
        assert names(batches) == fractions
        assert len(batches) == batches_per_epoch(three_sets, 4) == 36


def test_queries_by_set_counts_the_drawn_queries(three_sets: list[LabelledSource]) -> None:
    assert queries_by_set(drawn(three_sets)) == {"large": 108, "middle": 31, "small": 3}
    # small: six rounds of one batch of 3; middle: twelve batches, one round of eight and four more of 4
    counts = queries_by_set(drawn(three_sets, temperature=3))
    assert counts["small"] == 18
    assert counts["large"] == 72
    assert 45 <= counts["middle"] <= 47


def test_no_query_repeats_before_all_were_drawn(three_sets: list[LabelledSource]) -> None:
    """Three epochs of 18 batches go through the large set exactly twice, wherever each epoch begins."""
    epochs = [drawn(three_sets, epoch, temperature=3) for epoch in range(3)]
    counts = Counter(query_id for batches in epochs for query_id in ids(batches, "large"))
    assert set(counts.values()) == {2}
    assert len(counts) == 108
    first = set(ids(epochs[0], "large"))
    assert len(first) == 72


def test_a_repeated_query_draws_new_negatives(three_sets: list[LabelledSource]) -> None:
    draws = [d for source, ds in drawn(three_sets, temperature=3) if source.source.dataset.name == "small" for d in ds]
    assert len({(draw.entry.query_id, tuple(draw.hard)) for draw in draws}) > 3


@pytest.mark.parametrize("options", [{}, {"temperature": 2.5}])
def test_an_epoch_depends_only_on_seed_and_number(three_sets: list[LabelledSource], options: dict[str, object]) -> None:
    assert drawn(three_sets, 4, **options) == drawn(three_sets, 4, **options)
    assert drawn(three_sets, 4, **options) != drawn(three_sets, 5, **options)
    assert drawn(three_sets, 4, **options) != drawn(three_sets, 4, seed=1, **options)


def test_an_empty_set_has_no_share(three_sets: list[LabelledSource], tmp_path: Path) -> None:
    assert names(drawn([*three_sets, labelled(tmp_path, "none", 0)], temperature=3)) == names(
        drawn(three_sets, temperature=3)
    )
    assert drawn([]) == []
