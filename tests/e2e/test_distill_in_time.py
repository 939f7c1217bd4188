"""Distillation with a time limit: what is left out for it, and that nothing finished is lost."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from d2llm.core import progress
from d2llm.core.errors import OutOfTimeError
from d2llm.core.time_limit import time_limit
from d2llm.data.plan import TrainingSource
from d2llm.models.student import Student
from d2llm.recipe import Recipe, ResidualConfig, ScoreFeaturesConfig
from d2llm.training import trainer
from d2llm.training import training_loop as loop
from d2llm.training.distill import DistillReport
from d2llm.training.training_loop import DistillRun
from tiny_data import tiny_recipe, topics, write_rule_labels
from tiny_distill import LEARNING, Workspace, log_of
from tiny_models import tiny_student_config

NUM_STEPS, NUM_EPOCHS = 8, 3


class Work:
    """A data set with train judgements, and a recipe with an interaction and token embeddings."""

    def __init__(self, folder: Path) -> None:
        self.workspace = Workspace(folder)
        source = topics(num_dev=40, shift=0)
        train = {entry.query_id: dict.fromkeys(entry.positives, 1) for entry in source.plan.entries}
        self.source: TrainingSource = replace(
            source, dataset=replace(source.dataset, qrels={"train": train, **source.dataset.qrels})
        )
        self.labels = folder / "topics"
        write_rule_labels(self.labels, [self.source], self.workspace.teacher)
        stages = {
            "residual": ResidualConfig(epochs=NUM_EPOCHS, batch_queries=8, learning_rate=1e-2, warmup_steps=0),
            "tokens": {"dim": 4, "epochs": 1},
        }
        recipe = tiny_recipe(tiny_student_config(self.workspace.model), **LEARNING | stages)
        self.recipe: Recipe = recipe.model_copy(update={"score_features": ScoreFeaturesConfig(bm25=True, maxsim=True)})

    def run(self, folder: Path) -> DistillReport:
        return self.workspace.run(folder, source=self.source, labels=self.labels, recipe=self.recipe)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Work:
    return Work(tmp_path_factory.mktemp("work"))


@pytest.fixture(scope="module")
def unlimited(work: Work) -> tuple[DistillReport, Path]:
    folder = work.workspace.folder / "unlimited"
    return work.run(folder), folder


def no_time_for(patch: pytest.MonkeyPatch, stage: str) -> None:
    """Let what follows the stage before it take all the time."""
    planned = DistillRun.seconds_after
    patch.setattr(DistillRun, "seconds_after", lambda run, after: 1e9 if after == stage else planned(run, after))


def end_after(patch: pytest.MonkeyPatch, module: object, name: str, count: int) -> None:
    """Let the time be over after so many calls of a function."""
    function: Callable[..., object] = getattr(module, name)
    num_calls = 0

    def counted(*args: object, **options: object) -> object:
        nonlocal num_calls
        num_calls += 1
        return function(*args, **options)

    def check_time() -> None:
        if num_calls >= count:
            raise OutOfTimeError

    patch.setattr(module, name, counted)
    patch.setattr(progress, "check_time", check_time)


def test_with_enough_time_nothing_is_different(work, unlimited, tmp_path):
    with time_limit(3_600.0):
        report = work.run(tmp_path / "student")
    assert report.fingerprint == unlimited[0].fingerprint
    assert report.score_features == unlimited[0].score_features
    assert any(line.get("stage") == "residual" for line in log_of(tmp_path / "student"))
    assert Student.load(tmp_path / "student", device="cpu").token_projection is not None


def test_the_loop_leaves_time_for_the_rest(work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = iter(range(1_000, 0, -100))  # at the beginning, and before each step
    monkeypatch.setattr(trainer, "seconds_left", lambda: next(left, 400))
    monkeypatch.setattr(DistillRun, "seconds_after", lambda *_: 650.0)
    report = work.run(tmp_path / "student")
    assert report.stopped_early
    assert report.steps == 5  # half of the time is for the loop, however long the rest may take


def test_the_rest_takes_as_long_as_its_texts_take(work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[DistillRun] = []
    planned = DistillRun.seconds_after
    monkeypatch.setattr(DistillRun, "seconds_after", lambda run, after: (seen.append(run), planned(run, after))[1])
    with time_limit(3_600.0):
        work.run(tmp_path / "student")
    run = seen[0]
    after_vectors, after_interaction, after_tokens = (
        planned(run, stage) / run.progress.seconds_per_text for stage in ("vectors", "interaction", "tokens")
    )
    num_dev = sum(len(dev.queries) + len(dev.passages) for dev in run.dev_sets)
    num_planned = len(run.sources[0].entries) + len({p for e in run.sources[0].entries for p in e.passage_ids})
    assert run.progress.seconds_per_text > 0
    assert after_tokens == pytest.approx(len(run.sources[0].source.dataset.passages) + 10 * 40)
    assert after_interaction - after_tokens == pytest.approx(num_planned)
    assert after_vectors - after_interaction == pytest.approx(2 * num_dev + num_planned)


def test_without_time_the_interaction_stays_as_it_was(work, tmp_path, monkeypatch, caplog):
    no_time_for(monkeypatch, "interaction")
    with caplog.at_level(logging.INFO, "d2llm.remarks"), time_limit(3_600.0):
        report = work.run(tmp_path / "student")
    assert "there was no time to train the interaction" in caplog.text
    assert report.steps == NUM_STEPS
    assert set(report.interaction_weights.values()) == {0.0}
    assert Student.load(tmp_path / "student", device="cpu").fingerprint == report.fingerprint


def test_an_interaction_out_of_time_keeps_its_best_epoch(work, tmp_path, monkeypatch, caplog):
    with monkeypatch.context() as patch:
        end_after(patch, trainer, "optimizer_step", NUM_STEPS + 4)  # in the second of the epochs of three steps
        # What follows has no limit of its own here.
        patch.setattr(DistillRun, "set_interaction_weights", lambda run: (patch.undo(), run.set_interaction_weights()))
        with caplog.at_level(logging.INFO, "d2llm.remarks"):
            report = work.run(tmp_path / "student")
    assert "the interaction was trained for 4 of" in caplog.text
    logged = [line["dev"] for line in log_of(tmp_path / "student") if line.get("stage") == "residual"]
    assert len(logged) == 1
    assert report.dev["tiny"]["by_weight"] == pytest.approx(logged[0]["tiny"])


def test_without_time_there_are_no_vectors_of_tokens(work, tmp_path, monkeypatch, caplog):
    no_time_for(monkeypatch, "tokens")
    with caplog.at_level(logging.INFO, "d2llm.remarks"), time_limit(3_600.0):
        report = work.run(tmp_path / "student")
    assert "no time to train token embeddings; the score counts none" in caplog.text
    student = Student.load(tmp_path / "student", device="cpu")
    assert student.token_projection is None
    assert "maxsim" not in report.score_features["asymmetric"]["weights"]


def test_a_run_that_is_out_of_time_continues(work, unlimited, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        end_after(patch, trainer, "optimizer_step", 5)
        with pytest.raises(OutOfTimeError):
            work.run(tmp_path / "student")
    assert not (tmp_path / "student").exists()
    with time_limit(-1.0), pytest.raises(OutOfTimeError):
        work.run(tmp_path / "student")
    assert work.run(tmp_path / "student").fingerprint == unlimited[0].fingerprint
    steps = [line["step"] for line in log_of(tmp_path / "student") if "loss" in line]
    assert steps == list(range(1, NUM_STEPS + 1))


def test_dev_is_measured_less_often_if_that_takes_too_much_of_the_time(work, tmp_path, monkeypatch):
    """The start and the end are measured, whatever it takes."""

    def measured_steps(folder: Path) -> list[int]:
        return sorted({line["step"] for line in log_of(folder) if "dev" in line and "stage" not in line})

    recipe = work.recipe.model_copy(
        update={"training": work.recipe.training.model_copy(update={"eval_every": 1, "patience": 100})}
    )
    for name, fraction, expected in (("all", 0.25, NUM_STEPS + 1), ("few", 0.0, 2)):
        monkeypatch.setattr(loop, "_MEASURING_FRACTION", fraction)
        with time_limit(3_600.0):
            work.workspace.run(tmp_path / name, source=work.source, labels=work.labels, recipe=recipe)
        steps = measured_steps(tmp_path / name)
        assert (steps[0], steps[-1], len(steps)) == (0, NUM_STEPS, expected)
