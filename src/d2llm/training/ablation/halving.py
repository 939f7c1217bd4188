"""The best of many recipes by short runs first: successive halving."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from d2llm.training.ablation.report import AblationReport


def halve(
    measure: Callable[[Sequence[str] | None, int], AblationReport], variants: Sequence[str] | None, epochs: int
) -> AblationReport:
    """The last of several ablations, each of the better half of the variants before, with twice as many epochs.

    Jamieson and Talwalkar, "Non-stochastic Best Arm Identification and Hyperparameter Optimization", AISTATS 2016, for
    what AutoDistiller (He et al., "Distiller", 2021, arXiv 2109.11105) does by fitting a model of such runs.

    Args:
        measure: the ablation of some variants (None: all) with so many epochs; the recipe itself is always in it.
        variants: those to begin with.
        epochs: those of the first ablation.
    """
    report = measure(variants, epochs)
    while len(report.rows) > 1 and not report.missing:
        best_first = sorted(report.rows, key=lambda row: (-(row.mean or 0.0), row.name))
        epochs *= 2
        report = measure([row.name for row in best_first[: len(best_first) // 2]], epochs)
    return report
