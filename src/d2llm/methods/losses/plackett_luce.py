"""The relevant passages first, then the teacher's order, each choice weighted by the teacher (PLD)."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from d2llm.methods.losses.listmle import drawing_costs
from d2llm.ops.losses import list_distributions, masked_mean
from d2llm.recipe.losses import Loss
from d2llm.training.losses import LossInput


class PlackettLuce(Loss, kind="plackett_luce"):
    """The relevant passages first, then the teacher's order, each choice weighted by the teacher's softmax (PLD)."""

    paper = "Bassam et al. 2025, arXiv 2506.12542 (PLD)"
    needs = frozenset({"labels"})
    measured = (
        "against judgements alone +.006 (.741 and .735), list imitation +.003 ([one "
        "seed](log/2026-11.md#2026-11-29-methods-as-their-papers-have-them)); static vectors +.006 and +.0021 ±.0003 "
        "([three seeds](log/2026-11.md#2026-11-30-three-seeds-of-what-looked-best-and-methods-without-a-figure)), "
        "with two maps +.0012 ±.0002 ([three](ablations.md#two-maps-or-a-mean-and-a-variance-on-three-sets))"
    )

    def __call__(self, inputs: LossInput) -> Tensor:
        return plackett_luce(inputs.imitating, inputs.log_odds, inputs.positive, inputs.candidates)


def plackett_luce(
    logits: Float[Tensor, "queries passages"],
    teacher_log_odds: Float[Tensor, "queries passages"],
    positive_mask: Bool[Tensor, "queries passages"],
    candidate_mask: Bool[Tensor, "queries passages"],
) -> Float[Tensor, ""]:
    """Drawing the positives and then the others in the teacher's order should be probable, the sure choices most.

    L_i = sum_{r=1..N} p_r -log( exp(z_r) / sum_{s >= r} exp(z_s) ),  p = softmax_C(l_i)

    with the candidates in order: the positives by the teacher's log-odds, then the rest by them. Counted: queries with
    a candidate of log-odds above -inf. Bassam et al., "PLD: A Choice-Theoretic List-Wise Knowledge Distillation", 2025
    (arXiv 2506.12542), where each example has one label. With p = 1/N and no label first, it is ``listmle``.
    """
    target, _, possible = list_distributions(logits, teacher_log_odds, candidate_mask, 1.0)
    weights = torch.where(possible, target.exp(), 0.0)
    span = target.abs().amax(dim=1, keepdim=True)
    key = torch.where(possible, target, -span - 1)
    first = torch.where(positive_mask, key + 2 * span + 2, key)
    costs, order = drawing_costs(logits, first, candidate_mask)
    return masked_mean((weights.gather(1, order) * costs).sum(dim=1), possible.any(dim=1)).to(logits.dtype)
