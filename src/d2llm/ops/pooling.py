"""Pooling and padding of token states, as plain functions of states and mask."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

PoolingName = Literal["mean", "weighted_mean", "ditto", "last", "first"]


def to_right_padding(
    token_ids: Int[Tensor, "batch tokens"], mask: Bool[Tensor, "batch tokens"]
) -> tuple[Int[Tensor, "batch tokens"], Bool[Tensor, "batch tokens"]]:
    """Move padding to the right without changing the order of the real tokens.

    With padding on the right, positions count from 0 and causal attention never sees a padding token, so that one code
    path serves decoders, encoders and either padding side.
    """
    order = torch.argsort((~mask).to(torch.int8), dim=1, stable=True)
    return token_ids.gather(1, order), mask.gather(1, order)


def last_positions(mask: Bool[Tensor, "batch tokens"]) -> Int[Tensor, " batch"]:
    """Index of the last real token of each right-padded row."""
    return mask.sum(dim=1).clamp(min=1) - 1


def pool(
    states: Float[Tensor, "batch tokens dim"], mask: Bool[Tensor, "batch tokens"], name: PoolingName
) -> Float[Tensor, "batch dim"]:
    """The pooling of right-padded states that a model was trained with: mean of the tokens, the last, or the first.

    In the weighted mean, token i of n counts i times: in a decoder, later tokens have read more. Muennighoff, "SGPT:
    GPT Sentence Embeddings for Semantic Search", 2022 (arXiv 2202.08904), section 3.1. For ``ditto``, the states have
    been weighted already (``models.diagonal_attention``), and this is their mean.
    """
    if name == "first":
        return states[:, 0]
    if name == "last":
        rows = torch.arange(states.shape[0], device=states.device)  # not len: a traced graph would freeze the number
        return states[rows, last_positions(mask)]
    kept = states.masked_fill(~mask.unsqueeze(-1), 0.0)  # not times 0: padding may hold NaN
    if name == "weighted_mean":
        weights = mask.cumsum(dim=1) * mask
        return (kept * weights.unsqueeze(-1)).sum(dim=1) / weights.sum(dim=1, keepdim=True).clamp(min=1)
    return kept.sum(dim=1) / mask.sum(dim=1, keepdim=True).clamp(min=1)
