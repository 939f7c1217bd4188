"""Between the start and the end of a training: as much of the change as dev asks for, and no more.

Source: Wortsman et al., "Robust Fine-Tuning of Zero-Shot Models", CVPR 2022: weights between the pretrained and the
tuned ones keep most of the gain and lose less on data that the training has not seen. A dev set of the training's own
data cannot see that loss, so among states that it cannot tell apart, the one nearest the start is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from d2llm.ops.gating import never_worse
from d2llm.pipeline.dev import DevResult, choose_residual_weights


def put_between(
    parameters: Mapping[str, nn.Parameter], start: Mapping[str, Tensor], end: Mapping[str, Tensor], share: float
) -> None:
    """Set the parameters to ``share`` of the way from ``start`` to ``end``.

    Of a low-rank adapter, whose change is the product of two matrices and 0 at the start, only the second is scaled:
    the weights that it changes are then exactly ``share`` of the way.
    """
    with torch.no_grad():
        for name, parameter in parameters.items():
            first = end[name] if ".lora_A." in name else start[name]
            parameter.copy_(torch.lerp(first.to(parameter.device), end[name].to(parameter.device), share))


def smallest_sufficient_share(
    shares: Sequence[float], measure: Callable[[float], dict[str, DevResult]], *, seed: int
) -> tuple[float, dict[float, dict[str, DevResult]]]:
    """The smallest share of the way whose dev result is on no data set significantly worse than the whole way's.

    Args:
        shares: to try, each in (0, 1]; the whole way is always among them.
        measure: the dev results of a share.
        seed: of the paired randomisation test, one-sided at .05 (``ops.gating.never_worse``).

    Returns:
        The share, and the dev results of all.
    """
    results = {share: measure(share) for share in sorted({*shares, 1.0})}
    whole = items_at_best_weight(results[1.0])
    for share, found in results.items():
        items = items_at_best_weight(found)
        if all(never_worse(whole[name], items[name], seed=seed).passed for name in whole):
            return share, results
    raise AssertionError("the whole way is never worse than itself")


def items_at_best_weight(results: Mapping[str, DevResult]) -> dict[str, dict[str, float]]:
    """The value of each query or pair, by its place, of each dev set at its task's best interaction weight."""
    weights = choose_residual_weights(dict(results))
    return {
        name: {str(place): float(value) for place, value in enumerate(result.by_item[weights[result.task]])}
        for name, result in results.items()
    }
