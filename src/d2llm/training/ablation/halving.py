"""The best of many recipes by short runs first: successive halving."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from d2llm.training.ablation.report import AblationReport, AblationRow


@dataclass
class Progress:
    """Which run of how many is trained, and how long the rest takes: over all rounds, if there is ``halving``."""

    halving: bool = False
    run: int = 0
    """Runs that are finished."""
    runs: int = 0
    left: int = 0
    """Runs that are not finished; one with twice the epochs counts twice."""
    seconds: list[float] = field(default_factory=list[float])

    def begin_round(self, num_variants: int, num_seeds: int, num_finished: int) -> None:
        """Count the runs of a round and of those after it, each of the recipe and half as many variants."""
        rounds = [num_variants]
        while self.halving and rounds[-1] > 1:
            rounds.append(rounds[-1] // 2)
        counts = [(count + 1) * num_seeds for count in rounds]
        self.runs, self.run = self.run + sum(counts), self.run + num_finished
        self.left = sum(count << later for later, count in enumerate(counts)) - num_finished
        self.seconds = [2 * fmean(self.seconds)] if self.seconds else []

    def begin_run(self, title: str) -> str:
        """``run 3 of 7: cosine`` and, once one has ended, the minutes that are left."""
        self.run += 1
        minutes = max(1.0, fmean(self.seconds) * self.left / 60) if self.seconds else None
        left = "" if minutes is None else f", about {minutes:,.0f} min left"
        return f"run {self.run} of {self.runs}: {title}{left}"

    def end_run(self, seconds: float) -> None:
        """Count a run that took so long."""
        self.seconds.append(seconds)
        self.left -= 1


def halve(
    measure: Callable[..., AblationReport],
    variants: Sequence[str] | None,
    epochs: int,
    budget_minutes: float | None = None,
) -> AblationReport:
    """The last of several ablations, each of the better half of the variants before, with twice as many epochs.

    Jamieson and Talwalkar, "Non-stochastic Best Arm Identification and Hyperparameter Optimization", AISTATS 2016, for
    what AutoDistiller (He et al., "Distiller", 2021, arXiv 2109.11105) does by fitting a model of such runs.

    Args:
        measure: ``ablate`` without what is set here; the recipe itself is always in it.
        variants: those to begin with; None: all.
        epochs: those of the first ablation.
        budget_minutes: for all of them.
    """
    started, progress = time.monotonic(), Progress(halving=True)
    while True:
        left = None if budget_minutes is None else max(0.0, budget_minutes - (time.monotonic() - started) / 60)
        report = measure(variants=variants, epochs=epochs, budget_minutes=left, progress=progress)
        if len(report.rows) <= 1 or report.missing:
            return report
        best_first = sorted(report.rows, key=_best_first)
        variants, epochs = [row.name for row in best_first[: len(best_first) // 2]], 2 * epochs


def _best_first(row: AblationRow) -> tuple[float, str]:
    return -(row.mean or 0.0), row.name
