"""The teacher's distribution, by its transport distance instead of a divergence (SinKD)."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from d2llm.ops.losses import checked_temperature, zero_outside
from d2llm.recipe.losses import Loss
from d2llm.training.losses import LossInput


class Sinkhorn(Loss, kind="sinkhorn"):
    """The teacher's distribution, by its transport distance instead of a divergence (SinKD)."""

    paper = "Cui et al., COLING 2024, arXiv 2402.17110 (SinKD)"
    needs = frozenset({"labels"})
    costs = "distances of all pairs of queries of a batch"
    measured = (
        "+.001 against judgements, list imitation +.003 ([one seed](log/2026-11.md#2026-11-29-methods-as-their-"
        "papers-have-them)); temperature 1: +.0037 over list imitation ([one "
        "seed](recipes.md#losses-how-to-imitate-a-teacher)), "
        "by [better grades](ablations.md#the-published-objective-taught-by-grades-that-are-better-than-the-"
        "student) -.020 ±.007 and -.001 ±.016 against judgements"
    )

    temperature: float = Field(default=2.0, gt=0)
    """Divides the scores of both before their distributions are compared."""

    def __call__(self, inputs: LossInput) -> Tensor:
        return sinkhorn(inputs.imitating, inputs.log_odds, inputs.candidates, temperature=self.temperature)


def sinkhorn(
    logits: Float[Tensor, "queries passages"],
    teacher_log_odds: Float[Tensor, "queries passages"],
    candidate_mask: Bool[Tensor, "queries passages"],
    *,
    temperature: float = 1.0,
    smoothing: float = 0.1,
    num_rounds: int = 20,
) -> Float[Tensor, ""]:
    """The teacher's distributions should be near the student's, as a cheap way of moving the one onto the other.

    L = 1/Q sum_ij P_ij D_ij,  D_ij = sum_k |p_ik - q_jk|

    with p = softmax_C(l / t), q = softmax_C(z / t) and P the transport plan between the batch's teacher and student
    distributions, which Sinkhorn's iterations make of exp(-D / smoothing) (rows and columns sum to 1). Counted: queries
    with a candidate of log-odds above -inf. SinKD, Cui et al., "Sinkhorn Distance Minimization for Knowledge
    Distillation", COLING 2024 (arXiv 2402.17110), with its smoothing and number of rounds. Its classes are the same for
    all examples; two queries share candidates only within a batch, so P is nearly diagonal and L nearly the mean
    distance of each query's own two distributions.
    """
    scale = 1.0 / checked_temperature(temperature)
    possible = candidate_mask & (teacher_log_odds > -torch.inf)
    counted = possible.any(dim=1)
    (student,) = zero_outside(candidate_mask, scale * logits)
    (teacher,) = zero_outside(possible, scale * teacher_log_odds)
    lowest = torch.finfo(student.dtype).min
    p = torch.where(possible, teacher.to(student.dtype).masked_fill(~possible, lowest).softmax(dim=1), 0.0)[counted]
    q = torch.where(candidate_mask, student.masked_fill(~candidate_mask, lowest).softmax(dim=1), 0.0)[counted]
    distances = (p[:, None] - q[None]).abs().sum(dim=2)
    plan = (-distances / checked_temperature(smoothing)).exp()
    smallest = torch.finfo(plan.dtype).tiny
    for _ in range(num_rounds):
        plan = plan / plan.sum(dim=0, keepdim=True).clamp(min=smallest)
        plan = plan / plan.sum(dim=1, keepdim=True).clamp(min=smallest)
    return ((plan * distances).sum() / counted.sum().clamp(min=1)).to(logits.dtype)
