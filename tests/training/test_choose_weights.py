"""Interpolation between the weights before and after training: which fraction of the training is kept."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from d2llm.core.types import Task
from d2llm.training.choose_weights import choose_fraction, choose_interaction_weights, interpolate, items_at_best_weight
from d2llm.training.dev_sets import DevResult

NUM = 40


def result(*values: float, task: Task = "asymmetric") -> DevResult:
    """A dev result whose 40 queries all have the same value per weight, so that other means differ significantly."""
    weights = (0.0, 1.0)[: len(values)]
    by_item = {weight: np.full(NUM, value) for weight, value in zip(weights, values, strict=True)}
    return DevResult(task, dict(zip(weights, values, strict=True)), by_item)


def test_interpolation_scales_the_adapters_product_by_the_share() -> None:
    generator = torch.Generator().manual_seed(0)
    start = {
        "x.lora_A.default.weight": torch.randn(2, 5, generator=generator),
        "x.lora_B.default.weight": torch.zeros(4, 2),
        "head": torch.tensor([1.0, 2.0]),
    }
    end = {name: value + torch.randn(value.shape, generator=generator) for name, value in start.items()}
    parameters = {name: nn.Parameter(value.clone()) for name, value in end.items()}
    interpolate(parameters, start, end, 0.25)
    product = parameters["x.lora_B.default.weight"] @ parameters["x.lora_A.default.weight"]
    whole = end["x.lora_B.default.weight"] @ end["x.lora_A.default.weight"]
    torch.testing.assert_close(product, 0.25 * whole)
    torch.testing.assert_close(parameters["head"].data, start["head"] + 0.25 * (end["head"] - start["head"]))
    interpolate(parameters, start, end, 0.0)
    assert not parameters["x.lora_B.default.weight"].any()
    torch.testing.assert_close(parameters["head"].data, start["head"])


@pytest.mark.parametrize(
    ("by_weight", "kept"),
    [
        ({0.5: (0.6, 0.6), 1.0: (0.6, 0.6)}, 0.5),  # half the change is as good as all
        ({0.5: (0.6, 0.6), 1.0: (0.7, 0.7)}, 1.0),  # half the change is worse
        ({0.5: (0.6, 0.6), 1.0: (0.9, 0.4)}, 0.5),  # the whole change loses on one set, half of it does not
        ({0.5: (0.6, 0.4), 1.0: (0.9, 0.4)}, 0.0),  # every share loses on one set
        ({0.25: (0.6, 0.6), 0.5: (0.7, 0.6), 1.0: (0.5, 0.5)}, 0.5),  # half the change is better than all
    ],
)
def test_smallest_sufficient_share_is_kept(by_weight: dict[float, tuple[float, float]], kept: float) -> None:
    start = items_at_best_weight({"a": result(0.5), "b": result(0.5)})

    def measure(fraction: float) -> dict[str, DevResult]:
        first, second = by_weight.get(fraction, (0.5, 0.5))
        return {"a": result(first), "b": result(second)}

    fraction, results = choose_fraction([s for s in by_weight if s < 1], measure, start, seed=0)
    assert fraction == kept
    assert set(results) == set(by_weight) | ({0.0} if kept == 0 else set())


def test_kept_share_never_exceeds_the_largest() -> None:
    start = items_at_best_weight({"a": result(0.5)})

    def measure(fraction: float) -> dict[str, DevResult]:
        return {"a": result(0.5 + 0.4 * fraction)}  # keeps getting better

    fraction, results = choose_fraction([0.25, 0.5, 0.75], measure, start, seed=0, largest=0.6)
    assert fraction == 0.6
    assert set(results) == {0.25, 0.5, 0.6}
    assert choose_fraction([], measure, start, seed=0, largest=0.5)[0] == 0.5


def test_weight_that_harms_any_set_is_not_chosen() -> None:
    start = items_at_best_weight({"a": result(0.5), "b": result(0.5), "c": result(0.5, task="symmetric")})
    results = {"a": result(0.5, 0.9), "b": result(0.5, 0.4), "c": result(0.4, 0.6, task="symmetric")}
    assert choose_interaction_weights(results, start, seed=0) == {"asymmetric": 0.0, "symmetric": 1.0}
    # Better than the start, but worse than the trained vectors alone.
    lost = {"a": result(0.7, 0.9), "b": result(0.7, 0.6), "c": results["c"]}
    assert choose_interaction_weights(lost, start, seed=0) == {"asymmetric": 0.0, "symmetric": 1.0}
    assert choose_interaction_weights({"c": result(0.3, 0.4, task="symmetric")}, {"c": start["c"]}, seed=0) == {
        "symmetric": 0.0
    }
