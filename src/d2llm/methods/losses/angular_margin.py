"""A positive above every other passage by a margin, in angles between vectors (CoRT)."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from d2llm.ops.losses import masked_mean
from d2llm.recipe.losses import Loss
from d2llm.training.losses import LossInput


class AngularMargin(Loss, kind="angular_margin"):
    """A positive above every other passage by a margin, in angles between vectors (CoRT).

    The paper's hard negatives are BM25's: ``training.complement_words``.
    """

    paper = "Wrzalik and Krechel, NAACL 2021, arXiv 2010.10252 (CoRT)"
    needs = frozenset({"judgements"})
    measured = (
        "against judgements by cross-entropy -.010 (.725 and .735; wikiqa -.024, banking77 +.004; [one "
        "seed](log/2026-11.md#2026-11-29-methods-as-their-papers-have-them), vectors alone)"
    )
    of_vectors: ClassVar[bool] = True
    of_products: ClassVar[bool] = True

    margin: float = Field(default=0.1, gt=0, lt=1)
    """In similarities of 0 (opposite directions) to 1 (the same)."""

    def __call__(self, inputs: LossInput) -> Tensor | None:
        if inputs.vectors is None:
            return None
        queries, passages = inputs.for_products(inputs.vectors)
        return angular_margin(queries, passages, inputs.positive, inputs.negatives, margin=self.margin)


def angular_margin(
    queries: Float[Tensor, "queries dim"],
    passages: Float[Tensor, "passages dim"],
    positive_mask: Bool[Tensor, "queries passages"],
    negative_mask: Bool[Tensor, "queries passages"],
    *,
    margin: float,
) -> Float[Tensor, ""]:
    """A triplet loss over all negatives of the batch, by the angle between two vectors.

    L_i = 1/|D+| sum_{j in D+, k in D-} max( 0, m - s_ij + s_ik ),  s_ij = 1 - arccos(cos(a_i, b_j)) / pi

    Counted: queries with a positive. Wrzalik and Krechel, "CoRT: Complementary Rankings from Transformers", NAACL 2021
    (arXiv 2010.10252); there the loss is a sum over queries too.

    Args:
        queries: the queries' vectors, ready for inner products.
        passages: the passages' vectors.
        positive_mask: which passages are relevant.
        negative_mask: which passages are not.
        margin: m, above 0.
    """
    dtype = torch.promote_types(queries.dtype, torch.float32)
    a, b = (functional.normalize(vectors.to(dtype), dim=1) for vectors in (queries, passages))
    near = 1.0 - 1e-6  # the gradient of arccos is infinite at 1
    similarities = 1.0 - (a @ b.T).clamp(-near, near).arccos() / math.pi
    query, positive = positive_mask.nonzero(as_tuple=True)
    above = similarities[query, positive][:, None] - similarities[query]
    costs = torch.where(negative_mask[query], (margin - above).clamp(min=0.0), 0.0).sum(dim=1)
    per_positive = torch.zeros_like(similarities).index_put((query, positive), costs)
    return masked_mean(masked_mean(per_positive, positive_mask), positive_mask.any(dim=1)).to(queries.dtype)
