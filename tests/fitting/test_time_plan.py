"""How a fit divides its time."""

from __future__ import annotations

import pytest

from d2llm.fitting.time_plan import (
    DEV_FRACTION,
    MIN_TRAINING_SECONDS,
    MIN_WRITING_SECONDS,
    plan_time,
    recipe_for_queries,
)
from d2llm.recipe import DataConfig, StudentConfig


def plan(minutes, num_passages=3_000, rate=100.0, **options):
    return plan_time(60 * minutes, num_passages=num_passages, passages_per_second=rate, num_negatives=2, **options)


@pytest.mark.parametrize("minutes", [20, 60, 480])
def test_the_stages_fill_the_time(minutes):
    result = plan(minutes)
    assert result.total == pytest.approx(60 * minutes)
    assert min(result.writing, result.training, result.measuring) > 0
    assert result.reviewing == 0  # without a teacher it takes seconds


def test_more_time_is_for_more_queries():
    assert plan(60).max_queries > plan(20).max_queries > 1_000


def test_a_slow_machine_trains_on_less():
    assert plan(60, rate=20.0).max_queries < plan(60).max_queries


def test_a_large_corpus_is_compared_without_the_untuned_student_before_little_or_nothing_is_trained():
    long, short, shortest = (plan(minutes, num_passages=60_000) for minutes in (80, 60, 20))  # a pass takes ten
    assert long.measuring > 1_200  # two passes
    assert 1_200 > short.measuring > 600  # one
    assert min(long.training, short.training) > 600  # mining is another
    assert shortest.training == 0
    for minutes, result in ((80, long), (60, short), (20, shortest)):
        assert result.total == pytest.approx(60 * minutes)


def test_vectors_that_mining_finds_in_the_index_leave_their_time_to_writing_and_training():
    found, made = (plan(40, num_passages=60_000, has_vectors=value) for value in (True, False))
    assert found.max_queries > made.max_queries > 0
    assert found.total == made.total == pytest.approx(2_400)
    assert plan(20, num_passages=60_000, has_vectors=True).training >= MIN_TRAINING_SECONDS
    assert plan(20, num_passages=60_000).training == 0


def test_on_cores_that_others_use_a_training_without_its_last_stages_is_better_than_none():
    busy = plan(13, num_passages=2_500, rate=28.0, is_written=True)  # eight evaluations take 570 seconds
    assert busy.training > 90 + 4 * 71 + MIN_TRAINING_SECONDS
    assert busy.total == pytest.approx(780)


def test_on_busy_cores_writing_gets_its_share_too():
    busy = plan(18, num_passages=2_500, rate=28.0, seconds_per_search=0.06)
    assert busy.writing > 200
    assert busy.training > 0
    assert busy.total == pytest.approx(1_080)


def test_slow_searches_take_time_from_writing_and_training():
    slow = plan(60, seconds_per_search=0.2)
    assert slow.measuring == pytest.approx(plan(60).measuring + 6 * 300 * 0.2)
    assert slow.training < plan(60).training
    assert slow.total == pytest.approx(3_600)


def test_a_corpus_that_cannot_be_encoded_in_time_is_not_encoded_again():
    assert plan(5, num_passages=60_000).total == pytest.approx(300)


def test_too_little_time_is_for_fitting_weights_alone():
    result = plan(4)
    assert (result.training, result.max_queries) == (0, 0)
    assert result.writing >= MIN_WRITING_SECONDS
    assert plan(10).training >= MIN_TRAINING_SECONDS


def test_queries_that_are_written_leave_their_time_to_training():
    result = plan(20, is_written=True)
    assert result.writing == 0
    assert result.training > plan(20).training


def test_a_teacher_takes_a_share_of_the_training():
    with_teacher = plan(60, has_teacher=True)
    assert with_teacher.max_queries < plan(60).max_queries
    assert with_teacher.total == pytest.approx(3_600)
    assert with_teacher.reviewing > 300
    assert plan(60, has_teacher=True, is_written=True, is_reviewed=True).reviewing == 0
    assert plan(60, has_teacher=True, is_written=True).reviewing > 300  # an earlier call was interrupted


@pytest.mark.parametrize("minutes", [6, 12, 30, 480])
@pytest.mark.parametrize("rate", [14.0, 28.0, 100.0])
def test_dev_takes_at_most_a_share_of_the_time_for_training(minutes, rate):
    """Eight evaluations, unless the smallest ones already take more."""
    result = plan(minutes, num_passages=1_500, rate=rate, has_vectors=True)
    dev = 8 * min(1_500, result.evaluated) / rate
    if result.training:
        assert dev <= 1.2 * DEV_FRACTION * result.training or result.evaluated == 200
        assert result.max_queries * 16 / rate >= 0.5 * result.training  # most is for training
    assert plan(480).evaluated == 2_000


def test_six_minutes_on_a_slow_machine_are_not_spent_on_dev():
    result = plan(6, num_passages=600, rate=28.0, has_vectors=True)
    assert result.training > MIN_TRAINING_SECONDS
    recipe = recipe_for_queries("start", StudentConfig(), [DataConfig(path="written", max_queries=200)], result)
    assert recipe.training.dev_passages == result.evaluated < 600
    assert recipe.training.dev_queries == 50
    long = recipe_for_queries("start", StudentConfig(), [DataConfig(path="written", max_queries=200)], plan(480))
    assert (long.training.dev_queries, long.training.dev_passages) == (200, 1_000)
