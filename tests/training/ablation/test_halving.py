"""Successive halving: which variants are trained in each round, and what is left to do, worked out by hand."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from d2llm.training.ablate import Progress, halve


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

    def measure(*, variants, epochs, budget_minutes, progress):
        assert budget_minutes is None
        trained.append((variants, epochs))
        rows = [Row(name, MEANS[epochs][name]) for name in variants or MEANS[epochs]]
        return Report(rows, ("a run",) if epochs == stops_at else ())

    report = halve(measure, None, 1)
    assert trained == rounds
    assert {row.name for row in report.rows} == {*rounds[-1][0]}


def test_runs_and_minutes_are_those_of_all_rounds_and_so_is_the_budget(monkeypatch):
    """Six variants: 7 runs of one epoch, 4 of two and 2 of four, as long as 23 of one; a minute each epoch."""
    clock, said, budgets = [0.0], [], []
    monkeypatch.setattr("d2llm.training.ablate.time.monotonic", lambda: clock[0])

    def measure(*, variants, epochs, budget_minutes, progress):
        budgets.append(budget_minutes)
        rows = [Row(name, 0.5) for name in variants]
        progress.begin_round(len(rows), 1, 0)
        for name in ("recipe", *variants):
            said.append(progress.begin_run(name))
            clock[0] += 60 * epochs
            progress.end_run(60 * epochs)
        return Report(rows)

    halve(measure, ["a", "b", "c", "d", "e", "f"], 1, budget_minutes=20)
    assert budgets == [20, 13, 5]
    assert said[:2] == ["run 1 of 13: recipe", "run 2 of 13: a, about 22 min left"]
    assert said[7] == "run 8 of 13: recipe, about 16 min left"
    assert said[-2:] == ["run 12 of 13: recipe, about 8 min left", "run 13 of 13: a, about 4 min left"]


def test_what_an_earlier_call_finished_is_counted():
    progress = Progress()
    progress.begin_round(2, 2, 3)  # recipe and two variants with two seeds
    assert progress.begin_run("b") == "run 4 of 6: b"
    assert progress.left == 3
