"""A mean and a variance for each dimension of a text, compared by their divergence (MRL)."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

from d2llm.models.backbone import Backbone
from d2llm.models.pooling import TextPooling, make_pooling
from d2llm.recipe.student import ChangedPooling

_ONE = math.log(math.e - 1)  # softplus of it is 1


class Multivariate(ChangedPooling, kind="multivariate"):
    """A normal distribution for each text, of another pooling's vectors, compared by their divergence; for the head
    ``divergence`` (MRL).
    """

    paper = "Zamani and Bendersky, SIGIR 2023, arXiv 2304.14522 (MRL)"
    measured = (
        "against cosines with the same losses +.009 ([one seed](log/2026-11.md#2026-11-30-methods-of-other-vectors-"
        "answers-and-batches)); against two maps, with static vectors, wikiqa +.011, stackfaq +.016, banking77 -.002 "
        "([three seeds](ablations.md#two-maps-or-a-mean-and-a-variance-on-three-sets)), as heads level ([one "
        "seed](ablations.md#all-heads-on-the-same-lists))"
    )
    costs = "vectors with twice as many dimensions and one more; the head `divergence`"
    reads_tokens: ClassVar[bool] = False

    def module(self, backbone: Backbone) -> TextPooling:
        return MultivariatePooling(make_pooling(self.pooling, backbone))


class MultivariatePooling(TextPooling):
    """f [c, 1 / s^2 - 1, m / s^2] with m = M y and s^2 = softplus(S y + b), f = sqrt(2 + 1 / k) and
    c = (k - sum of (ln s^2 + m^2 / s^2)) / sqrt(k), for k dimensions of y.

    It is the passage's side of the score as an inner product (``DivergenceHead`` makes the query's of it): Zamani and
    Bendersky, "Multivariate Representation Learning for Information Retrieval", SIGIR 2023 (arXiv 2304.14522), section
    3.3. Constants are such that M = 1, S = 0, s^2 = 1 at the start, where the score is that of a cosine, give vectors
    of norm sqrt(2 k + 1), as formats of few bits want them. There m and s are made of two tokens put before a text;
    here of one vector.
    """

    inner: TextPooling  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, inner: TextPooling) -> None:
        super().__init__(2 * inner.dim + 1, inner)
        self.mean = nn.Parameter(torch.eye(inner.dim))
        self.spread = nn.Linear(inner.dim, inner.dim)
        nn.init.zeros_(self.spread.weight)
        nn.init.constant_(self.spread.bias, _ONE)

    def forward(
        self, states: Float[Tensor, "batch tokens dim"], mask: Bool[Tensor, "batch tokens"]
    ) -> Float[Tensor, "batch vector_dim"]:
        vectors = self.inner(states, mask)
        size = self.inner.dim
        mean, variance = vectors @ self.mean.T, functional.softplus(self.spread(vectors))
        constant = (size - (variance.log() + mean**2 / variance).sum(dim=-1, keepdim=True)) / size**0.5
        return (self.dim / size) ** 0.5 * torch.cat([constant, 1 / variance - 1, mean / variance], dim=-1)
