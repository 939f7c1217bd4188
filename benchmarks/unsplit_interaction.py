"""The interaction (IEM) of one pair, unsplit and in plain float operations: the reference for every faster path.

Source: Liao et al., "D2LLM", ACL 2024, section 3.2; the dot head and the rich features are additions of d2llm.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from d2llm.ops.scoring import Linear

FeatureName = Literal["rich", "concat", "product", "difference"]


def pair_features(
    query: Float[Tensor, "*pairs dim"], passage: Float[Tensor, "*pairs dim"], name: FeatureName
) -> Float[Tensor, "*pairs features"]:
    """Input of the first layer for a pair: [a; b] (as in the paper), plus a * b, |a - b|, or both (rich)."""
    parts = [query, passage]
    if name in ("product", "rich"):
        parts.append(query * passage)
    if name in ("difference", "rich"):
        parts.append((query - passage).abs())
    return torch.cat(parts, dim=-1)


def multilayer_perceptron(x: Float[Tensor, "*pairs in"], layers: Sequence[Linear]) -> Float[Tensor, "*pairs out"]:
    """Linear layers with ReLU between them (none after the last)."""
    for position, layer in enumerate(layers):
        if position:
            x = torch.relu(x)
        x = torch.nn.functional.linear(x, layer.weight, layer.bias)
    return x


def dot_logit(
    query: Float[Tensor, "*pairs dim"],
    passage: Float[Tensor, "*pairs dim"],
    query_map: Float[Tensor, "dim dim"],
    passage_map: Float[Tensor, "dim dim"],
    scale: float | Tensor,
) -> Float[Tensor, "*pairs"]:
    """The inner product t <U a, V b> / dim; for U = V = I and vectors of norm sqrt(dim) it is t times their cosine."""
    inner = ((query @ query_map.T) * (passage @ passage_map.T)).sum(dim=-1)
    return scale * inner / query.shape[-1]
