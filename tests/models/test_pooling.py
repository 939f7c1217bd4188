"""Poolings against float64 numpy."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from d2llm.core.errors import InputError
from d2llm.methods.poolings.pma import PMA, MultiheadAttentionPooling
from d2llm.models.pooling import TextPooling, make_pooling
from d2llm.ops.pooling import last_positions, to_right_padding
from d2llm.recipe import Pooling
from tiny_models import randomise

DIM, HEADS = 12, 3


def pool(states: torch.Tensor, mask: torch.Tensor, kind: str) -> torch.Tensor:
    return Pooling(kind=kind).pool(states, mask)


def module_of(pooling: Pooling, own: str = "mean") -> TextPooling:
    """The module for a backbone that is only as wide and has such a pooling of its own."""
    backbone: Any = SimpleNamespace(dim=DIM, own_pooling=Pooling(kind=own))
    return make_pooling(pooling, backbone)


def states_and_mask(lengths=(5, 1, 3), dim=DIM, seed=0):
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(len(lengths), max(lengths), dim, generator=generator, dtype=torch.float64)
    mask = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
    return states, mask


def pma_in_numpy(module: MultiheadAttentionPooling, states: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """LN(h + FF(h)) with h = LN(MHA(q, Y, Y) + q), one text, one seed and one head at a time."""
    p = {name: value.detach().double().numpy() for name, value in module.named_parameters()}

    def linear(x, name):
        return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    def layer_norm(x, name):
        centred = x - x.mean()
        return centred / np.sqrt((centred**2).mean() + 1e-5) * p[f"{name}.weight"] + p[f"{name}.bias"]

    rows = []
    for text, real in zip(states, mask, strict=True):
        text = text[real]  # without the padding
        pooled = []
        for seed in p["seeds"]:
            query, keys, values = linear(seed, "query"), linear(text, "key"), linear(text, "value")
            heads = []
            width = len(seed) // module.num_heads
            for head in range(module.num_heads):
                part = slice(head * width, (head + 1) * width)
                weights = np.exp(keys[:, part] @ query[part] / np.sqrt(width))
                heads.append(weights / weights.sum() @ values[:, part])
            hidden = layer_norm(linear(np.concatenate(heads), "output") + seed, "norm_attention")
            inner = np.maximum(linear(hidden, "feedforward.0"), 0)
            pooled.append(layer_norm(hidden + linear(inner, "feedforward.2"), "norm_feedforward"))
        joined = np.concatenate(pooled)
        rows.append(joined @ p["join.weight"].T if len(pooled) > 1 else joined)
    return np.stack(rows)


def test_right_padding_keeps_the_order_of_the_real_tokens():
    token_ids = torch.tensor([[0, 0, 7, 8, 9], [5, 6, 0, 0, 0], [0, 3, 0, 4, 0]])
    ids, mask = to_right_padding(token_ids, token_ids > 0)
    assert ids.tolist() == [[7, 8, 9, 0, 0], [5, 6, 0, 0, 0], [3, 4, 0, 0, 0]]
    assert mask.tolist() == (ids > 0).tolist()
    assert last_positions(mask).tolist() == [2, 1, 1]


def test_mean_last_and_first_pooling_by_hand():
    states = torch.tensor([[[1.0, 2.0], [3.0, 6.0], [100.0, 100.0]], [[5.0, 7.0], [9.0, 9.0], [9.0, 9.0]]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert pool(states, mask, "mean").tolist() == [[2.0, 4.0], [5.0, 7.0]]
    assert pool(states, mask, "last").tolist() == [[3.0, 6.0], [5.0, 7.0]]
    assert pool(states, mask, "first").tolist() == [[1.0, 2.0], [5.0, 7.0]]


def test_in_a_weighted_mean_the_second_token_counts_twice():
    states = torch.tensor([[[1.0, 2.0], [4.0, 8.0], [100.0, 100.0]], [[5.0, 7.0], [9.0, 9.0], [9.0, 9.0]]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert pool(states, mask, "weighted_mean").tolist() == [[3.0, 6.0], [5.0, 7.0]]


@pytest.mark.parametrize("name", ["mean", "weighted_mean"])
def test_nan_in_the_padding_is_ignored(name):
    states, mask = states_and_mask()
    expected = pool(states, mask, name)
    assert torch.equal(pool(states.masked_fill(~mask[..., None], torch.nan), mask, name), expected)


@pytest.mark.parametrize("num_seeds", [1, 3])
@pytest.mark.parametrize("feedforward_dim", [None, 5])
def test_pma_equals_the_formula(num_seeds, feedforward_dim):
    config = PMA(num_seeds=num_seeds, num_heads=HEADS, feedforward_dim=feedforward_dim)
    module = MultiheadAttentionPooling(config, DIM).double()
    randomise(module)
    states, mask = states_and_mask()
    expected = pma_in_numpy(module, states.numpy(), mask.numpy())
    assert expected.shape == (3, DIM)
    np.testing.assert_allclose(module(states, mask).detach().numpy(), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("warm_start", [True, False])
def test_padding_does_not_change_the_vectors(warm_start):
    module = module_of(PMA(num_heads=HEADS, warm_start=warm_start))
    randomise(module)
    states, mask = states_and_mask()
    states = states.float()
    other = torch.where(mask[..., None], states, 1e3 * torch.randn_like(states))
    assert torch.equal(module(states, mask), module(other, mask))
    torch.testing.assert_close(module(states[2:, :3], mask[2:, :3]), module(states, mask)[2:], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("pooling", "own"), [("auto", "last"), ("last", "mean")])
def test_a_warm_start_is_the_other_pooling(pooling, own):
    module = module_of(PMA(num_heads=HEADS, pooling=Pooling(kind=pooling)), own)
    states, mask = states_and_mask()
    pooled = pool(states.float(), mask, "last")
    vectors = module(states.float(), mask)
    expected = pooled / pooled.norm(dim=1, keepdim=True) * DIM**0.5
    torch.testing.assert_close(vectors, expected)
    with torch.no_grad():
        module.gate.fill_(0.5)
    torch.testing.assert_close(module(states.float(), mask), expected + 0.5 * module.pma(states.float(), mask))


def test_a_cold_start_is_pma_alone():
    module = module_of(PMA(num_heads=HEADS, warm_start=False))
    states, mask = states_and_mask()
    assert torch.equal(module(states.float(), mask), module.pma(states.float(), mask))
    assert module.gate is None


def test_heads_that_do_not_divide_the_width_are_rejected():
    with pytest.raises(InputError, match=r"num_heads is 5, .*width 12 .*use one of 1, 2, 3, 4, 6, 12"):
        MultiheadAttentionPooling(PMA(num_heads=5), 12)


def test_whitening_changes_the_other_pooling():
    """By hand: on a sphere, minus the mean, through the map, and on the sphere again."""
    pooling = module_of(Pooling(kind="whitening"), "first")
    rng = np.random.default_rng(0)
    sample = (rng.normal(size=(200, DIM)) @ rng.normal(size=(DIM, DIM))).astype(np.float32)
    own = sample[:3].astype(np.float64)
    on_sphere = own / np.linalg.norm(own, axis=1, keepdims=True) * np.sqrt(DIM)

    def pooled() -> np.ndarray:
        states = torch.from_numpy(sample[:3])[:, None]
        return pooling(states, torch.ones(3, 1, dtype=torch.bool)).detach().numpy()

    np.testing.assert_allclose(pooled(), on_sphere, rtol=1e-5)  # nothing is fitted yet
    pooling.fit(sample)
    wide = sample.astype(np.float64)
    precision = np.linalg.inv(np.cov(wide.T))  # W W^T, whatever the basis of W
    centred = on_sphere - wide.mean(axis=0)
    inner = centred @ precision @ centred.T
    lengths = np.sqrt(np.diag(inner))
    np.testing.assert_allclose(pooled() @ pooled().T / DIM, inner / np.outer(lengths, lengths), rtol=1e-3, atol=1e-4)
