"""The teacher's order of every two candidates, weighted by their exchange's change in nDCG (LambdaRank)."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from d2llm.methods.losses.ranknet import ordered_pairs, sum_by_query
from d2llm.ops.losses import masked_mean, zero_outside
from d2llm.recipe.losses import Loss
from d2llm.training.losses import LossInput


class LambdaRank(Loss, kind="lambdarank"):
    """The teacher's order of every two candidates, weighted by their exchange's change in nDCG (LambdaRank)."""

    paper = "Burges 2010; Wang et al., CIKM 2018 (LambdaLoss)"
    needs = frozenset({"labels"})
    costs = "one row of scores for each labelled pair"
    measured = (
        "-.0019 against list imitation on qnli, banking77 ([one seed](recipes.md#losses-how-to-imitate-a-"
        "teacher)); by [better grades](ablations.md#the-published-objective-taught-by-grades-that-are-better-"
        "than-the-student) -.007 ±.008 against judgements on squad-sent and banking77, -.008 ±.014 on wikiqa "
        "and quora (three seeds)"
    )

    def __call__(self, inputs: LossInput) -> Tensor:
        return lambdarank(inputs.imitating, inputs.probabilities, inputs.candidates)


def lambdarank(
    logits: Float[Tensor, "queries passages"],
    teacher_probabilities: Float[Tensor, "queries passages"],
    candidate_mask: Bool[Tensor, "queries passages"],
) -> Float[Tensor, ""]:
    """RankNet with each pair weighted by what exchanging its two passages would change in nDCG.

    L_i = sum_{j, k in C: s_ij > s_ik} |s_ij - s_ik| |d(r_j) - d(r_k)| / DCG*_i  log( 1 + exp(z_ik - z_ij) )

    with d(r) = 1 / log2(1 + r), r the student's rank among the candidates, and the teacher's probabilities as gains;
    DCG*_i is the teacher's own order's. Counted: queries with such a pair. Burges, "From RankNet to LambdaRank to
    LambdaMART", 2010; as a loss: Wang et al., "The LambdaLoss Framework", CIKM 2018. Memory: as ``ranknet``.
    """
    (gains,) = zero_outside(candidate_mask, teacher_probabilities)
    query, is_below, losses = ordered_pairs(
        logits, teacher_probabilities.masked_fill(teacher_probabilities <= 0, -torch.inf), candidate_mask
    )
    discounts = 1.0 / torch.arange(2, logits.shape[1] + 2, device=logits.device, dtype=losses.dtype).log2()
    gains = gains.to(losses.dtype)
    ideal = (gains.sort(dim=1, descending=True).values * discounts).sum(dim=1)
    with torch.no_grad():
        order = logits.float().masked_fill(~candidate_mask, -torch.inf).argsort(dim=1, descending=True, stable=True)
        discount = torch.empty_like(gains).scatter_(1, order, discounts.expand_as(gains))
    high = candidate_mask & (teacher_probabilities > 0)
    row, column = high.nonzero(as_tuple=True)
    change = (gains[row, column][:, None] - gains[row]).abs() * (discount[row, column][:, None] - discount[row]).abs()
    change = change / ideal.clamp(min=torch.finfo(ideal.dtype).tiny)[row][:, None]
    per_query = sum_by_query(torch.where(is_below, change * losses, 0.0), query, len(logits))
    has_pairs = sum_by_query(is_below.to(per_query.dtype), query, len(logits)) > 0
    return masked_mean(per_query, has_pairs).to(logits.dtype)
