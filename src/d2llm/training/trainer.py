"""One training loop for every model that d2llm trains: resumable, interruptible, measured on dev, logged.

A ``Trainable`` says what a step is; the ``Trainer`` does the rest. Dropout depends only on the seed and the step, so a
run that was interrupted and resumed ends with the same weights.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor, nn

from d2llm.core.errors import OutOfTimeError
from d2llm.core.progress import Bar, progress_bar, remarks
from d2llm.core.stop_signals import StopSignals
from d2llm.core.time_limit import seconds_left
from d2llm.recipe import Recipe
from d2llm.training.checkpoints import (
    CHECKPOINT,
    BestState,
    RunLog,
    Tracker,
    adamw,
    diverged,
    learning_rate_factor,
    load_checkpoint,
    optimizer_step,
    save_checkpoint,
)
from d2llm.training.processes import ALONE, Processes

BEST = "best.safetensors"


class _Dataclass(Protocol):
    __dataclass_fields__: ClassVar[dict[str, Any]]


_Report = TypeVar("_Report", bound=_Dataclass)


class Trainable:
    """What is trained.

    Attributes:
        title: what the training does, for the progress bar and messages.
        total_steps: number of steps.
        parameters: the parameters to train, by name.
        groups: the same in groups of (parameters, learning rate, weight decay).
    """

    title: str
    total_steps: int
    parameters: dict[str, nn.Parameter]
    groups: Sequence[tuple[Sequence[Tensor], float, float]]

    def step(self, step: int) -> dict[str, Any]:
        """Add the gradient of the loss of a step, counted from 0; returns what is logged, with ``loss``."""
        raise NotImplementedError

    def evaluate(self) -> Any:
        """Measure the present state on dev; every process takes part."""
        raise NotImplementedError

    def record(self, results: Any, step: int, best: BestState) -> dict[str, Any]:
        """Update ``best`` by what ``evaluate`` returned; returns what is logged. Only in the first process."""
        raise NotImplementedError

    def may_evaluate(self) -> bool:
        """Whether there is time for an evaluation between the start and the end; alike in every process."""
        return True

    def reserved_seconds(self) -> float:
        """How much of a time limit must be left when the training ends; by default the limit interrupts it."""
        return -math.inf

    def state(self) -> dict[str, Any]:
        """What else a checkpoint must have, as JSON."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue from such a state."""


@dataclass(eq=False)
class Trainer:
    """Trains to the end, to the end of its patience or time, or to Ctrl-C or SIGTERM; then it keeps a checkpoint.

    Attributes:
        model: what is trained.
        folder: where checkpoint, best state and log are kept; a run whose checkpoint is there continues. None: a short
            training, which starts over after an interruption.
        identity: JSON with everything that affects the run; a checkpoint with another one is refused.
        shaping: of the recipe in ``identity``, only this is compared.
        seed: seed of the dropout.
        warmup_steps: number of steps in which the learning rate rises; it falls in all others.
        max_gradient_norm: longer gradients are scaled to this norm.
        eval_every: steps between evaluations on dev; there is one at the end too. None: there are none.
        eval_start: evaluate before the first step too.
        lower_is_better: whether a state is better if its dev value is lower.
        patience: stop after so many evaluations without a better one.
        max_minutes: stop after so much time, without that of interruptions.
        checkpoint_every: maximum number of steps between checkpoints.
        checkpoint_minutes: maximum time between checkpoints.
        open_trackers: opens what gets the logged values too, given the step after which the run continues.
        processes: the processes that train together; the first one writes.
    """

    model: Trainable
    folder: Path | None = None
    identity: Mapping[str, Any] = field(default_factory=dict[str, Any])
    _: KW_ONLY
    shaping: Callable[[Recipe], dict[str, Any]] | None = None
    seed: int = 0
    warmup_steps: int = 0
    max_gradient_norm: float = 1.0
    eval_every: int | None = None
    eval_start: bool = False
    lower_is_better: bool = False
    patience: float = math.inf
    max_minutes: float = math.inf
    checkpoint_every: float = math.inf
    checkpoint_minutes: float = 5.0
    open_trackers: Callable[[int], Sequence[Tracker]] = lambda _: ()
    processes: Processes = ALONE

    def __post_init__(self) -> None:
        self.parameters, self.total_steps, self.title = self.model.parameters, self.model.total_steps, self.model.title
        self.optimizer, self.signals = adamw(self.model.groups), StopSignals()
        path = None if self.folder is None else self.folder / BEST
        self.best = BestState(self.parameters, path, lower_is_better=self.lower_is_better)
        self.losses: list[float] = []
        self.evaluated, self.saved = -1 if self.eval_start else 0, -1
        """The last step that was evaluated, and the last one that was saved."""
        self.seconds, self.limit = 0.0, seconds_left()
        self.log: RunLog | None = None
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            state = load_checkpoint(self.folder, self.parameters, self.optimizer, self.identity, self.shaping)
            if state is not None:
                self._load_state(state)
                self.saved = self.step
                remarks.info("%s: continues after step %d of %d", self.title, self.step, self.total_steps)
            if self.processes.is_first:
                self.log = RunLog(self.folder, resume_step=self.saved, trackers=self.open_trackers(self.step))
        self.saved_at = time.monotonic()

    @property
    def is_resumed(self) -> bool:
        """Whether there was a checkpoint, or has been one since."""
        return self.saved >= 0

    @property
    def step(self) -> int:
        """Number of steps that are complete."""
        return len(self.losses)

    @property
    def mean_losses(self) -> tuple[float, float]:
        """Mean loss of the first tenth of the steps, and of the last."""
        tenth = max(1, len(self.losses) // 10)
        first, last = self.losses[:tenth], self.losses[-tenth:]
        return sum(first) / len(first), sum(last) / len(last)

    def train(self) -> bool:
        """Run the remaining steps, and restore the best state if dev was measured; returns whether it ended early.

        Raises:
            KeyboardInterrupt: Ctrl-C or SIGTERM; a checkpoint of the last complete step is kept.
            OutOfTimeError: a time limit has passed; the same.
            TrainingDivergedError: the loss, the gradient or a weight is not finite; the last good checkpoint is kept.
        """
        seconds = max(0.0, 60 * self.max_minutes - self.seconds)
        with self.signals, progress_bar(self.title, self.total_steps, done=self.step, seconds=seconds) as advance:
            try:
                self._evaluate_and_save()  # before the first step, or if a stop prevented it
                self._train(advance)
            except (KeyboardInterrupt, OutOfTimeError):
                if self.folder is not None and self.signals.is_consistent and (self.losses or self.best.step == 0):
                    self.save()
                    remarks.info("%s: step %d is saved in %s", self.title, self.step, self.folder)
                raise
        self.best.restore()
        return self.step < self.total_steps

    def _train(self, advance: Bar) -> None:
        started = time.monotonic() - self.seconds
        while self.step < self.total_steps and self.best.evals_since_best < self.patience:
            self.seconds = time.monotonic() - started
            if self._is_out_of_time():
                remarks.info("%s: stops after %d of %d steps: out of time", self.title, self.step, self.total_steps)
                if self.eval_every is not None and self.evaluated < self.step:
                    self._evaluate()
                break
            self._step(advance)
            self._evaluate_and_save()
        if self.saved != self.step:
            self.save()

    def _is_out_of_time(self) -> bool:
        """Whether the training has taken ``max_minutes``, or must leave the rest of a time limit to what follows.

        The first process says so for all.
        """
        if math.isinf(self.max_minutes) and math.isinf(self.limit):
            return False
        is_over = self.seconds >= 60 * self.max_minutes or seconds_left() < self.model.reserved_seconds()
        return self.processes.from_first(is_over)

    def _step(self, advance: Bar) -> None:
        step = self.step
        torch.manual_seed(self.seed * 1_000_003 + step)
        values = self.model.step(step)
        values["loss"] = loss = float(values["loss"])
        if not math.isfinite(loss):
            raise diverged(f"the loss became {loss} at step {step}", self.folder)
        factor = learning_rate_factor(step, warmup_steps=self.warmup_steps, total_steps=self.total_steps)
        options = {"factor": factor, "max_gradient_norm": self.max_gradient_norm}
        with self.signals.held():
            norm = optimizer_step(self.optimizer, self.parameters, folder=self.folder, **options)
            self.losses.append(loss)
            self.write(step + 1, **values, gradient_norm=norm)
        advance(1, f"loss {loss:.3f}" + ("" if self.best.value is None else f"  dev {self.best.value:.4f}"))

    def write(self, step: int, **values: Any) -> None:
        """Write values to the log, if this process has one."""
        if self.log is not None:
            self.log.write(step, **values)

    def finish(self) -> None:
        """Tell the trackers that the run is finished."""
        if self.log is not None:
            self.log.finish()

    def _evaluate_and_save(self) -> None:
        """Evaluate and save a checkpoint if they are due."""
        step, every, at_end, is_evaluated = self.step, self.eval_every, self.step == self.total_steps, False
        if every is not None and self.evaluated < step:
            is_due = step // every > self.evaluated // every and (self.evaluated < 0 or self.model.may_evaluate())
            if is_evaluated := at_end or is_due:
                self._evaluate()
        # With every new best state too, so that the checkpoint of a resumed run matches it.
        is_due = at_end or self.best.step == step or (step > 0 and step % self.checkpoint_every == 0)
        is_due |= time.monotonic() - self.saved_at > 60 * self.checkpoint_minutes
        if is_due and (is_evaluated or self.saved != step):
            self.save()

    def _evaluate(self) -> None:
        results = self.model.evaluate()
        if self.processes.is_first:
            with self.signals.held():
                self.write(self.step, **self.model.record(results, self.step, self.best))
                self.evaluated = self.step
        if self.processes.count > 1:
            self._load_state(self.processes.from_first(self._state()))

    def _state(self) -> dict[str, Any]:
        return {
            "losses": self.losses,
            "evaluated": self.evaluated,
            "seconds": self.seconds,
            "best": self.best.state(),
            "model": self.model.state(),
        }

    def _load_state(self, state: Mapping[str, Any]) -> None:
        self.losses, self.evaluated, self.seconds = state["losses"], state["evaluated"], state["seconds"]
        self.best.load(state["best"])
        self.model.load_state(state["model"])

    def save(self) -> None:
        """Write a checkpoint."""
        if not all(bool(torch.isfinite(parameter).all()) for parameter in self.parameters.values()):
            raise diverged(f"weights became infinite or NaN before step {self.step}", self.folder)
        self.saved, self.saved_at = self.step, time.monotonic()
        if self.folder is not None and self.processes.is_first:
            with self.signals.held():
                save_checkpoint(self.folder, self.parameters, self.optimizer, self._state(), self.identity)

    def delete_checkpoint(self) -> None:
        """Delete the checkpoint and the best state: a run that begins after the end of this one starts over."""
        assert self.folder is not None
        for name in (CHECKPOINT, BEST):
            (self.folder / name).unlink(missing_ok=True)


def save_tuned(
    report: _Report, save: Callable[[dict[str, Any]], str], content: Mapping[str, Any], trainers: Sequence[Trainer]
) -> _Report:
    """Save a tuned model with the report of its tuning, delete the checkpoints, and add the fingerprint to the report.

    ``save`` gets what the manifest is to have beside the model, and returns the fingerprint.
    """
    values = {name: value for name, value in asdict(report).items() if name not in ("fingerprint", "folder")}
    fingerprint = save({**content, "report": values})
    for trainer in trainers:
        trainer.delete_checkpoint()
    return replace(report, fingerprint=fingerprint)
