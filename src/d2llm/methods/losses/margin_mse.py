"""The teacher's differences between positives and negatives; of the pairs that it scored (Margin-MSE)."""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor

from d2llm.ops.losses import masked_mean, zero_outside
from d2llm.recipe.losses import Loss
from d2llm.training.losses import LossInput


class MarginMSE(Loss, kind="margin_mse"):
    """The teacher's differences between positives and negatives; of the pairs that it scored (Margin-MSE)."""

    paper = "Hofstätter et al. 2020, arXiv 2010.02666"
    needs = frozenset({"labels"})
    measured = (
        "+.0026 over list imitation on qnli, banking77 ([one seed](recipes.md#losses-how-to-imitate-a-teacher)); "
        "by [better grades](ablations.md#the-published-objective-taught-by-grades-that-are-better-than-the-"
        "student) -.023 ±.005 against judgements on squad-sent and banking77, -.010 ±.008 on wikiqa and "
        "quora (three seeds)"
    )

    def __call__(self, inputs: LossInput) -> Tensor:
        labelled = inputs.labelled
        return margin_mse(inputs.imitating, inputs.log_odds, inputs.positive & labelled, inputs.negatives & labelled)


def margin_mse(
    logits: Float[Tensor, "queries passages"],
    teacher_log_odds: Float[Tensor, "queries passages"],
    positive_mask: Bool[Tensor, "queries passages"],
    negative_mask: Bool[Tensor, "queries passages"],
) -> Float[Tensor, ""]:
    """A positive should score above a negative by as much as it does with the teacher.

    L_i = 1/(|D+| |D-|) sum_{j in D+, k in D-} ( (z_ij - z_ik) - (l_ij - l_ik) )^2

    Counted: queries with a positive and a negative of finite log-odds; other entries are left out. Margin-MSE:
    Hofstätter et al., "Improving Efficient Neural Ranking Models with Cross-Architecture Knowledge Distillation", 2020
    (arXiv 2010.02666), section 3.
    """
    finite = teacher_log_odds.isfinite()
    positives, negatives = positive_mask & finite, negative_mask & finite
    student, teacher = zero_outside(positives | negatives, logits, teacher_log_odds)
    query, positive = positives.nonzero(as_tuple=True)
    difference = student - teacher
    errors = (difference[query, positive][:, None] - difference[query]).square()
    counted = positives.any(dim=1) & negatives.any(dim=1)
    per_positive = masked_mean(errors, negatives[query]) / positives.sum(dim=1)[query]
    return (per_positive.sum() / counted.sum().clamp(min=1)).to(logits.dtype)
