"""One run of an ablation: training, measuring, and storing the result for later calls."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from d2llm.core.files import write_json
from d2llm.core.fingerprint import fingerprint_json
from d2llm.core.manifest import FILE_NAME as MANIFEST
from d2llm.core.manifest import read_manifest
from d2llm.core.recipe import Recipe, TeacherConfig
from d2llm.data.training import TrainingSource
from d2llm.models.student import Student
from d2llm.models.student_files import FORMAT_VERSION, KIND
from d2llm.training.ablation.report import RunResult
from d2llm.training.dev import DevSet, evaluate_dev, has_interaction_weight
from d2llm.training.distill import distill
from d2llm.training.interpolation import value_by_set
from d2llm.training.training_run import LOG

_RECORD_VERSION = 1


@dataclass(frozen=True)
class RunSettings:
    """Settings shared by all runs: ``place`` is their common folder, ``measured_on`` a fingerprint of the dev sets."""

    sources: list[TrainingSource]
    dev_sets: list[DevSet]
    measured_on: str
    place: Path
    labels: Path
    teacher: TeacherConfig
    device: str | None
    dtype: str | None
    show_progress: bool | None

    def student(self, variant: str, seed: int) -> Path:
        """The folder of one run's student; ``<folder>.run`` and ``<folder>.json`` beside it have its log and result."""
        return self.place / variant / f"seed-{seed}"


def fingerprint_sets(dev_sets: Sequence[DevSet]) -> str:
    """A fingerprint of everything besides the student that a measured value depends on."""
    return fingerprint_json([_RECORD_VERSION, [_content(dev) for dev in dev_sets]])


def _content(dev: DevSet) -> list[Any]:
    if dev.pairs:
        return [dev.name, dev.task, [(pair.query, pair.passage, pair.label, pair.score) for pair in dev.pairs]]
    return [dev.name, dev.task, [*dev.queries.items()], [*dev.passages], [*dev.passages.values()], dev.qrels]


def _record(student: Path) -> Path:
    return student.with_name(student.name + ".json")


def read_result(shared: RunSettings, name: str, seed: int) -> RunResult | None:
    """The result of an earlier call; None if there is none, or if it was measured on other queries."""
    student = shared.student(name, seed)
    if not _record(student).is_file() or not (student / MANIFEST).is_file():
        return None
    record = json.loads(_record(student).read_text(encoding="utf-8"))
    result = RunResult(**record["result"]) if record.get("measured_on") == shared.measured_on else None
    fingerprint = read_manifest(student, KIND, FORMAT_VERSION)["fingerprint"]
    return result if result is not None and result.fingerprint == fingerprint else None


def train_and_measure(shared: RunSettings, recipe: Recipe, name: str, seed: int) -> RunResult:
    """Train one student, unless an earlier call has done so, and measure the student in its folder."""
    folder = shared.student(name, seed)
    if not (folder / MANIFEST).is_file():
        distill(
            shared.sources,
            folder,
            recipe=recipe.model_copy(update={"seed": seed}),
            labels=shared.labels,
            teacher=shared.teacher,
            device=shared.device,
            dtype=shared.dtype,
            show_progress=shared.show_progress,
        )
    manifest = read_manifest(folder, KIND, FORMAT_VERSION)
    student = Student.load(folder, device=shared.device, dtype=shared.dtype)
    weights = manifest["residual_weights"]
    by_set = value_by_set(evaluate_dev(student, shared.dev_sets, show_progress=shared.show_progress), weights)
    result = RunResult(
        variant=name,
        seed=seed,
        ndcg=fmean(by_set.values()),
        by_set=by_set,
        residual_weights=weights if has_interaction_weight(student) else {},
        steps=manifest["steps"],
        best_step=manifest["best_step"],
        seconds=_seconds(_log_lines(folder)),
        fingerprint=student.fingerprint,
    )
    write_json(_record(folder), {"measured_on": shared.measured_on, "result": asdict(result)})
    for checkpoint in _run_folder(folder).glob("*.safetensors"):
        checkpoint.unlink()  # no longer needed, and several times as large as the student
    return result


def _run_folder(student: Path) -> Path:
    return student.with_name(student.name + ".run")


def _log_lines(student: Path) -> Iterator[dict[str, Any]]:
    for line in (_run_folder(student) / LOG).read_text(encoding="utf-8").splitlines():
        yield json.loads(line)


def _seconds(lines: Iterable[Mapping[str, Any]]) -> float:
    """The training time over all sessions; the log's clock restarts in each session."""
    total = before = 0.0
    for line in lines:
        now = line["seconds"]
        total += now - before if now >= before else now
        before = now
    return total
