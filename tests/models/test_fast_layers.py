"""Faster layers compute what torch's do, and so do their gradients."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from d2llm.core import machine
from d2llm.models import fast_layers
from d2llm.models.fast_layers import OneDnnLinear, RowEmbedding, sum_gradients_by_row, use_fast_products
from d2llm.training.gradient_cache import backpropagate_parts

needs_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"),
    reason="torch has no oneDNN products here",
)


def linear(*, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    layer = nn.Linear(24, 40, bias=bias)
    layer.__class__ = OneDnnLinear
    return layer


@needs_onednn
@pytest.mark.parametrize("shape", [(3, 5, 24), (7, 24), (24,), (0, 24)])
@pytest.mark.parametrize("bias", [True, False])
def test_products_and_gradients_are_those_of_the_formula(shape: tuple[int, ...], bias: bool) -> None:
    layer = linear(bias=bias)
    inputs = torch.randn(shape, requires_grad=True)
    output = layer(inputs)
    gradient = torch.randn_like(output)
    output.backward(gradient)
    x, w, g = (tensor.detach().double().numpy() for tensor in (inputs, layer.weight, gradient))
    b = layer.bias.detach().double().numpy() if bias else 0.0
    np.testing.assert_allclose(output.detach().numpy(), x @ w.T + b, atol=1e-5)
    assert inputs.grad is not None
    assert layer.weight.grad is not None
    np.testing.assert_allclose(inputs.grad.numpy(), g @ w, atol=1e-5)
    np.testing.assert_allclose(layer.weight.grad.numpy(), g.reshape(-1, 40).T @ x.reshape(-1, 24), atol=1e-5)
    if bias:
        assert layer.bias.grad is not None
        np.testing.assert_allclose(layer.bias.grad.numpy(), g.reshape(-1, 40).sum(0), atol=1e-5)
    with torch.inference_mode():
        assert torch.equal(layer(inputs), output)


@needs_onednn
def test_frozen_weights_get_no_gradient() -> None:
    layer = linear().requires_grad_(False)
    inputs = torch.randn(4, 24, requires_grad=True)
    layer(inputs).sum().backward()
    assert layer.weight.grad is None
    assert layer.bias.grad is None
    assert inputs.grad is not None


def test_other_formats_and_autocast_are_left_to_torch() -> None:
    layer, inputs = linear(), torch.randn(4, 24)
    plain = copy.deepcopy(layer)
    plain.__class__ = nn.Linear
    assert torch.equal(layer.double()(inputs.double()), plain.double()(inputs.double()))
    with torch.autocast("cpu", torch.bfloat16):
        output = layer.float()(inputs)
    assert output.dtype == torch.bfloat16


@pytest.mark.parametrize("vendor", ["AuthenticAMD", "GenuineIntel", ""])
def test_only_amds_cpus_multiply_with_onednn(vendor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast_layers, "cpu_fact", {"vendor_id": vendor}.get)
    fast_layers.can_multiply_faster.cache_clear()
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    use_fast_products(model)
    has_both = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    assert isinstance(model[0], OneDnnLinear) == (vendor == "AuthenticAMD" and has_both)
    assert type(model[1]) is nn.LayerNorm
    fast_layers.can_multiply_faster.cache_clear()


def test_facts_of_the_cpu_are_read_from_the_system(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    monkeypatch.setattr(machine, "_CPUINFO", file)
    assert machine.cpu_fact("vendor_id") == ""
    lines = "processor\t: 0\nvendor_id\t: GenuineIntel\nmodel\t\t: 1\nmodel name\t: A CPU: fast\n"
    file.write_text(lines, encoding="utf-8")
    assert machine.cpu_fact("vendor_id") == "GenuineIntel"
    assert machine.cpu_fact("model name") == "A CPU: fast"
    assert machine.cpu_fact("model") == "1"
    assert machine.cpu_fact("stepping") == ""


@pytest.mark.parametrize("option", [{"sparse": True}, {"scale_grad_by_freq": True}, {"max_norm": 1.0}])
def test_embeddings_with_other_gradients_are_left_to_torch(option: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Embedding(20, 6, **option))
    sum_gradients_by_row(model)
    assert type(model[0]) is nn.Embedding


@pytest.mark.parametrize("padding", [None, 0])
def test_rows_looked_up_in_several_parts_get_the_sum_of_their_gradients(padding: int | None) -> None:
    plain = nn.Embedding(20, 6, padding_idx=padding)
    model = nn.Sequential(copy.deepcopy(plain))
    sum_gradients_by_row(model)
    assert isinstance(model[0], RowEmbedding)
    for seed in (1, 2):
        torch.manual_seed(seed)
        ids = torch.randint(0, 8, (3, 5))  # with repeats, and with the padding
        gradient = torch.randn(3, 5, 6)
        for embedding in (plain, model[0]):
            embedding(ids).backward(gradient)
    assert plain.weight.grad is not None
    torch.testing.assert_close(model[0].weight.grad, plain.weight.grad)
    assert not plain.weight.grad[10:].any()


def test_parts_share_the_weights_in_the_format_of_the_products() -> None:
    torch.manual_seed(0)
    layer, texts = nn.Linear(8, 8), torch.randn(6, 8)
    copies: list[tuple[int, ...]] = []

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten._to_copy.default and args[0] is layer.weight:
                copies.append(tuple(args[0].shape))
            return func(*args, **(kwargs or {}))

    def encode(part: Sequence[int]) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return layer(texts[list(part)]).sum(1)

    def gradient(parts: list[list[int]]) -> Tensor:
        layer.zero_grad()
        backpropagate_parts(layer, encode, parts, [1] * 6, lambda v: (v**2).sum(), room=float("inf"), seed=0)
        assert layer.weight.grad is not None
        return layer.weight.grad

    whole = gradient([[0, 1, 2, 3, 4, 5]])
    with Copies():
        in_parts = gradient([[0, 1], [2, 3], [4, 5]])
    assert len(copies) == 1
    torch.testing.assert_close(in_parts, whole, rtol=0.03, atol=0.05)
