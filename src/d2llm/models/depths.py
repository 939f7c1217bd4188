"""States of tokens after some of a model's layers, in one pass, as the model cut to these layers would give them.

Source: Li et al., "2D Matryoshka Sentence Embeddings", 2024 (arXiv 2402.14776). There one depth is drawn in each step
and aligned with the last layer by a divergence. Here the recipe names the depths, and each learns in every step
(``losses.nested_cross_entropy``), without the alignment.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from d2llm.core.errors import ModelError

Read = Callable[[], Float[Tensor, "batch tokens dim"]]
"""Runs the model on a batch and returns its last states."""


def read_depths(
    layers: nn.ModuleList, final: nn.Module, depths: Sequence[int], read: Read
) -> list[Float[Tensor, "batch tokens dim"]]:
    """The states after the first ``depths`` of a model's layers, then those after all of them, with their gradient.

    Args:
        layers: the model's layers.
        final: what follows the last layer (``final_module``).
        depths: numbers of layers, each below that of the model.
        read: runs the model.
    """
    outputs: dict[int, Tensor] = {}
    hooks = [_keep_output(layers[depth - 1], outputs, depth) for depth in depths]
    try:
        last = read()
    finally:
        for hook in hooks:
            hook.remove()
    return [*(final(outputs[depth]).view_as(last) for depth in depths), last]


def final_module(model: nn.Module, layers: nn.ModuleList, read: Read, *, name: str) -> nn.Module:
    """What a model does to the states of its last layer: a norm, or nothing (``nn.Identity``), found by running it.

    Raises:
        ModelError: something else follows the layers of the model (``name`` in the message).
    """
    outputs: dict[int, Tensor] = {}
    followers: list[tuple[nn.Module, Any]] = []

    def follow(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if inputs and inputs[0] is outputs.get(0):
            followers.append((module, output))

    inside = {id(module) for module in layers.modules()}
    outside = [module for module in model.modules() if id(module) not in inside and module is not model]
    modes = [(module, module.training) for module in model.modules()]
    model.eval()  # dropout after the norm would hide it
    hooks = [_keep_output(layers[-1], outputs, 0), *(module.register_forward_hook(follow) for module in outside)]
    try:
        with torch.no_grad():
            last = read()
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes:
            module.training = mode
    if torch.equal(outputs[0].view_as(last), last):
        return nn.Identity()
    for module, output in followers:
        if isinstance(output, Tensor) and output.numel() == last.numel() and torch.equal(output.view_as(last), last):
            return module
    raise ModelError(
        f"'{name}' ({type(model).__name__}) has more than a norm after its last layer, so its states cannot be read "
        "after fewer layers: delete losses.nested_cross_entropy.layers, or use another model"
    )


def _keep_output(layer: nn.Module, outputs: dict[int, Tensor], key: int) -> RemovableHandle:
    def keep(_: nn.Module, __: Any, output: Any) -> None:
        outputs[key] = output[0] if isinstance(output, tuple) else output

    return layer.register_forward_hook(keep)
