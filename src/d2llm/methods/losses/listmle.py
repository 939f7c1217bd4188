"""The teacher's order of all candidates, one after the other (ListMLE)."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from d2llm.ops.losses import masked_mean, zero_outside
from d2llm.recipe.losses import Loss
from d2llm.training.losses import LossInput


class ListMLE(Loss, kind="listmle"):
    """The teacher's order of all candidates, one after the other (ListMLE)."""

    paper = "Xia et al., ICML 2008 (ListMLE); Reddi et al., AISTATS 2021 (RankDistil)"
    needs = frozenset({"labels"})
    measured = (
        "-.010 against judgements alone ([one seed](log/2026-11.md#2026-11-29-methods-as-their-papers-"
        "have-them)), -.0138 against list imitation ([one seed](recipes.md#losses-how-to-imitate-a-teacher)); "
        "by [better grades](ablations.md#the-published-objective-taught-by-grades-that-are-better-than-the-"
        "student) -.041 ±.002 and -.025 ±.009 against judgements on two pairs of sets (three seeds)"
    )

    def __call__(self, inputs: LossInput) -> Tensor:
        return listmle(inputs.imitating, inputs.log_odds, inputs.candidates)


def listmle(
    logits: Float[Tensor, "queries passages"],
    teacher_scores: Float[Tensor, "queries passages"],
    candidate_mask: Bool[Tensor, "queries passages"],
) -> Float[Tensor, ""]:
    """The teacher's order should be probable if the student draws one passage after the other.

    L_i = 1/n sum_{r=1..n} -log( exp(z_r) / sum_{s >= r} exp(z_s) )

    with the candidates in the teacher's order; only the n with a score above -inf are drawn, the others follow all of
    them, in no order. Of equal scores the first one counts as the higher. Counted: queries with a drawn candidate. The
    Plackett-Luce model's likelihood of an order: Xia et al., "Listwise Approach to Learning to Rank", ICML 2008
    (ListMLE); for distilling rankings: Reddi et al., "RankDistil", AISTATS 2021.
    """
    drawn = candidate_mask & (teacher_scores > -torch.inf)
    (teacher,) = zero_outside(drawn, teacher_scores)
    key = teacher.masked_fill(~drawn, torch.finfo(teacher.dtype).min / 2)
    costs, order = drawing_costs(logits, key, candidate_mask)
    is_drawn = drawn.gather(1, order)
    per_query = masked_mean(torch.where(is_drawn, costs, 0.0), is_drawn)
    return masked_mean(per_query, is_drawn.any(dim=1)).to(logits.dtype)


def drawing_costs(
    logits: Float[Tensor, "queries passages"],
    key: Float[Tensor, "queries passages"],
    candidate_mask: Bool[Tensor, "queries passages"],
) -> tuple[Float[Tensor, "queries passages"], Int[Tensor, "queries passages"]]:
    """-log( exp(z_r) / sum_{s >= r} exp(z_s) ) for each place r, and the columns in the order of ``key``.

    The highest key is drawn first; what is not a candidate comes last, and of equal keys the first column.
    """
    (student,) = zero_outside(candidate_mask, logits)
    lowest = torch.finfo(student.dtype).min
    key = key.to(student.dtype).masked_fill(~candidate_mask, lowest)
    order = key.sort(dim=1, descending=True, stable=True).indices
    ordered = student.masked_fill(~candidate_mask, lowest).gather(1, order)
    return ordered.flip(1).logcumsumexp(dim=1).flip(1) - ordered, order
