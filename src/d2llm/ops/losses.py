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

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from d2llm.core.errors import InputError

_SMALLEST_NORM = 1e-4
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
    student, teacher = _under(positive_mask | negative_mask, logits, teacher_probabilities)
    scale = 1.0 / _checked_temperature(temperature)
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
) -> Float[Tensor, ""]:
    """Multi-positive InfoNCE: each positive against the candidates that are not positives.

    L_i = -1/|D+| sum_{j in D+} log( exp(z_ij / t) / ( exp(z_ij / t) + sum_{k in C - D+} exp(z_ik / t) ) )

    The other positives of a query are left out of the denominator, so that they are not pushed away. Counted: queries
    with a positive (one without negatives contributes its value, 0). Leave passages that may be unlabelled positives
    out of the candidates C; the positives count whether or not they are in C. InfoNCE: van den Oord et al. 2018
    (arXiv 1807.03748), equation 4.
    """
    negative_mask = candidate_mask & ~positive_mask
    (student,) = _under(positive_mask | negative_mask, logits)
    scaled = student / _checked_temperature(temperature)
    return _positives_against_negatives(scaled, scaled, positive_mask, negative_mask).to(logits.dtype)


def nested_cross_entropy(
    queries: Float[Tensor, "queries dim"],
    passages: Float[Tensor, "passages dim"],
    positive_mask: Bool[Tensor, "queries passages"],
    candidate_mask: Bool[Tensor, "queries passages"],
    dims: Sequence[int],
) -> Float[Tensor, ""]:
    """In-batch cross-entropy of the cosines of the vectors' first components, for each width; the mean over widths.

    L = 1/|M| sum_{m in M} L_CE( 20 cos(a_i[1..m], b_j[1..m]) ), where L_CE is ``in_batch_cross_entropy``. Kusupati et
    al., "Matryoshka Representation Learning", NeurIPS 2022 (arXiv 2205.13147), equation 1, with equal weights.

    Args:
        queries: the queries' vectors, ready for inner products.
        passages: the passages' vectors.
        positive_mask: which passages are relevant.
        candidate_mask: which passages a query is compared with.
        dims: the widths, at most that of the vectors.
    """
    values: list[Tensor] = []
    dtype = torch.promote_types(queries.dtype, torch.float32)
    for width in dims:
        a, b = (functional.normalize(vectors[:, :width].to(dtype), dim=1) for vectors in (queries, passages))
        values.append(in_batch_cross_entropy(a @ b.T, positive_mask, candidate_mask, temperature=0.05))
    return torch.stack(values).mean()


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
    student, target = _under(mask, logits, targets)
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

    An offset shared by the teacher's log-odds, such as the share of relevant passages in its calibration data, cancels
    in p. The teacher's probabilities contain that offset: if few candidates are relevant, they are small even for a
    passage that the teacher prefers by far. Counted: queries with a candidate of log-odds above -inf. Kullback-Leibler
    divergence of list-wise distributions: Cao et al., "Learning to Rank", ICML 2007 (ListNet); for the distillation of
    cross-encoders: Ren et al., "RocketQAv2", EMNLP 2021, section 3.2.

    Log-odds of -inf mean that a passage is certainly not relevant. With a temperature above 1, the teacher is treated
    as less certain than its log-odds say.
    """
    target, predicted, possible = _distributions(logits, teacher_log_odds, candidate_mask, temperature)
    per_query = _divergence(target, predicted, possible)
    return masked_mean(per_query, possible.any(dim=1)).to(logits.dtype)


def recalibrated_imitation(
    logits: Float[Tensor, "queries passages"],
    teacher_log_odds: Float[Tensor, "queries passages"],
    positive_mask: Bool[Tensor, "queries passages"],
    candidate_mask: Bool[Tensor, "queries passages"],
) -> Float[Tensor, ""]:
    """Like ``list_imitation``, but the less sure the teacher is, the more the known positives replace its distribution.

    L_i = KL( (1 - u_i) p_i + u_i y_i || q_i ),  u_i = H(p_i) / log n_i,  y_i uniform over D+

    with p and q of ``list_imitation`` and the entropy H over the n candidates that the teacher thinks possible; u is 0
    for a single one. D+ is a subset of the candidates. Counted: as for ``list_imitation``; a query without positives
    keeps p. After the idea of Shen, "FerKD: Surgical Label Adaptation for Efficient Distillation", ICCV 2023 (arXiv
    2312.17473), which mixes labels into the soft targets of hard image regions.
    """
    target, predicted, possible = _distributions(logits, teacher_log_odds, candidate_mask, 1.0)
    known = positive_mask & candidate_mask
    entropy = -torch.where(possible, target.exp() * target, 0.0).sum(dim=1)
    unsure = entropy / possible.sum(dim=1).clamp(min=2).to(entropy.dtype).log()
    unsure = torch.where(known.any(dim=1), unsure.clamp(0.0, 1.0), 0.0)[:, None]
    labels = known / known.sum(dim=1, keepdim=True).clamp(min=1).to(target.dtype)
    mixed = (1.0 - unsure) * torch.where(possible, target.exp(), 0.0) + unsure * labels
    counted = mixed > 0
    per_query = _divergence(torch.where(counted, mixed, 1.0).log(), predicted, counted)
    return masked_mean(per_query, possible.any(dim=1)).to(logits.dtype)


def weighted_imitation(
    logits: Float[Tensor, "queries passages"],
    teacher_log_odds: Float[Tensor, "queries passages"],
    positive_mask: Bool[Tensor, "queries passages"],
    candidate_mask: Bool[Tensor, "queries passages"],
) -> Float[Tensor, ""]:
    """Like ``list_imitation``, but queries count the more, the more the teacher agrees with the data set.

    L = sum_i w_i KL( p_i || q_i ) / sum_i w_i,  w_i = sum_{j in D+} p_ij

    with p and q of ``list_imitation``: w is the probability that the teacher gives to the known positives D+. Counted:
    as for ``list_imitation``; 0 if all weights are. After the idea of Iliopoulos et al., "Weighted Distillation with
    Unlabeled Examples", NeurIPS 2022 (arXiv 2210.06711), which estimates from labelled examples how far to trust the
    teacher on each of the others; here every query has a label.
    """
    target, predicted, possible = _distributions(logits, teacher_log_odds, candidate_mask, 1.0)
    agreement = torch.where(possible & positive_mask, target.exp(), 0.0).sum(dim=1)
    weighted = (agreement * _divergence(target, predicted, possible)).sum()
    return (weighted / agreement.sum().clamp(min=torch.finfo(agreement.dtype).tiny)).to(logits.dtype)


def _distributions(
    logits: Tensor, teacher_log_odds: Tensor, candidate_mask: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Logarithms of the teacher's and the student's distribution over each query's candidates.

    The third is where the teacher's is above 0; elsewhere its logarithm is set to 0.
    """
    (student,) = _under(candidate_mask, logits)
    possible = candidate_mask & (teacher_log_odds > -torch.inf)
    (teacher,) = _under(possible, teacher_log_odds)
    lowest = torch.finfo(student.dtype).min
    scaled = (teacher / _checked_temperature(temperature)).to(student.dtype)
    target = torch.where(possible, scaled.masked_fill(~possible, lowest).log_softmax(dim=1), 0.0)
    return target, student.masked_fill(~candidate_mask, lowest).log_softmax(dim=1), possible


def _divergence(target: Tensor, predicted: Tensor, mask: Tensor) -> Tensor:
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
    student, teacher = _under(mask, logits, teacher_scores)
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
    student, teacher = _under(hard_mask | easy_mask, logits, teacher_probabilities)
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
    (features,) = _under(mask[:, :, None], student_features)
    (teacher,) = _under(pair_mask, teacher_gram.to(features.dtype))
    features = functional.normalize(features, dim=2, eps=_SMALLEST_NORM)
    with torch.autocast(features.device.type, enabled=False):  # bfloat16 would keep only two digits of a cosine
        gram = features @ features.mT
    per_query = masked_mean((teacher - gram).square().flatten(1), pair_mask.flatten(1))
    return masked_mean(per_query, mask.sum(dim=1) >= 2).to(student_features.dtype)


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
    (features,) = _under(mask[:, :, None], student_features)
    (gram,) = _under(mask[:, :, None] & mask[:, None, :], teacher_gram.to(features.dtype))
    (yes,) = _under(mask, teacher_probabilities.to(features.dtype))
    features = functional.normalize(features, dim=2, eps=_SMALLEST_NORM)
    smallest = _SMALLEST_NORM**2  # of a variance
    total = torch.zeros_like(yes)
    with torch.autocast(features.device.type, enabled=False):
        own = features @ features.mT
        for weights in (yes, mask.to(yes.dtype) - yes):
            shares = weights / weights.sum(dim=1, keepdim=True).clamp(min=smallest)
            centred, own_centred = (_centred(each, shares) for each in (gram, own))
            roots = shares.sqrt()
            variances, vectors = torch.linalg.eigh(roots[:, :, None] * centred * roots[:, None, :])
            variances, vectors = (each.flip(-1)[..., :num_directions] for each in (variances, vectors))
            sums = roots[:, :, None] * vectors  # [queries, entries, directions]: each direction as a sum of entries
            own_variances = (sums * (own_centred @ sums)).sum(dim=1)
            scale = variances[:, :1, None].clamp(min=smallest).sqrt()
            target, predicted = (
                (products @ sums) / lengths[:, None].clamp(min=smallest).sqrt() / scale
                for products, lengths in ((centred, variances), (own_centred, own_variances))
            )
            target, predicted = (torch.cat([each, -each], dim=2).log_softmax(dim=2) for each in (target, predicted))
            total = total + weights * (target.exp() * (target - predicted)).sum(dim=2)
    return masked_mean(masked_mean(total, mask), mask.sum(dim=1) >= 2).to(student_features.dtype)


def _centred(gram: Tensor, shares: Tensor) -> Tensor:
    """Inner products [queries, entries, entries] of vectors after their mean, weighted by shares, is taken away."""
    by_mean = gram @ shares[:, :, None]  # [queries, entries, 1]
    return gram - by_mean - by_mean.mT + (shares[:, None, :] @ by_mean)


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
    judged = mask & teacher_log_odds.isfinite()
    student, teacher = _under(judged, logits, teacher_log_odds)
    differences, pairs = (student - teacher).flatten(), judged.flatten()
    offset = masked_mean(differences, pairs)
    return masked_mean((differences - offset).square(), pairs).to(logits.dtype)


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
    student, teacher = _under(positives | negatives, logits, teacher_log_odds)
    query, positive = positives.nonzero(as_tuple=True)
    difference = student - teacher
    errors = (difference[query, positive][:, None] - difference[query]).square()
    counted = positives.any(dim=1) & negatives.any(dim=1)
    per_positive = masked_mean(errors, negatives[query]) / positives.sum(dim=1)[query]
    return (per_positive.sum() / counted.sum().clamp(min=1)).to(logits.dtype)


def plackett_luce(
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
    (student,) = _under(candidate_mask, logits)
    (teacher,) = _under(drawn, teacher_scores)
    lowest = torch.finfo(student.dtype).min
    key = teacher.to(student.dtype).masked_fill(~drawn, lowest / 2).masked_fill(~candidate_mask, lowest)
    order = key.sort(dim=1, descending=True, stable=True).indices
    ordered = student.masked_fill(~candidate_mask, lowest).gather(1, order)
    remaining = ordered.flip(1).logcumsumexp(dim=1).flip(1)
    is_drawn = drawn.gather(1, order)
    per_query = masked_mean(torch.where(is_drawn, remaining - ordered, 0.0), is_drawn)
    return masked_mean(per_query, is_drawn.any(dim=1)).to(logits.dtype)


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
    is_drawn = functional.one_hot(orders, logits.shape[-1]).cumsum(dim=1)
    before = torch.cat([torch.zeros_like(is_drawn[:, :1]), is_drawn[:, :-1]], dim=1) > 0
    log_shares = logits.masked_fill(before, -torch.inf).log_softmax(dim=-1)
    losses = -log_shares.gather(2, orders[:, :, None])[:, :, 0]
    weights = 1 / torch.arange(1, steps + 1, device=logits.device)
    return (losses @ (weights / weights.sum())).mean()


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
    query, is_below, losses = _ordered_pairs(logits, teacher_scores, candidate_mask)
    per_query = _sum_by_query(torch.where(is_below, losses, 0.0), query, len(logits))
    num_pairs = _sum_by_query(is_below.to(per_query.dtype), query, len(logits))
    return masked_mean(per_query / num_pairs.clamp(min=1), num_pairs > 0).to(logits.dtype)


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
    (gains,) = _under(candidate_mask, teacher_probabilities)
    query, is_below, losses = _ordered_pairs(
        logits, teacher_probabilities.masked_fill(teacher_probabilities <= 0, -torch.inf), candidate_mask
    )
    discounts = 1.0 / torch.arange(2, logits.shape[1] + 2, device=logits.device, dtype=losses.dtype).log2()
    gains = gains.to(losses.dtype)
    ideal = (gains.sort(dim=1, descending=True).values * discounts).sum(dim=1)
    with torch.no_grad():
        places = logits.float().masked_fill(~candidate_mask, -torch.inf).argsort(dim=1, descending=True, stable=True)
        discount = torch.empty_like(gains).scatter_(1, places, discounts.expand_as(gains))
    high = candidate_mask & (teacher_probabilities > 0)
    row, column = high.nonzero(as_tuple=True)
    change = (gains[row, column][:, None] - gains[row]).abs() * (discount[row, column][:, None] - discount[row]).abs()
    change = change / ideal.clamp(min=torch.finfo(ideal.dtype).tiny)[row][:, None]
    per_query = _sum_by_query(torch.where(is_below, change * losses, 0.0), query, len(logits))
    has_pairs = _sum_by_query(is_below.to(per_query.dtype), query, len(logits)) > 0
    return masked_mean(per_query, has_pairs).to(logits.dtype)


def sinkhorn(
    logits: Float[Tensor, "queries passages"],
    teacher_log_odds: Float[Tensor, "queries passages"],
    candidate_mask: Bool[Tensor, "queries passages"],
    *,
    smoothing: float = 0.1,
    num_rounds: int = 20,
) -> Float[Tensor, ""]:
    """The teacher's distributions should be near the student's, as a cheap way of moving the one onto the other.

    L = 1/Q sum_ij P_ij D_ij,  D_ij = sum_k |p_ik - q_jk|

    with p and q as in ``list_imitation`` and P the transport plan between the batch's teacher and student
    distributions, which Sinkhorn's iterations make of exp(-D / smoothing) (rows and columns sum to 1). Counted: queries
    with a candidate of log-odds above -inf. SinKD, Cui et al., "Sinkhorn Distance Minimization for Knowledge
    Distillation", COLING 2024 (arXiv 2402.17110), with its smoothing and number of rounds. Its classes are the same for
    all examples; two queries share candidates only within a batch, so P is nearly diagonal and L nearly the mean
    distance of each query's own two distributions.
    """
    possible = candidate_mask & (teacher_log_odds > -torch.inf)
    counted = possible.any(dim=1)
    (student,) = _under(candidate_mask, logits)
    (teacher,) = _under(possible, teacher_log_odds)
    lowest = torch.finfo(student.dtype).min
    p = torch.where(possible, teacher.to(student.dtype).masked_fill(~possible, lowest).softmax(dim=1), 0.0)[counted]
    q = torch.where(candidate_mask, student.masked_fill(~candidate_mask, lowest).softmax(dim=1), 0.0)[counted]
    distances = (p[:, None] - q[None]).abs().sum(dim=2)
    plan = (-distances / _checked_temperature(smoothing)).exp()
    smallest = torch.finfo(plan.dtype).tiny
    for _ in range(num_rounds):
        plan = plan / plan.sum(dim=0, keepdim=True).clamp(min=smallest)
        plan = plan / plan.sum(dim=1, keepdim=True).clamp(min=smallest)
    return ((plan * distances).sum() / counted.sum().clamp(min=1)).to(logits.dtype)


def soft_expansion(queries: Float[Tensor, "queries dim"], expanded: Float[Tensor, "queries dim"]) -> Float[Tensor, ""]:
    """A query's vector should be that of the query expanded by a language model, so that a search needs no such model.

    L = 1/Q sum_i |y_i - e_i|^2 / dim

    over the Q queries with an expanded vector e_i; a row of NaN is none. SoftQE, Pimpalkhute et al., "SoftQE: Learned
    Representations of Queries Expanded by LLMs", ECIR 2024 (arXiv 2402.12663), whose expanded vectors come from an
    encoder that was trained on expanded queries; here they come from the student as it was before training.
    """
    counted = torch.isfinite(expanded).all(dim=1)
    (distances,) = _under(counted, (queries.float() - expanded.nan_to_num()).square().mean(dim=1))
    return masked_mean(distances, counted).to(queries.dtype)


def _under(mask: Tensor, *values: Tensor) -> list[Tensor]:
    """The values in one full-precision dtype, 0 outside the mask; applied before any arithmetic, so no NaN spreads."""
    dtype = torch.promote_types(values[0].dtype, torch.float32)
    return [torch.where(mask, value.to(dtype), 0.0) for value in values]


def _positives_against_negatives(
    positive_exponents: Tensor, negative_exponents: Tensor, positive_mask: Tensor, negative_mask: Tensor
) -> Tensor:
    """Mean over queries and positives of -log(e^p_j / (e^p_j + sum_k e^n_k)) = -log sigmoid(p_j - logsumexp(n))."""
    # Not -inf: for a query without negatives, NaN would pass through logsumexp's backward and trip anomaly detection.
    lowest = torch.finfo(negative_exponents.dtype).min
    against = negative_exponents.masked_fill(~negative_mask, lowest).logsumexp(dim=1, keepdim=True)
    losses = -functional.logsigmoid(positive_exponents - against)
    return masked_mean(masked_mean(losses, positive_mask), positive_mask.any(dim=1))


def _ordered_pairs(logits: Tensor, scores: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All pairs of a passage with a score above -inf and a candidate that scores lower.

    Returns (query of each such passage [n], whether a candidate is below it [n, N], log(1 + exp(z_k - z_j)) [n, N]).
    """
    (student,) = _under(mask, logits)
    scores = scores.masked_fill(~mask, torch.inf)  # never below
    query, high = (mask & (scores > -torch.inf)).nonzero(as_tuple=True)
    is_below = scores[query] < scores[query, high][:, None]
    return query, is_below, functional.softplus(student[query] - student[query, high][:, None])


def _sum_by_query(rows: Tensor, query: Tensor, num_queries: int) -> Tensor:
    """Sums [num_queries] of the rows [n, N] that belong to each query."""
    return rows.new_zeros(num_queries).index_add(0, query, rows.sum(dim=1))


def _standardised(values: Tensor, mask: Tensor) -> Tensor:
    """Rows with mean 0 and length 1 over the mask, 0 outside it."""
    centred = torch.where(mask, values - masked_mean(values, mask)[:, None], 0.0)
    return functional.normalize(centred, dim=1, eps=_SMALLEST_NORM)


def _checked_temperature(temperature: float) -> float:
    if not temperature > 0:
        raise InputError(f"temperature is {temperature}, but it divides the logits: it must be above 0")
    return temperature
