"""Distilling from labelled pairs, alone and together with a retrieval set."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from d2llm.core.errors import InputError, TrainingDivergedError
from d2llm.data.open_data import open_data
from d2llm.data.pair_training import plan_of_pairs, read_pair_training_set
from d2llm.data.pairs import PairDataset
from d2llm.data.plan import TrainingSource, read_plan, write_plan
from d2llm.data.run_folder import training_source
from d2llm.models.interaction import TASKS, Interaction
from d2llm.models.student import Student
from d2llm.recipe import AutoPooling, DataConfig
from d2llm.recipe.losses import Objective
from d2llm.training import residual
from d2llm.training import training_loop as loop
from d2llm.training.distill import distill
from tiny_data import JUDGEMENTS, tiny_recipe, topics, write_rule_labels
from tiny_distill import Workspace, log_of, poison
from tiny_models import TEXTS, tiny_student_config


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return Workspace(tmp_path_factory.mktemp("pairs"))


def write_pairs(folder: Path, *, splits: tuple[str, ...] = ("train", "dev")) -> Path:
    """A pair is positive if its second text has the words of the next topic, which an untrained cosine cannot know."""
    rng = random.Random(0)
    words = [text.split() for text in TEXTS]
    folder.mkdir(parents=True)
    for split in splits:
        lines: list[str] = []
        for number in range(48):
            topic = rng.randrange(len(words))
            is_yes = number % 2 == 0
            other = (topic + (1 if is_yes else rng.randrange(2, len(words)))) % len(words)
            texts = [" ".join(rng.sample(words[t], min(3, len(words[t])))) for t in (topic, other)]
            lines.append(json.dumps({"query": texts[0], "document": texts[1], "label": int(is_yes)}))
        (folder / f"{split}.jsonl").write_text("\n".join(lines))
    return folder


def pair_source(folder: Path, plan: Path) -> TrainingSource:
    dataset = open_data(folder)
    assert isinstance(dataset, PairDataset)
    write_plan(plan, plan_of_pairs(read_pair_training_set(dataset), "train", seed=0), {})
    return training_source(DataConfig(path=str(folder), task="symmetric"), read_plan(plan))


PLAIN = Objective(JUDGEMENTS | {"pair_cross_entropy": {"dot": 0.0}})


def test_pairs_alone_teach_a_student_without_a_teacher(workspace: Workspace, tmp_path: Path) -> None:
    source = pair_source(write_pairs(tmp_path / "couples"), tmp_path / "plan")
    recipe = tiny_recipe(tiny_student_config(workspace.model), learning_rate=3e-3, head_learning_rate=1e-2, epochs=12)
    recipe = recipe.model_copy(update={"losses": PLAIN})
    report = workspace.run(tmp_path / "student", source=source, recipe=recipe)
    start = report.dev["couples"]["start"]
    best = max(report.dev["couples"]["by_weight"].values())
    assert best > start + 0.1
    losses = [line["pair_cross_entropy"] for line in log_of(tmp_path / "student") if "loss" in line]
    assert losses[-1] < losses[0]
    manifest = json.loads((tmp_path / "student" / "manifest.json").read_text())
    assert set(manifest["offsets"]) == {"couples"}
    assert Student.load(tmp_path / "student", device="cpu").fingerprint == report.fingerprint


def test_a_run_on_pairs_and_retrieval_resumes_exactly(workspace: Workspace, tmp_path: Path) -> None:
    sources = [topics(name="tiny"), pair_source(write_pairs(tmp_path / "couples"), tmp_path / "plan")]
    write_rule_labels(tmp_path / "labels", sources, workspace.teacher)
    recipe = tiny_recipe(tiny_student_config(workspace.model), learning_rate=1e-3, head_learning_rate=1e-2)

    def run(folder: Path) -> str:
        return distill(
            sources, folder, recipe=recipe, labels=tmp_path / "labels", teacher=workspace.teacher, device="cpu"
        ).fingerprint

    fingerprint = run(tmp_path / "whole")
    steps = [line for line in log_of(tmp_path / "whole") if "loss" in line]
    assert {frozenset(name for name in line if "cross_entropy" in name) for line in steps} == {
        frozenset({"pair_cross_entropy"}),
        frozenset({"in_batch_cross_entropy", "dot_cross_entropy"}),
    }
    (tmp_path / "whole" / "manifest.json").unlink()
    for path in sorted((tmp_path / "whole").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    assert run(tmp_path / "whole") == fingerprint


def test_interpolation_keeps_one_of_the_measured_shares(workspace: Workspace, tmp_path: Path) -> None:
    student = tiny_student_config(workspace.model, pooling=AutoPooling())
    report = workspace.run(
        tmp_path / "student", student=student, interpolation=(0.5, 0.999)
    )  # no PMA to leave out later
    fractions = {line["fraction"]: line["dev"] for line in log_of(tmp_path / "student") if "fraction" in line}
    assert set(fractions) == {0.5, 0.999, 1.0}
    assert report.fraction_kept in fractions
    assert report.dev["tiny"]["by_weight"] == {
        weight: pytest.approx(value, abs=1e-5) for weight, value in fractions[report.fraction_kept]["tiny"].items()
    }
    manifest = json.loads((tmp_path / "student" / "manifest.json").read_text())
    assert manifest["fraction_kept"] == report.fraction_kept
    assert Student.load(tmp_path / "student", device="cpu").fingerprint == report.fingerprint


def test_pairs_without_a_dev_split_are_rejected(workspace: Workspace, tmp_path: Path) -> None:
    source = pair_source(write_pairs(tmp_path / "couples", splits=("train",)), tmp_path / "plan")
    recipe = tiny_recipe(tiny_student_config(workspace.model))
    recipe = recipe.model_copy(update={"losses": PLAIN})
    with pytest.raises(InputError, match="there are no dev pairs"):
        workspace.run(tmp_path / "student", source=source, recipe=recipe)


def test_vectors_are_trained_before_the_interaction(workspace: Workspace, tmp_path: Path) -> None:
    sources = [topics(name="tiny"), pair_source(write_pairs(tmp_path / "couples"), tmp_path / "plan")]
    write_rule_labels(tmp_path / "labels", sources, workspace.teacher)
    stage = {"epochs": 6, "learning_rate": 1e-2, "warmup_steps": 1, "num_near": 5, "num_random": 5, "batch_queries": 8}
    recipe = tiny_recipe(
        tiny_student_config(workspace.model), learning_rate=1e-3, head_learning_rate=1e-2, residual=stage
    )
    report = distill(
        sources,
        tmp_path / "student",
        recipe=recipe,
        labels=tmp_path / "labels",
        teacher=workspace.teacher,
        device="cpu",
    )
    lines = log_of(tmp_path / "student")
    first_stage = [line for line in lines if "loss" in line]
    assert first_stage
    dev = [line["dev"] for line in lines if "dev" in line and line.get("stage") != "residual"]
    assert all(len(set(values.values())) == 1 for results in dev for values in results.values())  # no interaction yet
    second_stage = [line["dev"] for line in lines if line.get("stage") == "residual"]
    assert len(second_stage) == 6
    assert any(len(set(values.values())) > 1 for results in second_stage for values in results.values())
    for name, result in report.dev.items():
        weight = report.interaction_weights["asymmetric" if name == "tiny" else "symmetric"]
        assert result["by_weight"][str(weight)] >= result["by_weight"]["0.0"]
    student = Student.load(tmp_path / "student", device="cpu", dtype="float32")
    assert student.fingerprint == report.fingerprint
    head = student.interaction
    assert any(float(p.abs().max()) > 0 for p in head.output.parameters()) or report.interaction_weights == {
        "asymmetric": 0.0,
        "symmetric": 0.0,
    }


def test_the_interaction_of_a_student_to_start_from_is_trained_at_full_weight(workspace, tmp_path, monkeypatch):
    stage = {"epochs": 1, "warmup_steps": 0, "num_near": 5, "num_random": 5, "batch_queries": 8}
    start = Student.create(tiny_student_config(workspace.model), device="cpu", dtype="float32")
    assert isinstance(start.interaction, Interaction)
    for task in TASKS:
        start.interaction.interaction_weight(task).fill_(0.0)
    start.save(tmp_path / "zero")
    weights: list[dict[str, float]] = []
    original = residual._Training.step

    def step(run: residual._Training, step: int) -> dict[str, Any]:
        weights.append({task: float(run.head.interaction_weight(task)) for task in TASKS})
        return original(run, step)

    monkeypatch.setattr(residual._Training, "step", step)
    workspace.run(tmp_path / "student", start=str(tmp_path / "zero"), residual=stage)
    own = workspace.source.task
    assert weights
    assert all(each == {task: float(task == own) for task in TASKS} for each in weights)


@pytest.mark.parametrize("stopped_in", ["the second stage", "the mining of an epoch"])
def test_a_resumed_run_goes_on_from_the_mined_plans(workspace, tmp_path, monkeypatch, stopped_in: str):
    stage = {"epochs": 1, "warmup_steps": 0, "num_near": 5, "num_random": 5, "batch_queries": 8}
    options = {"remine": True, "epochs": 3, "residual": stage}
    whole = workspace.run(tmp_path / "whole", **options)

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    original = loop.remine

    def interrupted_in_the_second(*inputs: Any, epoch: int, **more: Any) -> Any:
        return original(*inputs, epoch=epoch, **more) if epoch == 1 else interrupted()

    with monkeypatch.context() as patch:
        if stopped_in == "the second stage":
            patch.setattr(residual._Training, "step", interrupted)
        else:
            patch.setattr(loop, "remine", interrupted_in_the_second)
        with pytest.raises(KeyboardInterrupt):
            workspace.run(tmp_path / "again", **options)
    mined: list[Any] = []

    def recorded(source: TrainingSource, *inputs: Any, **more: Any) -> TrainingSource:
        mined.append(source.plan)
        return original(source, *inputs, **more)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "remine", recorded)
        assert workspace.run(tmp_path / "again", **options).fingerprint == whole.fingerprint
    if stopped_in == "the mining of an epoch":
        first = read_plan(tmp_path / "again.run" / "remined" / "epoch-1" / "tiny")
        assert [plan.entries for plan in mined] == [first.entries]


def test_remined_negatives_survive_an_interruption(workspace, tmp_path, monkeypatch):
    options = {"remine": True, "epochs": 3, "checkpoint_every": 1}
    whole = workspace.run(tmp_path / "whole", **options)
    plans = sorted((tmp_path / "whole.run" / "remined").glob("*/tiny"))
    assert [plan.parent.name for plan in plans] == ["epoch-1", "epoch-2"]
    first, second = (read_plan(plan) for plan in plans)
    assert {e.query_id: e.positives for e in first.entries} == {
        e.query_id: e.positives for e in workspace.source.plan.entries
    }
    assert first.entries != workspace.source.plan.entries
    assert first.entries != second.entries

    with monkeypatch.context() as patch:
        poison(patch, step=6, value=float("nan"))
        with pytest.raises(TrainingDivergedError):
            workspace.run(tmp_path / "again", **options)
    assert workspace.run(tmp_path / "again", **options).fingerprint == whole.fingerprint
