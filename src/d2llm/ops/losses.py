"""The training losses as pure functions: what the student learns to imitate.

First those of Liao et al., "D2LLM: Decomposed and Distilled Large Language Models for Semantic Search", ACL 2024
(arXiv 2406.17262), section 3.3 "Knowledge distillation"; then what others published on distilling a scorer. Every
function works on a whole batch: Q queries against all N passages of the batch (own lists and in-batch), with boolean
masks that say which role each passage plays for each query. What they share:

- An entry outside the masks is ignored: it may hold NaN or infinity, and its gradient is exactly 0.
- The result is the mean over the queries that count; each docstring says which. If none counts, it is 0, still
  connected to the graph, with zero gradients.
- The result is a scalar in the student's dtype. Half precisions are computed in float32 and only the result is
  rounded, so pass float32 logits if the digits of the loss matter.

Notation and arguments: z_ij student logit (``logits``); s_ij teacher score (``teacher_probabilities``: P(yes), in
[0, 1]); t temperature, above 0, or an ``InputError`` is raised; D+ positives, D- negatives, split into D_H hard and D_I
easy ones, each a mask [queries, passages]; D+ and D- are disjoint.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from d2llm.core.errors import InputError

MIN_NORM = 1e-4
"""Vectors shorter than this are not stretched to length 1: their direction is rounding noise, its gradient huge."""


def masked_mean(
    values: Float[Tensor, "*batch entries"], mask: Bool[Tensor, "*batch entries"]
) -> Float[Tensor, "*batch"]:
    """Mean of the masked ``values`` along the last axis; 0 with zero gradients where the mask is empty."""
    return torch.where(mask, values, 0.0).sum(dim=-1) / mask.sum(dim=-1).clamp(min=1)


def contrastive_imitation(
    logits: Float[Tensor, "queries passages"],
    teacher_probabilities: Float[Tensor, "queries passages"],
    positive_mask: Bool[Tensor, "queries passages"],
    negative_mask: Bool[Tensor, "queries passages"],
    *,
    temperature: float,
) -> Float[Tensor, ""]:
    """Each positive against all negatives, weighted by the teacher's probabilities.

    L_i = -1/|D+| sum_{j in D+} log( e_ij / ( e_ij + sum_{k in D-} exp((1 - s_ik) z_ik / t) ) )
    with e_ij = exp(s_ij z_ij / t)

    A negative that the teacher considers relevant (s = 1, a false negative) contributes the constant exp(0) and is not
    pushed away. Counted: queries with a positive (one without negatives contributes its value, 0). Liao et al. 2024,
    section 3.3, contrastive imitation.
    """
    student, teacher = zero_outside(positive_mask | negative_mask, logits, teacher_probabilities)
    scale = 1.0 / checked_temperature(temperature)
    loss = _positives_against_negatives(
        scale * teacher * student, scale * (1.0 - teacher) * student, positive_mask, negative_mask
    )
    return loss.to(logits.dtype)


def in_batch_cross_entropy(
    logits: Float[Tensor, "queries passages"],
    positive_mask: Bool[Tensor, "queries passages"],
    candidate_mask: Bool[Tensor, "queries passages"],
    *,
    temperature: float = 1.0,
    focus: float = 0.0,
) -> Float[Tensor, ""]:
    """Multi-positive InfoNCE: each positive against the candidates that are not positives.

    L_i = -1/|D+| sum_{j in D+} (1 - p_ij)^g log p_ij
    with p_ij = exp(z_ij / t) / ( exp(z_ij / t) + sum_{k in C - D+} exp(z_ik / t) ) and g the ``focus``

    The other positives of a query are left out of the denominator, so that they are not pushed away. Counted: queries
    with a positive (one without negatives contributes its value, 0). Leave passages that may be unlabelled positives
    out of the candidates C; the positives count whether or not they are in C. InfoNCE: van den Oord et al. 2018
    (arXiv 1807.03748), equation 4. Focal weights: Lin et al., ICCV 2017 (arXiv 1708.02002), equation 4.
    """
    negative_mask = candidate_mask & ~positive_mask
    (student,) = zero_outside(positive_mask | negative_mask, logits)
    scaled = student / checked_temperature(temperature)
    return _positives_against_negatives(scaled, scaled, positive_mask, negative_mask, focus).to(logits.dtype)


def pair_cross_entropy(
    logits: Float[Tensor, "queries passages"],
    targets: Float[Tensor, "queries passages"],
    mask: Bool[Tensor, "queries passages"],
) -> Float[Tensor, ""]:
    """Cross-entropy of single pairs: is the answer yes?

    L = mean_{ij in M} -( p_ij log sigmoid(z_ij) + (1 - p_ij) log sigmoid(-z_ij) )

    Every judged pair (mask M) counts equally, whichever query it belongs to. ``targets`` p are probabilities of a yes;
    a logit of 0 means that yes and no are equally likely.
    """
    student, target = zero_outside(mask, logits, targets)
    losses = functional.binary_cross_entropy_with_logits(student, target, reduction="none")
    return masked_mean(losses.flatten(), mask.flatten()).to(logits.dtype)


def list_imitation(
    logits: Float[Tensor, "queries passages"],
    teacher_log_odds: Float[Tensor, "queries passages"],
    candidate_mask: Bool[Tensor, "queries passages"],
    *,
    temperature: float = 1.0,
) -> Float[Tensor, ""]:
    """The student's distribution over the candidates should match the teacher's (list-wise distillation).

    L_i = sum_{j in C} p_ij log( p_ij / q_ij ),  p_i = softmax_C(l_i / t),  q_i = softmax_C(z_i)

    An offset shared by the teacher's log-odds, such as the fraction of relevant passages in its calibration data,
    cancels in p. The teacher's probabilities contain that offset: if few candidates are relevant, they are small even
    for a passage that the teacher prefers by far. Counted: queries with a candidate of log-odds above -inf.
    Kullback-Leibler divergence of list-wise distributions: Cao et al., "Learning to Rank", ICML 2007 (ListNet); for the
    distillation of cross-encoders: Ren et al., "RocketQAv2", EMNLP 2021, section 3.2.

    Log-odds of -inf mean that a passage is certainly not relevant. With a temperature above 1, the teacher is treated
    as less certain than its log-odds say.
    """
    target, predicted, possible = list_distributions(logits, teacher_log_odds, candidate_mask, temperature)
    per_query = divergence(target, predicted, possible)
    return masked_mean(per_query, possible.any(dim=1)).to(logits.dtype)


def list_distributions(
    logits: Tensor, teacher_log_odds: Tensor, candidate_mask: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Logarithms of the teacher's and the student's distribution over each query's candidates.

    The third is where the teacher's is above 0; elsewhere its logarithm is set to 0.
    """
    (student,) = zero_outside(candidate_mask, logits)
    possible = candidate_mask & (teacher_log_odds > -torch.inf)
    (teacher,) = zero_outside(possible, teacher_log_odds)
    lowest = torch.finfo(student.dtype).min
    scaled = (teacher / checked_temperature(temperature)).to(student.dtype)
    target = torch.where(possible, scaled.masked_fill(~possible, lowest).log_softmax(dim=1), 0.0)
    return target, student.masked_fill(~candidate_mask, lowest).log_softmax(dim=1), possible


def divergence(target: Tensor, predicted: Tensor, mask: Tensor) -> Tensor:
    """Kullback-Leibler divergence of each row, from logarithms of probabilities."""
    return torch.where(mask, target.exp() * (target - predicted), 0.0).sum(dim=1)


def rank_imitation_positive_hard(
    logits: Float[Tensor, "queries passages"],
    teacher_scores: Float[Tensor, "queries passages"],
    mask: Bool[Tensor, "queries passages"],
) -> Float[Tensor, ""]:
    """The student's order of positives and hard negatives should follow the teacher's.

    L_i = 1 - pearson(s_i, z_i) over D+ and D_H

    Counted: queries with at least 2 entries and teacher scores that are not all equal. Constant student logits have
    correlation 0 and a finite gradient: centred logits with a norm below 1e-4 are not scaled up. Liao et al. 2024,
    section 3.3, rank imitation. ``teacher_scores`` are log-odds or probabilities; scale and offset do not matter.
    """
    student, teacher = zero_outside(mask, logits, teacher_scores)
    highest = teacher.masked_fill(~mask, -torch.inf).amax(dim=1, keepdim=True)
    lowest = teacher.masked_fill(~mask, torch.inf).amin(dim=1, keepdim=True)
    varies = highest > lowest  # implies at least 2 entries
    teacher = teacher / torch.where(varies, highest - lowest, 1.0)  # or squaring would lose a tiny spread
    correlation = (_standardised(teacher, mask) * _standardised(student, mask)).sum(dim=1)
    return masked_mean(1.0 - correlation, varies.squeeze(1)).to(logits.dtype)


def rank_imitation_hard_easy(
    logits: Float[Tensor, "queries passages"],
    teacher_probabilities: Float[Tensor, "queries passages"],
    hard_mask: Bool[Tensor, "queries passages"],
    easy_mask: Bool[Tensor, "queries passages"],
) -> Float[Tensor, ""]:
    """Hard negatives should score above easy ones, as far as the teacher scores them so.

    L_i = -1/(|D_H| |D_I|) sum_{j in D_H, k in D_I} w_jk log sigmoid(z_ij - z_ik),  w_jk = max(s_ij - s_ik, 0)

    Counted: queries with a hard and an easy negative. Memory: one row of N per hard negative of the batch, never
    Q x N x N. Liao et al. 2024, section 3.3, rank imitation.
    """
    student, teacher = zero_outside(hard_mask | easy_mask, logits, teacher_probabilities)
    counted = hard_mask.any(dim=1) & easy_mask.any(dim=1)
    query, hard = hard_mask.nonzero(as_tuple=True)  # one element per hard negative
    above = student[query, hard][:, None] - student[query]
    weight = (teacher[query, hard][:, None] - teacher[query]).clamp(min=0.0)
    per_hard = masked_mean(-weight * functional.logsigmoid(above), easy_mask[query])
    loss = (per_hard / hard_mask.sum(dim=1)[query]).sum() / counted.sum().clamp(min=1)
    return loss.to(logits.dtype)


def feature_imitation(
    student_features: Float[Tensor, "queries entries dim"],
    teacher_gram: Float[Tensor, "queries entries entries"],
    mask: Bool[Tensor, "queries entries"],
) -> Float[Tensor, ""]:
    """The student's pair features of one query should be as similar to each other as the teacher's are.

    L_i = mean_{j != k} ( cos(y^T_ij, y^T_ik) - cos(y^S_ij, y^S_ik) )^2 over D+ and D_H

    Only cosines are compared, so the widths of teacher and student may differ. The diagonal is left out: it is
    1 - 1 = 0 for any student and would only reduce the weight of short lists. Counted: queries with at least 2 entries.
    A student feature with a norm below 1e-4 is not scaled up; the zero vector has cosine 0 with all others. Liao et al.
    2024, section 3.3, feature imitation.

    Args:
        student_features: y^S of each query with each passage of its own list.
        teacher_gram: cosines of the teacher's features over the same lists.
        mask: which entries of the padded lists are real.
    """
    pair_mask = mask[:, :, None] & mask[:, None, :] & ~torch.eye(mask.shape[1], dtype=torch.bool, device=mask.device)
    (features,) = zero_outside(mask[:, :, None], student_features)
    (teacher,) = zero_outside(pair_mask, teacher_gram.to(features.dtype))
    features = functional.normalize(features, dim=2, eps=MIN_NORM)
    with torch.autocast(features.device.type, enabled=False):  # bfloat16 would keep only two digits of a cosine
        gram = features @ features.mT
    per_query = masked_mean((teacher - gram).square().flatten(1), pair_mask.flatten(1))
    return masked_mean(per_query, mask.sum(dim=1) >= 2).to(student_features.dtype)


def drawing_loss(
    logits: Float[Tensor, "lists steps passages"], orders: Int[Tensor, "lists steps"]
) -> Float[Tensor, ""]:
    """-log probability of drawing these passages in turn: the mean over lists of a weighted mean over steps.

    L = mean_i sum_r w_r ( log sum_{j not drawn before r} exp(z_irj) - z_ir,o(r) ),    w_r = (1 / r) / sum_s (1 / s)

    ``logits`` are those of each step, ``orders`` the places of the passages to draw, each at most once. ListMLE (Xia et
    al., "Listwise Approach to Learning to Rank", ICML 2008), except that each step has scores of its own; the weights
    are those of PE-Rank (Liu et al. 2024, arXiv 2406.14848).
    """
    steps = orders.shape[1]
    log_probabilities = logits.masked_fill(_drawn_before(logits, orders), -torch.inf).log_softmax(dim=-1)
    losses = -log_probabilities.gather(2, orders[:, :, None])[:, :, 0]
    weights = 1 / torch.arange(1, steps + 1, device=logits.device)
    return (losses @ (weights / weights.sum())).mean()


def drawing_divergence(
    logits: Float[Tensor, "lists steps passages"],
    target_logits: Float[Tensor, "lists steps passages"],
    orders: Int[Tensor, "lists steps"],
) -> Float[Tensor, ""]:
    """How far each step's draw is from that of other logits: the mean over lists of a sum over steps.

    L = mean_i sum_r KL( p_ir || q_ir ),  p = softmax(t), q = softmax(z) over what was not drawn before r

    With the logits t of a reader that reads the passages' texts too, the third loss of PE-Rank's published code (Liu et
    al. 2024, arXiv 2406.14848); the gradient goes to both.
    """
    before = _drawn_before(logits, orders)
    predicted, target = (
        one.masked_fill(before, torch.finfo(one.dtype).min).log_softmax(dim=-1) for one in (logits, target_logits)
    )
    return functional.kl_div(predicted, target, reduction="batchmean", log_target=True)


def _drawn_before(logits: Tensor, orders: Tensor) -> Tensor:
    """[lists, steps, passages]: whether a passage is drawn in an earlier step."""
    is_drawn = functional.one_hot(orders, logits.shape[-1]).cumsum(dim=1)
    return torch.cat([torch.zeros_like(is_drawn[:, :1]), is_drawn[:, :-1]], dim=1) > 0


def zero_outside(mask: Tensor, *values: Tensor) -> list[Tensor]:
    """The values in one full-precision dtype, 0 outside the mask; applied before any arithmetic, so no NaN spreads."""
    dtype = torch.promote_types(values[0].dtype, torch.float32)
    return [torch.where(mask, value.to(dtype), 0.0) for value in values]


def _positives_against_negatives(
    positive_exponents: Tensor,
    negative_exponents: Tensor,
    positive_mask: Tensor,
    negative_mask: Tensor,
    focus: float = 0.0,
) -> Tensor:
    """Mean over queries and positives of -log(e^p_j / (e^p_j + sum_k e^n_k)) = -log sigmoid(p_j - logsumexp(n)).

    With ``focus`` above 0, each times (1 - sigmoid)^focus.
    """
    # Not -inf: for a query without negatives, NaN would pass through logsumexp's backward and trip anomaly detection.
    lowest = torch.finfo(negative_exponents.dtype).min
    against = negative_exponents.masked_fill(~negative_mask, lowest).logsumexp(dim=1, keepdim=True)
    margins = torch.where(positive_mask, positive_exponents - against, 0.0)
    losses = -functional.logsigmoid(margins)
    if focus:
        losses = (focus * functional.logsigmoid(-margins)).exp() * losses
    return masked_mean(masked_mean(losses, positive_mask), positive_mask.any(dim=1))


def _standardised(values: Tensor, mask: Tensor) -> Tensor:
    """Rows with mean 0 and length 1 over the mask, 0 outside it."""
    centred = torch.where(mask, values - masked_mean(values, mask)[:, None], 0.0)
    return functional.normalize(centred, dim=1, eps=MIN_NORM)


def checked_temperature(temperature: float) -> float:
    """The temperature; an ``InputError`` if it is not above 0."""
    if not temperature > 0:
        raise InputError(f"temperature is {temperature}, but it divides the logits: it must be above 0")
    return temperature
