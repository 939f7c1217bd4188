"""Several rankings joined into one strength for each item.

The model of Plackett and Luce: a ranking is drawn from the best to the worst, each time with probabilities in
proportion to the strengths of the items that are left. The strengths of the greatest likelihood are found by Hunter's
iteration ("MM algorithms for generalized Bradley-Terry models", Annals of Statistics 2004), which never overshoots. Two
virtual rankings of every pair of items, one each way, with a small weight, keep the strengths of an item finite that
won or lost everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_TOLERANCE = 1e-6
_MAX_STEPS = 1000


def strengths(rankings: Sequence[Sequence[int]], num_items: int, *, prior: float = 1.0) -> NDArray[np.float64]:
    """The logarithms [num_items] of the strengths, with mean 0.

    Args:
        rankings: items from 0 to ``num_items`` - 1, best first; each may leave items out.
        num_items: number of items.
        prior: weight of the virtual rankings, in rankings, above 0.

    >>> strengths([[1, 0]], 2, prior=1.0).round(2)
    array([-0.35,  0.35])
    """
    if num_items < 2:
        return np.zeros(num_items)
    virtual = prior / (num_items - 1)  # so that each item's virtual rankings weigh ``prior`` together
    wins = np.full(num_items, virtual * (num_items - 1))
    for ranking in rankings:
        wins[list(ranking[:-1])] += 1
    values = np.ones(num_items)
    for _ in range(_MAX_STEPS):
        pairs = 1 / (values[:, None] + values)
        np.fill_diagonal(pairs, 0)
        weights = 2 * virtual * pairs.sum(axis=1)
        for ranking in rankings:
            order = list(ranking)
            left = np.cumsum(values[order][::-1])[::-1][:-1]  # total strength of what is left at each draw but the last
            drawn = np.cumsum(1 / left)
            weights[order] += np.append(drawn, drawn[-1:]) if len(order) > 1 else 0
        following = wins / weights
        following /= np.exp(np.log(following).mean())
        change = np.abs(np.log(following) - np.log(values)).max()
        values = following
        if change < _TOLERANCE:
            break
    return np.log(values)
