"""The parts of the interaction (IEM) that every way of computing it shares."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class Linear(NamedTuple):
    """Weight [out, in] and bias [out] of y = W x + b."""

    weight: Tensor
    bias: Tensor | None


def bounded_logit(
    dot: Float[Tensor, "*pairs"], interaction: Float[Tensor, "*pairs"], bound: float | Tensor
) -> Float[Tensor, "*pairs"]:
    """The score z = dot + B tanh(g).

    The interaction shifts the inner product by at most B, so a candidate list can be certified.
    """
    return dot + bound * torch.tanh(interaction)


def mean_best_cosines(
    queries: Sequence[Float[Tensor, "_ dim"]],
    passages: Sequence[Float[Tensor, "_ dim"]],
    *,
    num_tokens: Sequence[int] | None = None,
) -> Float[Tensor, "queries passages"]:
    """The mean, over a query's tokens, of the highest cosine with a token of the passage: late interaction.

    Source: Khattab and Zaharia, "ColBERT", SIGIR 2020.

    Args:
        queries: the vectors, of norm sqrt(dim), of each query's tokens; a query without any has 0 for all passages.
        passages: the same for the passages; one without tokens has the cosine -1 with every token.
        num_tokens: over how many tokens of each query the mean is taken, if not over those with a vector: the others
            count as cosines of 0.
    """
    rows, columns = torch.cat([*queries]), torch.cat([*passages])
    cosines = rows @ columns.T / rows.shape[-1]
    owners = torch.repeat_interleave(torch.tensor([len(tokens) for tokens in passages], device=rows.device))
    best = cosines.new_full((len(cosines), len(passages)), -1.0)
    best = best.scatter_reduce(1, owners.expand(len(cosines), -1), cosines, "amax")
    counts = torch.tensor([len(tokens) for tokens in queries], device=rows.device)
    summed = best.new_zeros(len(queries), len(passages)).index_add(0, torch.repeat_interleave(counts), best)
    divisors = counts if num_tokens is None else torch.tensor([*num_tokens], device=rows.device)
    return summed / divisors.clamp(min=1)[:, None]
