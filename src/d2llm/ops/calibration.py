"""Calibration of scores (is 80 % right four times out of five?) and how well scores separate the two labels.

Scores or log-odds [n] come with labels [n], true for a yes. An ``InputError`` is raised for NaN, no pairs, lengths that
differ, or no bins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from d2llm.core.errors import InputError


def sigmoid(log_odds: NDArray[np.float64]) -> NDArray[np.float64]:
    """Probabilities from log-odds, without overflow."""  # SciPy's is slow to import, and a search needs no more of it
    return (1 + np.tanh(log_odds / 2)) / 2


@dataclass(frozen=True, slots=True)
class ReliabilityBin:
    """Pairs with a probability of yes in [low, high); the last bin includes its upper end."""

    low: float
    high: float
    mean_probability: float
    fraction_positive: float
    count: int


@dataclass(frozen=True, slots=True)
class ScoreHistogram:
    """Counts per label of scores in [edges[i], edges[i + 1]); the last bin includes its upper end."""

    edges: tuple[float, ...]
    positive: tuple[int, ...]
    negative: tuple[int, ...]


def reliability_bins(log_odds: ArrayLike, labels: ArrayLike, *, num_bins: int = 10) -> list[ReliabilityBin]:
    """Predicted against observed frequency of yes, in bins of equal width of p(yes) = 1 / (1 + exp(-log_odds)).

    Returns the non-empty bins, in order. Infinite log-odds mean certainty.

    Source: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, section 2.
    """
    values, truth = _checked(log_odds, labels, num_bins)
    probabilities = sigmoid(values)
    edges = np.linspace(0, 1, num_bins + 1)
    bins = np.clip(np.searchsorted(edges, probabilities, side="right") - 1, 0, num_bins - 1)
    return [
        ReliabilityBin(
            low=float(edges[index]),
            high=float(edges[index + 1]),
            mean_probability=float(probabilities[bins == index].mean()),
            fraction_positive=float(truth[bins == index].mean()),
            count=int((bins == index).sum()),
        )
        for index in np.unique(bins).tolist()
    ]


def expected_calibration_error(bins: Sequence[ReliabilityBin]) -> float:
    """Mean gap between predicted and observed frequency over the pairs in ``bins``: 0 is perfect, 1 the maximum.

    ECE = sum over bins of count / n * |fraction_positive - mean_probability|.

    Source: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, equation 3.
    """
    if not bins:
        raise InputError("there are no bins: calibration needs at least one pair")
    distances = sum(part.count * abs(part.fraction_positive - part.mean_probability) for part in bins)
    return distances / sum(part.count for part in bins)


def log_loss(log_odds: ArrayLike, labels: ArrayLike) -> float:
    """Mean of -log p(true label), in nats: 0 is perfect, log 2 is the loss of always predicting one half.

    log_loss = mean over pairs of log(1 + exp(-s * log_odds)), s = 1 for a yes and -1 for a no.
    """
    values, truth = _checked(log_odds, labels, 1)
    return float(np.logaddexp(0, np.where(truth, -values, values)).mean())


def score_histogram(scores: ArrayLike, labels: ArrayLike, num_bins: int = 30) -> ScoreHistogram:
    """Count scores in bins of equal width between the lowest and the highest, per label.

    The bins span the finite scores; infinite scores count in the outermost bins.
    """
    values, truth = _checked(scores, labels, num_bins)
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 0.0)
    edges = np.histogram_bin_edges([low, high], bins=num_bins)  # if they are equal, half a unit to both sides
    within = np.clip(values, edges[0], edges[-1])
    positive, negative = (np.histogram(within[part], edges)[0].tolist() for part in (truth, ~truth))
    return ScoreHistogram(tuple(edges.tolist()), tuple(positive), tuple(negative))


def _checked(scores: ArrayLike, labels: ArrayLike, num_bins: int) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    values, truth = np.asarray(scores, np.float64), np.asarray(labels).astype(bool)
    if values.ndim != 1 or values.shape != truth.shape:
        raise InputError(f"scores of shape {values.shape} and labels of shape {truth.shape}: give one each per pair")
    if not len(values) or num_bins < 1:
        raise InputError(f"{len(values)} pairs in {num_bins} bins: at least one of each is needed")
    if np.isnan(values).any():
        raise InputError(f"{int(np.isnan(values).sum())} of {len(values)} scores are NaN; check the model")
    return values, truth
