from __future__ import annotations

import copy
import json
import math
import signal
import threading

import pytest
import torch
from torch import nn

from d2llm.core.errors import InputError, Terminated, TrainingDivergedError
from d2llm.core.recipe import Recipe, TrainingConfig
from d2llm.core.recipe_file import shaping_settings
from d2llm.training.checkpoints import (
    CHECKPOINT,
    LOG,
    BestState,
    RunLog,
    StopSignals,
    learning_rate_factor,
    load_checkpoint,
    optimizer_step,
    require_finite,
    restore,
    save_checkpoint,
    trainable,
    warmup_steps,
)

DATA = torch.randn(20, 5, generator=torch.Generator().manual_seed(1))


class Run:
    """A small training loop with dropout, like those of the commands."""

    def __init__(self, folder, settings=None):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.3), nn.Linear(8, 1), nn.LayerNorm(1))
        self.model[3].requires_grad_(False)
        self.parameters = trainable(self.model)
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=0.1)
        for group in self.optimizer.param_groups:
            group["initial_lr"] = group["lr"]
        self.folder, self.settings, self.step, self.losses = folder, settings or {"seed": 0}, 0, []

    def train(self, until, total=10):
        while self.step < until:
            torch.manual_seed(self.step)
            loss = self.model[2](self.model[1](self.model[0](DATA))).square().mean()
            loss.backward()
            factor = learning_rate_factor(self.step, warmup_steps=3, total_steps=total)
            optimizer_step(self.optimizer, self.parameters, factor=factor, max_gradient_norm=1.0)
            self.step += 1
            self.losses.append(float(loss.detach()))

    def keep(self):
        save_checkpoint(
            self.folder, self.step, self.parameters, self.optimizer, {"losses": self.losses}, settings=self.settings
        )

    def resume(self):
        checkpoint = load_checkpoint(self.folder, settings=self.settings)
        restore(checkpoint, self.parameters, self.optimizer)
        self.step, self.losses = checkpoint.step, checkpoint.state["losses"]


def test_resumed_equals_uninterrupted_bit_for_bit(tmp_path):
    whole = Run(tmp_path)
    whole.train(until=10)
    for stop in (0, 1, 4, 10):
        first = Run(tmp_path)
        first.train(until=stop)
        first.keep()
        second = Run(tmp_path)
        second.resume()
        second.train(until=10)
        assert second.losses == whole.losses
        assert set(second.parameters) == {"0.weight", "0.bias", "2.weight", "2.bias"}
        for name, parameter in second.parameters.items():
            assert torch.equal(parameter, whole.parameters[name])


def test_losing_the_optimizer_state_changes_the_run(tmp_path):
    """So the test above would notice a resume that lacks AdamW's moments."""
    whole, forgetful = Run(tmp_path), Run(tmp_path)
    whole.train(until=10)
    forgetful.train(until=4)
    forgetful.optimizer.state.clear()
    forgetful.train(until=10)
    assert forgetful.losses != whole.losses


def test_missing_checkpoint_is_none(tmp_path):
    assert load_checkpoint(tmp_path, settings={}) is None


def test_checkpoint_of_another_run_names_the_differences(tmp_path):
    run = Run(tmp_path, {"recipe": {"training": {"learning_rate": 0.1, "epochs": 2}, "names": ["a"]}, "seed": 0})
    run.keep()
    settings = {"recipe": {"training": {"learning_rate": 0.2, "epochs": 2}, "names": ("a",)}, "seed": 1}
    changes = r"recipe.training.learning_rate \(was 0.1, is 0.2\), seed \(was 0, is 1\); finish that run"
    with pytest.raises(InputError, match=rf"checkpoint.safetensors belongs to a run with other settings: {changes}"):
        load_checkpoint(tmp_path, settings=settings)
    with pytest.raises(InputError, match=r"other settings: new \(was not set, is 1\); finish"):
        load_checkpoint(tmp_path, settings=run.settings | {"new": 1})


def test_a_checkpoint_of_a_schema_with_fewer_settings_continues(tmp_path):
    """Recipes are compared as today's schema reads them, and only in what shapes the student."""
    recipe = Recipe().model_dump(mode="json")
    saved = copy.deepcopy(recipe) | {"name": "other"}
    del saved["training"]["in_batch_labels"], saved["student"]["pooling"]["whitening"]
    Run(tmp_path, {"recipe": saved}).keep()
    assert load_checkpoint(tmp_path, settings={"recipe": recipe}, shaping=shaping_settings) is not None
    recipe["training"]["epochs"] = 7
    with pytest.raises(InputError, match=r"other settings: training.epochs \(was \w+, is 7\); finish that run"):
        load_checkpoint(tmp_path, settings={"recipe": recipe}, shaping=shaping_settings)
    saved["training"]["forgotten"] = True
    Run(tmp_path, {"recipe": saved}).keep()
    with pytest.raises(InputError, match=r"unknown key 'training.forgotten'.*another version of d2llm.*start over"):
        load_checkpoint(tmp_path, settings={"recipe": recipe}, shaping=shaping_settings)


def test_damaged_checkpoint_is_rejected(tmp_path):
    run = Run(tmp_path)
    run.keep()
    (tmp_path / CHECKPOINT).write_bytes((tmp_path / CHECKPOINT).read_bytes()[:100])
    with pytest.raises(InputError, match=r"checkpoint.safetensors: cannot be read .*delete it to restart the run"):
        load_checkpoint(tmp_path, settings=run.settings)


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


class TestStopSignals:
    @pytest.fixture(autouse=True)
    def default_handlers(self):
        """The handlers of a fresh process, whatever earlier tests left; an uncaught signal would end the process."""
        defaults = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
        before = {number: signal.signal(number, handler) for number, handler in defaults.items()}
        yield
        for number, handler in before.items():
            signal.signal(number, handler)

    @pytest.mark.parametrize(("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)])
    def test_a_signal_waits_for_the_held_block(self, number, error):
        before, done, signals = signal.getsignal(number), [], StopSignals()

        def work():
            with signals:
                with signals.held():
                    signal.raise_signal(number)
                    done.append("held")
                done.append("after")

        with pytest.raises(error) as raised:
            work()
        assert type(raised.value) is error
        assert done == ["held"]
        assert signals.is_consistent
        assert signal.getsignal(number) is before

    def test_a_signal_outside_held_blocks_acts_at_once(self):
        done = []

        def work():
            with StopSignals():
                signal.raise_signal(signal.SIGINT)
                done.append("after")

        with pytest.raises(KeyboardInterrupt):
            work()
        assert done == []

    def test_an_error_in_a_held_block_leaves_it_inconsistent(self):
        with pytest.raises(ZeroDivisionError), StopSignals() as signals, signals.held():
            _ = 1 / 0
        assert not signals.is_consistent

    def test_handlers_of_other_code_are_left_alone(self):
        calls = []
        before = signal.signal(signal.SIGTERM, lambda number, frame: calls.append(number))
        try:
            with StopSignals():
                signal.raise_signal(signal.SIGTERM)
        finally:
            signal.signal(signal.SIGTERM, before)
        assert calls == [signal.SIGTERM]

    def test_other_threads_install_no_handlers(self):
        handlers = []

        def work():
            with StopSignals() as signals, signals.held():
                handlers.append(signal.getsignal(signal.SIGTERM))

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert handlers == [signal.getsignal(signal.SIGTERM)]


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
    with pytest.raises(TrainingDivergedError, match=r"gradient's norm became .*checkpoint is kept"):
        optimizer_step(optimizer, {"p": parameter}, factor=1.0, max_gradient_norm=1.0)
    assert parameter.tolist() == [1, 1]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_loss_stops_training(tmp_path, bad):
    require_finite(torch.tensor(1e30), 7, tmp_path)
    with pytest.raises(TrainingDivergedError, match="at step 7; training stopped") as raised:
        require_finite(torch.tensor(bad), 7, tmp_path)
    assert str(tmp_path) in str(raised.value)


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
    ("lower_is_better", "values", "best", "looks_since"),
    [(False, [0.5, 0.7, 0.7, 0.6], 0.7, 2), (True, [0.5, 0.7, 0.4, 0.4], 0.4, 1)],
)
def test_best_state_is_kept_and_restored(tmp_path, in_memory, lower_is_better, values, best, looks_since):
    parameters = {"weight": nn.Parameter(torch.zeros(2))}
    path = None if in_memory else tmp_path / "best.safetensors"
    state = BestState(parameters, path, lower_is_better=lower_is_better)
    state.put_back()
    assert parameters["weight"].tolist() == [0, 0]  # no evaluation yet
    for step, value in enumerate(values):
        with torch.no_grad():
            parameters["weight"].fill_(step + 1)
        state.offer(value, step)
    step = values.index(best)
    assert state.record() == {"step": step, "value": best, "looks_since": looks_since}
    assert not state.offer(1e9 * (-1 if lower_is_better else 1), 9, is_sound=False)
    assert (state.step, state.looks_since) == (step, looks_since + 1)
    state.put_back()
    assert parameters["weight"].tolist() == [step + 1] * 2
