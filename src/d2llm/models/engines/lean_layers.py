"""The layers of a lean student and the usual poolings, with NumPy; each takes its weights by name.

The formulas are those of ``models.pooling`` and ``methods.poolings.pma`` (alone, or beside one of the usual poolings).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from d2llm.recipe import Pooling

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


# From the states of a text's tokens to its vector ---------------------------------------------------------------------

_WEIGHTLESS = {"mean", "first", "last"}
_EPS = np.float32(1e-5)  # torch's default


class LeanPooling:
    """Pools the states of one text; ``native`` is the kind of the backbone's own pooling."""

    def __init__(self, config: Pooling, native: str, dim: int, arrays: Arrays) -> None:
        self._config: Any = config
        self._native, self._dim = native, dim
        self._arrays = {name.removeprefix("pooling."): array for name, array in arrays.items()}

    @property
    def fits(self) -> bool:
        """Whether the pooling is one of those, and the arrays are its own."""
        config, kinds = self._config, ("auto", self._native)
        if self._native not in _WEIGHTLESS:
            return False
        if config.kind != "pma":
            return config.kind in kinds and not self._arrays
        shapes = {name: array.shape for name, array in self._arrays.items()}
        return (not config.warm_start or config.pooling.kind in kinds) and shapes == _pma_shapes(config, self._dim)

    def __call__(self, states: NDArray[np.float32]) -> NDArray[np.float32]:
        """The vector [dim] of states [tokens, dim]."""
        if self._config.kind != "pma":
            return self._plain(states)
        if not self._config.warm_start:
            return self._pma(states)
        return self._plain(states) + np.float32(float(self._arrays["gate"])) * self._pma(states)

    def _plain(self, states: NDArray[np.float32]) -> NDArray[np.float32]:
        pooled = states.mean(0) if self._native == "mean" else states[0 if self._native == "first" else -1]
        return to_sphere(pooled)

    def _pma(self, states: NDArray[np.float32]) -> NDArray[np.float32]:
        arrays = self._arrays
        seeds = arrays["pma.seeds"]
        query, key, value = (
            dense(arrays, f"pma.{name}", rows) for name, rows in (("query", seeds), ("key", states), ("value", states))
        )
        attended = dense(arrays, "pma.output", attend(query, key, value, self._config.num_heads))
        hidden = norm(arrays, "pma.norm_attention", attended + seeds, _EPS)
        inner = np.maximum(dense(arrays, "pma.feedforward.0", hidden), 0)
        pooled = norm(arrays, "pma.norm_feedforward", hidden + dense(arrays, "pma.feedforward.2", inner), _EPS)
        joined = pooled.reshape(-1)
        return joined if len(seeds) == 1 else arrays["pma.join.weight"] @ joined


def to_sphere(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Vectors of norm sqrt(dim)."""
    norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / np.maximum(norms, np.float32(1e-12)) * np.float32(vectors.shape[-1] ** 0.5)


def project_tokens(states: NDArray[np.float32], weight: NDArray[np.float32]) -> NDArray[np.float32]:
    """Token embeddings [tokens, token_dim] of states, as ``models.token_vectors`` makes them, in this thread alone.

    A product of BLAS this small takes .01 ms, or as long as a busy core keeps its other threads waiting.
    """
    return to_sphere(np.einsum("td,kd->tk", states, weight))


def _pma_shapes(config: Any, dim: int) -> dict[str, tuple[int, ...]]:
    inner, seeds = config.feedforward_dim or dim, config.num_seeds
    layers = dict.fromkeys(("query", "key", "value", "output"), (dim, dim))
    layers |= {"feedforward.0": (inner, dim), "feedforward.2": (dim, inner)}
    shapes: dict[str, tuple[int, ...]] = {"pma.seeds": (seeds, dim)}
    for name, shape in layers.items():
        shapes |= {f"pma.{name}.weight": shape, f"pma.{name}.bias": shape[:1]}
    for name in ("norm_attention", "norm_feedforward"):
        shapes |= {f"pma.{name}.weight": (dim,), f"pma.{name}.bias": (dim,)}
    shapes |= {"gate": ()} if config.warm_start else {}
    return shapes | ({"pma.join.weight": (dim, seeds * dim)} if seeds > 1 else {})
