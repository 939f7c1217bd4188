"""The loss of drawing a ranking, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from d2llm.ops.drawing import drawing_loss


def test_drawing_loss_by_hand():
    logits = torch.tensor([[[1.0, 2.0, 3.0], [0.5, 9.0, 0.0]]])
    first = -math.log(math.exp(2) / (math.exp(1) + math.exp(2) + math.exp(3)))
    second = -math.log(1 / (math.exp(0.5) + 1))  # the second passage was drawn, so its 9 counts no more
    expected = (first + second / 2) / 1.5
    assert drawing_loss(logits, torch.tensor([[1, 2]])).item() == pytest.approx(expected, abs=1e-6)


def test_the_last_passage_is_drawn_with_certainty():
    logits = torch.tensor([[[5.0, 5.0], [-3.0, 3.0]]], requires_grad=True)
    loss = drawing_loss(logits, torch.tensor([[1, 0]]))
    assert loss.item() == pytest.approx(math.log(2) / 1.5, abs=1e-6)
    loss.backward()
    assert torch.isfinite(logits.grad).all()


def test_the_mean_over_lists():
    logits = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0))
    orders = torch.tensor([[0, 1], [3, 2], [1, 3]])
    alone = [drawing_loss(logits[row : row + 1], orders[row : row + 1]).item() for row in range(3)]
    assert drawing_loss(logits, orders).item() == pytest.approx(sum(alone) / 3, abs=1e-6)
