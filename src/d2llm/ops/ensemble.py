"""Calibrated log-odds from the scores of several teachers: logistic regression with non-negative weights.

Each teacher's score is standardised, an L2-regularised regression finds the weights, and a temperature and a bias then
undo the shrinkage, so that the result is calibrated. With one teacher this is plain calibration.

Sources: Wolpert, "Stacked generalization", Neural Networks 5, 1992; Breiman, "Stacked regressions", Machine Learning
24, 1996 (why not negative); Platt, "Probabilistic outputs for support vector machines", 1999; Guo et al., "On
Calibration of Modern Neural Networks", ICML 2017.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64
from numpy.typing import ArrayLike, NDArray

from d2llm.core.errors import InputError
from d2llm.ops.calibration import sigmoid

DEFAULT_L2 = 1e-3
_NEWTON_STEPS = 100  # a handful suffice


@dataclass(frozen=True, slots=True)
class Ensemble:
    """log-odds = bias + sum over m of weights[m] * (score[m] - means[m]) / scales[m].

    ``temperature`` is the number that weights and bias were divided by after the regression; it is already applied.
    """

    means: tuple[float, ...]
    scales: tuple[float, ...]
    weights: tuple[float, ...]
    bias: float
    temperature: float = 1.0

    def log_odds(self, scores: ArrayLike) -> Float64[np.ndarray, " pairs"]:
        """Scores [pairs, members] -> log-odds [pairs]."""
        values = (np.asarray(scores, np.float64) - np.array(self.means)) / np.array(self.scales)
        return values @ np.array(self.weights) + self.bias

    def only(self, members: Sequence[int]) -> Ensemble:
        """The ensemble of some of its members; the same function if the other members have weight 0."""
        chosen = ([values[m] for m in members] for values in (self.means, self.scales, self.weights))
        means, scales, weights = map(tuple, chosen)
        return Ensemble(means, scales, weights, self.bias, self.temperature)


def fit_logistic(
    scores: ArrayLike, targets: ArrayLike, *, l2: float = 0.0
) -> tuple[Float64[np.ndarray, " members"], float]:
    """Weights w >= 0 and bias b that minimise  mean_i [log(1 + exp(f_i)) - t_i f_i] + l2 / 2 |w|^2,  f = scores w + b.

    ``scores`` are [pairs, members], with columns of similar scale, ``targets`` [pairs] in [0, 1]. The bias is not
    regularised. Newton's method: the minimum of each quadratic approximation is a non-negative least-squares problem
    (its bias is the difference of two columns), and a step is halved until it lowers the loss.
    """
    from scipy.optimize import nnls  # slow to import

    columns = np.asarray(scores, np.float64)
    target_probabilities = np.asarray(targets, np.float64)
    num_pairs, num_members = columns.shape
    design = np.column_stack((columns, np.ones(num_pairs), -np.ones(num_pairs)))
    shrinking = np.array([l2] * num_members + [0.0, 0.0])

    def loss(at: NDArray[np.float64]) -> float:
        logits = design @ at
        return float(np.mean(np.logaddexp(0, logits) - target_probabilities * logits) + shrinking @ at**2 / 2)

    parameters = np.zeros(num_members + 2)
    for _ in range(_NEWTON_STEPS):
        logits = design @ parameters
        probabilities = sigmoid(logits)
        roots = np.maximum(np.sqrt(probabilities * (1 - probabilities) / num_pairs), 1e-9)
        responses = roots * logits + (target_probabilities - probabilities) / num_pairs / roots
        quadratic = np.vstack((roots[:, None] * design, np.diag(np.sqrt(shrinking))))
        minimum, _ = nnls(quadratic, np.concatenate((responses, np.zeros(num_members + 2))), maxiter=1000)
        step = minimum - parameters
        if np.abs(step).max() < 1e-10:
            break
        before, size = loss(parameters), 1.0
        while size > 1e-6 and loss(parameters + size * step) > before + 1e-15:
            size /= 2
        parameters = parameters + size * step
    return parameters[:num_members], float(parameters[-2] - parameters[-1])


def fit_ensemble(scores: ArrayLike, labels: ArrayLike, *, l2: float = DEFAULT_L2) -> Ensemble:
    """Fit weights, bias and temperature to labelled pairs.

    Labels are softened to Platt's targets, so that the result stays finite if the scores separate the labels perfectly.

    Args:
        scores: [pairs, members] finite.
        labels: [pairs] bool, both kinds.
        l2: weight of the regularisation, relative to the mean log-loss on standardised scores.

    Raises:
        InputError: shapes that differ, a score that is not a finite number, or labels of one kind only.
    """
    values, truth = _checked(scores, labels)
    means, scales = values.mean(axis=0), values.std(axis=0)
    # The standard deviation of a constant column may be a rounding error, which must not blow the column up.
    scales = np.where(scales > 1e-9 * (1 + np.abs(means)), scales, 1.0)
    standard = (values - means) / scales
    targets = _soft_targets(truth)
    weights, bias = fit_logistic(standard, targets, l2=l2)
    slope = 1.0
    if weights.any():
        slopes, shift = fit_logistic((standard @ weights + bias)[:, None], targets)
        slope = float(slopes[0])
        weights, bias = slope * weights, slope * bias + shift
    return Ensemble(tuple(means.tolist()), tuple(scales.tolist()), tuple(weights.tolist()), bias, 1 / slope)


def out_of_fold_log_odds(
    scores: ArrayLike,
    labels: ArrayLike,
    groups: Sequence[str],
    *,
    l2: float = DEFAULT_L2,
    num_folds: int = 5,
    seed: int = 0,
) -> Float64[np.ndarray, " pairs"]:
    """The log-odds of every pair from an ensemble that was fitted without the pair's group: an unbiased estimate.

    Pairs of one group (the query's id) stay in one of ``num_folds`` folds, to which ``seed`` assigns the groups at
    random. There are fewer folds if there are fewer groups. Other arguments and errors: ``fit_ensemble``.

    Raises:
        InputError: there is only one group.
    """
    values, truth = _checked(scores, labels)
    names = sorted(set(groups))
    if len(names) < 2:
        raise InputError("cross-validation over queries needs at least two of them; give more queries")
    order = np.random.default_rng(seed).permutation(len(names))
    fold_of = {names[index]: position % num_folds for position, index in enumerate(order.tolist())}
    folds = np.array([fold_of[group] for group in groups])
    log_odds = np.empty(len(values))
    for fold in np.unique(folds).tolist():
        left_out = folds == fold
        log_odds[left_out] = fit_ensemble(values[~left_out], truth[~left_out], l2=l2).log_odds(values[left_out])
    return log_odds


def _soft_targets(truth: NDArray[np.bool_]) -> Float64[np.ndarray, " pairs"]:
    """Platt's targets: (N+ + 1) / (N+ + 2) for a positive, 1 / (N- + 2) for a negative."""
    positives = int(truth.sum())
    return np.where(truth, (positives + 1) / (positives + 2), 1 / (len(truth) - positives + 2))


def _checked(scores: ArrayLike, labels: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    values, truth = np.asarray(scores, np.float64), np.asarray(labels).astype(bool)
    if values.ndim != 2 or values.shape[0] != len(truth) or not values.shape[1]:
        raise InputError(f"scores of shape {values.shape} and {len(truth)} labels: give [pairs, members] and [pairs]")
    if not np.isfinite(values).all():
        raise InputError(f"{int((~np.isfinite(values)).sum())} of {values.size} scores are not finite numbers")
    if truth.all() or not truth.any():
        raise InputError(
            f"all {len(truth)} pairs have the same label, so the scores cannot be calibrated; "
            "give queries with positives and negatives"
        )
    return values, truth
