"""What a batch of distillation is trained on: the weighted sum of the imitation losses.

Source: Liao et al., "D2LLM", ACL 2024, section 3.3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from d2llm.core.errors import InputError
from d2llm.core.recipe import LossWeights
from d2llm.data.collation import DistillationBatch
from d2llm.models.backbone import TextKind
from d2llm.models.interaction import PairScores
from d2llm.models.student import Student
from d2llm.ops import losses
from d2llm.ops.batching import token_budget_batches

_PART_TOKENS = 8192  # of one pass through the backbone: texts of like length, so that little is spent on padding


def score_batch(student: Student, batch: DistillationBatch) -> PairScores:
    """Encode the batch's queries and passages, each once, and score all against all; differentiable."""
    source = batch.source
    queries = _vectors(student, [source.query_text(query_id) for query_id in batch.query_ids], "query")
    passages = _vectors(student, [source.passage_text(passage_id) for passage_id in batch.passage_ids], "passage")
    dtype = student.backbone.compute_dtype
    with torch.autocast(queries.device.type, dtype, enabled=dtype != torch.float32):
        return student.interaction(queries, passages, source.task)


def batch_losses(scores: PairScores, batch: DistillationBatch, weights: LossWeights) -> dict[str, Tensor]:
    """Each loss with a weight above 0, unweighted, by the name of its weight."""
    device = scores.logits.device
    positive, hard, easy = (torch.from_numpy(mask).to(device) for mask in (batch.positive, batch.hard, batch.easy))
    candidates = positive | hard | easy
    logits = _without_common_change(scores, candidates)
    log_odds = torch.from_numpy(batch.teacher_log_odds).to(device)
    probabilities = torch.sigmoid(log_odds)
    found: dict[str, Tensor] = {}
    if weights.contrastive_imitation:
        found["contrastive_imitation"] = losses.contrastive_imitation(
            logits, probabilities, positive, hard | easy, temperature=weights.temperature
        )
    if weights.rank_imitation_positive_hard:
        found["rank_imitation_positive_hard"] = losses.rank_imitation_positive_hard(logits, log_odds, positive | hard)
    if weights.rank_imitation_hard_easy:
        found["rank_imitation_hard_easy"] = losses.rank_imitation_hard_easy(logits, probabilities, hard, easy)
    if weights.feature_imitation and scores.features is not None:
        own = torch.from_numpy(batch.own).to(device)
        rows = torch.arange(len(own), device=device).unsqueeze(1)
        features = scores.features[rows, own.clamp(min=0)].float()
        gram = torch.from_numpy(batch.gram).to(device)
        found["feature_imitation"] = losses.feature_imitation(features, gram, own >= 0)
    if weights.in_batch_cross_entropy:
        found["in_batch_cross_entropy"] = losses.in_batch_cross_entropy(logits, positive, candidates)
    if weights.anchor_cross_entropy and scores.anchor is not None:
        found["anchor_cross_entropy"] = losses.in_batch_cross_entropy(scores.anchor, positive, candidates)
    return found


def _without_common_change(scores: PairScores, candidates: Tensor) -> Tensor:
    """Logits without what the interaction adds to all candidates of a query alike, float32 [queries, passages].

    It moves no passage past another, but the contrastive imitation loss is not blind to it: lowering every logit lowers
    that loss, and a bounded interaction would end with all its tanh at -1, where it has neither effect nor gradient.
    """
    logits = scores.logits.float()
    if scores.anchor is None:
        return logits
    return logits - losses.masked_mean(logits - scores.anchor.float(), candidates)[:, None]


def weighted_sum(found: dict[str, Tensor], weights: LossWeights) -> Tensor:
    """The total loss.

    Raises:
        InputError: no loss has a weight above 0.
    """
    if not found:
        raise InputError(
            "no loss has a weight above 0 (anchor_cross_entropy is for the head 'anchored' only); set one in [losses]"
        )
    return torch.stack([getattr(weights, name) * value for name, value in found.items()]).sum()


def _vectors(student: Student, texts: list[str], kind: TextKind) -> Tensor:
    ids = student.tokenize(texts, kind).ids
    parts = token_budget_batches([len(row) for row in ids], max_tokens=_PART_TOKENS, max_items=len(ids))
    encoded = torch.cat([student(*student.backbone.pad([ids[index] for index in part])) for part in parts])
    order = torch.tensor([index for part in parts for index in part], device=encoded.device)
    return encoded[torch.argsort(order)]
