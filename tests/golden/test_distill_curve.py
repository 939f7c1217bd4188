"""The loss curve and the dev results of a tiny seeded run, compared with stored numbers.

After an intended change, ``python tests/golden/test_distill_curve.py`` (with src and tests on PYTHONPATH) rewrites
them, so that the difference shows up in the review.
"""

from __future__ import annotations

import json
import sys
import tempfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from d2llm.recipe.losses import Objective
from d2llm.training.distill import distill
from tiny_data import PUBLISHED, tiny_recipe, topics, write_rule_labels
from tiny_models import tiny_student_config, tiny_teacher_config, write_tiny_model

GOLDEN = Path(__file__).with_name("distill_curve.json")
TOLERANCE = 0.01  # relative; changing the weights by 1e-5 of their size moves this curve by 1e-4 at most
LOSSES = Objective(
    PUBLISHED | {"rank_imitation_hard_easy": 0.5, "feature_imitation": 0.5}
)  # heavy enough to show in the curve


def run(folder: Path) -> dict[str, Any]:
    """The log of one run of 16 steps on a symmetric and an asymmetric data set."""
    torch.set_num_threads(1)
    model = fixed_weights(write_tiny_model(folder / "student", "modernbert"))
    teacher = tiny_teacher_config(write_tiny_model(folder / "teacher", "llama"))
    sources = [topics(name="one"), topics(name="two", task="symmetric")]
    write_rule_labels(folder / "labels", sources, teacher)
    recipe = tiny_recipe(
        tiny_student_config(model), losses=LOSSES, learning_rate=1e-3, head_learning_rate=1e-2, eval_every=8
    )
    distill(
        sources, folder / "run", recipe=recipe, labels=folder / "labels", teacher=teacher, device="cpu", dtype="float32"
    )
    lines = [json.loads(line) for line in (folder / "run.run" / "log.jsonl").read_text("utf-8").splitlines()]
    return {
        "steps": [{k: v for k, v in line.items() if k != "seconds"} for line in lines if "loss" in line],
        "dev": [{"step": line["step"], **line["dev"]} for line in lines if "dev" in line],
    }


def fixed_weights(model: Path) -> Path:
    """Weights from numpy's generator, tensor by tensor: another transformers version may initialise differently."""
    path = model / "model.safetensors"
    weights = load_file(path)
    for name, tensor in weights.items():
        drawn = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(tensor.shape)
        weights[name] = ((1.0 if tensor.ndim == 1 else 0.0) + 0.1 * drawn).astype(np.float32)
    save_file(weights, path, metadata={"format": "pt"})
    return model


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    threads = torch.get_num_threads()
    try:
        return run(tmp_path_factory.mktemp("golden"))
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    return json.loads(GOLDEN.read_text("utf-8"))


def test_the_loss_curve_is_as_stored(logged: dict[str, Any], golden: dict[str, Any]) -> None:
    assert len(logged["steps"]) == len(golden["steps"]) == 16
    for actual, stored in zip(logged["steps"], golden["steps"], strict=True):
        assert actual.keys() == stored.keys()
        assert actual["task"] == stored["task"]
        numbers = [{k: v for k, v in line.items() if k != "task"} for line in (actual, stored)]
        assert numbers[0] == pytest.approx(numbers[1], rel=TOLERANCE, abs=1e-3), f"step {actual['step']}"


def test_the_dev_results_are_as_stored(logged: dict[str, Any], golden: dict[str, Any]) -> None:
    assert [line["step"] for line in logged["dev"]] == [line["step"] for line in golden["dev"]] == [0, 8, 16]
    for actual, stored in zip(logged["dev"], golden["dev"], strict=True):
        for name in ("one", "two"):
            # Eight queries: one swap of neighbours that score alike moves the mean by about 0.01.
            assert actual[name] == pytest.approx(stored[name], abs=0.02), (actual["step"], name)


def test_the_stored_loss_goes_down(golden: dict[str, Any]) -> None:
    for task in ("symmetric", "asymmetric"):
        curve = [line["loss"] for line in golden["steps"] if line["task"] == task]
        assert np.mean(curve[-3:]) < 0.8 * np.mean(curve[:3])


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        numbers = run(Path(temporary))
    GOLDEN.write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(f"{GOLDEN}: written\n")
