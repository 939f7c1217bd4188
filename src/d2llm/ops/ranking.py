"""From scores to rankings: selecting the best k, fusing rankings, and measuring how far two agree.

Rankings are best first, equal scores by ascending id.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Sequence
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Shaped
from torch import Tensor

from d2llm.core.errors import InputError
from d2llm.core.types import Candidate
from d2llm.ops.selection import ids_at, top_rows

_Item = TypeVar("_Item", bound=Hashable)


def top_k(
    scores: Shaped[np.ndarray, " items"] | Shaped[Tensor, " items"], ids: Sequence[str], k: int
) -> list[tuple[str, float]]:
    """The ``k`` best (id, score), best first, equal scores by ascending id; all of them if there are fewer.

    Like ``top_rows``, but returns ids and scores, accepts tensors, and checks its arguments; infinities are allowed.

    Raises:
        InputError: k is negative, scores is not one-dimensional, the lengths differ, or a score is NaN.
    """
    values = _as_array(scores)
    if values.ndim != 1 or len(values) != len(ids):
        raise InputError(f"scores have shape {values.shape}, but {len(ids)} ids are given: one score per id is needed")
    if k < 0:
        raise InputError(f"k is {k}, but it counts results: give 0 or more")
    _refuse_nan(values, ids)
    rows: list[int] = top_rows(values, k, partial(ids_at, ids)).tolist()
    return [(ids[row], float(values[row])) for row in rows]


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
    shares: defaultdict[_Item, list[float]] = defaultdict(list)
    for number, (ranking, weight) in enumerate(zip(rankings, ranking_weights, strict=True), start=1):
        seen: set[_Item] = set()
        for rank, item in enumerate(ranking, start=1):
            if item in seen:
                raise InputError(f"ranking {number} holds '{item}' twice (again at rank {rank}); keep one")
            seen.add(item)
            shares[item].append(weight / (k + rank))
    # fsum rounds once, so equal sets of ranks give equal scores, whichever rankings they come from.
    return {item: math.fsum(share) for item, share in shares.items()}


def kendall_tau(first: Sequence[float], second: Sequence[float]) -> float:
    """How far two scorings put the same items into the same order: 1 the same, 0 unrelated, -1 reversed.

    tau_b = (concordant - discordant pairs) / sqrt(pairs untied in first * pairs untied in second).

    0 if a scoring ties every pair, because it then has no order to compare. Cost O(n^2), for short lists.

    Kendall, "The treatment of ties in ranking problems", Biometrika 33, 1945.

    Raises:
        InputError: the lengths differ or a number is NaN.
    """
    if len(first) != len(second):
        raise InputError(f"{len(first)} numbers cannot be compared with {len(second)}: give one of each per item")
    scores = np.array([first, second], dtype=np.float64)
    if np.isnan(scores).any():
        raise InputError("a score is NaN and cannot be ordered; check the model that gave it")
    before, after = np.triu_indices(len(first), 1)
    # Compared, not subtracted: the difference of two infinities is NaN.
    left, right = scores[:, before], scores[:, after]
    signs = (left > right).astype(np.int64) - (left < right)
    agreement = int(np.sum(signs[0] * signs[1]))
    untied = np.abs(signs).sum(axis=1)
    return agreement / math.sqrt(float(untied[0]) * float(untied[1])) if untied.all() else 0.0


def _as_array(scores: np.ndarray | Tensor) -> np.ndarray:
    if isinstance(scores, Tensor):
        scores = scores.detach().cpu()
        scores = (scores.float() if scores.dtype == torch.bfloat16 else scores).numpy()  # numpy has no bfloat16
    return scores if scores.dtype.kind == "f" else scores.astype(np.float64)


def _refuse_nan(values: np.ndarray, ids: Sequence[str]) -> None:
    wrong: list[int] = np.flatnonzero(np.isnan(values)).tolist()
    if wrong:
        first = ", ".join(f"'{ids[index]}'" for index in wrong[:5])
        raise InputError(
            f"{len(wrong)} of {len(values)} scores are NaN (first: {first}) and cannot be ranked; "
            "check the model that gave them"
        )
