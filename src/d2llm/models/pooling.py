"""From the states of tokens to the vector of a text, as a module (``recipe.student``)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

from d2llm.recipe.student import AutoPooling, Pooling

if TYPE_CHECKING:
    from d2llm.models.backbone import Backbone
    from d2llm.models.tokens import EncodedTexts


class TextPooling(nn.Module):
    """What pools states of tokens [batch, tokens, dim], padded on the right, to float32 vectors [batch, dim].

    Attributes:
        dim: width of the vectors.
        inner: the pooling whose vectors it changes, if there is one.
        gate: factor of what it adds to the vectors of ``inner``, if it does: it can be left out where the gate is 0.
        takes_one_token: whether a vector is the state of a single token.
        is_fitted_to_passages: whether some of its weights are fitted to passages before training (``fit_texts``).
    """

    gate: nn.Parameter | None
    inner: TextPooling | None
    takes_one_token = False
    is_fitted_to_passages = False

    def __init__(self, dim: int, inner: TextPooling | None = None) -> None:
        super().__init__()
        self.dim, self.inner, self.gate = dim, inner, None

    @property
    def stages(self) -> tuple[TextPooling, ...]:
        """This pooling, the one whose vectors it changes, and so on."""
        return (self, *(() if self.inner is None else self.inner.stages))

    @property
    def gated(self) -> TextPooling | None:
        """The stage with a gate, if there is one."""
        return next((stage for stage in self.stages if stage.gate is not None), None)

    def fit_texts(self, texts: Sequence[str], encode: Callable[[Sequence[str]], EncodedTexts]) -> None:
        """Fit what is fitted to passages; ``encode`` gives the vectors of ``inner``.

        Raises:
            InputError: there are not enough of them.
        """
        self.fit(encode(texts).vectors)

    def fit(self, vectors: Float[np.ndarray, "texts dim"]) -> None:
        """The same, given the vectors of ``inner``."""

    def forward(
        self, states: Float[Tensor, "batch tokens dim"], mask: Bool[Tensor, "batch tokens"]
    ) -> Float[Tensor, "batch vector_dim"]:
        """The vectors; tokens where ``mask`` is false are ignored."""
        raise NotImplementedError


class WeightlessPooling(TextPooling):
    """What a kind without weights pools, of norm sqrt(dim)."""

    def __init__(self, kind: Pooling, dim: int) -> None:
        super().__init__(dim)
        self.kind = kind
        self.takes_one_token = kind.takes_one_token

    def forward(
        self, states: Float[Tensor, "batch tokens dim"], mask: Bool[Tensor, "batch tokens"]
    ) -> Float[Tensor, "batch dim"]:
        """Vectors sqrt(dim) pool(Y) / |pool(Y)|, whose inner product is dim times their cosine."""
        return to_sphere(self.kind.pool(states.float(), mask))


def make_pooling(kind: Pooling, backbone: Backbone) -> TextPooling:
    """The module of a pooling for the states of a backbone.

    Raises:
        InputError: the backbone does not fit.
    """
    if isinstance(kind, AutoPooling):
        kind = backbone.own_pooling
    return kind.module(backbone) or WeightlessPooling(kind, backbone.dim)


def without_gated(pooling: TextPooling) -> TextPooling:
    """The pooling without the stage that has a gate, in place."""
    if pooling.inner is None:
        return pooling
    if pooling.gate is not None:
        return pooling.inner
    pooling.inner = without_gated(pooling.inner)
    return pooling


def with_gated(pooling: TextPooling, other: TextPooling) -> TextPooling:
    """The pooling, in place, with the gated stage of another that has the same stages besides."""
    if other.gate is not None:
        other.inner = pooling
        return other
    if pooling.inner is not None and other.inner is not None:
        pooling.inner = with_gated(pooling.inner, other.inner)
    return pooling


def to_sphere(vectors: Float[Tensor, "*texts dim"]) -> Float[Tensor, "*texts dim"]:
    """Vectors of norm sqrt(dim), whose inner product is dim times their cosine."""
    return functional.normalize(vectors, dim=-1) * vectors.shape[-1] ** 0.5
