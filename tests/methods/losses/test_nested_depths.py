"""Vectors after some layers, trained as vectors: the loss of a batch, its gradient, and what the student records."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from d2llm.core.errors import InputError
from d2llm.data.collation import DistillationBatch, LabelledSource, collate, epoch_batches
from d2llm.data.labels import LabelStore
from d2llm.models.interaction import PairScores
from d2llm.models.student import Student
from d2llm.recipe.losses import Objective
from d2llm.training.gradient_cache import backpropagate
from d2llm.training.losses import LossInput, batch_tokens
from tiny_data import JUDGEMENTS, tiny_recipe
from tiny_distill import LEARNING, Workspace, losses_of, score_batch
from tiny_models import DIM, randomise, tiny_student_config

NESTED = "nested_cross_entropy"
WEIGHTS = Objective(JUDGEMENTS | {NESTED: {"layers": (1,), "weight": 2.0}})


def nested_loss(
    student: Student, vectors: torch.Tensor, batch: DistillationBatch, objective: Objective, after: list[torch.Tensor]
) -> torch.Tensor:
    loss = objective.root[NESTED]
    value = loss(
        LossInput(batch, PairScores(vectors, None, None), student, vectors, dict(zip(loss.depths, after, strict=True)))
    )
    assert value is not None
    return value


@pytest.fixture(scope="module")
def batch(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> DistillationBatch:
    store = LabelStore(
        tmp_path_factory.mktemp("l"), teacher="none", prompt="none", dataset=workspace.source.dataset.name
    )
    labelled = LabelledSource.join(workspace.source, store, keep_unlabelled=True)
    return collate(*epoch_batches([labelled], epoch=0, batch_queries=4, num_hard=2, num_easy=1, seed=0)[0])


def test_the_loss_by_hand(workspace: Workspace, batch: DistillationBatch) -> None:
    """-log of a relevant passage's softmax, by 20 times the cosine, at 8 components and in full; means of these."""
    student = Student.create(tiny_student_config(workspace.model), device="cpu", dtype="float32")
    count = len(batch.query_ids)
    whole, shallow = (torch.randn(count + len(batch.passage_ids), DIM) for _ in range(2))
    weights = WEIGHTS.with_losses({NESTED: {"dims": (8,)}})

    def expected(vectors: torch.Tensor, width: int) -> float:
        rows = vectors.double().numpy()[:, :width]
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)  # the inner product's maps are 1 before training
        logits = 20 * rows[:count] @ rows[count:].T
        values = []
        for query in range(count):
            candidates = batch.positive[query] | batch.hard[query] | batch.easy[query]
            for passage in np.flatnonzero(batch.positive[query]):
                rivals = candidates & ~batch.positive[query]
                rivals[passage] = True
                values.append(np.log(np.exp(logits[query, rivals]).sum()) - logits[query, passage])
        return float(np.mean(values))

    found = nested_loss(student, whole, batch, weights, [shallow])
    mean = np.mean([expected(whole, 8), np.mean([expected(shallow, 8), expected(shallow, DIM)])])
    assert found.item() == pytest.approx(mean, rel=1e-4)
    alone = nested_loss(student, whole, batch, WEIGHTS, [shallow])
    assert alone.item() == pytest.approx(expected(shallow, DIM), rel=1e-4)
    pairs = replace(batch, targets=np.zeros(batch.positive.shape, np.float32))
    scores = score_batch(student, batch)
    assert NESTED not in losses_of(scores, pairs, WEIGHTS, student=student, vectors=whole)


@pytest.mark.parametrize("room", [0, float("inf")])
def test_the_gradient_in_parts_is_that_of_the_whole_batch(workspace, batch, room: float):
    student = Student.create(tiny_student_config(workspace.model), device="cpu", dtype="float32")
    student.prepare_training()
    randomise(student, scale=0.1)
    ids = batch_tokens(student.train(), batch)

    def loss_of(encoded: torch.Tensor, _: object = None) -> torch.Tensor:
        vectors, *nested = encoded.split(DIM, dim=1)
        value = nested_loss(student, vectors, batch, WEIGHTS, nested)
        return value + (vectors**2).mean()

    (shallow, last), mask = student.backbone.states_at(*student.backbone.pad(ids), (1,))
    loss = loss_of(torch.cat([student.pool(last, mask), student.pool(shallow, mask)], dim=1))
    loss.backward()
    expected = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    student.zero_grad()
    found = backpropagate(student, ids, loss_of, depths=(1,), part_tokens=64, room=room, seed=0)
    assert found.item() == pytest.approx(loss.item(), rel=1e-5)
    assert any(float(gradient.abs().max()) > 1e-4 for name, gradient in expected.items() if "lora" in name)
    for name, parameter in student.named_parameters():
        if name in expected:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-5)


def test_a_trained_student_records_its_depths(workspace: Workspace, tmp_path: Path) -> None:
    recipe = tiny_recipe(tiny_student_config(workspace.model), **LEARNING).model_copy(update={"losses": WEIGHTS})
    report = workspace.run(tmp_path / "student", recipe=recipe)
    assert report.best_step > 0
    student = Student.load(tmp_path / "student", device="cpu", dtype="float32")
    assert student.nested_depths == (1,)
    assert student.cut(1).backbone.num_layers == 1
    student.prepare_training()
    assert student.nested_depths == ()


def test_depths_that_the_backbone_does_not_have_are_refused(workspace: Workspace, tmp_path: Path) -> None:
    deep = WEIGHTS.with_losses({NESTED: {"layers": (1, 9)}})
    recipe = tiny_recipe(tiny_student_config(workspace.model)).model_copy(update={"losses": deep})
    with pytest.raises(InputError, match="names 9, but the student's backbone has 2 layers; name fewer"):
        workspace.run(tmp_path / "student", recipe=recipe)


def test_one_depth_is_drawn_and_aligned_with_the_last_layer(workspace: Workspace, batch: DistillationBatch) -> None:
    student = Student.create(tiny_student_config(workspace.model), device="cpu", dtype="float32")
    whole, *after = (torch.randn(len(batch.query_ids) + len(batch.passage_ids), DIM) for _ in range(3))
    sampled = WEIGHTS.with_losses({NESTED: {"layers": (1, 2), "sampled": True}})
    aligned = sampled.with_losses({NESTED: {"alignment": 0.5}})
    drawn = {
        names: nested_loss(student, whole, replace(batch, query_ids=names), sampled, after).item()
        for names in (tuple(f"{seed}.{workspace}" for workspace in range(len(batch.query_ids))) for seed in range(9))
    }
    values = [
        nested_loss(student, whole, batch, WEIGHTS.with_losses({NESTED: {"layers": (depth,)}}), [vectors]).item()
        for depth, vectors in enumerate(after, start=1)
    ]
    assert sorted({round(value, 5) for value in drawn.values()}) == sorted(round(value, 5) for value in values)
    names, value = next(iter(drawn.items()))
    chosen = after[int(np.argmin(np.abs(np.array(values) - value)))].double().numpy()
    target, predicted = (np.exp(rows / 0.3) for rows in (whole.double().numpy(), chosen))
    target, predicted = (rows / rows.sum(axis=1, keepdims=True) for rows in (target, predicted))
    divergence = 0.09 * (target * np.log(target / predicted)).sum(axis=1).mean()
    found = nested_loss(student, whole, replace(batch, query_ids=names), aligned, after).item()
    assert found == pytest.approx(value + 0.5 * divergence, rel=1e-4)
