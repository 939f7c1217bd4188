"""What distillation refuses, skips or does not need, and how it reports that."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

from d2llm.core.errors import InputError, LabelMismatchError
from d2llm.data.labels import LabelStore, QueryLabels
from d2llm.models.teachers.identity import identify_local_teacher
from d2llm.recipe import Recipe
from d2llm.recipe.losses import Objective
from d2llm.training.distill import DistillReport, distill
from tiny_data import JUDGEMENTS, tiny_recipe, topics, write_rule_labels
from tiny_distill import Workspace, log_of
from tiny_models import tiny_student_config, tiny_teacher_config, write_tiny_model


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return Workspace(tmp_path_factory.mktemp("workspace"))


# --- labels that do not match -----------------------------------------------------------------------------------------


def test_labels_of_another_teacher_are_refused(workspace: Workspace, tmp_path: Path) -> None:
    other = tiny_teacher_config(write_tiny_model(tmp_path / "other", "llama", seed=7))
    with pytest.raises(LabelMismatchError, match=identify_local_teacher(other).fingerprint):
        workspace.run(tmp_path / "student", teacher=other)
    with pytest.raises(LabelMismatchError, match="only of teacher"):
        workspace.run(tmp_path / "student", teacher=workspace.teacher.model_copy(update={"prompt": "paper"}))
    assert not (tmp_path / "student.run").exists()


def test_labels_for_no_query_of_the_plan_are_refused(workspace: Workspace, tmp_path: Path) -> None:
    identity = identify_local_teacher(workspace.teacher)
    key = {"teacher": identity.fingerprint, "prompt": identity.prompts["asymmetric"], "dataset": "tiny"}
    store = LabelStore(tmp_path / "labels", **key)
    store.write([QueryLabels("another", ("p00",), np.zeros(1, np.float32))])
    with pytest.raises(InputError, match="no query of the plans has all its labels; finish `d2llm label` first"):
        workspace.run(tmp_path / "student", labels=tmp_path / "labels")


@pytest.mark.parametrize(("unlabelled", "trained_on"), [("leave_out", 6), ("own_labels", 16)])
def test_unlabelled_queries_are_counted(workspace, unlabelled: str, trained_on: int, tmp_path, caplog):
    queries = [f"q{n:02}" for n in range(6)]
    write_rule_labels(tmp_path / "labels", [workspace.source], workspace.teacher, queries=queries)
    with caplog.at_level(logging.WARNING, logger="d2llm"):
        report = workspace.run(tmp_path / "student", labels=tmp_path / "labels", unlabelled=unlabelled)
    assert (report.queries, report.unlabelled_queries) == (trained_on, 10)
    assert report.steps == 2 * -(-trained_on // 4)
    assert "tiny: 10 of 16 queries of the plan lack the teacher's labels" in caplog.text


def test_a_data_set_without_labels_is_trained_on_its_own_judgements(workspace: Workspace, tmp_path: Path) -> None:
    write_rule_labels(tmp_path / "labels", [workspace.source], workspace.teacher)
    more = topics(name="more")
    recipe = tiny_recipe(tiny_student_config(workspace.model), epochs=1)

    def run(recipe: Recipe) -> DistillReport:
        folder, labels = tmp_path / "student", tmp_path / "labels"
        return distill(
            [workspace.source, more], folder, recipe=recipe, labels=labels, teacher=workspace.teacher, device="cpu"
        )

    with pytest.raises(LabelMismatchError, match=r"has no labels of teacher .* data set more"):
        run(recipe)
    own = recipe.training.model_copy(update={"unlabelled": "own_labels"})
    report = run(recipe.model_copy(update={"training": own}))
    assert report.queries == len(workspace.source.plan.entries) + len(more.plan.entries)
    assert report.unlabelled_queries == len(more.plan.entries)


def test_labels_without_cosines_are_counted(workspace, tmp_path, caplog):
    identity = identify_local_teacher(workspace.teacher)
    key = {"teacher": identity.fingerprint, "prompt": identity.prompts["asymmetric"], "dataset": "tiny"}
    store = LabelStore(tmp_path / "labels", **key)
    plan = workspace.source.plan.entries
    store.write([QueryLabels(e.query_id, e.passage_ids, np.ones(len(e.passage_ids), np.float32)) for e in plan])
    with caplog.at_level(logging.WARNING, logger="d2llm"):
        workspace.run(tmp_path / "student", labels=tmp_path / "labels", epochs=1)
    assert "16 queries lack cosines of the teacher's features" in caplog.text
    assert {line["feature_imitation"] for line in log_of(tmp_path / "student") if "loss" in line} == {0.0}


# --- unsuitable folders and settings ----------------------------------------------------------------------------------


def test_a_finished_student_is_not_overwritten(workspace: Workspace, tmp_path: Path) -> None:
    workspace.run(tmp_path / "student", epochs=1)
    with pytest.raises(InputError, match="already holds a finished student"):
        workspace.run(tmp_path / "student", epochs=1)


def test_a_foreign_folder_is_refused_before_training(workspace: Workspace, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("do not lose", encoding="utf-8")
    with pytest.raises(InputError, match="holds files that d2llm did not make"):
        workspace.run(tmp_path / "mine")
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with pytest.raises(InputError, match="is a file"):
        workspace.run(tmp_path / "file")


def test_sources_with_the_same_name_are_refused(workspace: Workspace, tmp_path: Path) -> None:
    sources = [workspace.source, topics(name="tiny")]
    recipe = tiny_recipe(tiny_student_config(workspace.model))
    with pytest.raises(InputError, match="two data sets have the same name: tiny, tiny"):
        distill(sources, tmp_path / "student", recipe=recipe, labels=workspace.labels, teacher=workspace.teacher)


def test_without_imitation_no_labels_are_needed(workspace: Workspace, tmp_path: Path) -> None:
    without_imitation = Objective(JUDGEMENTS)
    recipe = tiny_recipe(tiny_student_config(workspace.model), losses=without_imitation, epochs=1)
    report = workspace.run(tmp_path / "student", labels=tmp_path / "nothing", recipe=recipe)
    assert (report.steps, report.queries, report.unlabelled_queries) == (4, 16, 16)
    losses = [line for line in log_of(tmp_path / "student") if "loss" in line]
    assert all({"in_batch_cross_entropy", "dot_cross_entropy"} <= line.keys() for line in losses)
    assert not any("imitation" in name for line in losses for name in line)
    assert not (tmp_path / "nothing").exists()
