"""Trackers: what the real packages recorded of a run, read back with their own readers."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import pytest

from d2llm.core.errors import MissingExtraError, RecipeError
from d2llm.recipe import Recipe, TrainingConfig
from d2llm.recipe.recipe import parse_recipe
from d2llm.training import checkpoints
from d2llm.training.checkpoints import LOG, RunLog, numbers, open_trackers


def recipe(*names: str) -> Recipe:
    return Recipe(name="tracked", training=TrainingConfig.model_validate({"trackers": names, "batch_queries": 7}))


def log_three_steps(folder: Path, name: str, *, resume_step: int = 0) -> None:
    opened = open_trackers(recipe(name), folder, run_key="abc123", resume_step=resume_step)
    log = RunLog(folder, resume_step=resume_step, trackers=opened)
    for step in range(resume_step + 1, resume_step + 4):
        log.write(step, loss=1 / step, task="asymmetric", dev={"set": {"0.5": step / 10}})
    log.finish()


def test_numbers_are_flattened_and_texts_dropped() -> None:
    values = {"loss": 2, "task": "symmetric", "dev": {"a b": {"0.0": 0.25, "note": "x"}}, "bad": math.inf, "list": [1]}
    assert numbers(values) == {"loss": 2.0, "dev/a b/0.0": 0.25, "bad": math.inf}
    assert numbers({"dev": {"set": {0.25: 0.5}}}) == {"dev/set/0.25": 0.5}  # the second stage's, by weight


def test_default_is_tensorboard_if_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints.importlib.util, "find_spec", lambda name: None)
    assert open_trackers(Recipe(), tmp_path, run_key="k", resume_step=0) == []
    opened: list[str] = []
    monkeypatch.setattr(checkpoints.importlib.util, "find_spec", lambda name: name == "tensorboard" or None)
    monkeypatch.setitem(checkpoints._TRACKERS, "tensorboard", lambda *arguments: opened.append("tensorboard"))
    open_trackers(Recipe(), tmp_path, run_key="k", resume_step=0)
    assert opened == ["tensorboard"]


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
def test_missing_tracker_package_gets_an_install_hint(name: str, tmp_path, monkeypatch):
    for module in (name, "mlflow.tracking"):
        monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(MissingExtraError, match=rf"the tracker '{name}' needs .*pip install .*'d2llm\[track\]'"):
        open_trackers(recipe(name), tmp_path, run_key="k", resume_step=0)


def test_unknown_trackers_are_rejected() -> None:
    with pytest.raises(RecipeError, match=r"trackers.*'tensorboard', 'wandb' or 'mlflow'"):
        parse_recipe({"training": {"trackers": ["tensorbord"]}})


def test_tensorboard_log_continues_after_a_resume(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log_three_steps(tmp_path, "tensorboard")
    log_three_steps(tmp_path, "tensorboard", resume_step=2)  # killed after step 3; the last checkpoint was step 2
    accumulator = EventAccumulator(str(tmp_path / "tensorboard"))
    accumulator.Reload()
    assert set(accumulator.Tags()["scalars"]) == {"loss", "dev/set/0.5"}
    loss = [(event.step, event.value) for event in accumulator.Scalars("loss")]
    assert loss == [(step, pytest.approx(1 / step)) for step in (1, 2, 3, 4, 5)]
    lines = [json.loads(line) for line in (tmp_path / LOG).read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(step, 1 / step) for step in (1, 2, 3, 4, 5)]


def test_mlflow_resumes_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow: Any = pytest.importorskip("mlflow", reason="mlflow is not installed")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/runs")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # the light package's only store without a server
    log_three_steps(tmp_path, "mlflow")
    log_three_steps(tmp_path, "mlflow", resume_step=3)
    client = mlflow.tracking.MlflowClient()
    [run] = client.search_runs([client.get_experiment_by_name("d2llm").experiment_id])
    assert run.info.run_name == "tracked"
    assert run.info.status == "FINISHED"
    assert run.data.params["batch_queries"] == "7.0"
    history = client.get_metric_history(run.info.run_id, "loss")
    assert [(point.step, point.value) for point in history] == [(step, 1 / step) for step in range(1, 7)]
    assert client.get_metric_history(run.info.run_id, "dev/set/0.5")[2].value == pytest.approx(0.3)


@pytest.mark.slow
def test_wandb_offline_keeps_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    log_three_steps(tmp_path, "wandb")
    wandb.teardown()  # its service may still be writing when a run has finished
    [file] = tmp_path.glob("wandb/offline-run-*/run-abc123.wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    # LevelDB's log format after a header of 7 bytes. Each record: checksum, length and kind (1: whole), content.
    content, offset, losses = file.read_bytes(), 7, list[float]()
    while offset < len(content):
        length, kind = struct.unpack_from("<HB", content, offset + 4)
        assert kind == 1
        record = Record()
        record.ParseFromString(content[offset + 7 : offset + 7 + length])
        items = {"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
        losses += [float(items["loss"])] if "loss" in items else []
        offset += 7 + length
    assert losses == [pytest.approx(1 / step) for step in (1, 2, 3)]
