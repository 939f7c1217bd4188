"""Vectors with mean 0 and covariance 1 on the passages of the data sets."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from d2llm.core.errors import InputError
from d2llm.models.backbone import Backbone
from d2llm.models.pooling import TextPooling, make_pooling, to_sphere
from d2llm.ops.whitening import whitening
from d2llm.recipe.student import ChangedPooling


class Whitening(ChangedPooling, kind="whitening"):
    """Another pooling's vectors with mean 0 and covariance 1 on passages, fitted before the first step.

    With ``dim``, of the directions in which the passages differ most alone (whitening-k). Over the pooling
    ``first_last``, this is WhiteningBERT.

    Su et al., "Whitening Sentence Representations for Better Semantics and Faster Retrieval", 2021.
    """

    paper = "Su et al. 2021, arXiv 2103.15316; Huang et al. 2021, arXiv 2104.01767 (WhiteningBERT)"
    costs = "more passages than dimensions, better ten times as many, read once"
    measured = (
        "before training: squad-sent +.135 with smollm2, -.038 with minilm, a third of the dimensions +.168 "
        "and -.019 ([200 dev queries](log/2026-11.md#2026-11-30-more-methods-measured-and-retromae-and-bebr)); "
        "after it, with minilm: -.018 with PMA, -.020 without ([one "
        "seed](log/2026-11.md#2026-11-25-two-heads-nested-widths-and-whitening-after-training))"
    )
    reads_tokens: ClassVar[bool] = False

    dim: int | None = Field(default=None, ge=1)
    """Width of the text's vector, smaller than that of the pooling's. None: the same."""

    @property
    def is_trained(self) -> bool:
        return self.pooling.is_trained

    def module(self, backbone: Backbone) -> TextPooling:
        inner = make_pooling(self.pooling, backbone)
        if self.dim is not None and self.dim >= inner.dim:
            raise InputError(
                f"pooling.dim is {self.dim}, but the vectors to whiten have only {inner.dim} components; give fewer, "
                "or delete it"
            )
        return WhitenedPooling(inner, self.dim or inner.dim)


class WhitenedPooling(TextPooling):
    """(y - m) W, of norm sqrt(dim); until they are fitted, m is 0 and W keeps the first components."""

    inner: TextPooling  # pyright: ignore[reportIncompatibleVariableOverride]
    mean: Tensor
    whitening: Tensor
    is_fitted_to_passages = True

    def __init__(self, inner: TextPooling, dim: int) -> None:
        super().__init__(dim, inner)
        self.register_buffer("mean", torch.zeros(inner.dim))
        self.register_buffer("whitening", torch.eye(inner.dim, dim))

    def fit(self, vectors: Float[np.ndarray, "texts dim"]) -> None:
        mean, matrix = whitening(vectors, self.dim)
        self.mean.copy_(torch.from_numpy(mean))
        self.whitening.copy_(torch.from_numpy(matrix))

    def forward(
        self, states: Float[Tensor, "batch tokens dim"], mask: Bool[Tensor, "batch tokens"]
    ) -> Float[Tensor, "batch vector_dim"]:
        return to_sphere((self.inner(states, mask) - self.mean) @ self.whitening)
