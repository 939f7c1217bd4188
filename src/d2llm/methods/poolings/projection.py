"""Vectors of fewer dimensions, by a trained linear map."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from d2llm.core.errors import InputError
from d2llm.models.backbone import Backbone
from d2llm.models.pooling import TextPooling, make_pooling, to_sphere
from d2llm.ops.whitening import principal_components
from d2llm.recipe.student import ChangedPooling


class Projection(ChangedPooling, kind="projection"):
    """Another pooling's vectors in fewer dimensions, by a trained map that starts as principal components.

    Those of the student's own vectors; or those of a teacher's, if the pretraining ``components`` comes first (HPD).
    """

    paper = "after Zhao et al., Findings of ACL 2022, arXiv 2203.07687"
    costs = "ten passages for each of the backbone's dimensions, read once"
    measured = (
        "128 of minilm's 384 dimensions: -.013 (.7695 against .7828; qnli .834 against .860, banking77 .705 against "
        ".705; [one seed](log/2026-11.md#2026-11-25-two-adapters-fewer-layers-and-fewer-dimensions))"
    )
    reads_tokens: ClassVar[bool] = False

    dim: int = Field(ge=1)
    """Width of the text's vector, smaller than the backbone's."""

    @model_validator(mode="after")
    def _check_pooling(self) -> Projection:
        if self.pooling.kind == "whitening":
            raise ValueError(
                "pooling is whitening, but a projection keeps the directions in which passages differ most, and after "
                "whitening they differ as much in all: name another"
            )
        return self

    def module(self, backbone: Backbone) -> TextPooling:
        inner = make_pooling(self.pooling, backbone)
        if self.dim >= inner.dim:
            raise InputError(
                f"pooling.dim is {self.dim}, but the vectors to project have only {inner.dim} components; give fewer, "
                "or another pooling"
            )
        return ProjectedPooling(inner, self.dim)


class ProjectedPooling(TextPooling):
    """P y, of norm sqrt(dim). P starts as the principal components of passages; until then, the first components."""

    inner: TextPooling  # pyright: ignore[reportIncompatibleVariableOverride]
    is_fitted_to_passages = True

    def __init__(self, inner: TextPooling, dim: int) -> None:
        super().__init__(dim, inner)
        self.projection = nn.Parameter(torch.eye(dim, inner.dim))

    def fit(self, vectors: Float[np.ndarray, "texts dim"]) -> None:
        with torch.no_grad():
            self.projection.copy_(torch.from_numpy(principal_components(vectors, self.dim).copy()))

    def forward(
        self, states: Float[Tensor, "batch tokens dim"], mask: Bool[Tensor, "batch tokens"]
    ) -> Float[Tensor, "batch vector_dim"]:
        return to_sphere(self.inner(states, mask) @ self.projection.T)
