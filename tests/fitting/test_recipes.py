"""The recipes of a fit: how time becomes queries, epochs and judgements."""

from __future__ import annotations

import pytest

from d2llm.fitting.time_plan import TimePlan, recipe_for_queries, recipe_with_teacher
from d2llm.recipe import DataConfig, Recipe, StudentConfig, TeacherConfig

HALF_AN_HOUR = 1800.0
DATA = (DataConfig(path="written", max_queries=900), DataConfig(path="users", max_queries=100))


def recipe(max_queries: int, data: tuple[DataConfig, ...] = DATA) -> Recipe:
    plan = TimePlan(0.0, HALF_AN_HOUR, 0.0, max_queries)
    return recipe_for_queries("minilm", StudentConfig(), data, plan, seed=3)


def num_queries(recipe: Recipe) -> list[int | None]:
    return [data.max_queries for data in recipe.data]


def test_with_little_time_each_set_gives_a_share_of_its_queries_once() -> None:
    short = recipe(500)
    assert num_queries(short) == [450, 50]
    assert short.training.epochs == 1
    assert num_queries(recipe(1)) == [1, 1]


def test_with_time_few_queries_are_read_several_times_and_many_once() -> None:
    assert recipe(1_500).training.epochs == 1  # there is no time for a second epoch
    assert recipe(100_000).training.epochs == 2  # 60 steps of 32 queries
    assert recipe(100_000, (DataConfig(path="written", max_queries=50),)).training.epochs == 10
    assert recipe(100_000, (DataConfig(path="written", max_queries=9_000),)).training.epochs == 1


def test_training_on_queries_alone_asks_no_teacher() -> None:
    plain = recipe(1_000)
    assert not plain.losses.imitates
    assert (plain.seed, plain.training.start, plain.mining.student) == (3, "minilm", "minilm")
    assert plain.training.max_minutes is None  # a fit limits the time of all that a training does


@pytest.mark.parametrize(("seconds_per_pair", "labelled", "gated"), [(0.1, [331, 36], 56), (60.0, [1, 1], 20)])
def test_a_teacher_judges_as_much_as_its_time_allows(seconds_per_pair: float, labelled: list[int], gated: int) -> None:
    plan = TimePlan(0.0, HALF_AN_HOUR, 0.0, 1_000)
    first = recipe(1_000)
    second = recipe_with_teacher(first, "run/student", TeacherConfig(), plan, seconds_per_pair=seconds_per_pair)
    assert [data.max_labelled for data in second.data] == labelled
    assert second.gate.queries == gated
    assert second.losses.imitates
    assert second.labelling.compared_students == ("minilm", "run/student")
    assert second.training.start == "run/student"
    assert num_queries(second) == num_queries(first)
