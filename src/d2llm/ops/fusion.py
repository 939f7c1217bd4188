"""Rank fusion: joins rankings by their ranks alone. For the weights of a sum of scores, see ``ops.weighted_sum``.

``plackett_luce``: rankings joined into one strength for each item. The model of Plackett and Luce draws a ranking from
the best to the worst, each time with probabilities in proportion to the strengths of the items that are left. The
strengths of the greatest likelihood are found by Hunter's iteration ("MM algorithms for generalized Bradley-Terry
models", Annals of Statistics 2004), which never overshoots. Two virtual rankings of every pair of items, one each way,
with a small weight, keep the strengths of an item finite that won or lost everywhere.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from d2llm.core.errors import InputError
from d2llm.core.types import Candidate

_Item = TypeVar("_Item", bound=Hashable)


def reciprocal_rank_fusion(rankings: Sequence[Sequence[str]], *, k: int = 60) -> list[Candidate]:
    """Fuse rankings by rank alone: every passage of any ranking, best first, equal scores by ascending id.

    Arguments and errors: ``reciprocal_rank_scores``.
    """
    fused = [Candidate(passage_id, score) for passage_id, score in reciprocal_rank_scores(rankings, k=k).items()]
    return sorted(fused, key=lambda candidate: (-candidate.score, candidate.passage_id))


def reciprocal_rank_scores(
    rankings: Sequence[Sequence[_Item]], *, k: int = 60, weights: Sequence[float] | None = None
) -> dict[_Item, float]:
    """The fused score of every item of any ranking, by rank alone, so that their scores need not be comparable.

    score(p) = sum over the rankings that contain p of weight / (k + rank(p)), rank counted from 1.

    Cormack, Clarke and Büttcher, "Reciprocal Rank Fusion outperforms Condorcet and individual Rank Learning Methods",
    SIGIR 2009 (k = 60 is theirs). The order of the rankings does not matter.

    Args:
        rankings: passage ids or rows, best first; they may have different lengths and members.
        k: how much the first places are levelled, at least 0.
        weights: weights of the rankings, at least 0; 1 each by default, as in the paper.

    Raises:
        InputError: k or a weight is negative, there are not as many weights as rankings, or a ranking contains an
            item twice.
    """
    if k < 0:
        raise InputError(f"k is {k}, but 1 / (k + rank) needs 0 or more")
    ranking_weights = [1.0] * len(rankings) if weights is None else list(weights)
    if len(ranking_weights) != len(rankings) or not all(weight >= 0 for weight in ranking_weights):
        raise InputError(f"the weights of {len(rankings)} rankings are {ranking_weights}; give each one of at least 0")
    terms: defaultdict[_Item, list[float]] = defaultdict(list)
    for position, (ranking, weight) in enumerate(zip(rankings, ranking_weights, strict=True), start=1):
        seen: set[_Item] = set()
        for rank, item in enumerate(ranking, start=1):
            if item in seen:
                raise InputError(f"ranking {position} holds '{item}' twice (again at rank {rank}); keep one")
            seen.add(item)
            terms[item].append(weight / (k + rank))
    # fsum rounds once, so equal sets of ranks give equal scores, whichever rankings they come from.
    return {item: math.fsum(values) for item, values in terms.items()}


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
