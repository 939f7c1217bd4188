"""The layers of a lean student, with NumPy; each takes its weights by name."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

Arrays = Mapping[str, NDArray[np.float32]]


def dense(arrays: Arrays, layer: str, rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """[n, in] -> [n, out]: W x + b."""
    return rows @ arrays[f"{layer}.weight"].T + arrays[f"{layer}.bias"]


def row_by_row(weight: NDArray[np.float32], rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """[m, in], [n, in] -> [n, m]: W x of each row by itself, so that equal rows have equal results.

    One product of all rows sums a row in an order that depends on its place.
    """
    return np.matmul(rows[:, None], weight.T)[:, 0]


def norm(arrays: Arrays, layer: str, rows: NDArray[np.float32], eps: np.float32) -> NDArray[np.float32]:
    """LayerNorm of each row."""
    centred = rows - rows.mean(-1, keepdims=True)
    scaled = centred / np.sqrt(np.square(centred).mean(-1, keepdims=True) + eps)
    return scaled * arrays[f"{layer}.weight"] + arrays[f"{layer}.bias"]


def attend(
    query: NDArray[np.float32], key: NDArray[np.float32], value: NDArray[np.float32], num_heads: int
) -> NDArray[np.float32]:
    """Multihead attention of queries [m, dim] over keys and values [n, dim], before its output layer: [m, dim]."""
    heads = [rows.reshape(len(rows), num_heads, -1).swapaxes(0, 1) for rows in (query, key, value)]
    scores = heads[0] @ heads[1].swapaxes(1, 2) / np.float32(math.sqrt(heads[0].shape[-1]))
    scores = np.exp(scores - scores.max(-1, keepdims=True))
    scores /= scores.sum(-1, keepdims=True)
    return (scores @ heads[2]).swapaxes(0, 1).reshape(query.shape)


def gelu(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """X (1 + erf(x / sqrt(2))) / 2; erf by Abramowitz and Stegun, formula 7.1.26, whose error is below 1.5e-7."""
    size = np.abs(values) * np.float32(0.5**0.5)
    t = np.reciprocal(1 + np.float32(0.3275911) * size)
    polynomial = np.float32(1.061405429) * t
    for coefficient in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
        polynomial = (polynomial + np.float32(coefficient)) * t
    erf = np.copysign(1 - polynomial * np.exp(-np.square(size)), values)
    return values * (1 + erf) * np.float32(0.5)
