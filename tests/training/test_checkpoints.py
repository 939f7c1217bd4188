from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn

from d2llm.core.errors import TrainingDivergedError
from d2llm.recipe import TrainingConfig
from d2llm.training.checkpoints import (
    LOG,
    BestState,
    RunLog,
    learning_rate_factor,
    optimizer_step,
    warmup_steps,
)


def test_learning_rate_matches_hand_calculation():
    factors = [learning_rate_factor(step, warmup_steps=4, total_steps=10) for step in range(11)]
    expected = [1 / 4, 2 / 4, 3 / 4, 1, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0]
    assert factors == pytest.approx(expected)
    assert learning_rate_factor(0, warmup_steps=0, total_steps=5) == 1
    assert learning_rate_factor(4, warmup_steps=0, total_steps=5) == pytest.approx(1 / 5)
    # warm-up longer than the run
    assert learning_rate_factor(2, warmup_steps=1000, total_steps=3) == pytest.approx(3 / 1000)


def test_warm_up_is_a_share_of_the_steps_unless_given_in_steps(caplog):
    assert [warmup_steps(TrainingConfig(), total) for total in (20, 24, 1000)] == [2, 2, 100]
    assert warmup_steps(TrainingConfig(warmup_steps=50, warmup_fraction=0.5), 100) == 50
    assert caplog.text == ""
    # The published number of steps in a run of 20: the rate would only reach a fiftieth of its value.
    assert warmup_steps(TrainingConfig(warmup_steps=1000), 20) == 1000
    assert "the warm-up takes 20 of 20 steps, so the run hardly trains" in caplog.text


def test_optimizer_step_matches_hand_calculation():
    parameter = nn.Parameter(torch.tensor([1.0, 1.0]))
    optimizer = torch.optim.SGD([parameter], lr=123.0)
    optimizer.param_groups[0]["initial_lr"] = 0.5
    parameter.grad = torch.tensor([3.0, 4.0])
    norm = optimizer_step(optimizer, {"p": parameter}, factor=0.1, max_gradient_norm=1.0)
    assert norm == pytest.approx(5.0)
    # clipped to length 1: [.6, .8]; rate .5 x .1
    assert parameter.tolist() == pytest.approx([1 - 0.05 * 0.6, 1 - 0.05 * 0.8], abs=1e-6)
    assert parameter.grad is None


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_gradient_changes_no_parameter(bad):
    parameter = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    parameter.grad = torch.tensor([1.0, bad])
    with pytest.raises(TrainingDivergedError, match=r"gradient's norm became .*not changed; training stopped"):
        optimizer_step(optimizer, {"p": parameter}, factor=1.0, max_gradient_norm=1.0)
    assert parameter.tolist() == [1, 1]


def read_log(folder):
    return [json.loads(line) for line in (folder / LOG).read_text().splitlines()]


def test_resumed_log_continues_after_the_checkpoint(tmp_path):
    log = RunLog(tmp_path, resume_step=-1)
    for step in (0, 1, 2, 3, 4):
        log.write(step, loss=step / 10)
    with (tmp_path / LOG).open("a") as file:
        file.write('{"step": 5, "sec')  # killed while writing
    resumed = RunLog(tmp_path, resume_step=2)
    resumed.write(3, loss=7.0)
    assert [(record["step"], record["loss"]) for record in read_log(tmp_path)] == [
        (0, 0.0),
        (1, 0.1),
        (2, 0.2),
        (3, 7.0),
    ]
    assert all(record["seconds"] >= 0 for record in read_log(tmp_path))
    RunLog(tmp_path, resume_step=0)
    assert [record["step"] for record in read_log(tmp_path)] == [0]
    RunLog(tmp_path, resume_step=-1)
    assert read_log(tmp_path) == []


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize(
    ("lower_is_better", "values", "best", "evals_since_best"),
    [(False, [0.5, 0.7, 0.7, 0.6], 0.7, 2), (True, [0.5, 0.7, 0.4, 0.4], 0.4, 1)],
)
def test_best_state_is_kept_and_restored(tmp_path, in_memory, lower_is_better, values, best, evals_since_best):
    parameters = {"weight": nn.Parameter(torch.zeros(2))}
    path = None if in_memory else tmp_path / "best.safetensors"
    state = BestState(parameters, path, lower_is_better=lower_is_better)
    state.restore()
    assert parameters["weight"].tolist() == [0, 0]  # no evaluation yet
    for step, value in enumerate(values):
        with torch.no_grad():
            parameters["weight"].fill_(step + 1)
        state.update(value, step)
    step = values.index(best)
    assert state.state() == {"step": step, "value": best, "evals_since_best": evals_since_best}
    assert not state.update(1e9 * (-1 if lower_is_better else 1), 9, is_sound=False)
    assert (state.step, state.evals_since_best) == (step, evals_since_best + 1)
    state.restore()
    assert parameters["weight"].tolist() == [step + 1] * 2
