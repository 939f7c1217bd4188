"""The training loop: interruptions, divergence, dev evaluations, time and log, on a tiny network with dropout."""

from __future__ import annotations

import copy
import itertools
import json
import math
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from d2llm.core.errors import InputError, OutOfTimeError, Terminated, TrainingDivergedError
from d2llm.core.time_limit import time_limit
from d2llm.recipe import Recipe
from d2llm.recipe.recipe import shaping_settings
from d2llm.training import trainer as module
from d2llm.training.checkpoints import CHECKPOINT, LOG, BestState, trainable
from d2llm.training.trainer import BEST, Trainable, Trainer

DATA = torch.randn(20, 5, generator=torch.Generator().manual_seed(1))
STEPS = 12


class Interrupted(Exception):
    pass


class Network(Trainable):
    """Learns zeros; ``act`` is called at each place of the loop, by its name and the step, and may stop it."""

    title = "learning zeros"
    total_steps = STEPS

    def __init__(self, dev: list[float] | None = None, act: Any = lambda stage, step: None) -> None:
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.3), nn.Linear(8, 1), nn.LayerNorm(1))
        self.layers[3].requires_grad_(False)
        self.parameters = trainable(self.layers)
        self.groups = [([*self.parameters.values()], 0.1, 0.01)]
        self.act, self.dev, self.seen = act, dev, 0
        self.steps: list[int] = []
        self.evaluated: list[int] = []

    def step(self, step: int) -> dict[str, Any]:
        self.steps.append(step)
        self.act("step", step)
        loss = self.layers[2](self.layers[1](self.layers[0](DATA))).square().mean()
        loss.backward()
        self.act("gradient", step)
        return {"loss": loss.detach(), "half": float(loss.detach()) / 2}

    def evaluate(self) -> float:
        self.act("evaluate", self.seen)
        if self.dev is not None:
            return self.dev[self.seen]
        with torch.no_grad():
            return -float(self.layers[2](self.layers[0](DATA)).square().mean())

    def record(self, results: float, step: int, best: BestState) -> dict[str, Any]:
        self.act("record", self.seen)
        self.evaluated.append(step)
        self.seen += 1
        best.update(results, step)
        return {"dev": results}

    def state(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state(self, state: Any) -> None:
        self.seen = state["seen"]


SETTINGS: dict[str, Any] = {"seed": 7, "warmup_steps": 3, "eval_every": 4, "eval_start": True}


def train(folder: Path | None, model: Network, **settings: Any) -> Trainer:
    trainer = Trainer(model, folder, {"seed": 7}, **SETTINGS | settings)
    trainer.train()
    return trainer


def log_of(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / LOG).read_text(encoding="utf-8").splitlines()]
    assert all(line.pop("seconds") >= 0 for line in lines)
    return lines


def losses_in(folder: Path) -> list[int]:
    return [line["step"] for line in log_of(folder) if "loss" in line]


@pytest.fixture
def whole(tmp_path: Path) -> tuple[Path, Network]:
    model = Network()
    train(tmp_path / "whole", model)
    return tmp_path / "whole", model


def assert_equal_runs(folder: Path, model: Network, whole: tuple[Path, Network]) -> None:
    """The same weights, moments, best state, losses and log."""
    expected_folder, expected = whole
    for name, parameter in model.parameters.items():
        assert torch.equal(parameter, expected.parameters[name])
    for name in (CHECKPOINT, BEST):
        one, other = load_file(folder / name), load_file(expected_folder / name)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert log_of(folder) == log_of(expected_folder)


def stop_at(stage: str, at: int, raised: type[BaseException] | signal.Signals) -> Any:
    """Raise, or call a signal's handler, at the first time that a stage is reached."""

    def act(now: str, step: int) -> None:
        if (now, step) != (stage, at) or done:
            return
        done.append(1)
        if not isinstance(raised, signal.Signals):
            raise raised
        handler = signal.getsignal(raised)
        assert callable(handler)
        handler(raised, None)

    done: list[int] = []
    return act


@pytest.fixture
def default_handlers():
    """The handlers of a fresh process, whatever earlier tests left."""
    defaults = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in defaults.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


# Interruptions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "at", "raised", "saved"),
    [
        ("step", 7, signal.SIGINT, 7),
        ("gradient", 7, signal.SIGTERM, 7),
        ("step", 0, signal.SIGINT, 0),  # only the start was evaluated
        ("evaluate", 2, signal.SIGTERM, 8),  # is repeated
        ("record", 2, signal.SIGINT, 8),  # is finished first
        ("evaluate", 3, signal.SIGINT, STEPS),  # after the last step
        ("step", 5, OutOfTimeError, 5),
    ],
)
def test_stopped_and_resumed_equals_uninterrupted_bit_for_bit(
    whole, default_handlers, tmp_path, stage: str, at: int, raised: Any, saved: int
):
    folder, first, second = tmp_path / "run", Network(act=stop_at(stage, at, raised)), Network()
    with pytest.raises(OutOfTimeError if raised is OutOfTimeError else KeyboardInterrupt) as stop:
        train(folder, first)
    assert isinstance(stop.value, Terminated) == (raised == signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    trainer = train(folder, second)
    assert second.steps == [*range(saved, STEPS)]  # no step is repeated
    assert trainer.step == STEPS
    assert first.evaluated + second.evaluated == [0, 4, 8, 12]
    assert_equal_runs(folder, second, whole)


def test_another_ctrl_c_does_not_keep_the_checkpoint_from_being_written(default_handlers, tmp_path, monkeypatch):
    save = Trainer.save

    def save_for_the_impatient(trainer: Trainer) -> None:
        if trainer.step == 7:
            signal.raise_signal(signal.SIGINT)
        save(trainer)

    monkeypatch.setattr(Trainer, "save", save_for_the_impatient)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, Network(act=stop_at("step", 7, signal.SIGINT)))
    monkeypatch.undo()
    train(tmp_path, model := Network())
    assert model.steps == [*range(7, STEPS)]


@pytest.mark.parametrize("every", [1, 3, 5])
def test_after_a_crash_steps_since_the_last_checkpoint_are_repeated(whole, tmp_path, every: int):
    for at in (2, 7, 11):
        folder, model = tmp_path / f"run{at}", Network()
        with pytest.raises(Interrupted):
            train(folder, Network(act=stop_at("gradient", at, Interrupted)), checkpoint_every=every)
        train(folder, model, checkpoint_every=every)
        assert model.steps[0] >= max(0, at - every)
        assert_equal_runs(folder, model, whole)


def test_without_the_moments_the_run_is_another(whole: tuple[Path, Network], tmp_path: Path) -> None:
    """So the tests above would notice a resume that lacks them."""
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run", Network(act=stop_at("step", 4, KeyboardInterrupt)))
    trainer = Trainer(Network(), tmp_path / "run", {"seed": 7}, **SETTINGS)
    trainer.optimizer.state.clear()
    trainer.train()
    assert log_of(tmp_path / "run") != log_of(whole[0])


def test_a_finished_run_is_taken_up(whole: tuple[Path, Network]) -> None:
    model = Network()
    assert train(whole[0], model).losses == [line["loss"] for line in log_of(whole[0]) if "loss" in line]
    assert (model.steps, model.evaluated) == ([], [])
    assert_equal_runs(whole[0], model, whole)
    trainer = Trainer(Network(), whole[0], {"seed": 7})
    assert trainer.is_resumed
    trainer.delete_checkpoint()
    assert not Trainer(Network(), whole[0], {"seed": 8}).is_resumed


def test_a_checkpoint_of_another_run_or_a_damaged_one_is_refused(whole: tuple[Path, Network]) -> None:
    file = whole[0] / CHECKPOINT
    changes = r"new \(was not set, is 1\), seed \(was 7, is 8\); finish that run"
    with pytest.raises(InputError, match=rf"checkpoint.safetensors belongs to a run with other settings: {changes}"):
        Trainer(Network(), whole[0], {"seed": 8, "new": 1})
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(InputError, match=r"checkpoint.safetensors: cannot be read .*delete it to restart the run"):
        Trainer(Network(), whole[0], {"seed": 7})


def test_a_checkpoint_of_a_schema_with_fewer_settings_continues(tmp_path: Path) -> None:
    """Recipes are compared as today's schema reads them, and only in what shapes the student."""

    def trainer_of(recipe: dict[str, Any]) -> Trainer:
        return Trainer(Network(), tmp_path, {"recipe": recipe}, shaping=shaping_settings)

    recipe: dict[str, Any] = Recipe().model_dump(mode="json")
    saved: dict[str, Any] = copy.deepcopy(recipe) | {"name": "other"}
    del saved["training"]["in_batch_labels"], saved["student"]["pooling"]["warm_start"]
    trainer_of(saved).save()
    assert trainer_of(recipe).is_resumed
    recipe["training"]["epochs"] = 7
    with pytest.raises(InputError, match=r"other settings: training.epochs \(was \w+, is 7\); finish that run"):
        trainer_of(recipe)
    saved["training"]["forgotten"] = True
    (tmp_path / CHECKPOINT).unlink()
    trainer_of(saved).save()
    with pytest.raises(InputError, match=r"unknown key 'training.forgotten'.*another version of d2llm.*start over"):
        trainer_of(recipe)


def test_a_short_training_has_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert train(None, Network(dev=[0.5, 0.9, 0.1, 0.2])).best.step == 4
    assert list(tmp_path.iterdir()) == []


# Divergence --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "problem"),
    [
        ("loss", r"the loss became nan at step 6; training stopped. The last good checkpoint is kept in .*run\."),
        ("gradient", r"the gradient's norm became inf, and the weights were not changed; training stopped"),
        ("weight", r"weights became infinite or NaN before step 6; training stopped"),
    ],
)
def test_what_is_not_finite_stops_the_run_and_keeps_the_last_good_state(whole, tmp_path, what: str, problem: str):
    class Diverging(Network):
        def step(self, step: int) -> dict[str, Any]:
            values = super().step(step)
            first = self.parameters["0.weight"]
            if what == "gradient" and step == 6:
                assert first.grad is not None
                first.grad[0, 0] = math.inf
            if what == "weight" and step == 5:
                with torch.no_grad():
                    first[0, 0] = math.inf
            return values | ({"loss": math.nan} if what == "loss" and step == 6 else {})

    with pytest.raises(TrainingDivergedError, match=problem):
        train(tmp_path / "run", Diverging(), checkpoint_every=3)
    tensors = load_file(tmp_path / "run" / CHECKPOINT)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values())
    model = Network()
    train(tmp_path / "run", model)
    assert_equal_runs(tmp_path / "run", model, whole)


# Dev evaluations ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "evaluated"),
    [
        ({}, [0, 4, 8, 12]),
        ({"eval_start": False}, [4, 8, 12]),
        ({"eval_every": 5}, [0, 5, 10, 12]),
        ({"eval_every": None, "eval_start": False}, []),
    ],
)
def test_when_dev_is_measured(tmp_path: Path, settings: dict[str, Any], evaluated: list[int]) -> None:
    model = Network()
    train(tmp_path / "run", model, **settings)
    assert model.evaluated == evaluated
    assert [line["step"] for line in log_of(tmp_path / "run") if "dev" in line] == evaluated


def test_the_start_and_the_end_are_measured_whatever_it_takes(tmp_path: Path) -> None:
    model = Network()
    model.may_evaluate = lambda: False  # type: ignore[method-assign]
    train(tmp_path / "run", model)
    assert model.evaluated == [0, STEPS]


@pytest.mark.parametrize("lower_is_better", [False, True])
def test_patience_ends_the_run_and_the_best_state_is_kept(tmp_path: Path, lower_is_better: bool) -> None:
    values = [0.5, 0.7, 0.7, 0.6, 0.9]
    settings = {"eval_every": 1, "patience": 2, "lower_is_better": lower_is_better}
    after_one = Network()
    after_one.total_steps = 1
    train(None, after_one, eval_every=None, warmup_steps=STEPS)
    for steps in ([0, 1, 2], []):  # the second time it is taken up
        model = Network([1 - value for value in values] if lower_is_better else values)
        trainer = train(tmp_path / "run", model, warmup_steps=STEPS, **settings)
        assert (trainer.step, trainer.best.step, model.steps) == (3, 1, steps)
        assert trainer.best.value == pytest.approx(0.3 if lower_is_better else 0.7)
        assert all(torch.equal(each, after_one.parameters[name]) for name, each in model.parameters.items())


def test_without_dev_the_last_state_is_kept(tmp_path: Path) -> None:
    model = Network()
    trainer = train(tmp_path / "run", model, eval_every=None, eval_start=False)
    assert trainer.best.step is None
    checkpoint = load_file(tmp_path / "run" / CHECKPOINT)
    assert all(torch.equal(each, checkpoint[f"parameter/{name}"]) for name, each in model.parameters.items())


# Time --------------------------------------------------------------------------------------------------------------


def set_clock(patch: pytest.MonkeyPatch, model: Network, seconds: float) -> None:
    """Let a step take so much time."""
    patch.setattr(module, "time", SimpleNamespace(monotonic=lambda: seconds * len(model.steps)))


def test_checkpoints_are_due_by_time_and_by_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run whose steps take a minute must not lose a hundred of them."""
    saved: list[int] = []
    genuine = module.save_checkpoint

    def save(*arguments: Any) -> None:
        saved.append(len(arguments[3]["losses"]))
        genuine(*arguments)

    monkeypatch.setattr(module, "save_checkpoint", save)
    settings = {"eval_every": None, "eval_start": False}
    best = {"checkpoint_minutes": 1e9, "eval_every": 3}
    for name, times, expected in (
        ("best", best, [3, 6, 12]),  # so that the checkpoint of a resumed run matches the best state
        ("time", {"checkpoint_minutes": 2.5}, [3, 6, 9, 12]),
        ("steps", {"checkpoint_minutes": 1e9, "checkpoint_every": 5}, [5, 10, 12]),
        ("neither", {"checkpoint_minutes": 1e9}, [12]),
    ):
        model = Network(dev=[0.5, 0.7, 0.6, 0.1])
        set_clock(monkeypatch, model, 60)
        train(tmp_path / name, model, **settings | times)
        assert saved == expected
        saved.clear()


def test_out_of_minutes_the_last_step_is_evaluated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Network(act=stop_at("step", 3, KeyboardInterrupt))
    set_clock(monkeypatch, first, 60)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run", first, max_minutes=5.5)
    second = Network()
    set_clock(monkeypatch, second, 60)
    trainer = Trainer(second, tmp_path / "run", {"seed": 7}, **SETTINGS, max_minutes=5.5)
    assert trainer.train()
    assert 5 <= trainer.step <= 7  # the time before the interruption counts
    assert second.evaluated[-1] == trainer.step


def test_a_time_limit_leaves_time_for_what_follows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = itertools.chain(range(1000, 0, -100))  # at the beginning, and before each step
    monkeypatch.setattr(module, "seconds_left", lambda: next(left))
    model = Network()
    model.reserved_seconds = lambda: 650.0  # type: ignore[method-assign]
    assert train(tmp_path / "run", model).step == 3
    assert model.evaluated == [0, 3]


def test_a_time_limit_stops_a_run_which_continues_later(whole: tuple[Path, Network], tmp_path: Path) -> None:
    with pytest.raises(OutOfTimeError), time_limit(-1.0):
        train(tmp_path / "run", Network())
    assert losses_in(tmp_path / "run") == [1]
    model = Network()
    train(tmp_path / "run", model)
    assert_equal_runs(tmp_path / "run", model, whole)


# Log ---------------------------------------------------------------------------------------------------------------


def test_the_log_has_every_step(whole: tuple[Path, Network]) -> None:
    lines = log_of(whole[0])
    assert [line["step"] for line in lines if "dev" in line] == [0, 4, 8, 12]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [*range(1, STEPS + 1)]
    assert all(line["half"] == pytest.approx(line["loss"] / 2) and line["gradient_norm"] > 0 for line in steps)
    assert steps[-1]["loss"] < steps[0]["loss"]


def test_trackers_know_where_the_run_continues(tmp_path: Path) -> None:
    opened: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        train(
            tmp_path, Network(act=stop_at("step", 6, KeyboardInterrupt)), open_trackers=lambda s: opened.append(s) or ()
        )
    train(tmp_path, Network(), open_trackers=lambda step: opened.append(step) or ())
    assert opened == [0, 6]


def test_mean_losses_are_of_tenths() -> None:
    trainer = Trainer(Network())
    trainer.losses = [float(n) for n in range(25)]
    assert trainer.mean_losses == (0.5, 23.5)
    trainer.losses = [3.0]
    assert trainer.mean_losses == (3.0, 3.0)
