"""The teacher's distribution over the candidates, or softened judgements where it is unsure (FerKD)."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from d2llm.ops.losses import divergence, list_distributions, masked_mean
from d2llm.recipe.losses import Loss
from d2llm.training.losses import LossInput


class RecalibratedImitation(Loss, kind="recalibrated_imitation"):
    """List imitation in which softened judgements replace the teacher's distribution where it is unsure (FerKD)."""

    paper = "Shen, ICCV 2023, arXiv 2312.17473 (FerKD)"
    needs = frozenset({"labels"})
    measured = (
        "against judgements alone +.003 (.738 and .735; wikiqa +.003, banking77 +.002), as list imitation "
        "([one seed](log/2026-11.md#2026-11-29-methods-as-their-papers-have-them), vectors alone); static vectors "
        "+.003, list imitation +.004 ([three seeds](log/2026-11.md#2026-11-30-three-seeds-of-what-looked-best-and-"
        "methods-without-a-figure))"
    )

    threshold: float = Field(default=0.5, ge=0, le=1)
    """The teacher is unsure of a query if no candidate has this probability."""
    smoothing: float = Field(default=0.1, ge=0, lt=1)
    """Probability that the softened judgements spread evenly over all candidates."""

    def __call__(self, inputs: LossInput) -> Tensor:
        return recalibrated_imitation(
            inputs.imitating,
            inputs.log_odds,
            inputs.positive,
            inputs.candidates,
            threshold=self.threshold,
            smoothing=self.smoothing,
        )


def recalibrated_imitation(
    logits: Float[Tensor, "queries passages"],
    teacher_log_odds: Float[Tensor, "queries passages"],
    positive_mask: Bool[Tensor, "queries passages"],
    candidate_mask: Bool[Tensor, "queries passages"],
    *,
    threshold: float = 0.5,
    smoothing: float = 0.1,
) -> Float[Tensor, ""]:
    """Like ``list_imitation``, but where the teacher is unsure, the softened judgements are the target.

    L_i = KL( t_i || q_i ),  t_i = p_i if max_j p_ij >= h, else (1 - e) y_i + e / n_i

    with p and q of ``list_imitation``, y uniform over D+, n the number of candidates, h the ``threshold`` and e the
    ``smoothing``. D+ is a subset of the candidates. Counted: as for ``list_imitation``; a query without positives keeps
    p. Shen, "FerKD: Surgical Label Adaptation for Efficient Distillation", ICCV 2023 (arXiv 2312.17473), whose examples
    are regions of images. There the surest and the unsurest regions are left out of training, because an image has
    others; a query has not.
    """
    target, predicted, possible = list_distributions(logits, teacher_log_odds, candidate_mask, 1.0)
    teacher = torch.where(possible, target.exp(), 0.0)
    known = positive_mask & candidate_mask
    labels = known / known.sum(dim=1, keepdim=True).clamp(min=1).to(target.dtype)
    even = candidate_mask / candidate_mask.sum(dim=1, keepdim=True).clamp(min=1).to(target.dtype)
    unsure = (teacher.amax(dim=1) < threshold) & known.any(dim=1)
    chosen = torch.where(unsure[:, None], (1.0 - smoothing) * labels + smoothing * even, teacher)
    counted = chosen > 0
    per_query = divergence(torch.where(counted, chosen, 1.0).log(), predicted, counted)
    return masked_mean(per_query, possible.any(dim=1)).to(logits.dtype)
