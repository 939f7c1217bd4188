"""Distillation of a tiny student from rule-based labels, shared by several tests."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from d2llm.data.collation import DistillationBatch
from d2llm.data.labels import LabelStore
from d2llm.data.plan import TrainingSource
from d2llm.models.interaction import PairScores
from d2llm.models.student import Student
from d2llm.models.teachers.pair_teacher import identify_teacher
from d2llm.recipe import Recipe, StudentConfig, TeacherConfig
from d2llm.recipe.losses import Objective
from d2llm.training import trainer
from d2llm.training.distill import DistillReport, distill
from d2llm.training.losses import LossInput, batch_losses, batch_tokens, score_vectors
from tiny_data import tiny_recipe, topics, write_rule_labels
from tiny_models import tiny_student_config, tiny_teacher_config, write_tiny_model

LEARNING = {"learning_rate": 1e-3, "head_learning_rate": 1e-2}


class Workspace:
    """A folder with models and labels, and a method to run a distillation on them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = write_tiny_model(folder / "student", "modernbert", initializer_range=0.1)
        self.teacher = tiny_teacher_config(write_tiny_model(folder / "teacher", "llama"))
        self.source = topics()
        self.labels = folder / "labels"
        write_rule_labels(self.labels, [self.source], self.teacher)

    def run(
        self,
        folder: Path,
        *,
        student: StudentConfig | None = None,
        source: TrainingSource | None = None,
        labels: Path | None = None,
        teacher: TeacherConfig | None = None,
        recipe: Recipe | None = None,
        closed_gates: Collection[str] = (),
        **training: object,
    ) -> DistillReport:
        run_recipe = recipe or tiny_recipe(student or tiny_student_config(self.model), **(LEARNING | training))
        return distill(
            [source or self.source],
            folder,
            recipe=run_recipe,
            labels=labels or self.labels,
            teacher=teacher or self.teacher,
            closed_gates=closed_gates,
            device="cpu",
            dtype="float32",
        )

    def store(self, folder: Path) -> LabelStore:
        """The labels of the teacher in a folder."""
        identity, source = identify_teacher(self.teacher), self.source
        return LabelStore(
            folder, teacher=identity.fingerprint, prompt=identity.prompts[source.task], dataset=source.dataset.name
        )


def log_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder.with_name(folder.name + ".run") / "log.jsonl").open(encoding="utf-8")]


def poison(patch: pytest.MonkeyPatch, *, step: int, value: float) -> None:
    """Set the first weight to ``value`` (such as NaN) after ``step`` optimizer steps."""
    original, calls = trainer.optimizer_step, 0

    def optimizer_step(optimizer: Any, parameters: dict[str, torch.nn.Parameter], **options: Any) -> float:
        nonlocal calls
        calls += 1
        norm = original(optimizer, parameters, **options)
        if calls == step:
            with torch.no_grad():
                next(iter(parameters.values())).view(-1)[0] = value
        return norm

    patch.setattr(trainer, "optimizer_step", optimizer_step)


def score_batch(student: Student, batch: DistillationBatch) -> PairScores:
    """Encode the batch's texts in one pass and score all queries against all passages; differentiable.

    The reference for ``gradient_cache.backpropagate``, which works in parts.
    """
    return score_vectors(student, student(*student.backbone.pad(batch_tokens(student, batch))), batch)


def losses_of(
    scores: PairScores,
    batch: DistillationBatch,
    objective: Objective,
    *,
    student: Student | None = None,
    vectors: torch.Tensor | None = None,
    vectors_after: Mapping[int, torch.Tensor] | None = None,
    offset: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """The losses of a batch, whose scores are given."""
    return batch_losses(objective.root, LossInput(batch, scores, student, vectors, vectors_after or {}, offset))
