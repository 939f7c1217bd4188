"""The teacher's order of every two candidates (RankNet)."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from d2llm.ops.losses import masked_mean, zero_outside
from d2llm.recipe.losses import Loss
from d2llm.training.losses import LossInput


class RankNet(Loss, kind="ranknet"):
    """The teacher's order of every two candidates (RankNet)."""

    paper = "Burges et al., ICML 2005; Zhuang et al., SIGIR 2023 (RankT5)"
    needs = frozenset({"labels"})
    costs = "one row of scores for each labelled pair"
    measured = (
        "-.0034 against list imitation on qnli, banking77 ([one seed](recipes.md#losses-how-to-imitate-a-"
        "teacher)); by [better grades](ablations.md#the-published-objective-taught-by-grades-that-are-better-"
        "than-the-student) -.062 ±.010 against judgements on squad-sent and banking77, -.025 ±.017 on wikiqa "
        "and quora (three seeds)"
    )

    def __call__(self, inputs: LossInput) -> Tensor:
        return ranknet(inputs.imitating, inputs.log_odds, inputs.candidates)


def ranknet(
    logits: Float[Tensor, "queries passages"],
    teacher_scores: Float[Tensor, "queries passages"],
    candidate_mask: Bool[Tensor, "queries passages"],
) -> Float[Tensor, ""]:
    """Each passage should score above those that the teacher places below it.

    L_i = mean_{j, k in C: l_ij > l_ik} log( 1 + exp(z_ik - z_ij) )

    Counted: queries with such a pair. Pairs of two passages of -inf have no order. Burges et al., "Learning to Rank
    using Gradient Descent", ICML 2005; the pairwise logistic loss of RankT5 (Zhuang et al., SIGIR 2023). Memory: one
    row of N per passage with a score above -inf.
    """
    query, is_below, losses = ordered_pairs(logits, teacher_scores, candidate_mask)
    per_query = sum_by_query(torch.where(is_below, losses, 0.0), query, len(logits))
    num_pairs = sum_by_query(is_below.to(per_query.dtype), query, len(logits))
    return masked_mean(per_query / num_pairs.clamp(min=1), num_pairs > 0).to(logits.dtype)


def ordered_pairs(logits: Tensor, scores: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All pairs of a passage with a score above -inf and a candidate that scores lower.

    Returns (query of each such passage [n], whether a candidate is below it [n, N], log(1 + exp(z_k - z_j)) [n, N]).
    """
    (student,) = zero_outside(mask, logits)
    scores = scores.masked_fill(~mask, torch.inf)  # never below
    query, high = (mask & (scores > -torch.inf)).nonzero(as_tuple=True)
    is_below = scores[query] < scores[query, high][:, None]
    return query, is_below, functional.softplus(student[query] - student[query, high][:, None])


def sum_by_query(rows: Tensor, query: Tensor, num_queries: int) -> Tensor:
    """Sums [num_queries] of the rows [n, N] that belong to each query."""
    return rows.new_zeros(num_queries).index_add(0, query, rows.sum(dim=1))
