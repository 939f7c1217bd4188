"""Checkpoints, and what else every training loop needs: best state, optimiser, learning rate, log."""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from d2llm.core.errors import InputError, TrainingDivergedError
from d2llm.core.extras import require
from d2llm.core.files import write_bytes
from d2llm.core.json_values import parse_json
from d2llm.models.sources import load_tensors
from d2llm.recipe import Recipe, TrainingConfig, WarmUpConfig
from d2llm.recipe.recipe import changed_recipe, changed_settings

CHECKPOINT = "checkpoint.safetensors"
LOG = "log.jsonl"
_STEPS = 60  # at the default rate dev no longer improves after this many, on 100 and 300 questions (docs/log)
_log = logging.getLogger(__name__)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable parameters, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def save_checkpoint(
    folder: Path,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    identity: Mapping[str, Any],
) -> None:
    """Write parameters, AdamW moments and ``state`` (JSON) atomically as one safetensors file.

    ``identity`` is JSON with everything that affects the run; ``load_checkpoint`` rejects a checkpoint with another.
    """
    tensors = {f"parameter/{name}": parameter.detach().cpu().contiguous() for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"moment/{key}/{name}"] = value.detach().cpu().contiguous()
    metadata = {"state": json.dumps(state), "identity": json.dumps(identity)}
    write_bytes(folder / CHECKPOINT, save(tensors, metadata))


def load_checkpoint(
    folder: Path,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    identity: Mapping[str, Any],
    shaping: Callable[[Recipe], dict[str, Any]] | None = None,
) -> dict[str, Any] | None:
    """Load parameters and moments from the checkpoint in ``folder``; returns its ``state``, None if there is none yet.

    ``shaping``: of the recipe in ``identity``, only this is compared (``changed_recipe``).

    Raises:
        InputError: it is damaged, or another run's.
    """
    path = folder / CHECKPOINT
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:  # pyright: ignore[reportUnknownVariableType]
            metadata: dict[str, str] = file.metadata()
            tensors: dict[str, Tensor] = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: cannot be read ({error}); delete it to restart the run") from error
    saved, current = parse_json(metadata["identity"]), parse_json(json.dumps(identity))
    changes = [] if shaping is None else changed_recipe(saved.pop("recipe"), current.pop("recipe"), shaping)
    if changes := [*changes, *changed_settings(saved, current)]:
        raise InputError(
            f"{path} belongs to a run with other settings: {', '.join(changes)}; finish that run with its own "
            "settings, or start over: with --again on the command line, or in another folder"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors.pop(f"parameter/{name}"))
    for key, value in tensors.items():
        _, kind, name = key.split("/", 2)
        parameter = parameters[name]
        optimizer.state[parameter][kind] = value if kind == "step" else value.to(parameter.device)
    return parse_json(metadata["state"])


class BestState:
    """The best state of a training by its dev value: its step, its value, and the number of dev evaluations since.

    The parameters are kept in the safetensors file ``path``, or in memory.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], path: Path | None = None, *, lower_is_better: bool = False
    ) -> None:
        self.step: int | None = None
        self.value: float | None = None
        self.evals_since_best = 0
        self.path = path
        self._parameters, self._sign = parameters, -1 if lower_is_better else 1
        self._state: dict[str, Tensor] = {}

    def update(self, value: float, step: int, *, is_sound: bool = True) -> bool:
        """Keep the current state if ``is_sound`` and better than all earlier ones; returns whether it was kept."""
        if not is_sound or (self.value is not None and self._sign * value <= self._sign * self.value):
            self.evals_since_best += 1
            return False
        self.step, self.value, self.evals_since_best = step, value, 0
        if self.path is None:
            self._state = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        else:
            state = {name: parameter.detach().cpu().contiguous() for name, parameter in self._parameters.items()}
            write_bytes(self.path, save(state))
        return True

    def restore(self) -> None:
        """Restore the best values of the parameters; does nothing if there was no dev evaluation."""
        if self.step is None:
            return
        best = self._state
        if self.path is not None:
            best = load_tensors(self.path, remedy="delete the run's folder and train again")
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(best[name])

    def state(self) -> dict[str, Any]:
        """What a checkpoint must store, besides the file."""
        return {"step": self.step, "value": self.value, "evals_since_best": self.evals_since_best}

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from a ``state``; dev evaluations after its checkpoint are repeated, with the same results."""
        self.step, self.value, self.evals_since_best = state["step"], state["value"], state["evals_since_best"]


def epochs_of(training: TrainingConfig, steps_of_an_epoch: int) -> int:
    """Epochs of a distillation: the recipe's, or else ``usual_epochs``."""
    return training.epochs or usual_epochs(steps_of_an_epoch)


def usual_epochs(steps_of_an_epoch: float, *, fewest: int = 2) -> int:
    """As many epochs as give about 60 steps, at least ``fewest`` and at most 10."""
    return max(fewest, min(10, round(_STEPS / max(1, steps_of_an_epoch))))


def warmup_steps(config: WarmUpConfig, total_steps: int) -> int:
    """The recipe's number of warm-up steps; logs a warning if they are more than half of the run."""
    steps = config.warmup_of(total_steps)
    if 2 * steps > total_steps:
        _log.warning(
            "the warm-up takes %d of %d steps, so the run hardly trains: remove warmup_steps from the recipe, and set "
            "warmup_fraction, the fraction of the steps (usually 0.1)",
            min(steps, total_steps),
            total_steps,
        )
    return steps


def learning_rate_factor(step: int, *, warmup_steps: int, total_steps: int) -> float:
    """Linear warm-up from 0 to 1, then linear decay to 0 at ``total_steps``; ``step`` counts from 0."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return max(0.0, (total_steps - step) / max(1, total_steps - warmup_steps))


def adamw(groups: Iterable[tuple[Sequence[Tensor], float, float]]) -> torch.optim.AdamW:
    """AdamW for ``optimizer_step``, from groups of (parameters, learning rate, weight decay).

    Only matrices decay; vectors and scalars do not.
    """
    options: list[dict[str, Any]] = []
    for parameters, rate, decay in groups:
        matrices = [parameter for parameter in parameters if parameter.ndim > 1]
        others = [parameter for parameter in parameters if parameter.ndim <= 1]
        for part, own_decay in ((matrices, decay), (others, 0.0)):
            if part:
                options.append({"params": part, "lr": rate, "initial_lr": rate, "weight_decay": own_decay})
    # On a CPU torch takes one pass over the weights only if it is told to; on a GPU it chooses well by itself.
    on_cpu = all(parameter.device.type == "cpu" for group in options for parameter in group["params"])
    return torch.optim.AdamW(options, fused=True if on_cpu else None)


def optimizer_step(
    optimizer: torch.optim.Optimizer,
    parameters: dict[str, nn.Parameter],
    *,
    factor: float,
    max_gradient_norm: float,
    folder: Path | None = None,
) -> float:
    """Clip the gradient, scale each group's learning rate by ``factor``, step, and clear; returns the gradient norm.

    If the norm is not finite, the parameters stay unchanged, and ``TrainingDivergedError`` is raised.
    """
    norm = float(torch.nn.utils.clip_grad_norm_(parameters.values(), max_gradient_norm))
    if not math.isfinite(norm):
        raise diverged(f"the gradient's norm became {norm}, and the weights were not changed", folder)
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor
    optimizer.step()
    for parameter in parameters.values():
        increment_version(parameter)  # the fused step does not; weights prepared for scoring are known by it
    optimizer.zero_grad(set_to_none=True)
    return norm


def diverged(problem: str, folder: Path | None = None) -> TrainingDivergedError:
    """The error for a training that has diverged; ``folder`` has the last good checkpoint, if there is one."""
    kept = "" if folder is None else f" The last good checkpoint is kept in {folder}."
    return TrainingDivergedError(
        f"{problem}; training stopped.{kept} Lower the learning rate, or look for labels that are not numbers"
    )


class RunLog:
    """``log.jsonl``, with one JSON object per line; on resuming, lines after the checkpoint's step are removed.

    ``resume_step`` is -1 for a new run, whose log is emptied. Trackers get the numbers among the values.
    """

    def __init__(self, folder: Path, *, resume_step: int, trackers: Sequence[Tracker] = ()) -> None:
        self._path = folder / LOG
        self._trackers = trackers
        self._start = time.monotonic()
        if self._path.is_file():
            lines = self._path.read_text(encoding="utf-8", errors="replace").splitlines()
            kept = [line for line in lines if _step_of(line) <= resume_step]
            if len(kept) < len(lines):
                write_bytes(self._path, "".join(line + "\n" for line in kept).encode())

    def write(self, step: int, **values: Any) -> None:
        """Append one line."""
        record = {"step": step, "seconds": round(time.monotonic() - self._start, 3)} | values
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        for tracker in self._trackers:
            tracker.log(step, numbers(values))

    def finish(self) -> None:
        """Tell the trackers that the run is finished."""
        for tracker in self._trackers:
            tracker.finish()


def _step_of(line: str) -> float:
    """The step of a log line; infinity if a killed process left the line incomplete."""
    try:
        return int(parse_json(line)["step"])
    except (ValueError, LookupError, TypeError):
        return math.inf


# Trackers, which get the numbers of a run too: TensorBoard, Weights & Biases, MLflow ----------------------------------

# Each makes a few calls to its own library. The trackers of `accelerate` make the same calls, but do not support
# resumed runs, and the way to start them has changed between versions.

PROJECT = "d2llm"
_TRACKER_MODULES = {"mlflow": "mlflow.tracking"}  # where it is not called like the tracker


class Tracker(Protocol):
    """Receives the numbers of each step."""

    def log(self, step: int, values: Mapping[str, float], /) -> None:
        """Log the ``values`` of ``step`` by name."""

    def finish(self) -> None:
        """End the run."""


def open_trackers(recipe: Recipe, folder: Path, *, run_key: str, resume_step: int) -> list[Tracker]:
    """The trackers that the recipe names; TensorBoard's files go to ``<folder>/tensorboard``.

    W&B and MLflow continue the run with ``run_key``, which stays the same when a run is resumed. Values logged for
    steps after ``resume_step`` are superseded.

    Raises:
        MissingExtraError: a named tracker's package is not installed.
    """
    return [_TRACKERS[name](recipe, folder, run_key, resume_step) for name in require_trackers(recipe)]


def require_trackers(recipe: Recipe) -> tuple[str, ...]:
    """The names of the trackers of a recipe; a ``MissingExtraError`` if the package of one is not installed."""
    named = recipe.training.trackers
    if named == "auto":
        return ("tensorboard",) if importlib.util.find_spec("tensorboard") else ()
    for name in named:
        require(_TRACKER_MODULES.get(name, name), extra="track", purpose=f"the tracker '{name}'")
    return named


def numbers(values: Mapping[Any, Any], prefix: str = "") -> dict[str, float]:
    """The numbers in ``values`` and in its nested mappings, with names (texts or numbers) joined by ``/``."""
    values_by_name: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            values_by_name |= numbers(value, f"{prefix}{name}/")  # pyright: ignore[reportUnknownArgumentType]
        elif isinstance(value, (int, float)):
            values_by_name[f"{prefix}{name}"] = float(value)
    return values_by_name


class _TensorBoard:
    def __init__(self, recipe: Recipe, folder: Path, run_key: str, resume_step: int) -> None:
        del recipe, run_key
        from torch.utils.tensorboard.writer import SummaryWriter

        # purge_step hides later steps that a killed run logged; a short flush interval keeps the display current.
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=resume_step + 1, flush_secs=10)

    def log(self, step: int, values: Mapping[str, float], /) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)  # pyright: ignore[reportUnknownMemberType]
        self._writer.flush()

    def finish(self) -> None:
        self._writer.close()


class _WeightsAndBiases:
    def __init__(self, recipe: Recipe, folder: Path, run_key: str, resume_step: int) -> None:
        del resume_step  # W&B itself ignores steps that it already has
        wandb: Any = importlib.import_module("wandb")
        self._run = wandb.init(
            project=PROJECT,
            id=run_key,
            name=recipe.name,
            resume="allow",
            dir=str(folder),
            config=recipe.model_dump(mode="json"),
        )

    def log(self, step: int, values: Mapping[str, float], /) -> None:
        self._run.log(dict(values), step=step)

    def finish(self) -> None:
        self._run.finish()


class _MLflow:
    def __init__(self, recipe: Recipe, folder: Path, run_key: str, resume_step: int) -> None:
        del folder, resume_step  # in MLflow, a step logged again is a second point at the same step
        tracking: Any = importlib.import_module("mlflow.tracking")
        self._client = tracking.MlflowClient()
        experiment = self._client.get_experiment_by_name(PROJECT)
        experiment_id = self._client.create_experiment(PROJECT) if experiment is None else experiment.experiment_id
        earlier_runs = self._client.search_runs([experiment_id], f"tags.run_key = '{run_key}'")
        if earlier_runs:
            self._run_id = earlier_runs[0].info.run_id
            return
        self._run_id = self._client.create_run(
            experiment_id, tags={"run_key": run_key}, run_name=recipe.name
        ).info.run_id
        for name, value in numbers(recipe.training.model_dump()).items():
            self._client.log_param(self._run_id, name, value)

    def log(self, step: int, values: Mapping[str, float], /) -> None:
        for name, value in values.items():
            self._client.log_metric(self._run_id, name, value, step=step)

    def finish(self) -> None:
        self._client.set_terminated(self._run_id)


_TRACKERS: dict[str, Callable[[Recipe, Path, str, int], Tracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": _WeightsAndBiases,
    "mlflow": _MLflow,
}
