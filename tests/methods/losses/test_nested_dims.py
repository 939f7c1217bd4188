"""Vectors whose first components are trained as vectors: the loss of a batch, and what the student records."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from d2llm.core.errors import InputError
from d2llm.data.collation import LabelledSource, collate, epoch_batches
from d2llm.data.labels import LabelStore
from d2llm.methods.losses.nested_cross_entropy import nested_cross_entropy
from d2llm.models.student import Student
from d2llm.recipe import Recipe
from d2llm.recipe.losses import Objective
from d2llm.training.losses import batch_tokens
from tiny_data import JUDGEMENTS, tiny_recipe
from tiny_distill import LEARNING, Workspace, losses_of, score_batch
from tiny_models import DIM, tiny_student_config

DIMS = (4, 16)
NESTED = "nested_cross_entropy"
WEIGHTS = Objective(JUDGEMENTS | {NESTED: {"dims": DIMS, "weight": 5.0}})


def recipe(workspace: Workspace, weights: Objective, **training: object) -> Recipe:
    settings = tiny_recipe(tiny_student_config(workspace.model), **(LEARNING | training))
    return settings.model_copy(update={"losses": weights})


def test_the_loss_compares_dot_vectors_of_queries_with_vectors_of_passages(workspace, tmp_path):
    source = workspace.source
    store = LabelStore(tmp_path, teacher="none", prompt="none", dataset=source.dataset.name)
    labelled = LabelledSource.join(source, store, keep_unlabelled=True)
    batch = collate(*epoch_batches([labelled], epoch=0, batch_queries=4, num_hard=2, num_easy=1, seed=0)[0])
    student = Student.create(tiny_student_config(workspace.model), device="cpu", dtype="float32")
    with torch.no_grad():
        vectors = student(*student.backbone.pad(batch_tokens(student, batch)))
        queries, passages = vectors[: len(batch.query_ids)], vectors[len(batch.query_ids) :]
        positive, hard, easy = (torch.from_numpy(mask) for mask in (batch.positive, batch.hard, batch.easy))
        dots = torch.from_numpy(student.query_vectors(queries.numpy(), source.task))
        expected = nested_cross_entropy(dots, passages, positive, positive | hard | easy, DIMS)
        scores = score_batch(student, batch)
        actual = losses_of(scores, batch, WEIGHTS, student=student, vectors=vectors)
    assert actual[NESTED].item() == pytest.approx(expected.item(), rel=1e-5)
    pairs = replace(batch, targets=np.zeros(batch.positive.shape, np.float32))
    assert NESTED not in losses_of(scores, pairs, WEIGHTS, student=student, vectors=vectors)


def test_a_trained_student_records_its_widths(workspace: Workspace, tmp_path: Path) -> None:
    report = workspace.run(tmp_path / "student", recipe=recipe(workspace, WEIGHTS))
    assert report.best_step > 0
    student = Student.load(tmp_path / "student", device="cpu", dtype="float32")
    assert student.nested_dims == DIMS
    student.save(tmp_path / "merged", merge=True)
    assert Student.load(tmp_path / "merged", device="cpu", dtype="float32").nested_dims == DIMS
    student.prepare_training()
    assert student.nested_dims == ()


def test_an_untrained_student_records_none(workspace, tmp_path, caplog):
    still = {"learning_rate": 1e-12, "head_learning_rate": 1e-12}
    with caplog.at_level(logging.WARNING):
        report = workspace.run(tmp_path / "student", recipe=recipe(workspace, WEIGHTS, **still))
    assert report.best_step == 0
    assert Student.load(tmp_path / "student", device="cpu", dtype="float32").nested_dims == ()
    assert "cannot be cut to (4, 16)" in caplog.text


def test_widths_that_the_vectors_do_not_have_are_refused(workspace: Workspace, tmp_path: Path) -> None:
    wide = WEIGHTS.with_losses({NESTED: {"dims": (8, DIM)}})
    with pytest.raises(InputError, match=f"names {DIM}, but the student's vectors have {DIM} components"):
        workspace.run(tmp_path / "student", recipe=recipe(workspace, wide))
