"""Trackers for the numbers of a training run, in addition to ``log.jsonl``: TensorBoard, Weights & Biases, MLflow.

Each tracker makes a few calls to its own library. The trackers of `accelerate` make the same calls, but do not support
resumed runs, and the way to start them has changed between versions.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from d2llm.core.extras import require
from d2llm.recipe import Recipe

PROJECT = "d2llm"


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
    named = recipe.training.trackers
    if named == "auto":
        named = ("tensorboard",) if importlib.util.find_spec("tensorboard") else ()
    return [_TRACKERS[name](recipe, folder, run_key, resume_step) for name in named]


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
        require("tensorboard", extra="track", purpose="the tracker 'tensorboard'")
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
        wandb: Any = require("wandb", extra="track", purpose="the tracker 'wandb'")
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
        tracking: Any = require("mlflow.tracking", extra="track", purpose="the tracker 'mlflow'")
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
