"""From scores to rankings: selecting the best k, and measuring how far two rankings agree.

Rankings are best first, equal scores by ascending id.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from jaxtyping import Shaped
from torch import Tensor

from d2llm.core.errors import InputError
from d2llm.core.inputs import check_count
from d2llm.ops.selection import ids_at, top_rows


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
    check_count(k, "k", 0)
    _refuse_nan(values, ids)
    rows: list[int] = top_rows(values, k, partial(ids_at, ids)).tolist()
    return [(ids[row], float(values[row])) for row in rows]


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
