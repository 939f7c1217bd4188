"""Training data: consistency checks of the sources, and the pairs that a teacher is tuned on."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest

from d2llm.core.errors import InputError, MismatchError
from d2llm.core.types import Task
from d2llm.data.plan import PlanEntry, TrainingPair, TrainingSource, check_sources, labelled_pairs
from tiny_data import make_plan, make_source


def source(*, count: int = 12, num_hard: int = 6, num_easy: int = 4, name: str = "set", task: Task = "asymmetric"):
    """A source whose texts are 'text of <id>'."""
    entries = [
        PlanEntry(
            f"{name}-q{n:02}",
            (f"{n}-positive-0", f"{n}-positive-1"),
            tuple(f"{n}-hard-{k}" for k in range(num_hard)),
            tuple(f"{n}-easy-{k}" for k in range(num_easy)),
        )
        for n in range(count)
    ]
    passages = {passage_id: f"text of {passage_id}" for entry in entries for passage_id in entry.passage_ids}
    queries = {entry.query_id: f"text of {entry.query_id}" for entry in entries}
    return make_source(passages, queries, entries, name=name, task=task)


def kinds(pairs: list[TrainingPair]) -> Counter[str]:
    return Counter(pair.passage.split("-")[1] for pair in pairs)


def by_query(pairs: list[TrainingPair]) -> dict[str, list[TrainingPair]]:
    return {query: [pair for pair in pairs if pair.query == query] for query in {pair.query for pair in pairs}}


def test_each_query_gets_one_positive_and_its_negatives() -> None:
    pairs = labelled_pairs([source()], num_negatives=4, max_queries=None, seed=0)
    grouped = by_query(pairs)
    assert len(grouped) == 12
    for query, query_pairs in grouped.items():
        assert kinds(query_pairs) == {"positive": 1, "hard": 3, "easy": 1}  # a quarter of 4 is easy
        assert len({pair.passage for pair in query_pairs}) == 5
        number = int(query[-2:])
        assert all(pair.passage.startswith(f"text of {number}-") for pair in query_pairs)
        assert all(pair.is_positive == ("positive" in pair.passage) for pair in query_pairs)
        assert {pair.task for pair in query_pairs} == {"asymmetric"}


@pytest.mark.parametrize(
    ("num_negatives", "num_hard", "num_easy", "expected"),
    [
        (8, 6, 4, {"positive": 1, "hard": 6, "easy": 2}),
        (1, 6, 4, {"positive": 1, "easy": 1}),  # at least one easy
        (4, 6, 0, {"positive": 1, "hard": 4}),  # no easy ones: hard ones instead
        (4, 1, 4, {"positive": 1, "hard": 1, "easy": 3}),  # few hard ones: easy ones instead
        (9, 2, 1, {"positive": 1, "hard": 2, "easy": 1}),  # fewer than requested
    ],
)
def test_shares_of_hard_and_easy(num_negatives: int, num_hard: int, num_easy: int, expected: dict[str, int]) -> None:
    training_source = source(count=3, num_hard=num_hard, num_easy=num_easy)
    for query_pairs in by_query(
        labelled_pairs([training_source], num_negatives=num_negatives, max_queries=None, seed=0)
    ).values():
        assert kinds(query_pairs) == expected


def test_different_seeds_draw_both_positives() -> None:
    drawn = {
        pair.passage
        for seed in range(8)
        for pair in labelled_pairs([source(count=1)], num_negatives=1, max_queries=None, seed=seed)
        if pair.is_positive
    }
    assert drawn == {"text of 0-positive-0", "text of 0-positive-1"}


def test_a_draw_depends_only_on_query_and_seed() -> None:
    training_source = source()
    whole = by_query(labelled_pairs([training_source], num_negatives=4, max_queries=None, seed=5))
    plan = make_plan(training_source.plan.entries[::-2])
    part = by_query(
        labelled_pairs([dataclasses.replace(training_source, plan=plan)], num_negatives=4, max_queries=None, seed=5)
    )
    assert len(part) == 6
    assert {query: set(pairs) for query, pairs in part.items()} == {query: set(whole[query]) for query in part}


def test_order_is_fixed_by_the_seed_and_mixes_sources() -> None:
    sources = [source(name="one"), source(name="two", task="symmetric")]
    pairs = labelled_pairs(sources, num_negatives=2, max_queries=None, seed=0)
    assert pairs == labelled_pairs(sources, num_negatives=2, max_queries=None, seed=0)
    assert pairs != labelled_pairs(sources, num_negatives=2, max_queries=None, seed=1)
    assert len({pair.task for pair in pairs[:12]}) == 2
    reordered = [dataclasses.replace(each, plan=make_plan(each.plan.entries[::-1])) for each in sources]
    assert labelled_pairs(reordered, num_negatives=2, max_queries=None, seed=0) == pairs


def test_max_queries_applies_per_source_and_samples_are_nested() -> None:
    sources = [source(name="one"), source(name="two")]
    small, large = (
        {pair.query for pair in labelled_pairs(sources, num_negatives=2, max_queries=count, seed=0)} for count in (3, 5)
    )
    assert Counter(query.split()[2].split("-")[0] for query in small) == {"one": 3, "two": 3}
    assert small < large
    assert small != {f"text of {name}-q{n:02}" for name in ("one", "two") for n in range(3)}  # not just the first


# --- inconsistent sources ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "error", "message"),
    [
        (PlanEntry("nobody", ("p",), (), ()), MismatchError, "has no such query"),
        (PlanEntry("q", ("p", "lost"), (), ()), MismatchError, "has no passage 'lost'"),
        (PlanEntry("q", ("p",), (), ("lost",)), MismatchError, "has no passage 'lost'"),
        (PlanEntry("q", (), ("p",), ()), InputError, "there is no positive"),
        (PlanEntry("q", ("p",), ("p",), ()), InputError, "a passage is named twice"),
    ],
)
def test_a_plan_for_other_data_is_rejected(entry: PlanEntry, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"the plan for 'tiny', query '{entry.query_id}': .*{message}"):
        make_source({"p": "text"}, {"q": "text"}, [entry])


def test_sources_with_distinct_ids_are_accepted() -> None:
    sources: list[TrainingSource] = [source(name="one"), source(name="two")]
    check_sources(sources)
    check_sources([])


def test_sources_may_share_query_ids() -> None:
    entry = PlanEntry("q0", ("p",), (), ())
    check_sources([make_source({"p": "x"}, {"q0": "y"}, [entry], name=name) for name in ("one", "two")])


def test_two_sources_of_one_name_are_refused() -> None:
    with pytest.raises(InputError, match="two data sets have the same name: one, one"):
        check_sources([source(name="one", task="symmetric"), source(name="one", task="asymmetric")])


def test_samples_of_the_queries_to_label_are_nested() -> None:
    whole = source(count=20)
    chosen = {
        limit: [entry.query_id for entry in dataclasses.replace(whole, max_labelled=limit).entries_to_label]
        for limit in (5, 12, None)
    }
    assert [len(ids) for ids in chosen.values()] == [5, 12, 20]
    assert set(chosen[5]) < set(chosen[12])
    assert chosen[12] == [query_id for query_id in chosen[None] if query_id in chosen[12]]  # in plan order
