"""The teacher's log-odds themselves, up to an offset of the batch; of the pairs that it scored (DSE)."""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor

from d2llm.ops.losses import masked_mean, zero_outside
from d2llm.recipe.losses import Loss
from d2llm.training.losses import LossInput


class ScoreRegression(Loss, kind="score_regression"):
    """The teacher's log-odds themselves, up to an offset of the batch; of the pairs that it scored (DSE)."""

    paper = "Barkan et al., AAAI 2020, arXiv 1908.05161 (Distilled Sentence Embedding)"
    needs = frozenset({"labels"})
    measured = (
        "+.006 over list imitation (95 % interval .004 to .008; qnli +.013, banking77 -.001; [three "
        "seeds](log/2026-11.md#2026-11-25-judgements-alone-and-score-regression-with-three-seeds-two-ways-with-"
        "an-unsure-teacher)); by [better grades](ablations.md#the-published-objective-taught-by-grades-that-are-"
        "better-than-the-student) -.028 ±.003 and -.018 ±.009 against judgements on two pairs of sets (three seeds)"
    )

    def __call__(self, inputs: LossInput) -> Tensor:
        return score_regression(inputs.imitating, inputs.log_odds, inputs.candidates & inputs.labelled)


def score_regression(
    logits: Float[Tensor, "queries passages"],
    teacher_log_odds: Float[Tensor, "queries passages"],
    mask: Bool[Tensor, "queries passages"],
) -> Float[Tensor, ""]:
    """The student's logits should be the teacher's log-odds, up to one number for the whole batch.

    L = mean_{ij in M} (z_ij - l_ij - b)^2,  b = mean_{ij in M} (z_ij - l_ij)

    The offset b is the one that fits best: no ranking depends on it, and an inner product cannot learn it. Counted:
    every pair of the mask M with finite log-odds, equally. Distilled Sentence Embedding, Barkan et al., "Scalable
    Attentive Sentence-Pair Modeling via Distilled Sentence Embedding", AAAI 2020 (arXiv 1908.05161), which has no such
    offset.
    """
    scored = mask & teacher_log_odds.isfinite()
    student, teacher = zero_outside(scored, logits, teacher_log_odds)
    differences, pairs = (student - teacher).flatten(), scored.flatten()
    offset = masked_mean(differences, pairs)
    return masked_mean((differences - offset).square(), pairs).to(logits.dtype)
