"""Pooling by multihead attention (PMA), alone or beside another pooling."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from d2llm.core.errors import InputError
from d2llm.models.backbone import Backbone
from d2llm.models.pooling import TextPooling, make_pooling
from d2llm.recipe.student import ChangedPooling, Pooling


class PMA(ChangedPooling, kind="pma"):
    """Learned seed vectors attend over the tokens (PMA), by default beside another pooling.

    Lee et al., "Set Transformer", ICML 2019, section 3.2; used as in Liao et al., "D2LLM", ACL 2024, section 3.2, whose
    students have no warm start.
    """

    paper = "Lee et al., ICML 2019, arXiv 1810.00825"
    costs = "one attention layer"
    measured = (
        "against the mean of the tokens instead: -.001 on squad-sent and banking77, -.001 on wikiqa and quora ([three "
        "seeds](ablations.md#the-published-objective-taught-by-grades-that-are-better-than-the-student))"
    )

    num_seeds: int = Field(default=1, ge=1)
    num_heads: int = Field(default=12, ge=1)
    feedforward_dim: int | None = Field(default=None, ge=1)
    """Width of the feed-forward layer; by default the backbone's width."""
    warm_start: bool = True
    """Start as ``pooling``: y = pool(Y) + gate * PMA(Y), where the gate starts at 0. Otherwise, PMA alone."""

    @model_validator(mode="after")
    def _check_pooling(self) -> PMA:
        if self.pooling.weighing is not None:
            raise ValueError(
                f"pooling is {self.pooling.weighing.kind}, which changes the tokens' states, and PMA would read the "
                "changed ones: name another"
            )
        if not self.warm_start and self.pooling != self.pooling.weightless:
            raise ValueError(
                f"pooling is {self.pooling.kind}, which PMA without warm start does not use: set warm_start = true, or "
                "delete it"
            )
        return self

    @property
    def inner(self) -> Pooling | None:
        return self.pooling if self.warm_start else None

    def without_gated(self) -> Pooling:
        return self.pooling if self.warm_start else self

    def module(self, backbone: Backbone) -> TextPooling:
        inner = make_pooling(self.pooling, backbone) if self.warm_start else None
        return PooledByAttention(MultiheadAttentionPooling(self, backbone.dim), backbone.dim, inner)


class MultiheadAttentionPooling(nn.Module):
    """Learned seed vectors attend over the tokens: h = LN(MHA(q, Y, Y) + q); y = LN(h + FF(h)).

    A linear layer combines several seeds, so the result always has the width of the token states.
    """

    def __init__(self, config: PMA, dim: int) -> None:
        """Build the pooling for token states of width ``dim``.

        Raises:
            InputError: ``dim`` is not a multiple of the number of heads.
        """
        super().__init__()
        if dim % config.num_heads:
            divisors = [n for n in range(1, dim + 1) if dim % n == 0]
            raise InputError(
                f"pooling.num_heads is {config.num_heads}, but the backbone's width {dim} is not a multiple of it; "
                f"use one of {', '.join(map(str, divisors))}"
            )
        self.num_heads = config.num_heads
        feedforward_dim = config.feedforward_dim or dim
        self.seeds = nn.Parameter(torch.randn(config.num_seeds, dim))
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.output = nn.Linear(dim, dim)
        self.norm_attention = nn.LayerNorm(dim)
        self.feedforward = nn.Sequential(nn.Linear(dim, feedforward_dim), nn.ReLU(), nn.Linear(feedforward_dim, dim))
        self.norm_feedforward = nn.LayerNorm(dim)
        self.join = nn.Linear(config.num_seeds * dim, dim, bias=False) if config.num_seeds > 1 else nn.Identity()

    def forward(
        self, states: Float[Tensor, "batch tokens dim"], mask: Bool[Tensor, "batch tokens"]
    ) -> Float[Tensor, "batch dim"]:
        """Pool token states; tokens where ``mask`` is false are ignored.

        The seeds are the same for every text, so the products with the key and value weights are moved out of the sum
        over tokens: q_h (W_h y) = (q_h W_h) y, and sum_t a_t (V_h y_t) = V_h (sum_t a_t y_t). Each token is then
        multiplied by one vector per head and seed instead of two dim x dim matrices.
        """
        seeds = self._heads(self.query(self.seeds))  # [heads, seeds, head_dim]
        probes = (seeds @ self._rows(self.key.weight)).flatten(0, 1)  # [heads * seeds, dim]
        offsets = (seeds @ self._rows(self.key.bias)[..., None]).flatten()
        scores = (states @ probes.T + offsets) / seeds.shape[-1] ** 0.5
        attention = scores.masked_fill(~mask[..., None], -torch.inf).softmax(dim=1)
        mixed = (attention.transpose(1, 2) @ states).unflatten(1, seeds.shape[:2])  # [batch, heads, seeds, dim]
        # head by head: `@` would copy the weights for each text
        values = torch.einsum("bhsd,hed->bhse", mixed, self._rows(self.value.weight))
        attended = self.output(values.transpose(1, 2).flatten(2) + self.value.bias)
        hidden = self.norm_attention(attended + self.seeds)
        pooled = self.norm_feedforward(hidden + self.feedforward(hidden))
        return self.join(pooled.flatten(1))

    def _heads(self, values: Float[Tensor, "seeds dim"]) -> Float[Tensor, "heads seeds head_dim"]:
        return values.unflatten(-1, (self.num_heads, -1)).transpose(0, 1)

    def _rows(self, parameter: Float[Tensor, "dim ..."]) -> Float[Tensor, "heads head_dim ..."]:
        """The rows of a weight or bias, by head."""
        return parameter.unflatten(0, (self.num_heads, -1))


class PooledByAttention(TextPooling):
    """PMA alone, or with a warm start: y = pool(Y) + gate PMA(Y) with a learned gate that starts at 0.

    So an untrained student scores exactly as with the other pooling.
    """

    def __init__(self, pma: MultiheadAttentionPooling, dim: int, inner: TextPooling | None) -> None:
        super().__init__(dim, inner)
        self.pma = pma
        self.gate = None if inner is None else nn.Parameter(torch.zeros(()))

    def forward(
        self, states: Float[Tensor, "batch tokens dim"], mask: Bool[Tensor, "batch tokens"]
    ) -> Float[Tensor, "batch dim"]:
        if self.inner is None or self.gate is None:
            return self.pma(states.float(), mask)
        return self.inner(states, mask) + self.gate * self.pma(states.float(), mask)
