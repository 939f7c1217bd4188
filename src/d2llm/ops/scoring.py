"""The parts of the interaction (IEM) that every way of computing it shares."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class Linear(NamedTuple):
    """Weight [out, in] and bias [out] of y = W x + b."""

    weight: Tensor
    bias: Tensor | None


def anchored_logit(
    anchor: Float[Tensor, "*pairs"], interaction: Float[Tensor, "*pairs"], bound: float | Tensor
) -> Float[Tensor, "*pairs"]:
    """The score z = anchor + B tanh(g).

    The interaction shifts the anchor by at most B, so a candidate list can be certified.
    """
    return anchor + bound * torch.tanh(interaction)
