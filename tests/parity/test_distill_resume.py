"""A distillation run that is interrupted and resumed equals the uninterrupted run bit for bit, with dropout."""

from __future__ import annotations

import json
import signal
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from d2llm.core.errors import InputError
from d2llm.data.plan import TrainingSource
from d2llm.recipe import Lora, Recipe
from d2llm.training import distill as verb
from d2llm.training import training_loop
from d2llm.training.distill import DistillReport, distill
from prepared_process import PreparedProcess, script
from tiny_data import tiny_recipe, topics, write_rule_labels
from tiny_models import tiny_student_config, tiny_teacher_config, write_tiny_model

STEPS = 16  # 2 epochs of 4 + 4 batches
STUDENT_FILES = ("head.safetensors", "adapter_model.safetensors")


def sources() -> list[TrainingSource]:
    return [topics(name="one"), topics(name="two", task="symmetric")]


def recipe(models: Path, **training: object) -> Recipe:
    config = tiny_student_config(models / "student", tuning=Lora(rank=4, alpha=8.0, dropout=0.2))
    interaction = config.interaction.model_copy(update={"dropout": 0.1})
    student = config.model_copy(update={"interaction": interaction})
    settings = {"epochs": 2, "patience": 99, "eval_every": 4, "checkpoint_every": 3}
    rates = {"learning_rate": 1e-3, "head_learning_rate": 1e-2}
    return tiny_recipe(student, **(settings | rates | training))


def run(models: Path, folder: Path, **training: object) -> DistillReport:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return distill(
            sources(),
            folder,
            recipe=recipe(models, **training),
            labels=models / "labels",
            teacher=tiny_teacher_config(models / "teacher"),
            device="cpu",
            dtype="float32",
        )
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_tiny_model(folder / "student", "modernbert", initializer_range=0.1)
    write_tiny_model(folder / "teacher", "llama")
    write_rule_labels(folder / "labels", sources(), tiny_teacher_config(folder / "teacher"))
    return folder


@pytest.fixture(scope="module")
def uninterrupted(models: Path) -> tuple[DistillReport, Path]:
    """The uninterrupted run."""
    folder = models / "whole"
    return run(models, folder), folder


def log_of(folder: Path) -> list[dict[str, Any]]:
    lines = (folder.with_name(folder.name + ".run") / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in lines]


def assert_equal_runs(report: DistillReport, folder: Path, uninterrupted: tuple[DistillReport, Path]) -> None:
    expected, uninterrupted_folder = uninterrupted
    differing = {"folder", "seconds"}
    assert {k: v for k, v in asdict(report).items() if k not in differing} == {
        k: v for k, v in asdict(expected).items() if k not in differing
    }
    assert log_of(folder) == log_of(uninterrupted_folder)
    for name in STUDENT_FILES:
        assert (folder / name).read_bytes() == (uninterrupted_folder / name).read_bytes(), name
    for name in ("best.safetensors", "checkpoint.safetensors"):  # parameters and AdamW moments
        one, two = (load_file(path.with_name(path.name + ".run") / name) for path in (folder, uninterrupted_folder))
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one), name


def test_the_reference_run_trains_properly(uninterrupted: tuple[DistillReport, Path]) -> None:
    report, folder = uninterrupted
    assert report.steps == STEPS
    assert report.best_step > 0  # so a best state is stored and must be restored
    losses = [line["loss"] for line in log_of(folder) if "loss" in line]
    assert len(losses) == STEPS
    assert losses[-1] < losses[0]
    assert {line["task"] for line in log_of(folder) if "task" in line} == {"symmetric", "asymmetric"}
    adapter = load_file(folder / "adapter_model.safetensors")
    assert any(float(tensor.abs().sum()) > 0 for name, tensor in adapter.items() if name.endswith("lora_B.weight"))


class Interrupted(Exception):
    pass


# 2: before the first checkpoint; 10: between checkpoints; 15: at the last step.
@pytest.mark.parametrize("interruptions", [[2], [10, 15]])
def test_resumed_equals_uninterrupted(models, uninterrupted, interruptions: list[int], tmp_path, monkeypatch):
    folder = tmp_path / "student"
    for moment in interruptions:
        with monkeypatch.context() as patch:
            interrupt_at_call(patch, moment, folder)
            with pytest.raises(Interrupted):
                run(models, folder)
        assert not folder.exists()
    assert_equal_runs(run(models, folder), folder, uninterrupted)


def interrupt_at_call(patch: pytest.MonkeyPatch, step: int, folder: Path) -> None:
    """Raise in the middle of the step that would be number ``step`` + 1."""
    original = training_loop.weighted_sum
    run_folder = folder.with_name(folder.name + ".run")

    def weighted_sum(*arguments: Any) -> torch.Tensor:
        lines = (run_folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
        if sum('"loss"' in line for line in lines) == step:
            raise Interrupted
        return original(*arguments)

    patch.setattr(training_loop, "weighted_sum", weighted_sum)


def test_resumed_after_the_last_step(models, uninterrupted, tmp_path, monkeypatch):
    """Interrupted after all steps are done, but before the student is saved."""

    def save(*arguments: Any, **options: Any) -> None:
        raise Interrupted

    folder = tmp_path / "student"
    with monkeypatch.context() as patch:
        patch.setattr(verb.Student, "save", save)
        with pytest.raises(Interrupted):
            run(models, folder)
    assert_equal_runs(run(models, folder), folder, uninterrupted)


def test_training_continues_from_a_student(models: Path, tmp_path: Path) -> None:
    first = run(models, tmp_path / "first")
    second = run(models, tmp_path / "second", start=str(tmp_path / "first"))
    assert {name: dev["start"] for name, dev in second.dev.items()} == pytest.approx(
        {name: dev["by_weight"]["1.0"] for name, dev in first.dev.items()}, abs=0.02
    )
    other = recipe(models, start=str(tmp_path / "first"))
    backbone = other.student.backbone.model_copy(update={"max_passage_tokens": 32})
    with pytest.raises(InputError, match=r"training.start: .*backbone.max_passage_tokens \(was 64, is 32\)"):
        distill(
            sources(),
            tmp_path / "third",
            recipe=other.model_copy(update={"student": other.student.model_copy(update={"backbone": backbone})}),
            labels=models / "labels",
            teacher=tiny_teacher_config(models / "teacher"),
            device="cpu",
        )


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {path!r})
import test_distill_resume as test
from d2llm.training import trainer as verb

name, calls = sys.argv[3], int(sys.argv[4])
original = getattr(verb, name)

def killing(*arguments, **options):
    global calls
    calls -= 1
    if calls == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*arguments, **options)

setattr(verb, name, killing)
test.run(Path(sys.argv[1]), Path(sys.argv[2]))
"""


# In the middle of the eighth step, and after a best state is written but not the checkpoint that refers to it.
@pytest.mark.parametrize(("name", "calls"), [("optimizer_step", 8), ("save_checkpoint", 4)])
def test_killed_process_resumes_to_the_uninterrupted_result(models, uninterrupted, name: str, calls: int, tmp_path):
    folder, code = tmp_path / "student", KILLED.format(path=str(Path(__file__).parent))
    with PreparedProcess(script, code, str(models), str(folder), name, str(calls)) as process:
        assert process.wait() == -signal.SIGKILL, process.errors
    assert (tmp_path / "student.run" / "checkpoint.safetensors").is_file()
    assert not folder.exists()
    assert_equal_runs(run(models, folder), folder, uninterrupted)


def test_a_checkpoint_for_other_labels_is_refused(models, tmp_path, monkeypatch):
    """Labels added since the checkpoint would be mixed with the data set's own judgements."""
    base = recipe(models)
    own = base.model_copy(update={"training": base.training.model_copy(update={"unlabelled": "own_labels"})})
    teacher = tiny_teacher_config(models / "teacher")
    write_rule_labels(tmp_path / "labels", sources(), teacher, queries=["q00", "q01", "q02"])
    folder = tmp_path / "student"

    def run_with_labels() -> DistillReport:
        options = {"recipe": own, "labels": tmp_path / "labels", "teacher": teacher, "dtype": "float32"}
        return distill(sources(), folder, device="cpu", **options)

    with monkeypatch.context() as patch:
        interrupt_at_call(patch, 5, folder)
        with pytest.raises(Interrupted):
            run_with_labels()
    write_rule_labels(tmp_path / "labels", sources(), teacher)
    with pytest.raises(
        InputError, match=r"belongs to a run with other settings: labels\.one\.unlabelled \(was 13, is 0\)"
    ):
        run_with_labels()
