"""Score one query against many passages with the interaction (IEM), as a search does.

Everything that depends only on the weights is folded and cast once per state of the weights, and everything that
depends only on the query once per query. Each passage then takes one matrix product with [b; |a - b|] (with b alone if
the features have no difference) and one per inner layer. Products use the number format that the machine multiplies
fastest, in blocks whose activations stay in the cache. The inner product, the bound and the last layer's sum are
float32.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from d2llm.core.types import Task
from d2llm.models.device import (
    can_fuse_bfloat16_layers,
    onednn_linear,
    pack_bfloat16_weight,
    weights_state,
)
from d2llm.models.interaction import CosineHead, Interaction, at_least_float32
from d2llm.ops.scoring import Linear, bounded_logit

_ROWS = 96
"""Blocks are padded to a multiple of this, so that the score of a passage does not depend on how many others are scored
with it: products of few rows are summed in another order, and with AVX2 on Intel's CPUs so are the last rows of a
product whose number is not a multiple of 12. A multiple of 32 was right on every other CPU."""


class HeadWeights:
    """An interaction's weights for one task, folded and cast for scoring; ``is_of`` says whether they are up to date.

    If they depend on the query (``Interaction.is_generated``), they are those of ``query``.

    ``dtype`` is the number format of the products. It is float32 if bfloat16 is requested but the CPU has no fused
    bfloat16 layer: torch's own bfloat16 product takes several times as long there (docs/log), and is less exact.
    """

    def __init__(
        self, head: Interaction, task: Task, dtype: torch.dtype, query: Float[Tensor, " dim"] | None = None
    ) -> None:
        layers = head.split_layers(task, query)
        self._requested_dtype = dtype
        on_cpu = layers.passage.device.type == "cpu"
        if dtype == torch.bfloat16 and on_cpu and not can_fuse_bfloat16_layers():
            dtype = torch.float32
        self.query = Linear(layers.query, layers.bias)
        self.passage = layers.passage
        self.product = layers.product
        self.difference = None if layers.difference is None else layers.difference.to(dtype)
        self.inner = [_ReluLayer(layer.weight.to(dtype), _cast(layer.bias, dtype)) for layer in layers.inner]
        self.last, self.constant = layers.last, layers.constant
        self.dtype = dtype
        self._state = weights_state(head)

    def is_of(self, head: Interaction, dtype: torch.dtype) -> bool:
        """Whether these are the folded weights of ``head`` in its current state, and in the number format ``dtype``."""
        return dtype == self._requested_dtype and self._state == weights_state(head)


class _ReluLayer:
    """relu(W x + b); in bfloat16 on a CPU with oneDNN's fused operation and W reordered once.

    Plain torch reorders W in each call and makes a second pass over the result, which takes 10 % longer.
    """

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self._is_packed = weight.device.type == "cpu" and weight.dtype == torch.bfloat16
        self._weight = pack_bfloat16_weight(weight) if self._is_packed else weight
        self._bias = bias

    def __call__(self, inputs: Tensor) -> Tensor:
        if self._is_packed:
            return onednn_linear(inputs, self._weight, self._bias, activation="relu")
        return nn.functional.linear(inputs, self._weight, self._bias).relu_()


class QueryScorer:
    """The full score of one query with any passages, computed from their vectors.

    ``bound`` is the query's part r B r_q(a) of the bound of a pair, 0 if the inner product is the whole score.
    ``block`` is the number of passages scored at a time. ``interaction_weight`` replaces the head's own weight r, to
    measure the effect of another value. Without ``weights``, the inner product is the whole score.
    """

    def __init__(
        self,
        head: Interaction | CosineHead,
        weights: HeadWeights | None,
        query: Float[Tensor, " dim"],
        task: Task,
        block: int,
        *,
        interaction_weight: float | None = None,
    ) -> None:
        self._head = head
        self._weights = weights
        self._query = query
        self._task: Task = task
        self._block = block
        with torch.inference_mode():
            self.bound = 0.0
            if weights is not None and isinstance(head, Interaction) and head.has_dot:
                self.bound = head.query_bound(query, task, interaction_weight=interaction_weight).item()
            self._first = _first_layer(weights, query) if weights and (self.bound or not head.has_dot) else None

    @cached_property
    def _dot(self) -> Float[Tensor, "1 dim"] | None:
        """Computed when it is needed: a search that only asks for the bound has it from its scan."""
        with torch.inference_mode():
            return self._head.query_vectors(self._query[None], self._task) if self._head.has_dot else None

    @property
    def dot_query(self) -> Float[np.ndarray, " dim"] | None:
        """The vector whose inner product with a passage's vector is that of the score; None for head ``paper``."""
        return None if self._dot is None else self._dot[0].cpu().numpy()

    def __call__(
        self, passages: Float[np.ndarray, "passages dim"] | Float[Tensor, "passages dim"]
    ) -> Float[np.ndarray, " passages"]:
        """Final logits of the query with passages: arrays or tensors of any float format (bfloat16 is fastest)."""
        return self._by_block(passages, self._logits)

    def change(
        self, passages: Float[np.ndarray, "passages dim"] | Float[Tensor, "passages dim"]
    ) -> Float[np.ndarray, " passages"]:
        """tanh(g) in [-1, 1], where logit = dot + bound * r_p * tanh(g) (``Interaction.passage_bound``)."""
        return self._by_block(passages, self._change)

    def _by_block(
        self,
        passages: Float[np.ndarray, "passages dim"] | Float[Tensor, "passages dim"],
        work: Callable[[Tensor, _Buffers | None], Tensor],
    ) -> Float[np.ndarray, " passages"]:
        vectors = torch.from_numpy(passages) if isinstance(passages, np.ndarray) else passages
        device = self._query.device
        with torch.inference_mode():
            buffers = None
            if self._weights is not None and self._first is not None:
                width = self._first.weight.shape[1]
                buffers = _Buffers(self._weights, width, min(self._block, len(vectors)), device)
            starts = range(0, max(len(vectors), 1), self._block)
            scores = [work(vectors[start : start + self._block].to(device), buffers).cpu() for start in starts]
            return torch.cat(scores).numpy()

    def _logits(self, vectors: Float[Tensor, "passages dim"], buffers: _Buffers | None) -> Float[Tensor, " passages"]:
        if self._dot is None:
            return self._interaction(vectors, buffers)
        wide = at_least_float32(vectors)
        dots = (self._dot @ wide.T)[0]
        if not self.bound:
            return dots
        assert isinstance(self._head, Interaction)
        return bounded_logit(dots, self._interaction(vectors, buffers), self.bound * self._head.passage_bound(wide))

    def _change(self, vectors: Float[Tensor, "passages dim"], buffers: _Buffers | None) -> Float[Tensor, " passages"]:
        if not self.bound:
            return torch.zeros(len(vectors))
        return torch.tanh(self._interaction(vectors, buffers)).clamp(-1, 1)

    def _interaction(
        self, vectors: Float[Tensor, "passages dim"], buffers: _Buffers | None
    ) -> Float[Tensor, " passages"]:
        """The output g of the IEM alone."""
        weights, first = self._weights, self._first
        assert weights is not None
        assert first is not None
        assert buffers is not None
        num, dim, rows = *vectors.shape, _padded(len(vectors))
        activations = buffers.activations[:rows]
        activations[:num, :dim] = vectors
        if weights.difference is not None:
            activations[:num, dim:] = torch.sub(vectors, self._query).abs_()
        activations = nn.functional.linear(activations, first.weight, first.bias).relu_()
        for layer in weights.inner:
            activations = layer(activations)
        wide = activations if activations.dtype == weights.last.dtype else buffers.wide[:rows].copy_(activations)
        return torch.mv(wide, weights.last)[:num] + weights.constant


class _Buffers:
    """Memory shared by the blocks of one call: allocating it for each block would take 10 % of the time."""

    def __init__(self, weights: HeadWeights, width: int, num: int, device: torch.device) -> None:
        rows = _padded(num)
        self.activations = torch.zeros(rows, width, dtype=weights.dtype, device=device)
        self.wide = torch.empty(rows, len(weights.last), dtype=weights.last.dtype, device=device)


def _padded(num: int) -> int:
    return -(-num // _ROWS) * _ROWS


def _first_layer(weights: HeadWeights, query: Float[Tensor, " dim"]) -> Linear:
    """The first layer for one query, as a function of b or of [b; |a - b|]; the query's half goes into the bias."""
    passage = weights.passage if weights.product is None else torch.addcmul(weights.passage, weights.product, query)
    blocks = [passage.to(weights.dtype), *([] if weights.difference is None else [weights.difference])]
    return Linear(torch.cat(blocks, dim=1), _cast(nn.functional.linear(query, *weights.query), weights.dtype))


def _cast(bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    assert bias is not None
    return bias.to(dtype)
