"""Few words of a text with a weight above 0, and others in each text (SPLADE)."""

from __future__ import annotations

from typing import ClassVar

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from d2llm.recipe import Recipe
from d2llm.recipe.losses import Loss
from d2llm.training.losses import LossInput


class Flops(Loss, kind="flops"):
    """How many products of weights a query and a passage have in common; for the pooling ``splade`` (SPLADE)."""

    paper = "Paria et al., ICLR 2020, arXiv 2004.05665; Formal et al. 2021, arXiv 2107.05720 (SPLADE)"
    measured = (
        "words of a passage and a query of wikiqa 235 and 168 before training, 107 and 50 after it ([one "
        "seed](log/2026-11.md#2026-11-30-learned-words-splade-dsr-spar-and-condenser))"
    )
    of_vectors: ClassVar[bool] = True

    weight: float = Field(default=0.01, ge=0)
    queries: float = Field(default=3.0, ge=0)
    """How much more the weights of queries cost than those of passages; in SPLADE 3."""

    def check(self, recipe: Recipe) -> None:
        if recipe.student.pooling.kind != "splade":
            raise ValueError(f'losses.{self.kind} makes words of the pooling splade few: set pooling = "splade"')

    def __call__(self, inputs: LossInput) -> Tensor | None:
        if inputs.vectors is None:
            return None
        queries, passages = inputs.encoded(inputs.vectors)
        return self.queries * flops(queries) + flops(passages)


def flops(weights: Float[Tensor, "texts vocabulary"]) -> Float[Tensor, ""]:
    """sum_j ( 1/N sum_i w_ij )^2, the expected number of products of two texts.

    Formal et al., "SPLADE: Sparse Lexical and Expansion Model for First Stage Ranking", SIGIR 2021, equation 4.
    """
    return weights.mean(dim=0).square().sum()
