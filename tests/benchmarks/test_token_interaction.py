"""The inputs and the arithmetic of benchmarks/token_interaction.py, on values worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from token_interaction import BOUND, DESIGNS, Added, Lists, Training, changes, join, ndcg, table, token_inputs, train

DIM = 6


def test_inputs_of_a_token():
    # Two passages, of three tokens and of one; the query has one token.
    cosines = np.array([[0.2, 0.8, 0.5, 0.4]], np.float32)
    inputs = token_inputs(cosines, np.array([3, 1]), np.array([0.7], np.float32), np.array([[True], [False]]))
    mean, deviation = (0.8 + 0.4) / 2, (0.8 - 0.4) / 2
    standard = deviation / (deviation + 0.02)
    first = [0.8, 0.5, 1.5 / 3, 0.5 * standard, mean, 5 * deviation, 0.7, 1]
    second = [0.4, -1, 0.4, -0.5 * standard, mean, 5 * deviation, 0.7, 0]  # no second best: the lowest cosine
    np.testing.assert_allclose(inputs[:, 0], [first, second], atol=1e-6)


def test_ndcg_counts_relevant_passages_outside_the_list() -> None:
    lists = _lists(1, 3)
    lists.gains[0] = torch.tensor([0.0, 1.0, 0.0])
    lists.ideal[0] = 1 + 1 / np.log2(3)
    (value,) = ndcg(torch.tensor([[3.0, 2.0, 1.0]]), lists)
    assert value == pytest.approx((1 / np.log2(3)) / (1 + 1 / np.log2(3)))


@pytest.mark.parametrize("design", [*DESIGNS])
def test_a_design_starts_at_nothing_and_never_exceeds_its_bound(design: str) -> None:
    lists = _lists(4, 5)
    model = Added(DESIGNS[design](DIM), BOUND).eval()
    own = lists.scores[:, :, 0]
    with torch.inference_mode():
        assert torch.equal(model(lists), own)
        torch.nn.init.constant_(model.design.last.weight, 1e3)  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue]
        change = (model(lists) - own).abs()
    assert 0 < change.max() <= BOUND + 1e-5


@pytest.mark.parametrize("design", ["tokens", "transformer"])
def test_training_learns_that_the_word_must_occur(design: str) -> None:
    lists = _lists(140, 5)
    occurs = torch.arange(140)[:, None] % 5 == torch.arange(5)
    lists.tokens[..., 7] = occurs[:, :, None].float()
    lists.gains.copy_(occurs)
    lists.targets.copy_(torch.where(occurs, 0.0, -20.0))
    model, _ = train(lambda: Added(DESIGNS[design](DIM), BOUND), Training(lists, epochs=15, rate=1e-2))
    changed = changes(model, lists)
    assert changed[0.0].max() == 0
    assert changed[1.0].mean() > 0.2


def test_joined_lists_are_padded_with_passages_that_do_not_count() -> None:
    joined = join([_lists(2, 3), _lists(1, 5)])
    assert joined.mask.sum(dim=1).tolist() == [3, 3, 5]
    assert torch.isfinite(Added(DESIGNS["tokens"](DIM), BOUND).loss(joined))
    assert ndcg(joined.scores[:, :, 0], joined).shape == (3,)


def test_the_documentation_has_the_table_of_the_figures() -> None:
    root = Path(__file__).parents[2]
    results = json.loads((root / "benchmarks/results/token-interaction.json").read_text(encoding="utf-8"))
    assert table(results) in (root / "docs/ablations.md").read_text(encoding="utf-8")


def _lists(num: int, passages: int) -> Lists:
    """Random inputs of queries with three tokens; the score of all passages is a small random number."""
    torch.manual_seed(0)
    mask = torch.ones(num, passages, dtype=torch.bool)
    token_mask = torch.zeros(num, 16, dtype=torch.bool)
    token_mask[:, :3] = True
    return Lists(
        mask=mask,
        scores=torch.rand(num, passages, 5) / 10,
        tokens=torch.rand(num, passages, 16, 8),
        token_mask=token_mask,
        kernels=torch.rand(num, passages, 22),
        queries=torch.rand(num, DIM),
        passages=torch.rand(num, passages, DIM).half(),
        targets=torch.rand(num, passages).log_softmax(dim=1),
        gains=torch.ones(num, passages),
        ideal=torch.ones(num),
    )
