"""A positive nearer to its query than to the query's negatives (PAIR)."""

from __future__ import annotations

from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from d2llm.ops.losses import masked_mean
from d2llm.recipe.losses import Loss
from d2llm.training.losses import LossInput


class PassageContrast(Loss, kind="passage_contrast"):
    """A positive nearer to its query than to the query's negatives; beside losses on the query's side (PAIR)."""

    paper = "Ren et al., ACL Findings 2021, arXiv 2108.06027 (PAIR)"
    needs = frozenset({"judgements"})
    measured = (
        "against judgements alone +.003 (.738 and .735; wikiqa +.005, banking77 +.001; [one "
        "seed](log/2026-11.md#2026-11-29-methods-as-their-papers-have-them), vectors alone); static vectors +.001 "
        "([three seeds](log/2026-11.md#2026-11-30-three-seeds-of-what-looked-best-and-methods-without-a-figure))"
    )
    of_vectors: ClassVar[bool] = True
    of_products: ClassVar[bool] = True
    least_hard: ClassVar[int] = 1

    weight: float = Field(default=0.1, ge=0)
    """.1 in PAIR, beside .9 for the query's side."""

    def __call__(self, inputs: LossInput) -> Tensor | None:
        if inputs.vectors is None:
            return None
        queries, passages = inputs.for_products(inputs.vectors)
        return passage_contrast(queries, passages, inputs.positive, inputs.hard)


def passage_contrast(
    queries: Float[Tensor, "queries dim"],
    passages: Float[Tensor, "passages dim"],
    positive_mask: Bool[Tensor, "queries passages"],
    negative_mask: Bool[Tensor, "queries passages"],
) -> Float[Tensor, ""]:
    """Each positive should be more similar to its query than to the query's negatives.

    L_i = -1/|D+| sum_{j in D+} log( exp(20 cos(b_j, a_i)) / ( exp(20 cos(b_j, a_i)) + sum_{k in D-}
    exp(20 cos(b_j, b_k)) ) )

    Counted: queries with a positive. Ren et al., "PAIR: Leveraging Passage-Centric Similarity Relation for Improving
    Dense Passage Retrieval", ACL Findings 2021 (arXiv 2108.06027), section 3.2, whose similarity is the inner product.

    Args:
        queries: the queries' vectors, ready for inner products.
        passages: the passages' vectors.
        positive_mask: which passages are relevant.
        negative_mask: which are the query's own negatives.
    """
    dtype = torch.promote_types(queries.dtype, torch.float32)
    a, b = (functional.normalize(vectors.to(dtype), dim=1) for vectors in (queries, passages))
    query, positive = positive_mask.nonzero(as_tuple=True)
    to_query = 20 * (a[query] * b[positive]).sum(dim=1)
    to_negatives = (20 * b[positive] @ b.T).masked_fill(~negative_mask[query], torch.finfo(dtype).min)
    costs = functional.softplus(to_negatives.logsumexp(dim=1) - to_query) if len(query) else to_query
    per_positive = torch.zeros_like(a @ b.T).index_put((query, positive), costs)
    return masked_mean(masked_mean(per_positive, positive_mask), positive_mask.any(dim=1)).to(queries.dtype)
