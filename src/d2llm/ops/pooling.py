"""Padding of token states, and the poolings that most models are trained with."""

from __future__ import annotations

from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from d2llm.recipe.student import Pooling


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


def mean_of_tokens(
    states: Float[Tensor, "batch tokens dim"], mask: Bool[Tensor, "batch tokens"]
) -> Float[Tensor, "batch dim"]:
    """The mean of the states of real tokens."""
    kept = states.masked_fill(~mask.unsqueeze(-1), 0.0)  # not times 0: padding may hold NaN
    return kept.sum(dim=1) / mask.sum(dim=1, keepdim=True).clamp(min=1)


class MeanPooling(Pooling, kind="mean"):
    """The mean of all tokens."""

    measured = (
        "instead of PMA: +.001 on squad-sent and banking77, +.001 on wikiqa and quora ([three "
        "seeds](ablations.md#the-published-objective-taught-by-grades-that-are-better-than-the-student))"
    )

    def pool(
        self, states: Float[Tensor, "batch tokens dim"], mask: Bool[Tensor, "batch tokens"]
    ) -> Float[Tensor, "batch dim"]:
        """The mean."""
        return mean_of_tokens(states, mask)


class FirstPooling(Pooling, kind="first"):
    """The first token, CLS in many encoders."""

    measured = "not measured: the models at hand were trained for the mean or the last token"
    takes_one_token: ClassVar[bool] = True

    def pool(
        self,
        states: Float[Tensor, "batch tokens dim"],
        mask: Bool[Tensor, "batch tokens"],  # noqa: ARG002
    ) -> Float[Tensor, "batch dim"]:
        """The first state."""
        return states[:, 0]


class LastPooling(Pooling, kind="last"):
    """The last token, which has read the whole text in a decoder."""

    measured = (
        "instead of PMA: -.018 ±.006 on squad-sent and banking77, -.022 ±.016 on wikiqa and quora ([three "
        "seeds](ablations.md#the-published-objective-taught-by-grades-that-are-better-than-the-student))"
    )
    takes_one_token: ClassVar[bool] = True

    def pool(
        self, states: Float[Tensor, "batch tokens dim"], mask: Bool[Tensor, "batch tokens"]
    ) -> Float[Tensor, "batch dim"]:
        """The state of the last real token."""
        rows = torch.arange(states.shape[0], device=states.device)  # not len: a traced graph would freeze the number
        return states[rows, last_positions(mask)]
