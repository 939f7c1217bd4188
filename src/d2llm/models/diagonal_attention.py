"""Ditto: states of tokens, weighted by how much each token attends to itself in one head of the model.

Source: Chen et al., "Ditto: A Simple and Efficient Approach to Improve Sentence Embeddings", EMNLP 2023 (arXiv
2305.10786), section 3.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from d2llm.core.errors import InputError

DiagonalHead = tuple[int, int]
"""A layer and a head of it, both counted from 0."""


def last_states(
    model: Any,
    token_ids: Int[Tensor, "batch tokens"],
    mask: Int[Tensor, "batch tokens"] | Bool[Tensor, "batch tokens"],
    head: DiagonalHead | None,
) -> Float[Tensor, "batch tokens dim"]:
    """States of a model's last layer; with ``head``, each times its weight A_ii / mean_j A_jj in that head.

    A_ij is the attention of token i to token j, and the mean is over a text's real tokens. The plain mean of these
    states is therefore Ditto's weighted mean, so whatever pools states pools them so.
    """
    if head is None:
        return model(input_ids=token_ids, attention_mask=mask.long()).last_hidden_state
    output = model(input_ids=token_ids, attention_mask=mask.long(), output_attentions=True)
    layer, number = head
    diagonal = attention_to_itself(output.attentions[layer], mask)[:, number]
    mean = diagonal.sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True).clamp(min=1)
    return output.last_hidden_state * (diagonal / mean.clamp(min=1e-30)).unsqueeze(-1)


def attention_to_itself(
    attention: Float[Tensor, "batch heads tokens tokens"],
    mask: Int[Tensor, "batch tokens"] | Bool[Tensor, "batch tokens"],
) -> Float[Tensor, "batch heads tokens"]:
    """How much each token attends to itself in every head of a layer; 0 for padding."""
    return torch.diagonal(attention, dim1=2, dim2=3).float().masked_fill(~mask.bool()[:, None], 0.0)


def check_diagonal_head(model_config: Any, name: str, head: DiagonalHead) -> None:
    """Check that a model (``name`` in the message) has this head.

    Raises:
        InputError: it has no attention, or fewer layers or heads.
    """
    sizes = [getattr(model_config, size, None) for size in ("num_hidden_layers", "num_attention_heads")]
    if None in sizes:
        raise InputError(f"'{name}' has no attention, so pooling 'ditto' cannot weigh its tokens; set another pooling")
    for number, size, what in zip(head, sizes, ("layer", "head"), strict=True):
        if size is not None and number >= size:
            raise InputError(
                f"diagonal_head names {what} {number}, but '{name}' has only 0 to {size - 1}; it is (layer, head), "
                "counted from 0"
            )
