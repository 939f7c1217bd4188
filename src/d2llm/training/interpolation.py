"""What of a training is kept: a share of the change from its start, and for each task the interaction's weight r.

As much of the change as dev asks for, and no more.

Source: Wortsman et al., "Robust Fine-Tuning of Zero-Shot Models", CVPR 2022: weights between the pretrained and the
tuned ones keep most of the gain and lose less on data that the training has not seen. A dev set of the training's own
data cannot see that loss, so among states that it cannot tell apart, the one nearest the start is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from d2llm.core.types import Task
from d2llm.ops.gating import never_worse
from d2llm.training.dev import DevResult

Items = dict[str, dict[str, float]]
"""By data set, the value of each of its queries or pairs."""


def put_between(
    parameters: Mapping[str, nn.Parameter], start: Mapping[str, Tensor], end: Mapping[str, Tensor], share: float
) -> None:
    """Set the parameters to ``share`` of the way from ``start`` to ``end``.

    A low-rank adapter's change is the product of two matrices and 0 at the start. Only the second one is scaled, so the
    weights that it changes are exactly ``share`` of the way.
    """
    with torch.no_grad():
        for name, parameter in parameters.items():
            first = end[name] if ".lora_A." in name else start[name]
            parameter.copy_(torch.lerp(first.to(parameter.device), end[name].to(parameter.device), share))


def sufficient_share(
    shares: Sequence[float],
    measure: Callable[[float], dict[str, DevResult]],
    start: Mapping[str, Mapping[str, float]],
    *,
    seed: int,
    largest: float = 1.0,
) -> tuple[float, dict[float, dict[str, DevResult]]]:
    """The share of the change that is kept: never worse than the start, as good as any, and no larger than needed.

    First, the shares that are significantly worse than the start on some data set are dropped. Of the rest, the one
    with the best mean is found, and the smallest share is taken that is on no data set significantly worse than that
    one. If no share is left, the result is 0: the start itself.

    Args:
        shares: to try, each in (0, 1]; ``largest`` is always among them, and none beyond it.
        measure: the dev results of a share.
        start: the value of each query or pair of each dev set at the start (``items_at_best_weight``).
        seed: of the paired randomisation tests, one-sided at .05 (``ops.gating.never_worse``).
        largest: share that may be kept.

    Returns:
        The share, and the dev results of all that were tried.
    """
    results = {share: measure(share) for share in sorted({s for s in shares if s < largest} | {largest})}
    items: dict[float, Items] = {share: items_at_best_weight(result) for share, result in results.items()}
    sound = [share for share in results if not worse_sets(start, items[share], seed=seed)]
    if not sound:
        return 0.0, {0.0: measure(0.0), **results}
    best = max(sound, key=lambda share: mean_value(results[share]))
    return min(share for share in sound if not worse_sets(items[best], items[share], seed=seed)), results


def worse_sets(
    start: Mapping[str, Mapping[str, float]], end: Mapping[str, Mapping[str, float]], *, seed: int
) -> list[str]:
    """The data sets on which ``end`` is significantly worse than ``start``."""
    return [name for name, values in start.items() if not never_worse(values, end[name], seed=seed).passed]


def choose_interaction_weights(
    results: Mapping[str, DevResult], start: Mapping[str, Mapping[str, float]] | None = None, *, seed: int = 0
) -> dict[Task, float]:
    """For each task the weight r with the best mean over its dev sets; of equal ones the smallest.

    With ``start`` only weights that are on none of the sets significantly worse than the start, nor than the vectors
    alone (r = 0): a gain on one data set does not pay for another's loss. Where no weight will do (the vectors alone
    have lost something), the smallest.

    Args:
        results: by data set.
        start: the value of each query or pair of each dev set at the start (``items_at_best_weight``).
        seed: of the paired tests.
    """
    chosen: dict[Task, float] = {}
    tasks: list[Task] = sorted({result.task for result in results.values()})
    for task in tasks:
        of_task = {name: result for name, result in results.items() if result.task == task}
        weights = sorted(next(iter(of_task.values())).values)
        if start is not None:
            weights = _sound_weights(of_task, weights, start, seed) or weights[:1]
        chosen[task] = max(weights, key=lambda weight: sum(result.values[weight] for result in of_task.values()))
    return chosen


def _sound_weights(
    results: Mapping[str, DevResult],
    weights: Sequence[float],
    start: Mapping[str, Mapping[str, float]],
    seed: int,
) -> list[float]:
    """The weights that are on no data set worse than the start or the smallest weight."""
    before = {name: start[name] for name in results}
    alone = {name: by_place(result.by_item[weights[0]]) for name, result in results.items()}
    sound: list[float] = []
    for weight in weights:
        after = {name: by_place(result.by_item[weight]) for name, result in results.items()}
        if not worse_sets(before, after, seed=seed) and not worse_sets(alone, after, seed=seed):
            sound.append(weight)
    return sound


def value_by_set(results: Mapping[str, DevResult], weights: Mapping[Task, float]) -> dict[str, float]:
    """The measure of each dev set at its task's weight."""
    return {name: result.values[weights[result.task]] for name, result in results.items()}


def mean_value(results: Mapping[str, DevResult]) -> float:
    """Mean over the data sets of the dev measure, at the best weight r of each task."""
    by_set = value_by_set(results, choose_interaction_weights(results))
    return sum(by_set.values()) / len(by_set)


def items_at_best_weight(results: Mapping[str, DevResult]) -> Items:
    """The value of each query or pair, by its place, of each dev set at its task's best weight r."""
    weights = choose_interaction_weights(results)
    return {name: by_place(result.by_item[weights[result.task]]) for name, result in results.items()}


def by_place(values: NDArray[np.float64]) -> dict[str, float]:
    """Values of the items of a dev set by their place, for the paired tests."""
    return {str(place): float(value) for place, value in enumerate(values)}
