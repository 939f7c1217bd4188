"""Successive halving: which variants are trained in each round, worked out by hand."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from d2llm.training.ablation.halving import halve


@dataclass
class Row:
    name: str
    mean: float


@dataclass
class Report:
    rows: list[Row]
    missing: tuple[str, ...] = ()


# d is best in the end, but second after one epoch.
MEANS = {1: {"a": 0.1, "b": 0.5, "c": 0.2, "d": 0.4, "e": 0.3}, 2: {"b": 0.6, "d": 0.7}, 4: {"d": 0.9}}


@pytest.mark.parametrize(
    ("stops_at", "rounds"),
    [(None, [(None, 1), (["b", "d"], 2), (["d"], 4)]), (2, [(None, 1), (["b", "d"], 2)])],
)
def test_the_better_half_is_trained_longer(stops_at, rounds):
    trained = []

    def measure(names, epochs):
        trained.append((names, epochs))
        rows = [Row(name, MEANS[epochs][name]) for name in names or MEANS[epochs]]
        return Report(rows, ("a run",) if epochs == stops_at else ())

    report = halve(measure, None, 1)
    assert trained == rounds
    assert {row.name for row in report.rows} == {*rounds[-1][0]}
