"""Chooses on dev how much of a training to keep: a fraction of the change of weights, each task's interaction weight
r, and the gates of its bound.

Source: Wortsman et al., "Robust Fine-Tuning of Zero-Shot Models", CVPR 2022: weights between the pretrained and the
tuned ones keep most of the gain and lose less on data that the training has not seen. A dev set from the training's own
data cannot measure that loss, so the smallest fraction that dev cannot distinguish from the best is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from d2llm.core.types import Task
from d2llm.models.interaction import Interaction
from d2llm.models.student import Student
from d2llm.ops.gating import non_inferior
from d2llm.training.dev_sets import DevResult, DevSet, EncodedDev, encode_dev

Items = dict[str, dict[str, float]]
"""For each data set, the value of each of its queries or pairs."""
_DEPTH, _TOLERATED, _MORE = 10, 0.001, 1.01  # what gates must not change: results, loss on dev, passages to score


def interpolate(
    parameters: Mapping[str, nn.Parameter], start: Mapping[str, Tensor], end: Mapping[str, Tensor], fraction: float
) -> None:
    """Set the parameters to ``fraction`` of the way from ``start`` to ``end``.

    A low-rank adapter's change is the product of two matrices and 0 at the start. Only the second matrix is scaled, so
    the product is exactly ``fraction`` of the whole change.
    """
    with torch.no_grad():
        for name, parameter in parameters.items():
            first = end[name] if ".lora_A." in name else start[name]
            parameter.copy_(torch.lerp(first.to(parameter.device), end[name].to(parameter.device), fraction))


def choose_fraction(
    fractions: Sequence[float],
    measure: Callable[[float], dict[str, DevResult]],
    start: Mapping[str, Mapping[str, float]],
    *,
    seed: int,
    largest: float = 1.0,
) -> tuple[float, dict[float, dict[str, DevResult]]]:
    """The smallest fraction of the change that is not worse than the start, nor than the best fraction.

    First, the fractions that are significantly worse than the start on some data set are dropped. Of the others, the
    smallest fraction is chosen that is not significantly worse on any data set than the one with the best mean. If no
    fraction is left, the result is 0: the start itself. The tests are paired randomisation tests, one-sided at .05
    (``ops.gating.non_inferior``), against the items ``start`` (``items_at_best_weight``).

    ``measure`` returns the dev results of a fraction in (0, 1]; ``largest`` is always tried, larger ones never. Returns
    the fraction, and the dev results of all fractions that were tried.
    """
    results = {fraction: measure(fraction) for fraction in sorted({s for s in fractions if s < largest} | {largest})}
    items: dict[float, Items] = {fraction: items_at_best_weight(result) for fraction, result in results.items()}
    sound = [fraction for fraction in results if not worse_sets(start, items[fraction], seed=seed)]
    if not sound:
        return 0.0, {0.0: measure(0.0), **results}
    best = max(sound, key=lambda fraction: mean_value(results[fraction]))
    return min(fraction for fraction in sound if not worse_sets(items[best], items[fraction], seed=seed)), results


def worse_sets(
    start: Mapping[str, Mapping[str, float]], end: Mapping[str, Mapping[str, float]], *, seed: int
) -> list[str]:
    """The data sets on which ``end`` is significantly worse than ``start``."""
    return [name for name, values in start.items() if not non_inferior(values, end[name], seed=seed).passed]


def choose_interaction_weights(
    results: Mapping[str, DevResult], start: Mapping[str, Mapping[str, float]] | None = None, *, seed: int = 0
) -> dict[Task, float]:
    """For each task, the weight r with the best mean over its dev sets; of equal ones the smallest.

    If ``start`` is given, only weights are considered that are on no data set significantly worse than the start or
    than the vectors alone (r = 0): a gain on one data set does not make up for a loss on another. If there is no such
    weight (because the vectors alone are worse than the start), the smallest is chosen.
    """
    chosen: dict[Task, float] = {}
    tasks: list[Task] = sorted({result.task for result in results.values()})
    for task in tasks:
        task_results = {name: result for name, result in results.items() if result.task == task}
        weights = sorted(next(iter(task_results.values())).values)
        if start is not None:
            weights = _sound_weights(task_results, weights, start, seed) or weights[:1]
        chosen[task] = max(weights, key=lambda weight: sum(result.values[weight] for result in task_results.values()))
    return chosen


def _sound_weights(
    results: Mapping[str, DevResult],
    weights: Sequence[float],
    start: Mapping[str, Mapping[str, float]],
    seed: int,
) -> list[float]:
    """The weights that are not worse, on any data set, than the start or the smallest weight."""
    before = {name: start[name] for name in results}
    alone = {name: by_position(result.by_item[weights[0]]) for name, result in results.items()}
    sound: list[float] = []
    for weight in weights:
        after = {name: by_position(result.by_item[weight]) for name, result in results.items()}
        if not worse_sets(before, after, seed=seed) and not worse_sets(alone, after, seed=seed):
            sound.append(weight)
    return sound


def value_by_set(results: Mapping[str, DevResult], weights: Mapping[Task, float]) -> dict[str, float]:
    """The measure of each dev set at its task's weight."""
    return {name: result.values[weights[result.task]] for name, result in results.items()}


def mean_value(results: Mapping[str, DevResult]) -> float:
    """The mean of the dev measure over the data sets, at each task's best weight r."""
    by_set = value_by_set(results, choose_interaction_weights(results))
    return sum(by_set.values()) / len(by_set)


def items_at_best_weight(results: Mapping[str, DevResult]) -> Items:
    """For each dev set, the value of each query or pair (by its position) at its task's best weight r."""
    weights = choose_interaction_weights(results)
    return {name: by_position(result.by_item[weights[result.task]]) for name, result in results.items()}


def by_position(values: NDArray[np.float64]) -> dict[str, float]:
    """The values of a dev set's items by position, for the paired tests."""
    return {str(position): float(value) for position, value in enumerate(values)}


def make_idle_gates_constant(student: Student, dev_sets: Sequence[DevSet], *, seed: int) -> bool:
    """Give every text the same gates of the bound, unless that is worse on dev; whether it was done.

    A gate makes the bound of a pair smaller, so that an exact search scores fewer passages in full. If gates are almost
    the same for every text, the mean of their product over the dev pairs, multiplied into the bound once, does as well.

    It is worse if some dev set is significantly worse (``choose_weights.worse_sets``), if their mean falls by more than
    .001, or if more passages of the dev lists could be among the first ten by their bounds. Only tasks in which the
    interaction counts are measured.
    """
    head = student.interaction
    if not isinstance(head, Interaction) or head.query_gate is None or head.passage_gate is None:
        return False
    used = [encode_dev(student, dev) for dev in dev_sets if head.changes_scores(dev.task)]
    if not used:
        return False
    gates = (head.query_gate, head.passage_gate)
    learned = [(gate.weight.detach().clone(), gate.bias.detach().clone()) for gate in gates]
    before, to_score = _measure(student, used)
    mean_gate = fmean(_mean_gate(student, head, encoded) for encoded in used)
    with torch.no_grad():
        for gate in gates:
            gate.weight.zero_()
            gate.bias.fill_(float(torch.logit(torch.tensor(mean_gate**0.5, dtype=torch.float64))))
    after, to_score_without = _measure(student, used)
    lost = fmean(fmean(before[name].values()) - fmean(after[name].values()) for name in before)
    if worse_sets(before, after, seed=seed) or lost > _TOLERATED or to_score_without > _MORE * to_score:
        with torch.no_grad():
            for gate, (weight, bias) in zip(gates, learned, strict=True):
                gate.weight.copy_(weight)
                gate.bias.copy_(bias)
        return False
    return True


def _mean_gate(student: Student, head: Interaction, encoded: EncodedDev) -> float:
    """The mean of r_q r_p over the pairs of a dev set."""
    queries, passages = (
        torch.from_numpy(vectors).to(student.device) for vectors in (encoded.queries, encoded.passages)
    )
    with torch.inference_mode():
        bound = head.bound(encoded.dev.task)
        of_queries = (head.query_bound(queries, encoded.dev.task) / bound).cpu().numpy()
        of_passages = head.passage_bound(passages).cpu().numpy()
    return fmean(float(gate * of_passages[rows].mean()) for gate, rows in zip(of_queries, encoded.rows, strict=True))


def _measure(student: Student, used: Sequence[EncodedDev]) -> tuple[Items, float]:
    """The dev measure of each item, and how many passages a query's bounds leave on average."""
    items: Items = {}
    left: list[int] = []
    for encoded in used:
        scores: list[np.ndarray] = []
        for query, rows in zip(encoded.queries, encoded.rows, strict=True):
            passages = encoded.passages[rows]
            scorer = student.prepare(query, encoded.dev.task)
            dot = student.score(query, passages, encoded.dev.task, interaction_weight=0.0)
            scores.append(scorer(passages))
            if len(rows) > _DEPTH:
                tenth = np.partition(scores[-1], -_DEPTH)[-_DEPTH]
                left.append(int((dot + scorer.bound * student.passage_bound(passages) >= tenth).sum()))
        items[encoded.dev.name] = by_position(encoded.dev.measure(scores).by_item)
    return items, fmean(left) if left else 0.0
