"""Negatives that are mixed from two hard ones each (KaLM-Embedding-V2)."""

from __future__ import annotations

import random
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from d2llm.ops.losses import in_batch_cross_entropy
from d2llm.recipe.losses import Loss
from d2llm.training.losses import LossInput


class MixedNegatives(Loss, kind="mixed_negatives"):
    """In-batch cross-entropy of cosines, with negatives mixed from two hard ones each (KaLM-Embedding-V2)."""

    paper = "Zhao et al. 2025, arXiv 2506.20923 (KaLM-Embedding-V2); Kalantidis et al. 2020, arXiv 2010.01028 (MoCHi)"
    needs = frozenset({"judgements"})
    measured = (
        "against judgements alone -.000 (.7348 and .7350; wikiqa -.001, banking77 +.001; [one "
        "seed](log/2026-11.md#2026-11-29-methods-as-their-papers-have-them), vectors alone)"
    )
    of_vectors: ClassVar[bool] = True
    of_products: ClassVar[bool] = True
    least_hard: ClassVar[int] = 2

    num_mixed: int = Field(default=4, ge=1)
    """Mixtures a query, of pairs of its hard negatives and at random weights."""

    def __call__(self, inputs: LossInput) -> Tensor | None:
        if inputs.vectors is None:
            return None
        queries, passages = inputs.for_products(inputs.vectors)
        weights = mixtures(inputs.hard, self.num_mixed, random.Random(" ".join(inputs.batch.query_ids)))
        return mixed_negatives(queries, passages, inputs.positive, inputs.candidates, weights.to(passages.device))


def mixtures(
    hard_mask: Bool[Tensor, "queries passages"], num_mixed: int, rng: random.Random
) -> Float[Tensor, "queries mixed passages"]:
    """For each query, the weights of ``num_mixed`` mixtures of two hard negatives; 0 if it has fewer than two."""
    weights = torch.zeros(len(hard_mask), num_mixed, hard_mask.shape[1])
    for row, mask in enumerate(hard_mask.tolist()):
        hard = [column for column, is_hard in enumerate(mask) if is_hard]
        for mixture in weights[row] if len(hard) > 1 else ():
            one, other = rng.sample(hard, 2)
            mixture[one] = rng.random()
            mixture[other] = 1.0 - mixture[one]
    return weights


def mixed_negatives(
    queries: Float[Tensor, "queries dim"],
    passages: Float[Tensor, "passages dim"],
    positive_mask: Bool[Tensor, "queries passages"],
    candidate_mask: Bool[Tensor, "queries passages"],
    weights: Float[Tensor, "queries mixed passages"],
) -> Float[Tensor, ""]:
    """``in_batch_cross_entropy`` of 20 times the cosines, with h_im = sum_k w_imk b_k / |...| as negatives of query i.

    b are unit vectors, and a mixture of weights 0 is left out. Zhao et al., "KaLM-Embedding-V2", 2025 (arXiv
    2506.20923), online hard-negative mixing of pairs; Kalantidis et al., "Hard Negative Mixing for Contrastive
    Learning", NeurIPS 2020 (arXiv 2010.01028), equation 3.

    Args:
        queries: the queries' vectors, ready for inner products.
        passages: the passages' vectors.
        positive_mask: which passages are relevant.
        candidate_mask: which passages a query is compared with.
        weights: of the passages in each mixture (``mixtures``).
    """
    dtype = torch.promote_types(queries.dtype, torch.float32)
    a, b = (functional.normalize(vectors.to(dtype), dim=1) for vectors in (queries, passages))
    mixed = functional.normalize(weights.to(dtype) @ b, dim=2)
    cosines = torch.cat([a @ b.T, (mixed @ a[:, :, None]).squeeze(2)], dim=1)
    is_mixed = weights.any(dim=2)
    positive = torch.cat([positive_mask, torch.zeros_like(is_mixed)], dim=1)
    candidates = torch.cat([candidate_mask, is_mixed], dim=1)
    return in_batch_cross_entropy(cosines, positive, candidates, temperature=0.05).to(queries.dtype)
