"""Finer classes than yes and no, from the teacher's features of a query's pairs (LELP).

Beside a loss that imitates yes and no; for heads with an IEM, and teachers whose features are stored.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from d2llm.ops.losses import MIN_NORM, masked_mean, zero_outside
from d2llm.recipe import Recipe
from d2llm.recipe.losses import Loss
from d2llm.training.losses import LossInput


class SubclassImitation(Loss, kind="subclass_imitation"):
    """Yes and no in finer classes, along the principal directions of the teacher's features, for the student's to split
    alike (LELP).
    """

    paper = "Loo et al. 2024, arXiv 2409.20449 (LELP)"
    needs = frozenset({"labels", "features"})
    costs = (
        "an eigendecomposition of some small matrices for each batch; stored features (not of remote teachers), "
        "a head with an IEM"
    )
    measured = (
        "-.004 beside list imitation (.7790 against .7828, qnli level, banking77 -.008; [one "
        "seed](log/2026-11.md#2026-11-25-finer-classes-than-yes-and-no-lelp)), the interaction trained in a "
        "second stage"
    )

    def check(self, recipe: Recipe) -> None:
        if not (interaction := recipe.student.interaction).has_network:
            raise ValueError(
                f"losses.subclass_imitation needs the features of pairs, which the head {interaction.head!r} does not "
                'have: set student.interaction.head = "dot" or "paper", or delete subclass_imitation'
            )

    def __call__(self, inputs: LossInput) -> Tensor | None:
        features, batch = inputs.scores.features, inputs.batch
        if features is None:
            return None
        probabilities = torch.sigmoid(inputs.of_lists(inputs.log_odds))
        mask = inputs.on_device(batch.gram_columns) >= 0
        gram = inputs.on_device(batch.gram)
        return subclass_imitation(inputs.of_lists(features).float(), gram, probabilities, mask)


def subclass_imitation(
    student_features: Float[Tensor, "queries entries dim"],
    teacher_gram: Float[Tensor, "queries entries entries"],
    teacher_probabilities: Float[Tensor, "queries entries"],
    mask: Bool[Tensor, "queries entries"],
    *,
    num_directions: int = 2,
) -> Float[Tensor, ""]:
    """The student should split yes and no into the same finer classes as the teacher's features do.

    L_i = mean_j sum_{c in yes, no} s_cij KL( softmax(t_cij, -t_cij) || softmax(z_cij, -z_cij) )

    For each class c, whose members are all entries with the teacher's probabilities s_cij as weights, the principal
    directions of the centred teacher features are found. t_cij has the projections of entry j on the first ones, in
    standard deviations of the first direction, and each side of a direction is a subclass. z_cij is the same for the
    student's features: a direction is a sum of the entries' features, and the student's is the same sum of its own.

    Counted: queries with at least 2 entries. Loo et al., "Linear Projections of Teacher Embeddings for Few-Class
    Distillation" (LELP), 2024 (arXiv 2409.20449). There, one set of directions is found for all examples,
    and the student gets an output for each subclass, which is summed into its class. Here a label store has the cosines
    of a query's entries only, so each query has its own directions; and only the subclasses within a class are
    compared, since KL(all subclasses) = KL(classes) + sum_c s_c KL(subclasses of c) and other losses imitate classes.

    Args:
        student_features: y^S of each query with each passage of its own list.
        teacher_gram: cosines of the teacher's features over the same lists.
        teacher_probabilities: P(yes) of the entries.
        mask: which entries of the padded lists are real.
        num_directions: directions in each class; there are twice as many subclasses.
    """
    (features,) = zero_outside(mask[:, :, None], student_features)
    (gram,) = zero_outside(mask[:, :, None] & mask[:, None, :], teacher_gram.to(features.dtype))
    (yes,) = zero_outside(mask, teacher_probabilities.to(features.dtype))
    features = functional.normalize(features, dim=2, eps=MIN_NORM)
    smallest = MIN_NORM**2  # of a variance
    total = torch.zeros_like(yes)
    with torch.autocast(features.device.type, enabled=False):
        student_gram = features @ features.mT
        for weights in (yes, mask.to(yes.dtype) - yes):
            fractions = weights / weights.sum(dim=1, keepdim=True).clamp(min=smallest)
            centred, own_centred = (_centred(products, fractions) for products in (gram, student_gram))
            roots = fractions.sqrt()
            variances, vectors = torch.linalg.eigh(roots[:, :, None] * centred * roots[:, None, :])
            variances, vectors = (values.flip(-1)[..., :num_directions] for values in (variances, vectors))
            sums = roots[:, :, None] * vectors  # [queries, entries, directions]: each direction as a sum of entries
            own_variances = (sums * (own_centred @ sums)).sum(dim=1)
            scale = variances[:, :1, None].clamp(min=smallest).sqrt()
            target, predicted = (
                (products @ sums) / lengths[:, None].clamp(min=smallest).sqrt() / scale
                for products, lengths in ((centred, variances), (own_centred, own_variances))
            )
            target, predicted = (
                torch.cat([cosines, -cosines], dim=2).log_softmax(dim=2) for cosines in (target, predicted)
            )
            total = total + weights * (target.exp() * (target - predicted)).sum(dim=2)
    return masked_mean(masked_mean(total, mask), mask.sum(dim=1) >= 2).to(student_features.dtype)


def _centred(gram: Tensor, fractions: Tensor) -> Tensor:
    """Inner products [queries, entries, entries] of vectors after their mean, weighted by fractions, is taken away."""
    by_mean = gram @ fractions[:, :, None]  # [queries, entries, 1]
    return gram - by_mean - by_mean.mT + (fractions[:, None, :] @ by_mean)
