"""The loss of drawing a ranking, passage by passage."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


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
    is_drawn = nn.functional.one_hot(orders, logits.shape[-1]).cumsum(dim=1)
    before = torch.cat([torch.zeros_like(is_drawn[:, :1]), is_drawn[:, :-1]], dim=1) > 0
    log_shares = logits.masked_fill(before, -torch.inf).log_softmax(dim=-1)
    losses = -log_shares.gather(2, orders[:, :, None])[:, :, 0]
    weights = 1 / torch.arange(1, steps + 1, device=logits.device)
    return (losses @ (weights / weights.sum())).mean()
