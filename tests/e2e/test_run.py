"""A run from Python: all steps at once, finished steps skipped, and the student evaluated in the run's folder."""

from __future__ import annotations

import logging
import sys

import pytest

from d2llm import EvaluationSettings, Run, load_recipe
from d2llm.core.errors import InputError, MissingExtraError
from d2llm.core.toml import parse_toml
from d2llm.recipe import DataConfig
from d2llm.recipe.losses import Objective
from d2llm.recipe.recipe import parse_recipe
from d2llm.training.open_run import Skipped


@pytest.fixture(scope="module")
def run(workspace, tmp_path_factory):
    folder = tmp_path_factory.mktemp("from-python") / "run"
    return Run(workspace / "tiny.toml", folder, dtype="float32", show_progress=False)


def kinds_of(report):
    return {row.kind for row in report.rows}


def test_a_run_finishes_every_step_and_is_evaluated(run, caplog):
    with pytest.raises(InputError, match="there is no student yet"):
        run.evaluate()
    order = []
    with caplog.at_level(logging.INFO, "d2llm.remarks"):
        results = run.finish(after=lambda step, result: order.append((step, result)))
    steps = ["mine", "precheck", "tune-teacher", "ensemble", "gate", "filter", "label", "distill"]
    assert [step for step, _ in order] == list(results) == steps
    assert order == list(results.items())
    assert "distill: " in caplog.text
    assert (run.folder.student / "manifest.json").is_file()
    assert run.teacher.model == str(run.folder.teacher)

    repeated = run.finish()
    assert {step for step, result in repeated.items() if isinstance(result, Skipped)} >= {"gate", "distill"}
    assert isinstance(repeated["mine"]["everyday"], Skipped)
    assert repeated["label"].pairs == 0

    settings = EvaluationSettings(split="dev", task="symmetric", teacher_queries=2, teacher_depth=2)
    reports = run.evaluate(settings)
    assert list(reports) == ["everyday"]
    assert reports["everyday"].task == run.recipe.data[0].task  # the data set's own task, not that of the settings
    assert "teacher" in kinds_of(reports["everyday"])
    assert {"bm25", "d2llm"} <= kinds_of(reports["everyday"])
    assert (run.folder.path / "evaluation").is_dir()
    assert "teacher" not in kinds_of(run.evaluate(settings, with_teacher=False)["everyday"])


def test_labels_that_no_loss_imitates_are_warned_of(workspace, tmp_path, caplog):
    recipe = load_recipe(str(workspace / "tiny.toml"))
    judged = recipe.model_copy(update={"losses": Objective.model_validate({"in_batch_cross_entropy": 1.0})})
    with pytest.raises(InputError, match="there is no training plan yet"):
        Run(judged, tmp_path / "judged").label()
    assert "no loss of the recipe imitates a teacher" in caplog.text


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"losses": {"nested_cross_entropy": {"dims": [8, 32]}}}, "names 32, but the student's vectors have 32"),
        ({"losses": {"nested_cross_entropy": {"layers": [2]}}}, "names 2, but the student's backbone has 2 layers"),
        ({"training": {"pretraining": {"kind": "relations", "teacher": "decoder"}}}, "reads other tokens than"),
        (
            {"training": {"pretraining": {"kind": "relations", "teacher": "encoder", "relation_heads": 5}}},
            "relation_heads is 5, but '.*encoder' has queries, keys or values of width 32",
        ),
        ({"student": {"pooling": {"kind": "pma", "num_heads": 5}}}, "width 32 is not a multiple of it"),
        (
            {"training": {"in_batch_labels": True}, "teacher": {"kind": "likelihood", "model": "decoder"}},
            "in_batch_labels has the teacher",
        ),
        ({"training": {"trackers": ["wandb"]}}, "the tracker 'wandb' needs the package"),
    ],
)
def test_what_only_training_would_notice_is_refused_before_anything_is_mined(
    workspace, tmp_path, monkeypatch, changes, problem
):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.chdir(workspace)  # where the models are
    values = parse_toml((workspace / "tiny.toml").read_text(), where="tiny.toml")
    run = Run(parse_recipe(_overlaid(values, changes)), tmp_path / "run")
    with pytest.raises((InputError, MissingExtraError), match=problem):
        run.finish()
    assert not (tmp_path / "run").exists()


def _overlaid(values, changes):
    """The values, with those of the changes in their place, section by section."""
    sections = {
        name: section if "kind" in section else {**values.get(name, {}), **section} for name, section in changes.items()
    }
    return values | sections


def test_labelled_pairs_alone_are_refused_for_losses_of_lists_before_training(workspace, tmp_path):
    (tmp_path / "pairs").mkdir()
    for split in ("train", "dev"):
        (tmp_path / "pairs" / f"{split}.jsonl").write_text('{"query": "a b", "document": "c d", "label": 1}\n')
    recipe = load_recipe(str(workspace / "tiny.toml"))
    objective = Objective.model_validate({"nested_cross_entropy": {"dims": [8]}})
    data = (DataConfig(path=str(tmp_path / "pairs"), task="symmetric"),)
    run = Run(recipe.model_copy(update={"losses": objective, "data": data}), tmp_path / "run")
    with pytest.raises(InputError, match="all data sets are labelled pairs; delete it, or add a retrieval set"):
        run.finish()


def test_a_run_accepts_a_recipe_object(workspace, tmp_path):
    run = Run(load_recipe(str(workspace / "tiny.toml")), tmp_path / "other")
    assert run.folder.path == tmp_path / "other"
    with pytest.raises(InputError, match="there is no training plan yet"):
        run.distill()
    assert not (tmp_path / "other").exists()
