"""Layers of a ``transformers`` model that compute the same as torch's on a CPU, and faster."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from d2llm.core.machine import cpu_fact
from d2llm.models.device import computes, onednn_linear


def use_fast_products(model: nn.Module) -> None:
    """Let the linear layers of a model multiply float32 on a CPU with the library that is fastest there, in place.

    torch uses MKL, which multiplies on AMD's CPUs without AVX512: oneDNN, which torch has too, is then 2.2 times as
    fast, and with AVX2 alone 1.15 times.
    """
    if can_multiply_faster():
        for module in model.modules():
            if type(module) is nn.Linear:
                module.__class__ = OneDnnLinear


def sum_gradients_by_row(model: nn.Module) -> None:
    """Let the embeddings of a model on a CPU add to the gradients of those rows only that were looked up, in place.

    torch makes a gradient of the whole vocabulary for each part of a batch, and adds it to that of the others.
    """
    for module in model.modules():
        if type(module) is not nn.Embedding or module.weight.device.type != "cpu":
            continue
        if not module.sparse and not module.scale_grad_by_freq and module.max_norm is None:
            module.__class__ = RowEmbedding


@cache
def can_multiply_faster() -> bool:
    """Whether this CPU is AMD's, and torch has both libraries here, and the result of the other one is right."""
    if cpu_fact("vendor_id") != "AuthenticAMD" or not (
        torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    ):
        return False
    inputs, weight = torch.linspace(-1, 1, 64).view(2, 32), torch.linspace(-1, 1, 32 * 32).view(32, 32)
    return computes(
        lambda: onednn_linear(inputs, weight),
        inputs @ weight.T,
        tolerance=1e-5,
        name="float32 products of oneDNN",
        otherwise="MKL multiplies",
    )


class OneDnnLinear(nn.Linear):
    """A linear layer whose float32 products on a CPU are oneDNN's."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - as in nn.Linear
        """W x + b."""
        if (
            input.dtype != torch.float32
            or self.weight.dtype != torch.float32
            or not (input.is_cpu and self.weight.is_cpu and input.numel())
            or torch.is_autocast_enabled("cpu")
            or torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
            or torch.compiler.is_compiling()
        ):
            return super().forward(input)
        if torch.is_grad_enabled():
            return _Linear.apply(input, self.weight, self.bias)
        return onednn_linear(input, self.weight, self.bias)


class RowEmbedding(nn.Embedding):
    """An embedding whose gradient is added to ``weight.grad`` row by row."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - as in nn.Embedding
        """The rows of ``weight``."""
        if self.weight.requires_grad and torch.is_grad_enabled():
            return _Rows.apply(self.weight, input, self.padding_idx)
        return super().forward(input)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        return onednn_linear(inputs, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        inputs, weight = ctx.saved_tensors
        needs_inputs, needs_weight, needs_bias = ctx.needs_input_grad
        rows = gradient.reshape(-1, gradient.shape[-1])
        return (
            onednn_linear(gradient, weight.T) if needs_inputs else None,
            onednn_linear(rows.T, inputs.reshape(-1, inputs.shape[-1]).T) if needs_weight else None,
            rows.sum(dim=0) if needs_bias else None,
        )


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor, padding: int | None) -> Tensor:
        ctx.weight, ctx.ids, ctx.padding = weight, ids, padding
        return functional.embedding(ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        weight: Tensor = ctx.weight
        ids, rows = ctx.ids.flatten(), gradient.flatten(0, -2).to(weight.dtype)
        if ctx.padding is not None:
            kept = ids != ctx.padding
            ids, rows = ids[kept], rows[kept]
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        weight.grad.index_add_(0, ids, rows)
        return None, None, None
