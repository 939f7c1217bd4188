"""Training with two processes gives the same result as with one: in one or two stages, including dropout, and with
weights in 4 bits and layers that are computed again (QLoRA with gradient checkpointing).

Both encode the dev texts, and in the second stage those of the plan.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from d2llm.data.plan import TrainingSource
from d2llm.models.student import Student
from d2llm.recipe import Lora, Recipe
from d2llm.training.distill import DistillReport, distill
from tiny_data import tiny_recipe, topics, write_rule_labels
from tiny_distill import log_of
from tiny_models import tiny_student_config, tiny_teacher_config, write_tiny_model

CASES: dict[str, dict[str, Any]] = {"one stage": {}, "two stages": {"residual": {"epochs": 2}}}
if find_spec("bitsandbytes") is not None:
    CASES["QLoRA"] = {"gradient_checkpointing": True}


def sources() -> list[TrainingSource]:
    return [topics(name="one"), topics(name="two", task="symmetric")]


def recipe(models: Path, case: str) -> Recipe:
    """With dropout, and with parts so small that each process has several and keeps the graph of the first."""
    tuning = Lora(rank=4, alpha=8.0, dropout=0.2, quantization="4bit" if case == "QLoRA" else "none")
    config = tiny_student_config(models / "student", tuning=tuning)
    student = config.model_copy(update={"interaction": config.interaction.model_copy(update={"dropout": 0.1})})
    rates = {"learning_rate": 1e-3, "head_learning_rate": 1e-2}
    settings = {
        "epochs": 1,
        "patience": 99,
        "part_tokens": 30,
        "graph_gib": 1e-4,
        **CASES[case],
    }
    return tiny_recipe(student, **settings, **rates)


def run(models: Path, processes: str, case: str) -> DistillReport:
    torch.set_num_threads(1)
    return distill(
        sources(),
        models / processes / case,
        recipe=recipe(models, case),
        labels=models / "labels",
        teacher=tiny_teacher_config(models / "teacher"),
        device="cpu",
        dtype="float32",
    )


@pytest.fixture(scope="module")
def launched(models: Path) -> subprocess.CompletedProcess[str]:
    """Two processes that train all cases: their imports take longer than the training."""
    script = [str(Path(__file__)), str(models)]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    finished = subprocess.run(
        [*launcher, *script], check=False, timeout=240, capture_output=True, text=True, env=environment
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    return finished


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_tiny_model(folder / "student", "modernbert", initializer_range=0.1)
    write_tiny_model(folder / "teacher", "llama")
    write_rule_labels(folder / "labels", sources(), tiny_teacher_config(folder / "teacher"))
    return folder


@pytest.mark.parametrize("case", CASES)
def test_two_processes_match_one_process(models: Path, launched: subprocess.CompletedProcess[str], case: str) -> None:
    folders = models / "one" / case, models / "two" / case
    threads = torch.get_num_threads()
    try:
        expected = run(models, "one", case)
    finally:
        torch.set_num_threads(threads)
    assert expected.best_step > 0
    begin = f"REPORT {case} "
    reports = [json.loads(line[len(begin) :]) for line in launched.stdout.splitlines() if line.startswith(begin)]
    assert len(reports) == 2
    encoded = sorted(report.pop("encoded") for report in reports)
    assert encoded[0] > 0.4 * encoded[1]  # the first process also encodes what is fitted at the end
    assert reports[0] == reports[1]
    for name, dev in expected.dev.items():
        for key in ("start", "last", "kept"):
            assert reports[0]["dev"][name][key] == pytest.approx(dev[key], abs=2e-3), (name, key)
    for name in ("steps", "best_step", "stopped_early", "queries"):
        assert reports[0][name] == getattr(expected, name), name
    logs = [
        [{key: value for key, value in line.items() if key != "seconds"} for line in log_of(name)] for name in folders
    ]
    assert len(logs[0]) == len(logs[1])
    for one, two in zip(*logs, strict=True):
        assert one.keys() == two.keys()
        if "loss" in one:
            assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
            assert two["gradient_norm"] == pytest.approx(one["gradient_norm"], rel=1e-3)
    for name in ("head.safetensors", "adapter_model.safetensors"):
        one, two = (load_file(folder / name) for folder in folders)
        assert one.keys() == two.keys()
        for key, tensor in one.items():
            # AdamW's first steps have the size of the learning rate whatever the gradient: where that is nearly 0,
            # rounding alone decides the sign.
            torch.testing.assert_close(two[key], tensor, rtol=1e-2, atol=2e-3, msg=lambda m, key=key: f"{key}: {m}")


if __name__ == "__main__":
    num_encoded = 0
    encode = Student._encode

    def count(student: Student, texts: Sequence[str], *arguments: Any, **options: Any) -> Any:
        global num_encoded
        num_encoded += len(texts)
        return encode(student, texts, *arguments, **options)

    Student._encode = count  # type: ignore[method-assign]
    workspace = Path(sys.argv[1])
    for name in CASES:
        num_encoded = 0
        report = asdict(run(workspace, "two", name))
        sys.stdout.write(f"REPORT {name} {json.dumps(report | {'encoded': num_encoded})}\n")
