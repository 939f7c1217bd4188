"""PMA: pooling by multihead attention.

Source: Lee et al., "Set Transformer", ICML 2019, section 3.2; used as in Liao et al., "D2LLM", ACL 2024, section 3.2.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

from d2llm.core.errors import InputError
from d2llm.ops.whitening import principal_components, whitening
from d2llm.recipe import PoolingConfig


class MultiheadAttentionPooling(nn.Module):
    """Learned seed vectors attend over the tokens: h = LN(MHA(q, Y, Y) + q); y = LN(h + FF(h)).

    A linear layer combines several seeds, so the result always has the width of the token states.
    """

    def __init__(self, config: PoolingConfig, dim: int) -> None:
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
        values = mixed @ self._rows(self.value.weight).transpose(1, 2)
        attended = self.output(values.transpose(1, 2).flatten(2) + self.value.bias)
        hidden = self.norm_attention(attended + self.seeds)
        pooled = self.norm_feedforward(hidden + self.feedforward(hidden))
        return self.join(pooled.flatten(1))

    def _heads(self, values: Float[Tensor, "seeds dim"]) -> Float[Tensor, "heads seeds head_dim"]:
        return values.unflatten(-1, (self.num_heads, -1)).transpose(0, 1)

    def _rows(self, parameter: Float[Tensor, "dim ..."]) -> Float[Tensor, "heads head_dim ..."]:
        """The rows of a weight or bias, by head."""
        return parameter.unflatten(0, (self.num_heads, -1))


class TextPooling(nn.Module):
    """From token states to the text's vector: the backbone's own pooling, PMA, or both.

    With a warm start, y = sqrt(dim) pool(Y) / |pool(Y)| + gate PMA(Y) with a learned gate that starts at 0, so that an
    untrained student scores exactly by the backbone's own cosine. Without PMA (``method = "backbone"``), y is the first
    term alone. With whitening, pool(Y) is replaced by (sqrt(dim) pool(Y) / |pool(Y)| - m) W; m and W are 0 and 1 until
    ``fit`` is called.

    With ``projection_dim``, the result is P y, of norm sqrt(projection_dim). P starts as the principal components of
    passages (``fit``; until then, the first components) and is trained like the other weights, as in Zhao et al.,
    "Compressing Sentence Representation for Semantic Retrieval via Homomorphic Projective Distillation", Findings of
    ACL 2022 (arXiv 2203.07687). There the components are those of a larger teacher's vectors, which the projected
    vectors of a smaller student imitate. Here they are the student's own, and the recipe's losses train the projection.
    """

    def __init__(self, config: PoolingConfig, dim: int) -> None:
        super().__init__()
        has_pma = config.method == "pma"
        self.pma = MultiheadAttentionPooling(config, dim) if has_pma else None
        self.gate = nn.Parameter(torch.zeros(())) if has_pma and config.warm_start else None
        self.uses_own = config.uses_own
        self.mean: Tensor | None
        self.whitening: Tensor | None
        self.register_buffer("mean", torch.zeros(dim) if config.whitening else None)
        self.register_buffer("whitening", torch.eye(dim) if config.whitening else None)
        width = config.projection_dim
        if width is not None and width >= dim:
            raise InputError(
                f"pooling.projection_dim is {width}, but the backbone's vectors have only {dim} components; give "
                "fewer, or delete it"
            )
        self.projection = None if width is None else nn.Parameter(torch.eye(width, dim))
        self.projects = width is not None
        self._states_dim = dim

    @property
    def dim(self) -> int:
        """Width of a text's vector."""
        return len(self.projection) if self.projection is not None and self.projects else self._states_dim

    @property
    def is_fitted_to_passages(self) -> bool:
        """Whether some of the weights are fitted to passages before training (``fit``)."""
        return self.whitening is not None or self.projection is not None

    def reset(self) -> None:
        """Undo ``fit``, and give the vectors that it takes, which are not projected."""
        self.projects = False
        if self.whitening is not None and self.mean is not None:
            self.mean.zero_()
            nn.init.eye_(self.whitening)

    def fit(self, vectors: Float[np.ndarray, "texts dim"]) -> None:
        """Fit what is fitted to passages to their vectors as they are after ``reset``.

        Raises:
            InputError: there are not enough of them.
        """
        self.projects = self.projection is not None
        if self.whitening is not None and self.mean is not None:
            mean, matrix = whitening(vectors)
            self.mean.copy_(torch.from_numpy(mean))
            self.whitening.copy_(torch.from_numpy(matrix))
        if self.projection is not None:
            with torch.no_grad():
                self.projection.copy_(torch.from_numpy(principal_components(vectors, len(self.projection)).copy()))

    def drop_idle(self) -> bool:
        """Remove PMA if its gate is 0, so that it adds nothing; whether it was removed."""
        if self.gate is None or float(self.gate.detach()):
            return False
        self.pma = self.gate = None
        return True

    def forward(
        self,
        states: Float[Tensor, "batch tokens dim"],
        mask: Bool[Tensor, "batch tokens"],
        own: Float[Tensor, "batch dim"],
    ) -> Float[Tensor, "batch vector_dim"]:
        """The text's vector, float32; ``own`` is the backbone's own pooling of the same states."""
        own = to_sphere(own.float())
        if self.whitening is not None and self.mean is not None:
            own = to_sphere((own - self.mean) @ self.whitening)
        if self.pma is None:
            return self._project(own)
        pooled = self.pma(states.float(), mask)
        return self._project(pooled if self.gate is None else own + self.gate * pooled)

    def _project(self, vectors: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch projection_dim"]:
        if self.projection is None or not self.projects:
            return vectors
        return to_sphere(vectors @ self.projection.T)


def to_sphere(vectors: Float[Tensor, "*texts dim"]) -> Float[Tensor, "*texts dim"]:
    """Vectors of norm sqrt(dim), whose inner product is dim times their cosine."""
    return functional.normalize(vectors, dim=-1) * vectors.shape[-1] ** 0.5
