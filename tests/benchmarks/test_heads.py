"""Heads of benchmarks/heads.py whose arithmetic is their own, against formulas written out list by list."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from heads import HEADS, TwoHeads, measure
from token_interaction import Lists

DIM = 6


def test_each_of_two_heads_learns_from_its_own_targets() -> None:
    """Cross-entropy of the judgements and one head, plus that of the teacher's distribution and the other."""
    lists = _lists(3, 4)
    taught = torch.rand(3, 4).softmax(dim=1)
    judged = torch.tensor([[1.0, 0, 0, 0], [0, 0.5, 0.5, 0], [0, 0, 0, 1]])
    lists.gains.copy_((judged > 0).float())
    lists.targets.copy_((0.5 * taught + 0.5 * judged).log())
    model = TwoHeads(DIM, "asymmetric")
    with torch.no_grad():
        for parameter in model.interaction.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    expected = []
    for row in range(3):
        for target, share in ((judged[row], 1.0), (taught[row], 0.0)):
            scores = model.scores_of(lists, share)[row].detach().double().numpy() * np.exp(model.log_scale.item())
            logs = scores - np.log(np.exp(scores).sum())
            expected.append(-(target.double().numpy() * logs).sum())
    assert model.loss(lists).item() == pytest.approx(sum(expected) / 3, rel=1e-4)
    halves = [model.scores_of(lists, share) for share in (1.0, 0.0)]
    torch.testing.assert_close(model(lists), (halves[0] + halves[1]) / 2)
    mixed = TwoHeads(DIM, "asymmetric", probabilities=True)
    mixed.load_state_dict(model.state_dict())
    assert mixed.loss(lists).item() == pytest.approx(model.loss(lists).item())
    of_either = [(half * model.log_scale.exp()).softmax(dim=1) for half in halves]
    torch.testing.assert_close(mixed.scores_of(lists, 0.25).exp(), 0.25 * of_either[0] + 0.75 * of_either[1])


def test_two_heads_and_gates_learn_what_the_lists_say() -> None:
    lists = _lists(140, 5)
    relevant = torch.arange(140) % 5
    lists.gains.copy_(torch.nn.functional.one_hot(relevant, 5))
    lists.targets.copy_((0.5 * lists.gains + 0.5 * torch.full((140, 5), 0.2)).log())
    lists.passages[torch.arange(140), relevant, 0] += 3  # what tells relevant passages is in one dimension
    lists.queries[:, 1] += 1
    for head in ("two heads", "two heads, probabilities", "IEM, rich, gates"):
        found = measure(head, {"set": ("asymmetric", lists, lists)}, 0)["set"]
        assert found["chosen"] >= found["whole"] > 0.8, head


def test_every_head_of_the_table_begins_with_finite_scores() -> None:
    lists = _lists(2, 3)
    for name, (make, _) in HEADS.items():
        assert torch.isfinite(make(DIM, "asymmetric")(lists)).all(), name


def _lists(count: int, passages: int) -> Lists:
    torch.manual_seed(0)
    token_mask = torch.zeros(count, 16, dtype=torch.bool)
    token_mask[:, :3] = True
    return Lists(
        mask=torch.ones(count, passages, dtype=torch.bool),
        scores=torch.rand(count, passages, 5) / 10,
        tokens=torch.rand(count, passages, 16, 8),
        token_mask=token_mask,
        kernels=torch.rand(count, passages, 22),
        queries=torch.rand(count, DIM),
        passages=torch.rand(count, passages, DIM).half(),
        targets=torch.rand(count, passages).log_softmax(dim=1),
        gains=torch.ones(count, passages),
        ideal=torch.ones(count),
    )
