"""The training objective of a batch: the weighted sum of its losses.

Source: Liao et al., "D2LLM", ACL 2024, section 3.3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean

import torch
from torch import Tensor, nn

from d2llm.core.errors import InputError
from d2llm.data.collation import DistillationBatch, LabelledSource
from d2llm.data.plan import TrainingSource
from d2llm.models.interaction import Interaction, PairScores
from d2llm.models.student import Student
from d2llm.ops.scoring import mean_best_cosines
from d2llm.recipe.losses import Loss
from d2llm.training.losses import LossInput

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


def embedded_positions(student: Student, batch: DistillationBatch, ids: Sequence[Sequence[int]]) -> list[list[int]]:
    """The places of the tokens of each text that have vectors; none if token embeddings do not count in this batch."""
    projection = student.token_projection
    if projection is None or not batch.token_weight:
        return [[] for _ in ids]
    num_queries = len(batch.query_ids)
    return [
        *(projection.query_positions(row) for row in ids[:num_queries]),
        *(projection.positions(row) for row in ids[num_queries:]),
    ]


def score_vectors(
    student: Student, vectors: Tensor, batch: DistillationBatch, *, dots_only: bool = False
) -> PairScores:
    """Score all queries against all passages by their vectors [queries + passages, dim]; differentiable.

    ``dots_only`` scores by the inner product, without the interaction (dot head).
    """
    queries, passages = vectors.split([len(batch.query_ids), len(batch.passage_ids)])
    dtype = student.backbone.compute_dtype
    with torch.autocast(vectors.device.type, dtype, enabled=dtype != torch.float32):
        head = student.interaction
        task = batch.source.task
        if not isinstance(head, Interaction):
            return head(queries, passages, task)
        scores = head.score_dots(queries, passages, task) if dots_only else head(queries, passages, task)
        return scores if head.teacher_dots is None else head.score_heads(scores, queries, passages, task)


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
        tokens: the vectors [tokens, token_dim] of each text's tokens (``embedded_positions``).
        batch: the batch.
        ids: token ids of its texts.
    """
    projection = student.token_projection
    if projection is None or not batch.token_weight:
        return scores
    num_queries = len(batch.query_ids)
    num_tokens = [len(projection.positions(row)) for row in ids[:num_queries]]
    return replace(scores, tokens=mean_best_cosines(tokens[:num_queries], tokens[num_queries:], num_tokens=num_tokens))


def batch_losses(objective: Mapping[str, Loss], inputs: LossInput) -> dict[str, Tensor]:
    """The value of each loss before its weight, by kind; of labelled pairs those for pairs, else the others."""
    of_pairs = inputs.batch.targets is not None
    values = {kind: loss(inputs) for kind, loss in objective.items() if loss.of_pairs == of_pairs}
    return {kind: value for kind, value in values.items() if value is not None}


def weighted_sum(values: Mapping[str, Tensor], objective: Mapping[str, Loss]) -> Tensor:
    """The total loss.

    Raises:
        InputError: no loss has a value.
    """
    if not values:
        raise InputError(
            "no loss has a weight above 0 that these data have (labelled pairs have pair_cross_entropy alone, and the "
            "inner product's are for the head 'dot'); set one in [losses]"
        )
    return torch.stack([objective[kind].weight * value for kind, value in values.items()]).sum()


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
