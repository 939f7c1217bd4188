"""Leaves out neurons of a student's feed-forward layers, and lets those that stay make up for them.

Source: Kurtic et al., "ZipLM: Inference-Aware Structured Pruning of Language Models", NeurIPS 2023 (arXiv 2302.04089),
section 3.1: what a layer gives changes least, in the sum of squares over the tokens of some texts, if neurons go one by
one, each time the one that the others replace best (the optimal brain surgeon). There the number of neurons differs by
layer, as far as a target of speed allows; here all layers keep as many, which every program can load that reads the
architecture. Heads of the attention stay: a BERT's configuration cannot say that there are fewer.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from d2llm.core.errors import InputError
from d2llm.core.fingerprint import fingerprint_json
from d2llm.core.inputs import texts_of
from d2llm.models.backbone import Backbone
from d2llm.models.layer_choice import states_of
from d2llm.models.lora import has_adapters
from d2llm.models.pretrained import layers_of
from d2llm.models.student import Student

_MAX_TEXTS = 1_000
_DAMPING = 1e-3  # added to the covariances' diagonal, as a fraction of its mean


class _FeedForward(NamedTuple):
    """The linear layers of one layer of a model into its neurons, and the one out of them."""

    up: list[nn.Linear]
    down: nn.Linear


def prune_neurons(student: Student, texts: Iterable[str], keep: float) -> Student:
    """A smaller and faster copy of a student, whose feed-forward layers keep a fraction of their neurons.

    It is another student, without what was fitted to the scores of the first, and can be trained further
    (``training.start``). What it keeps is in docs/recipes.md.

    Args:
        student: one on BERT, XLM-R, Llama or another transformer with one list of layers.
        texts: typical passages, of which at most 1,000 are drawn.
        keep: the fraction of the neurons of each layer that stays, above 0 and below 1.

    Raises:
        InputError: there are no texts, ``keep`` is no such fraction, the student encodes with another engine than
            torch or has adapters that are not merged, or its feed-forward layers are of another kind.
        ModelError: the model has no single list of layers.
    """
    if not 0 < keep < 1:
        raise InputError(f"keep is {keep}, but must be a fraction of the neurons, above 0 and below 1, such as 0.5")
    backbone, drawn = student.backbone, texts_of(list(texts))
    if len(drawn) > _MAX_TEXTS:
        drawn = random.Random(0).sample(drawn, _MAX_TEXTS)
    backbone.require_merged("fewer neurons")
    backbone.require_tokens("fewer neurons")
    if has_adapters(backbone):
        raise InputError("this student has adapters in training, which are not pruned; save it and load it again")
    recorded = {"tasks": student.trained_tasks, "pruned_from": student.fingerprint, "kept_neurons": keep}
    pruned = student.changed_copy(["neurons", keep, fingerprint_json(drawn)], recorded, merged=True)
    layers = _feed_forward_layers(pruned.backbone)
    count = max(1, round(keep * num_neurons(student)))
    for layer, (mean, products) in zip(layers, _moments(pruned.backbone, layers, drawn), strict=True):
        _prune(layer, mean, products, count)
    pruned.backbone.model.config.intermediate_size = count
    return pruned


def num_neurons(student: Student) -> int:
    """The neurons of each feed-forward layer of a student's backbone; errors are those of ``prune_neurons``."""
    return _feed_forward_layers(student.backbone)[0].down.in_features


def _feed_forward_layers(backbone: Any) -> list[_FeedForward]:
    name, width = backbone.config.model, getattr(backbone.model.config, "intermediate_size", None)
    layers: list[_FeedForward] = []
    for layer in layers_of(backbone.model, name=name):
        linear = [part for part in layer.modules() if isinstance(part, nn.Linear)]
        up = [part for part in linear if part.out_features == width]
        down = [part for part in linear if part.in_features == width]
        if len(down) != 1 or len(up) not in (1, 2) or down[0] in up:  # two, if one of them is a gate
            raise InputError(
                f"the feed-forward layers of '{name}' ({type(backbone.model).__name__}) are not linear layers into "
                "and out of intermediate_size neurons; use a student on minilm, e5, smollm2 or another BERT, XLM-R or "
                "Llama"
            )
        layers.append(_FeedForward(up, down[0]))
    return layers


def _moments(
    backbone: Backbone, layers: Sequence[_FeedForward], texts: Sequence[str]
) -> list[tuple[Float[Tensor, " neurons"], Float[Tensor, "neurons neurons"]]]:
    """The mean of the neurons of each layer over the tokens of the texts, and the mean of their products."""
    sums: list[tuple[Tensor, Tensor]] = []
    num_tokens = 0
    for states in states_of(backbone, texts, [layer.down for layer in layers]):
        more = [(state.sum(0).double(), (state.T @ state).double()) for state in states]
        sums = [(a + c, b + d) for (a, b), (c, d) in zip(sums, more, strict=True)] if sums else more
        num_tokens += len(states[0])
    return [(mean / num_tokens, products / num_tokens) for mean, products in sums]


def _prune(layer: _FeedForward, mean: Tensor, products: Tensor, count: int) -> None:
    """Keep ``count`` neurons of a layer, in place."""
    weight, bias = layer.down.weight.detach().double(), cast("Tensor | None", layer.down.bias)
    if bias is not None:  # it makes up for the means
        products = products - torch.outer(mean, mean)
    kept, smaller = keep_columns(weight, products, count)
    if bias is not None:
        bias.data += (weight @ mean - smaller @ mean[kept]).to(bias.dtype)
    layer.down.weight = _like(layer.down.weight, smaller)
    layer.down.in_features = count
    for up in layer.up:
        up.weight, up.out_features = _like(up.weight, up.weight.detach()[kept].clone()), count
        if cast("Tensor | None", up.bias) is not None:
            up.bias = _like(up.bias, up.bias.detach()[kept].clone())


def _like(parameter: Tensor, values: Tensor) -> nn.Parameter:
    return nn.Parameter(values.to(parameter.dtype), requires_grad=parameter.requires_grad)


def keep_columns(
    weight: Float[Tensor, "out inputs"], covariance: Float[Tensor, "inputs inputs"], count: int
) -> tuple[Int[Tensor, " count"], Float[Tensor, "out count"]]:
    """Which inputs of a linear layer to keep, ascending, and the weights of these that replace all.

    One input after another goes: the one whose weights, w, cost least with H the damped covariance of the inputs, |w|^2
    / (H^-1)_ii. The others take W_i (H^-1)_i / (H^-1)_ii off theirs, which is the least squares solution.
    """
    damping = _DAMPING * float(covariance.diagonal().mean())
    inverse = torch.linalg.inv(covariance + damping * torch.eye(len(covariance), dtype=covariance.dtype))
    weight, kept = weight.clone(), torch.ones(len(covariance), dtype=torch.bool)
    for _ in range(len(covariance) - count):
        costs = (weight.square().sum(0) / inverse.diagonal()).masked_fill(~kept, torch.inf)
        chosen = int(costs.argmin())
        shares = inverse[chosen] / inverse[chosen, chosen]
        weight.addr_(weight[:, chosen].clone(), shares, alpha=-1)
        inverse.addr_(inverse[:, chosen].clone(), shares, alpha=-1)
        kept[chosen] = False
    return kept.nonzero()[:, 0], weight[:, kept]
