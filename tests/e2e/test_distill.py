"""Distillation from labels to a saved student: what is written, what never is, and what remains after a NaN."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from d2llm.core import progress
from d2llm.core.errors import InputError, TrainingDivergedError
from d2llm.core.types import Task
from d2llm.methods.losses.in_batch_imitation import LiveTeacher
from d2llm.models import student as models_student
from d2llm.models.device import checkpoint_layers
from d2llm.models.fitted_part import Widths
from d2llm.models.interaction import make_head
from d2llm.models.score_features import ScoreFeatures
from d2llm.models.student import Student
from d2llm.models.teachers.identity import identify_local_teacher
from d2llm.models.token_vectors import TokenProjection
from d2llm.recipe import InteractionConfig, ResidualConfig, ScoreFeaturesConfig
from d2llm.recipe.losses import Objective
from d2llm.training import score_features
from d2llm.training import training_loop as loop
from d2llm.training.checkpoints import adamw, trainable
from d2llm.training.dev_sets import DevResult, evaluate_dev, make_dev_set
from d2llm.training.distill import DistillReport, distill
from tiny_data import JUDGEMENTS, tiny_recipe, topics, write_rule_labels
from tiny_distill import LEARNING, Workspace, log_of, poison
from tiny_models import TEXTS, tiny_student_config


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return Workspace(tmp_path_factory.mktemp("workspace"))


def untrained(workspace: Workspace) -> Student:
    return Student.create(tiny_student_config(workspace.model), device="cpu", dtype="float32")


def scores(student: Student) -> np.ndarray:
    queries, passages = student.encode_queries(TEXTS[:3]).vectors, student.encode_passages(TEXTS).vectors
    return np.stack([student.score(query, passages, task) for task in ("asymmetric", "symmetric") for query in queries])


# --- what is written --------------------------------------------------------------------------------------------------


class Trained:
    def __init__(self, workspace: Workspace, folder: Path) -> None:
        self.folder = folder
        saved: list[Student] = []
        with pytest.MonkeyPatch.context() as patch:
            save = Student.save
            patch.setattr(Student, "save", lambda self, *a, **k: (saved.append(self), save(self, *a, **k))[1])
            self.report = workspace.run(folder)
        self.student = saved[0].eval()


@pytest.fixture(scope="module")
def trained(workspace: Workspace) -> Trained:
    return Trained(workspace, workspace.folder / "trained")


def test_checkpointed_layers_give_the_same_student(workspace, trained, tmp_path, monkeypatch):
    checkpointed: list[object] = []
    monkeypatch.setattr(
        models_student, "checkpoint_layers", lambda *given: checkpointed.append(checkpoint_layers(*given))
    )
    workspace.run(tmp_path / "student", gradient_checkpointing=True)
    assert len(checkpointed) == 1
    for file in ("adapter_model.safetensors", "head.safetensors"):
        expected, found = (load_file(folder / file) for folder in (trained.folder, tmp_path / "student"))
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-5)


def test_the_report_describes_the_run(workspace: Workspace, trained: Trained) -> None:
    report = trained.report
    assert report.folder == str(trained.folder)
    assert (report.steps, report.queries, report.unlabelled_queries) == (8, 16, 0)  # 2 epochs of 16 / 4
    assert report.best_step in (4, 8)
    assert not report.stopped_early
    assert set(report.interaction_weights) == {"asymmetric"}
    dev = report.dev["tiny"]
    assert dev["by_weight"][str(report.interaction_weights["asymmetric"])] == max(dev["by_weight"].values())
    assert max(dev["by_weight"].values()) > dev["start"]
    manifest = json.loads((trained.folder / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["dev"] == report.dev
    assert manifest["teacher"] == identify_local_teacher(workspace.teacher).fingerprint
    assert manifest["tasks"] == ["asymmetric"]
    assert manifest["recipe"]["training"]["epochs"] == 2
    assert [line["step"] for line in log_of(trained.folder) if "loss" in line] == list(range(1, 9))
    assert dev["kept"] == max(dev["by_weight"].values())
    assert [line["step"] for line in log_of(trained.folder) if "dev" in line] == [0, 4, 8]
    assert report.probabilities == {}  # eight dev queries are too few to fit them


def test_probabilities_are_fitted_given_enough_dev_queries(workspace: Workspace, tmp_path: Path) -> None:
    source = topics(num_dev=40)
    write_rule_labels(tmp_path / "labels", [source], workspace.teacher)
    report = workspace.run(tmp_path / "student", source=source, labels=tmp_path / "labels")
    student = Student.load(tmp_path / "student", dtype="float32")
    assert {task: fit.model_dump() for task, fit in student.calibration.tasks.items()} == report.probabilities
    fitted = report.probabilities["asymmetric"]
    assert (fitted["num_queries"], fitted["num_pairs"]) == ({"tiny": 40}, 400)
    assert fitted["error_after"] < fitted["error_before"]


def test_words_count_in_training_with_weights_fitted_once(workspace, tmp_path, monkeypatch):
    source = topics(num_dev=40, shift=0)  # a query has words of its relevant passages
    write_rule_labels(tmp_path / "labels", [source], workspace.teacher)
    fitted: list[bool] = []
    fit = score_features.fit_score_features
    monkeypatch.setattr(
        score_features, "fit_score_features", lambda *args, **options: fitted.append(True) or fit(*args, **options)
    )

    def run(name: str, *, in_training: bool) -> DistillReport:
        recipe = tiny_recipe(tiny_student_config(workspace.model), **LEARNING).model_copy(
            update={"score_features": ScoreFeaturesConfig(bm25=True, window_bm25=True, in_training=in_training)}
        )
        return workspace.run(tmp_path / name, source=source, labels=tmp_path / "labels", recipe=recipe)

    without, with_words = run("without", in_training=False), run("with", in_training=True)
    assert len(fitted) == 3  # at the end of both runs, and before the first step of one
    assert with_words.dev["tiny"]["start"] > without.dev["tiny"]["start"] + 0.1
    first_losses = [
        next(line["loss"] for line in log_of(tmp_path / name) if "loss" in line) for name in ("without", "with")
    ]
    assert first_losses[1] < first_losses[0]  # words already tell the relevant passages
    assert (
        ScoreFeatures.read(tmp_path / "with.run", untrained(workspace).fingerprint).weights("asymmetric").counts_words
    )
    shutil.rmtree(tmp_path / "with")
    again = run("with", in_training=True)
    assert len(fitted) == 4  # the weights in training are read again
    assert again.fingerprint == with_words.fingerprint
    shutil.rmtree(tmp_path / "with")
    with pytest.raises(InputError, match="checkpoint"):
        run("with", in_training=False)


def test_tokens_count_in_training_and_their_projection_is_trained_with_the_backbone(workspace, tmp_path):
    source = topics(num_dev=40, shift=0)
    train = {entry.query_id: dict.fromkeys(entry.positives, 1) for entry in source.plan.entries}
    source = replace(source, dataset=replace(source.dataset, qrels={"train": train, **source.dataset.qrels}))
    write_rule_labels(tmp_path / "labels", [source], workspace.teacher)
    recipe = tiny_recipe(tiny_student_config(workspace.model), **LEARNING | {"tokens": {"dim": 4, "epochs": 1}})
    recipe = recipe.model_copy(
        update={
            "score_features": ScoreFeaturesConfig(maxsim=True, in_training=True),
            "losses": recipe.losses.with_losses({"token_cross_entropy": 0.5}),
        }
    )

    def run(name: str) -> DistillReport:
        return workspace.run(tmp_path / name, source=source, labels=tmp_path / "labels", recipe=recipe)

    report = run("student")
    key = untrained(workspace).fingerprint
    weight = ScoreFeatures.read(tmp_path / "student.run", key).weights("asymmetric").terms["maxsim"]
    start = TokenProjection.read(tmp_path / "student.run", key, Widths(0, untrained(workspace).backbone.dim))
    student = Student.load(tmp_path / "student", device="cpu", dtype="float32")
    assert start is not None
    assert student.token_projection is not None
    assert weight > 0
    changed = (student.token_projection.weight - start.weight).abs().max()
    assert changed > 1e-3  # by the steps of the training, not by another one on fixed states
    assert all(line["token_cross_entropy"] > 0 for line in log_of(tmp_path / "student") if "loss" in line)
    # the dev result of the start counts tokens, with the weight and the projection that were fitted before
    dev_set = make_dev_set(
        source, num_queries=recipe.training.dev_queries, num_passages=recipe.training.dev_passages, seed=recipe.seed
    )
    first = untrained(workspace)
    first.token_projection = start
    expected = evaluate_dev(first, [dev_set.with_score_features(None, weight)])["tiny"]
    assert report.dev["tiny"]["start"] == pytest.approx(max(expected.values.values()), abs=1e-6)
    # a run that is resumed reads both again, and its result is the same
    shutil.rmtree(tmp_path / "student")
    assert run("student").fingerprint == report.fingerprint
    again = Student.load(tmp_path / "student", device="cpu", dtype="float32")
    assert again.token_fingerprint == student.token_fingerprint


STAGES = (  # the parts of a two-stage run, in order
    "BM25 for the dev queries of tiny",
    "measuring the start on dev",
    "distilling",
    "measuring on dev",
    "measuring 50% of the change on dev",
    "measuring 100% of the change on dev",
    "measuring without PMA on dev",
    "encoding tiny",
    "encoding dev",
    "neighbours in tiny",
    "training the interaction",
    "BM25 for calibrating on tiny",
    "calibrating on tiny",
)


def test_a_student_imitates_a_live_teacher_without_labels(workspace, trained, tmp_path):
    """Its distributions come nearer to the live teacher's than they were."""
    recipe = tiny_recipe(tiny_student_config(workspace.model), **LEARNING)
    live = {"teacher": str(trained.folder)}
    weights = Objective(JUDGEMENTS | {"in_batch_imitation": live, "in_batch_cross_entropy": 0.0})
    recipe = recipe.model_copy(update={"losses": weights})
    report = workspace.run(tmp_path / "student", recipe=recipe, labels=tmp_path / "none")
    logged = [line["in_batch_imitation"] for line in log_of(tmp_path / "student") if "loss" in line]
    assert len(logged) == report.steps
    manifest = json.loads((tmp_path / "student" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["settings"]["live_teacher"] == trained.report.fingerprint
    live = LiveTeacher(trained.student, workspace.source.dataset, workspace.source.task, scores="vectors")
    ids = list(workspace.source.dataset.passages)
    query = workspace.source.query_text(workspace.source.plan.entries[0].query_id)
    expected = trained.student.score(
        trained.student.encode_queries([query]).vectors[0],
        trained.student.encode_passages([workspace.source.passage_text(passage_id) for passage_id in ids]).vectors,
        workspace.source.task,
    )
    np.testing.assert_allclose(live(query, ids), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(live(query, ids[::-1]), live(query, ids)[::-1])  # from the vectors in memory
    assert mean_kl(Student.load(tmp_path / "student", dtype="float32"), trained.student, workspace) < 0.9 * mean_kl(
        untrained(workspace), trained.student, workspace
    )


@pytest.mark.parametrize("residual_epochs", [0, 1])
def test_two_heads_end_as_one(workspace: Workspace, tmp_path: Path, residual_epochs: int) -> None:
    weights = Objective(JUDGEMENTS | {"list_imitation": 0.5})
    stages = {"residual": ResidualConfig(epochs=residual_epochs)}
    recipe = tiny_recipe(tiny_student_config(workspace.model), **LEARNING | stages | {"dual_head": True})
    report = workspace.run(tmp_path / "student", recipe=recipe.model_copy(update={"losses": weights}))
    combinations = {
        line["label_weight"]: line["dev"] for line in log_of(tmp_path / "student") if "label_weight" in line
    }
    values = {fraction: max(dev["tiny"].values()) for fraction, dev in combinations.items()}
    assert values.keys() == {0.0, 0.25, 0.5, 0.75, 1.0}
    assert values[report.label_weight or 0.0] == max(values.values())
    assert report.dev["tiny"]["kept"] > report.dev["tiny"]["start"]
    manifest = json.loads((tmp_path / "student" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["label_weight"] == report.label_weight
    reloaded = Student.load(tmp_path / "student", device="cpu", dtype="float32")
    assert reloaded.fingerprint == report.fingerprint
    head = load_file(tmp_path / "student" / "head.safetensors")
    interaction = InteractionConfig.model_validate(manifest["config"]["interaction"])
    expected = make_head(interaction, reloaded.vector_dim).state_dict()
    assert {name for name in head if name.startswith("interaction.")} == {f"interaction.{n}" for n in expected}
    dev = make_dev_set(workspace.source, num_queries=50, num_passages=100, seed=0)
    stored = {float(weight): value for weight, value in report.dev["tiny"]["by_weight"].items()}
    values = evaluate_dev(reloaded, [dev])["tiny"].values
    assert values == pytest.approx({weight: stored[weight] for weight in values}, abs=0.01)
    shutil.rmtree(tmp_path / "student")
    resumed = workspace.run(tmp_path / "student", recipe=recipe.model_copy(update={"losses": weights}))
    assert resumed.fingerprint == report.fingerprint


def mean_kl(student: Student, teacher: Student, workspace: Workspace) -> float:
    """How far the student's distributions over all passages are from the teacher's, over the dev queries."""
    texts = [passage.full_text for passage in workspace.source.dataset.passages.values()]
    queries = [workspace.source.dataset.queries[query_id].text for query_id in workspace.source.dataset.qrels["dev"]]
    of: list[torch.Tensor] = []
    for each in (teacher, student):
        passages = each.encode_passages(texts).vectors
        rows = [each.score(query, passages, workspace.source.task) for query in each.encode_queries(queries).vectors]
        of.append(torch.from_numpy(np.stack(rows)).log_softmax(dim=1))
    return float((of[0].exp() * (of[0] - of[1])).sum(dim=1).mean())


def test_every_slow_part_logs_its_progress(workspace, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    stages = {"residual": ResidualConfig(epochs=1), "interpolation": (0.5, 1.0)}
    with caplog.at_level(logging.INFO, "d2llm.remarks"):
        workspace.run(tmp_path / "student", **stages)
        lines = [record.getMessage().split(": ") for record in caplog.records if " after " in record.getMessage()]
        caplog.clear()
        with progress.showing_progress(False):
            workspace.run(tmp_path / "quiet", **stages)
    assert list(dict.fromkeys(part for part, _ in lines)) == list(STAGES)
    last = dict(lines)
    assert all("(100%)" in message for message in last.values()), last  # every counter reaches its total
    assert [record.getMessage() for record in caplog.records if " after " in record.getMessage()] == []


def test_the_saved_student_scores_like_the_trained_one(workspace: Workspace, trained: Trained) -> None:
    reloaded = Student.load(trained.folder, device="cpu", dtype="float32")
    assert reloaded.fingerprint == trained.report.fingerprint == trained.student.fingerprint
    np.testing.assert_allclose(scores(reloaded), scores(trained.student), rtol=1e-4, atol=1e-4)
    assert np.abs(scores(reloaded) - scores(untrained(workspace))).max() > 0.1
    weight = reloaded.interaction.interaction_weight("asymmetric")
    assert float(weight) == trained.report.interaction_weights["asymmetric"]
    assert not reloaded.interaction.has_interaction("symmetric")  # not trained, so left out
    assert reloaded.interaction.interaction_weight("symmetric") == 0


@pytest.mark.parametrize("tuning", ["full", "frozen"])
def test_full_and_frozen_backbones(workspace: Workspace, tuning: str, tmp_path: Path) -> None:
    config = tiny_student_config(workspace.model, tuning=tuning)
    report = workspace.run(tmp_path / "student", student=config)
    reloaded = Student.load(tmp_path / "student", device="cpu", dtype="float32")
    assert reloaded.fingerprint == report.fingerprint
    before = load_file(workspace.model / "model.safetensors")
    after = {name.removeprefix("model."): tensor for name, tensor in reloaded.backbone.model.state_dict().items()}
    changed = [name for name, tensor in before.items() if not torch.equal(tensor, after[name.removeprefix("model.")])]
    assert bool(changed) == (tuning == "full" and report.best_step > 0)


def test_the_head_of_the_paper(workspace: Workspace, tmp_path: Path) -> None:
    base = tiny_student_config(workspace.model)
    paper = InteractionConfig(head="paper", features="concat", hidden_dim=16, feature_dim=8)
    config = base.model_copy(update={"interaction": paper})
    report = workspace.run(tmp_path / "student", student=config)
    assert report.interaction_weights == {"asymmetric": 1.0}
    assert set(report.dev["tiny"]["by_weight"]) == {"1.0"}
    assert Student.load(tmp_path / "student", device="cpu").fingerprint == report.fingerprint
    assert all("dot_cross_entropy" not in line for line in log_of(tmp_path / "student"))


# --- never worse than the start ---------------------------------------------------------------------------------------


def test_the_start_is_saved_if_training_only_hurts(workspace: Workspace, tmp_path: Path) -> None:
    """Positives share words with their query, so the untrained cosine beats chance; absurd rates wreck that."""
    source = topics(shift=0)
    write_rule_labels(tmp_path / "labels", [source], workspace.teacher)
    absurd = {"learning_rate": 0.5, "head_learning_rate": 0.5, "warmup_steps": 0}
    report = workspace.run(tmp_path / "student", source=source, labels=tmp_path / "labels", **absurd)
    by_step = {
        line["step"]: max(line["dev"]["tiny"].values()) for line in log_of(tmp_path / "student") if "dev" in line
    }
    assert max(by_step[4], by_step[8]) < by_step[0] - 0.1  # training did hurt: 0.45 at the start, then chance, 0.25
    assert report.best_step == 0
    assert report.interaction_weights == {"asymmetric": 0.0}
    assert set(report.dev["tiny"]["by_weight"].values()) == {report.dev["tiny"]["start"]}
    untrained = Student.create(tiny_student_config(workspace.model), device="cpu", dtype="float32")
    written = Student.load(tmp_path / "student", device="cpu", dtype="float32")
    np.testing.assert_allclose(scores(written), scores(untrained), rtol=0, atol=1e-5)
    dev = make_dev_set(source, num_queries=50, num_passages=100, seed=0)
    values = [evaluate_dev(student, [dev])["tiny"].values for student in (written, untrained)]
    assert values[0] == {0.0: values[1][0.0]}  # without an interaction, which was never trained


def dev_result(value: float, *, task: Task = "asymmetric") -> DevResult:
    """Give all 20 queries the same value, so that any other mean differs significantly."""
    return DevResult(task, {0.0: value, 1.0: value}, {0.0: np.full(20, value), 1.0: np.full(20, value)})


def test_a_gain_on_one_set_does_not_offset_a_loss_on_another(workspace, tmp_path, monkeypatch):
    results = iter([(0.5, 0.5), (0.9, 0.4), (0.55, 0.5), (0.55, 0.5)])  # start, step 4, step 8, without PMA

    def evaluate(student: Student, dev_sets: Any, **options: Any) -> dict[str, DevResult]:
        values = next(results)
        return {dev.name: dev_result(value, task=dev.task) for dev, value in zip(dev_sets, values, strict=True)}

    monkeypatch.setattr(loop, "evaluate_dev", evaluate)
    sources = [topics(num_train=8, name="one"), topics(num_train=8, name="two", task="symmetric")]
    write_rule_labels(tmp_path / "labels", sources, workspace.teacher)
    report = distill(
        sources,
        tmp_path / "student",
        recipe=tiny_recipe(tiny_student_config(workspace.model)),
        labels=tmp_path / "labels",
        teacher=workspace.teacher,
        device="cpu",
    )
    assert report.best_step == 8
    assert {name: dev["by_weight"]["0.0"] for name, dev in report.dev.items()} == {"one": 0.55, "two": 0.5}


# --- divergence -------------------------------------------------------------------------------------------------------


def finite_checkpoint_step(folder: Path) -> int:
    """Return the step of the checkpoint, after checking that it and the best state are finite and no student exists."""
    assert not folder.exists()
    run_folder = folder.with_name(folder.name + ".run")
    for name in ("checkpoint.safetensors", "best.safetensors"):
        tensors = load_file(run_folder / name)
        assert tensors
        assert all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values())
    with safe_open(run_folder / "checkpoint.safetensors", framework="pt") as file:
        return len(json.loads(file.metadata()["state"])["losses"])


@pytest.mark.parametrize("step", [4, 8])
def test_dev_scores_that_are_not_finite_stop_the_run_and_it_can_resume(workspace, step: int, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        poison(patch, step=step, value=float("nan"))
        with pytest.raises(TrainingDivergedError, match="scores of the dev queries of 'tiny' are not finite"):
            workspace.run(tmp_path / "student", checkpoint_every=3)
    assert 3 <= finite_checkpoint_step(tmp_path / "student") < step
    assert workspace.run(tmp_path / "student", checkpoint_every=3).steps == 8


# --- the optimiser ----------------------------------------------------------------------------------------------------


def test_learning_rate_and_weight_decay_of_each_parameter(workspace: Workspace) -> None:
    """Matrices decay, including those of LoRA, vectors and scalars do not; heads have their own learning rate."""
    student = Student.create(tiny_student_config(workspace.model), device="cpu", dtype="float32")
    student.prepare_training()
    parameters = trainable(student)
    recipe = tiny_recipe(student.config, learning_rate=1e-3, head_learning_rate=1e-2, weight_decay=0.1)
    optimizer = adamw(loop._groups(parameters, recipe.training))
    settings = {id(p): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    assert len(settings) == len(parameters)
    for name, parameter in parameters.items():
        rate = 1e-3 if name.startswith("backbone.") else 1e-2
        assert settings[id(parameter)] == (rate, 0.1 if parameter.ndim > 1 else 0.0), name
