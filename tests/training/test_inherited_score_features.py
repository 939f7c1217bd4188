"""A student that is trained from another begins with its weights of words, windows and tokens, and may keep more."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from d2llm.core.types import Task
from d2llm.models.score_features import ScoreFeatures, TaskFeatureWeights
from d2llm.models.student import Student
from d2llm.models.token_vectors import TokenProjection
from d2llm.recipe import ScoreFeaturesConfig
from tiny_data import tiny_recipe, topics, write_rule_labels
from tiny_distill import LEARNING, Workspace
from tiny_models import DIM, tiny_student_config, write_trained_student

WITHOUT_TOKENS = TaskFeatureWeights(weights={"bm25": 3.0}, dev={"old": (0.1, 0.2)}, num_queries={"old": 40})
START: dict[Task, TaskFeatureWeights] = {
    "asymmetric": TaskFeatureWeights(
        weights={"bm25": 2.0, "window_bm25": 1.0, "window_vectors": 0.5, "maxsim": 4.0},
        dev={"old": (0.1, 0.3)},
        num_queries={"old": 40},
        without_parts=WITHOUT_TOKENS,
    ),
    "symmetric": TaskFeatureWeights(weights={"bm25": 0.5}, dev={"old": (0.5, 0.6)}, num_queries={"old": 40}),
}


@pytest.fixture(scope="module")
def start(workspace: Workspace) -> Student:
    student = Student.create(tiny_student_config(workspace.model), device="cpu", dtype="float32")
    student.score_features = ScoreFeatures(tasks=START)
    torch.manual_seed(0)
    student.token_projection = TokenProjection(DIM, 4, [1.0] * len(student.backbone.tokenizer))
    student.save(workspace.folder / "start")
    return student


def trained(workspace: Workspace, folder: Path, score_features: ScoreFeaturesConfig, *, num_dev: int) -> Student:
    settings: dict[str, Any] = {**LEARNING, "start": str(workspace.folder / "start"), "tokens": {"dim": 4}}
    recipe = tiny_recipe(tiny_student_config(workspace.model), **settings)
    source = topics(num_dev=num_dev, shift=0)
    labels = folder / "labels"
    write_rule_labels(labels, [source], workspace.teacher)
    workspace.run(
        folder / "student",
        recipe=recipe.model_copy(update={"score_features": score_features}),
        source=source,
        labels=labels,
    )
    return Student.load(folder / "student", device="cpu", dtype="float32")


@pytest.mark.parametrize("words", [True, False])
def test_with_few_dev_queries_the_start_s_weights_remain(workspace, start, tmp_path, words: bool, caplog):
    with caplog.at_level(logging.INFO, "d2llm.remarks"):
        student = trained(workspace, tmp_path, ScoreFeaturesConfig(bm25=words, window_bm25=words), num_dev=8)
    assert student.fingerprint != start.fingerprint
    for task in ("asymmetric", "symmetric"):
        assert student.feature_weights(task) == start.feature_weights(task)
        assert student.feature_weights(task, stored=()) == start.feature_weights(task, stored=())
        assert student.score_features.tasks[task].dev == {}  # it was not measured with this student
    assert student.token_projection is not None
    assert start.token_projection is not None
    assert torch.equal(student.token_projection.weight, start.token_projection.weight)
    assert "asymmetric search: the feature weights are those of the start" in caplog.text


def test_with_enough_dev_queries_the_task_s_weights_are_fitted_anew(workspace, start, tmp_path):
    student = trained(workspace, tmp_path, ScoreFeaturesConfig(bm25=True), num_dev=40)
    fitted = student.score_features.tasks["asymmetric"]
    assert set(fitted.dev) == {"tiny"}
    assert fitted.weights != START["asymmetric"].weights
    assert student.feature_weights("symmetric") == start.feature_weights("symmetric")


def test_without_vectors_of_tokens_weights_that_need_none_are_inherited() -> None:
    inherited = ScoreFeatures(tasks=START).inherited(has_tokens=False)
    assert inherited.weights("asymmetric").terms == {"bm25": 3.0}
    assert inherited.weights("symmetric").terms == {"bm25": 0.5}


def test_a_tuned_backbone_stays_as_it_is_if_the_recipe_freezes_it(tmp_path: Path) -> None:
    tuned = write_trained_student(tmp_path)
    before = Student.load(tuned, device="cpu", dtype="float32")
    workspace = Workspace(tmp_path)
    frozen = tiny_student_config(before.config.backbone.model, tuning="frozen")
    report = workspace.run(tmp_path / "continued", student=frozen, start=str(tuned))
    after = Student.load(tmp_path / "continued", device="cpu", dtype="float32")
    assert not report.is_untrained
    assert after.config.backbone == before.config.backbone
    adapters = [load_file(folder / "adapter_model.safetensors") for folder in (tuned, tmp_path / "continued")]
    assert adapters[0].keys() == adapters[1].keys()
    assert all(torch.equal(adapters[0][name], adapters[1][name]) for name in adapters[0])
    heads = [load_file(folder / "head.safetensors") for folder in (tuned, tmp_path / "continued")]
    assert not all(torch.equal(heads[0][name], heads[1][name]) for name in heads[0])
