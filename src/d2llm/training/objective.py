"""The training objective of a batch: the weighted sum of its losses.

Source: Liao et al., "D2LLM", ACL 2024, section 3.3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import fmean

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from d2llm.core.errors import InputError
from d2llm.core.recipe import LossWeights
from d2llm.data.collation import DistillationBatch, LabelledSource
from d2llm.data.training import TrainingSource
from d2llm.models.interaction import Interaction, PairScores
from d2llm.models.student import Student
from d2llm.ops import losses
from d2llm.ops.scoring import mean_best_cosines

OFFSET = "offset."
"""Prefix of the parameter name of a data set's offset, followed by the data set's name."""
_OFFSET_QUERIES = 100


def batch_tokens(student: Student, batch: DistillationBatch) -> list[list[int]]:
    """Token ids of the batch's texts: each query once, then each passage once."""
    source = batch.source
    tokenize = student.backbone.tokenize  # training truncates queries earlier than a search does
    queries = tokenize([source.query_text(query_id) for query_id in batch.query_ids], "query")
    passages = tokenize([source.passage_text(passage_id) for passage_id in batch.passage_ids], "passage")
    return queries.ids + passages.ids


def token_places(student: Student, batch: DistillationBatch, ids: Sequence[Sequence[int]]) -> list[list[int]]:
    """The places of the tokens of each text that have vectors; none if vectors of tokens do not count in this batch."""
    projection = student.token_projection
    if projection is None or not batch.token_weight:
        return [[] for _ in ids]
    num_queries = len(batch.query_ids)
    return [
        *(projection.query_places(row) for row in ids[:num_queries]),
        *(projection.places(row) for row in ids[num_queries:]),
    ]


def score_vectors(
    student: Student, vectors: Tensor, batch: DistillationBatch, *, anchors_only: bool = False
) -> PairScores:
    """Score all queries against all passages by their vectors [queries + passages, dim]; differentiable.

    ``anchors_only`` scores by the inner product, without the interaction (anchored head).
    """
    queries, passages = vectors.split([len(batch.query_ids), len(batch.passage_ids)])
    dtype = student.backbone.compute_dtype
    with torch.autocast(vectors.device.type, dtype, enabled=dtype != torch.float32):
        head = student.interaction
        task = batch.source.task
        if not isinstance(head, Interaction):
            return head(queries, passages, task)
        scores = head.score_anchors(queries, passages, task) if anchors_only else head(queries, passages, task)
        return scores if head.teacher_anchors is None else head.score_heads(scores, queries, passages, task)


def with_tokens(
    student: Student,
    scores: PairScores,
    tokens: Sequence[Tensor],
    batch: DistillationBatch,
    ids: Sequence[Sequence[int]],
) -> PairScores:
    """The scores with the mean best cosines of tokens, if they count in this batch; differentiable.

    Args:
        student: the student.
        scores: the scores of the vectors.
        tokens: the vectors [tokens, token_dim] of each text's tokens (``token_places``).
        batch: the batch.
        ids: token ids of its texts.
    """
    projection = student.token_projection
    if projection is None or not batch.token_weight:
        return scores
    num_queries = len(batch.query_ids)
    num_tokens = [len(projection.places(row)) for row in ids[:num_queries]]
    return replace(scores, tokens=mean_best_cosines(tokens[:num_queries], tokens[num_queries:], num_tokens=num_tokens))


def batch_losses(
    scores: PairScores, batch: DistillationBatch, weights: LossWeights, *, offset: Tensor | None = None
) -> dict[str, Tensor]:
    """The value of each loss with a weight above 0, before weighting, by the name of its weight.

    Args:
        scores: the scores of all queries and passages of the batch. With two heads, the one that imitates the teacher
            has the losses that need one, and the other has the rest.
        batch: the roles and labels of its pairs.
        weights: the weights of the losses.
        offset: for labelled pairs, the logit at which yes and no are equally likely.
    """
    if batch.targets is not None:
        return _losses_of_pairs(scores, batch.targets, batch.teacher_log_odds, weights, offset)
    device = scores.logits.device
    positive, hard, easy, labelled = (
        torch.from_numpy(mask).to(device) for mask in (batch.positive, batch.hard, batch.easy, batch.labelled)
    )
    negatives, candidates = hard | easy, positive | hard | easy
    contrasted = hard if weights.normalisation == "authors" else negatives
    evidence = _evidence(scores, batch)
    logits = _without_common_change(scores, candidates) + evidence
    teacher = scores.teacher
    imitating = logits if teacher is None else _without_common_change(teacher, candidates) + evidence
    log_odds = torch.from_numpy(batch.teacher_log_odds).to(device)
    probabilities = torch.sigmoid(log_odds)
    by_name: dict[str, Callable[[], Tensor]] = {
        "contrastive_imitation": lambda: losses.contrastive_imitation(
            imitating, probabilities, positive, contrasted, temperature=weights.temperature
        ),
        "list_imitation": lambda: losses.list_imitation(imitating, log_odds, candidates),
        "recalibrated_imitation": lambda: losses.recalibrated_imitation(imitating, log_odds, positive, candidates),
        "weighted_imitation": lambda: losses.weighted_imitation(imitating, log_odds, positive, candidates),
        "score_regression": lambda: losses.score_regression(imitating, log_odds, candidates & labelled),
        "margin_mse": lambda: losses.margin_mse(imitating, log_odds, positive & labelled, negatives & labelled),
        "plackett_luce": lambda: losses.plackett_luce(imitating, log_odds, candidates),
        "ranknet": lambda: losses.ranknet(imitating, log_odds, candidates),
        "lambdarank": lambda: losses.lambdarank(imitating, probabilities, candidates),
        "sinkhorn": lambda: losses.sinkhorn(imitating, log_odds, candidates),
        "in_batch_imitation": lambda: losses.list_imitation(imitating, _live_scores(batch, device), candidates),
        "rank_imitation_positive_hard": lambda: losses.rank_imitation_positive_hard(
            imitating, log_odds, positive | hard
        ),
        "rank_imitation_hard_easy": lambda: losses.rank_imitation_hard_easy(imitating, probabilities, hard, easy),
        "in_batch_cross_entropy": lambda: losses.in_batch_cross_entropy(logits, positive, candidates),
    }
    features, anchor, tokens = scores.features, scores.anchor, scores.tokens
    if features is not None:
        by_name["feature_imitation"] = lambda: _feature_imitation(features, batch)
        by_name["subclass_imitation"] = lambda: _subclass_imitation(features, batch)
    if anchor is not None:
        by_name["anchor_cross_entropy"] = lambda: losses.in_batch_cross_entropy(anchor.float(), positive, candidates)
    if tokens is not None:
        token_logits = batch.token_weight * tokens
        by_name["token_cross_entropy"] = lambda: losses.in_batch_cross_entropy(token_logits, positive, candidates)
    values = {name: loss() for name, loss in by_name.items() if getattr(weights, name)}
    if weights.normalisation == "authors":
        factors = _authors_factors(batch, hard)
        values = {name: value * factors.get(name, 1.0) for name, value in values.items()}
    return values


def _authors_factors(batch: DistillationBatch, hard: Tensor) -> dict[str, float | Tensor]:
    """By what the published code multiplies losses that are means over queries here (``LossWeights.normalisation``)."""
    with_hard = hard.any(dim=1).sum().clamp(min=1)
    num_with_features = ((batch.own >= 0).sum(axis=1) >= 2).sum()  # of the others, feature imitation has no value
    return {
        "in_batch_cross_entropy": 1 / len(batch.query_ids),
        "contrastive_imitation": with_hard / hard.sum().clamp(min=1),
        "feature_imitation": float(num_with_features),
    }


def nested_losses(
    student: Student, vectors: Tensor, batch: DistillationBatch, weights: LossWeights, nested: Sequence[Tensor] = ()
) -> dict[str, Tensor]:
    """The loss of vectors nested in others as in ``batch_losses``, if there is one.

    ``vectors`` [queries + passages, dim] are those of all layers, of which the first components count; ``nested`` are
    those after ``nested_depths`` layers, which also count in full.
    """
    if not weights.nested or batch.targets is not None:
        return {}
    positive, candidates = (
        torch.from_numpy(mask).to(vectors.device) for mask in (batch.positive, batch.positive | batch.hard | batch.easy)
    )
    dims = weights.nested_dims
    counted = [(each, (*dims, each.shape[1])) for each in nested] + ([(vectors, dims)] if dims else [])
    values: list[Tensor] = []
    for each, widths in counted:
        queries, passages = each.split([len(batch.query_ids), len(batch.passage_ids)])
        queries = student.interaction.anchor_queries(queries, batch.source.task)
        values.append(losses.nested_cross_entropy(queries, passages, positive, candidates, widths))
    return {"nested_cross_entropy": torch.stack(values).mean()}


def expansion_losses(vectors: Tensor, batch: DistillationBatch, weights: LossWeights) -> dict[str, Tensor]:
    """The distance of the queries' vectors [queries + passages, dim] from their expanded ones, if it counts."""
    if not weights.soft_expansion or batch.expanded_queries is None:
        return {}
    expanded = torch.from_numpy(batch.expanded_queries).to(vectors.device)
    return {"soft_expansion": losses.soft_expansion(vectors[: len(batch.query_ids)].float(), expanded)}


def _feature_imitation(features: Tensor, batch: DistillationBatch) -> Tensor:
    own = torch.from_numpy(batch.own).to(features.device)
    gram = torch.from_numpy(batch.gram).to(features.device)
    return losses.feature_imitation(_of_lists(features, own).float(), gram, own >= 0)


def _subclass_imitation(features: Tensor, batch: DistillationBatch) -> Tensor:
    own, gram, log_odds = (
        torch.from_numpy(each).to(features.device) for each in (batch.own, batch.gram, batch.teacher_log_odds)
    )
    probabilities = torch.sigmoid(_of_lists(log_odds, own))
    return losses.subclass_imitation(_of_lists(features, own).float(), gram, probabilities, own >= 0)


def _of_lists(values: Tensor, own: Tensor) -> Tensor:
    """The values [queries, passages, ...] of each query's own list [queries, n, ...]."""
    return values[torch.arange(len(own), device=own.device).unsqueeze(1), own.clamp(min=0)]


def _live_scores(batch: DistillationBatch, device: torch.device) -> Tensor:
    if batch.live_scores is None:
        raise InputError("losses.in_batch_imitation needs a live teacher: set training.live_teacher")
    return torch.from_numpy(batch.live_scores).to(device)


def _losses_of_pairs(
    scores: PairScores,
    own_targets: NDArray[np.float32],
    teacher_log_odds: NDArray[np.float32],
    weights: LossWeights,
    offset: Tensor | None,
) -> dict[str, Tensor]:
    """Losses of labelled pairs. Each pair was judged alone, so other pairs of the batch are not negatives."""
    own = torch.from_numpy(own_targets).to(scores.logits.device)
    judged = torch.isfinite(own)
    own, share = own.nan_to_num(), weights.teacher_share
    teacher = torch.sigmoid(torch.from_numpy(teacher_log_odds).to(own.device))
    middle = 0.0 if offset is None else offset

    def cross_entropy(logits: Tensor, of_teacher: Tensor | None) -> Tensor:
        logits = logits.float() - middle
        if of_teacher is None:
            return losses.pair_cross_entropy(logits, (1 - share) * own + share * teacher, judged)
        # The cross-entropy is linear in its target, so this is the same loss if both heads have the same scores.
        imitation = losses.pair_cross_entropy(of_teacher.float() - middle, teacher, judged)
        return (1 - share) * losses.pair_cross_entropy(logits, own, judged) + share * imitation

    two = scores.teacher
    values: dict[str, Tensor] = {}
    if weights.pair_cross_entropy:
        values["pair_cross_entropy"] = cross_entropy(scores.logits, None if two is None else two.logits)
    if weights.anchor_pair_cross_entropy and scores.anchor is not None:
        values["anchor_pair_cross_entropy"] = cross_entropy(scores.anchor, None if two is None else two.anchor)
    return values


def _evidence(scores: PairScores, batch: DistillationBatch) -> Tensor:
    """What words and tokens add to the scores: the gradient is then that of what they leave unexplained."""
    added = torch.zeros_like(scores.logits, dtype=torch.float32)
    if batch.word_scores is not None:
        added = added + torch.from_numpy(batch.word_scores).to(added.device)
    if scores.tokens is not None:
        added = added + batch.token_weight * scores.tokens
    return added


def _without_common_change(scores: PairScores, candidates: Tensor) -> Tensor:
    """Logits minus the mean change that the interaction makes to a query's candidates, float32 [queries, passages].

    The mean does not affect the ranking, but it does affect the contrastive imitation loss: lowering every logit lowers
    that loss, and a bounded interaction would end with all its tanh at -1, where it has neither effect nor gradient.
    """
    logits = scores.logits.float()
    if scores.anchor is None:
        return logits
    return logits - losses.masked_mean(logits - scores.anchor.float(), candidates)[:, None]


def weighted_sum(values: dict[str, Tensor], weights: LossWeights) -> Tensor:
    """The total loss.

    Raises:
        InputError: no loss has a weight above 0.
    """
    if not values:
        raise InputError(
            "no loss has a weight above 0 (the anchor's are for the head 'anchored' only); set one in [losses]"
        )
    return torch.stack([getattr(weights, name) * value for name, value in values.items()]).sum()


def offset_name(source: TrainingSource) -> str:
    """The parameter name of a pair set's offset."""
    return f"{OFFSET}{source.dataset.name}"


def make_offsets(student: Student, sources: Sequence[LabelledSource]) -> dict[str, nn.Parameter]:
    """For each set of labelled pairs, the logit where yes and no are equally likely, initialised to the mean score."""
    offsets: dict[str, nn.Parameter] = {}
    for labelled in sources:
        source, entries = labelled.source, labelled.entries[:_OFFSET_QUERIES]
        if not any(entry.targets for entry in entries):
            continue
        queries = student.encode_queries([source.query_text(entry.query_id) for entry in entries]).vectors
        scores: list[float] = []
        for query, entry in zip(queries, entries, strict=True):
            texts = [source.passage_text(passage_id) for passage_id in entry.positives + entry.hard_negatives]
            scores += student.score(query, student.encode_passages(texts).vectors, source.task).tolist()
        offsets[offset_name(source)] = nn.Parameter(torch.tensor(fmean(scores), device=student.backbone.device))
    return offsets
