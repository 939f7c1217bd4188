"""Second stage: the penalty on what an interaction changes for texts it was not trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from d2llm.core.types import Task
from d2llm.data.collation import LabelledSource
from d2llm.data.labels import LabelStore
from d2llm.models.student import Student
from d2llm.recipe import ResidualConfig
from d2llm.training.dev_sets import DevResult, make_dev_set
from d2llm.training.residual import train_residual
from tiny_data import tiny_recipe, topics
from tiny_models import tiny_student_config, write_tiny_model


def train_second_stage(folder: Path, tasks: dict[str, Task], off_task_penalty: float) -> dict[str, DevResult]:
    """Dev results after the second stage alone, on the data sets' own labels: relevant is the next topic."""
    stage = ResidualConfig(
        epochs=20,
        learning_rate=1e-2,
        warmup_steps=0,
        batch_queries=8,
        num_near=4,
        num_random=4,
        off_task_penalty=off_task_penalty,
    )
    recipe = tiny_recipe(
        tiny_student_config(write_tiny_model(folder, "modernbert", initializer_range=0.1)), residual=stage
    )
    student = Student.create(recipe.student, device="cpu", dtype="float32", seed=0)
    student.prepare_training(seed=0)
    sources = [topics(num_train=64, name=name, task=task, shift=1) for name, task in tasks.items()]
    stores = [LabelStore(folder / "labels", teacher="none", prompt="none", dataset=name) for name in tasks]
    labelled = [LabelledSource.join(s, store, keep_unlabelled=True) for s, store in zip(sources, stores, strict=True)]
    dev = [make_dev_set(source, num_queries=8, num_passages=24, seed=0) for source in sources]

    def nothing(*_: Any, **__: Any) -> None:
        return None

    return train_residual(student, labelled, dev, recipe, nothing, nothing, ask_teacher=nothing)


def gain(result: DevResult) -> float:
    return result.values[1.0] - result.values[0.0]


def test_quiet_price_keeps_one_task_from_moving_the_other(tmp_path: Path) -> None:
    tasks: dict[str, Task] = {"one": "symmetric", "two": "asymmetric"}
    # Both tasks have the same kind of texts, so an interaction that may not move those of one cannot move the others.
    assert gain(train_second_stage(tmp_path / "free", tasks, 0.0)["one"]) > 0.2
    assert gain(train_second_stage(tmp_path / "priced", tasks, 1e4)["one"]) == pytest.approx(0.0, abs=0.1)


def test_quiet_price_has_no_effect_on_a_single_task(tmp_path: Path) -> None:
    free, priced = (
        train_second_stage(tmp_path / str(price), {"one": "symmetric"}, price)["one"] for price in (0.0, 1e4)
    )
    assert free.values == priced.values
    assert gain(free) > 0.2
