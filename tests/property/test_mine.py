"""Mining: the draw for a query depends only on the seed, its id and the corpus."""

from __future__ import annotations

import random
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from d2llm.core.types import Passage, Query
from d2llm.data.beir import Dataset
from d2llm.recipe import MiningConfig
from d2llm.training.mining.mine import mine
from examples import examples

WORDS = ("cat", "dog", "bird", "fish", "tree", "猫咪", "sun", "rain")
TEXTS = st.lists(st.sampled_from(WORDS), min_size=0, max_size=4).map(" ".join)


@st.composite
def datasets(draw: st.DrawFn) -> Dataset:
    passages = [
        Passage(f"p{number}", text) for number, text in enumerate(draw(st.lists(TEXTS, min_size=4, max_size=14)))
    ]
    queries = [Query(f"q{number}", text) for number, text in enumerate(draw(st.lists(TEXTS, min_size=1, max_size=6)))]
    grades = st.dictionaries(st.sampled_from([p.id for p in passages]), st.integers(0, 2), max_size=3)
    train = {query.id: draw(grades) for query in queries}
    train[queries[0].id] = {"p0": 1}  # at least one query to mine for
    return Dataset("d", Path("d"), {p.id: p for p in passages}, {q.id: q for q in queries}, {"train": train})


def shuffled(dataset: Dataset, order: random.Random) -> Dataset:
    def shuffle(mapping: dict) -> dict:
        items = list(mapping.items())
        order.shuffle(items)
        return dict(items)

    train = shuffle({query_id: shuffle(grades) for query_id, grades in dataset.qrels["train"].items()})
    return Dataset("d", Path("d"), shuffle(dataset.passages), shuffle(dataset.queries), {"train": train})


@settings(max_examples=examples(60))
@given(dataset=datasets(), seed=st.integers(0, 9), order=st.randoms(use_true_random=False))
def test_shuffling_the_files_changes_no_draw(dataset: Dataset, seed: int, order: random.Random) -> None:
    config = MiningConfig(num_hard=2, num_easy=2, range_max=5, range_min=1)
    entries = mine(dataset, "train", config, encoder=None, seed=seed).entries
    shuffled_entries = mine(shuffled(dataset, order), "train", config, encoder=None, seed=seed).entries
    drawn = {entry.query_id: (entry.hard_negatives, entry.easy_negatives) for entry in entries}
    assert drawn == {entry.query_id: (entry.hard_negatives, entry.easy_negatives) for entry in shuffled_entries}
    assert {e.query_id: set(e.positives) for e in entries} == {e.query_id: set(e.positives) for e in shuffled_entries}


@settings(max_examples=examples(60))
@given(dataset=datasets(), seed=st.integers(0, 9), num_easy=st.integers(0, 20), num_hard=st.integers(0, 9))
def test_lists_are_disjoint_and_as_long_as_the_corpus_allows(dataset: Dataset, seed: int, num_easy: int, num_hard: int):
    config = MiningConfig(num_hard=num_hard, num_easy=num_easy)
    for entry in mine(dataset, "train", config, encoder=None, seed=seed).entries:
        assert len(set(entry.passage_ids)) == len(entry.passage_ids)
        assert set(entry.positives) == {p for p, grade in dataset.qrels["train"][entry.query_id].items() if grade > 0}
        assert len(entry.hard_negatives) <= num_hard
        own = dataset.queries[entry.query_id].text  # a passage with this text is the query itself
        texts = {own, *(dataset.passages[passage_id].text for passage_id in entry.positives)} - {""}
        negatives = entry.hard_negatives + entry.easy_negatives
        assert not any(dataset.passages[passage_id].text in texts for passage_id in negatives)
        allowed = sum(
            passage_id not in entry.positives and passage.text not in texts
            for passage_id, passage in dataset.passages.items()
        )
        assert len(entry.easy_negatives) == min(num_easy, allowed - len(entry.hard_negatives))
