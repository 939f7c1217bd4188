"""From scores to rankings: the best k, and one ranking out of several. Best first, equal scores by ascending id."""

from __future__ import annotations

import heapq
import math
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Shaped
from torch import Tensor

from d2llm.core.errors import InputError
from d2llm.core.types import Candidate

__all__ = ["reciprocal_rank_fusion", "top_k"]


def top_k(
    scores: Shaped[np.ndarray, " items"] | Shaped[Tensor, " items"], ids: Sequence[str], k: int
) -> list[tuple[str, float]]:
    """The ``k`` best (id, score), best first, equal scores by ascending id; all of them when there are fewer.

    The result is a prefix of the result for any larger k. Cost O(N) for the selection plus O(k log k) for the order
    (ties at the border: O(ties log k)), so N may be a whole corpus.

    Args:
        scores: one number per item; infinities are allowed.
        ids: the id of each item, in the order of ``scores``.
        k: how many, at least 0.

    Raises:
        InputError: k is negative, scores is not one-dimensional, the lengths differ, or a score is NaN.
    """
    values = _as_array(scores)
    if values.ndim != 1 or len(values) != len(ids):
        raise InputError(f"scores have shape {values.shape}, but {len(ids)} ids are given: one score per id is needed")
    if k < 0:
        raise InputError(f"k is {k}, but it counts results: give 0 or more")
    _refuse_nan(values, ids)
    if k == 0:
        return []
    if k >= len(values):
        return _best_first(range(len(values)), values, ids)
    border = np.partition(values, len(values) - k)[len(values) - k]  # the k-th best score
    above: list[int] = np.flatnonzero(values > border).tolist()
    level: list[int] = np.flatnonzero(values == border).tolist()
    # Of those level with the border, which may be the whole corpus, only the smallest ids still fit.
    chosen = heapq.nsmallest(k - len(above), level, key=lambda index: ids[index])
    return _best_first(above, values, ids) + [(ids[index], float(values[index])) for index in chosen]


def reciprocal_rank_fusion(rankings: Sequence[Sequence[str]], *, k: int = 60) -> list[Candidate]:
    """Fuse rankings by rank alone, so that their scores need not be comparable.

    score(p) = sum over the rankings that contain p of 1 / (k + rank(p)), rank counted from 1.

    Cormack, Clarke and Büttcher, "Reciprocal Rank Fusion outperforms Condorcet and individual Rank Learning Methods",
    SIGIR 2009 (k = 60 is theirs). The order of the rankings does not matter.

    Args:
        rankings: passage ids, best first; they may have different lengths and members.
        k: how much the first places are levelled, at least 0.

    Returns:
        Every passage of any ranking, best first, equal scores by ascending id.

    Raises:
        InputError: k is negative, or a ranking holds an id twice.
    """
    if k < 0:
        raise InputError(f"k is {k}, but 1 / (k + rank) needs 0 or more")
    shares: defaultdict[str, list[float]] = defaultdict(list)
    for number, ranking in enumerate(rankings, start=1):
        seen: set[str] = set()
        for rank, passage_id in enumerate(ranking, start=1):
            if passage_id in seen:
                raise InputError(f"ranking {number} holds '{passage_id}' twice (again at rank {rank}); keep one")
            seen.add(passage_id)
            shares[passage_id].append(1.0 / (k + rank))
    # fsum rounds once, so equal sets of ranks give equal scores whatever ranking they come from.
    fused = [Candidate(passage_id, math.fsum(share)) for passage_id, share in shares.items()]
    return sorted(fused, key=lambda candidate: (-candidate.score, candidate.passage_id))


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


def _best_first(indices: Sequence[int], values: np.ndarray, ids: Sequence[str]) -> list[tuple[str, float]]:
    pairs = [(ids[index], float(values[index])) for index in indices]
    return sorted(pairs, key=lambda pair: (-pair[1], pair[0]))
