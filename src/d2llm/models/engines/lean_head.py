"""A student's head with NumPy: the inner product and the interaction of one query with passages.

The formula is that of ``models.interaction``, in float32; a test checks that both give the same scores.
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from d2llm.core.types import TASKS, Task
from d2llm.models.engines.lean_layers import Arrays, row_by_row
from d2llm.models.protocols import PairScorer
from d2llm.recipe import InteractionConfig

_PAIR_FEATURES = {"concat": 0, "product": 1, "difference": 1, "rich": 2}
_SHARED = "shared"
_BLOCK = 1_024  # passages scored at a time


class LeanHead:
    """The arrays of a dot or cosine head, by their names in the student's file without its prefix."""

    def __init__(self, config: InteractionConfig, dim: int, arrays: Arrays) -> None:
        self.config, self.dim = config, dim
        self.arrays = {name.removeprefix("interaction."): array for name, array in arrays.items()}

    @property
    def fits(self) -> bool:
        """Whether the arrays are exactly those that the configuration needs."""
        if self.config.features not in _PAIR_FEATURES:
            return False
        return {name: array.shape for name, array in self.arrays.items()} == _shapes(self.config, self.dim)

    def weight(self, task: Task) -> float:
        """The weight r of the interaction in a task; 0 if it has none."""
        return float(self.arrays.get(f"residual_{task}", 0.0))

    def branch(self, task: Task) -> str:
        """The name of the part of the head that serves a task."""
        return task if self.config.branches == "per_task" else _SHARED

    def query_vectors(self, vectors: NDArray[np.float32], task: Task) -> NDArray[np.float32]:
        """The vectors whose inner product with a passage's vector is that of the score."""
        prefix = "" if self.config.head == "cosine" else f"dots.{self.branch(task)}."
        if prefix:
            vectors = vectors @ self.arrays[f"{prefix}query_map"].T @ self.arrays[f"{prefix}passage_map"]
        return vectors * np.float32(math.exp(float(self.arrays[f"{prefix}log_scale"])) / self.dim)

    def passage_bound(self, passages: NDArray[np.float32]) -> NDArray[np.float32]:
        """The passages' part of the bound of a pair."""
        return self._gate("passage_gate", passages)

    def query_bound(self, query: NDArray[np.float32], task: Task) -> float:
        """The query's part of the bound of a pair; 0 if the inner product is the whole score."""
        weight = self.weight(task)
        if not weight:
            return 0.0
        largest = self.config.max_bound * float(_sigmoid(self.arrays["raw_bound"][None])[0])
        return weight * largest * float(self._gate("query_gate", query[None])[0])

    def scorer(self, query: NDArray[np.float32], task: Task) -> PairScorer:
        """A scorer of this query against any passages."""
        return _QueryScorer(self, query, task)

    def _gate(self, name: str, vectors: NDArray[np.float32]) -> NDArray[np.float32]:
        if f"{name}.weight" not in self.arrays:
            return np.ones(len(vectors), np.float32)
        return _sigmoid(row_by_row(self.arrays[f"{name}.weight"], vectors)[:, 0] + self.arrays[f"{name}.bias"])


class _QueryScorer:
    """Scores passages for one query: dot + bound r_p tanh(g)."""

    def __init__(self, head: LeanHead, query: NDArray[np.float32], task: Task) -> None:
        self._head, self._query = head, query
        self._task: Task = task
        self.bound = head.query_bound(query, task)

    @cached_property
    def _dot(self) -> NDArray[np.float32]:
        return self._head.query_vectors(self._query[None], self._task)[0]

    @property
    def dot_query(self) -> NDArray[np.float32]:
        return self._dot

    def __call__(self, passages: NDArray[np.float32]) -> NDArray[np.float32]:
        dots = row_by_row(self.dot_query[None], passages)[:, 0]
        if not self.bound:
            return dots
        return dots + np.float32(self.bound) * self._head.passage_bound(passages) * self.change(passages)

    def change(self, passages: NDArray[np.float32]) -> NDArray[np.float32]:
        if not self.bound:
            return np.zeros(len(passages), np.float32)
        starts = range(0, max(len(passages), 1), _BLOCK)
        return np.concatenate([np.tanh(self._interaction(passages[start : start + _BLOCK])) for start in starts])

    @cached_property
    def _first(self) -> tuple[NDArray[np.float32], NDArray[np.float32] | None, NDArray[np.float32]]:
        """The first layer as a function of b and, if it is a feature, |a - b|: their weights, and the query's part."""
        arrays, features = self._head.arrays, self._head.config.features
        first = arrays["first.weight"]
        blocks: list[NDArray[Any]] = np.split(first, first.shape[1] // self._head.dim, axis=1)
        of_query, of_passage, *of_both = blocks
        if features in ("product", "rich"):
            of_passage = of_passage + of_both[0] * self._query
        of_difference = of_both[-1] if features in ("difference", "rich") else None
        return of_passage, of_difference, of_query @ self._query + arrays["first.bias"]

    def _interaction(self, passages: NDArray[np.float32]) -> NDArray[np.float32]:
        arrays, config = self._head.arrays, self._head.config
        of_passage, of_difference, of_query = self._first
        hidden = row_by_row(of_passage, passages) + of_query
        if of_difference is not None:
            hidden += row_by_row(of_difference, np.abs(passages - self._query))
        branch = f"branches.{self._head.branch(self._task)}"
        for layer in [*(["shared"] if config.layers == 5 else []), f"{branch}.0"]:
            hidden = row_by_row(arrays[f"{layer}.weight"], np.maximum(hidden, 0)) + arrays[f"{layer}.bias"]
        last, constant = arrays["output.weight"], arrays["output.bias"]
        if config.layers == 5:  # no ReLU stands between the last two
            last, constant = last @ arrays[f"{branch}.2.weight"], last @ arrays[f"{branch}.2.bias"] + constant
        return row_by_row(last, np.maximum(hidden, 0))[:, 0] + constant


def _shapes(config: InteractionConfig, dim: int) -> dict[str, tuple[int, ...]]:
    """The shapes of a head's arrays, by name."""
    if config.head == "cosine":
        return {"log_scale": ()}
    names = {tasks: (*tasks,) if config.branches == "per_task" else (_SHARED,) for tasks in (TASKS, config.tasks)}
    maps = ("query_map", "passage_map")
    shapes: dict[str, tuple[int, ...]] = {f"dots.{name}.{layer}": (dim, dim) for name in names[TASKS] for layer in maps}
    shapes |= {f"dots.{name}.log_scale": () for name in names[TASKS]}
    if not config.tasks:
        return shapes
    hidden, wide = config.hidden_dim, config.feature_dim
    layers = {"first": (hidden, (2 + _PAIR_FEATURES[config.features]) * dim), "output": (1, wide)}
    layers |= {f"branches.{name}.0": (hidden, hidden) for name in names[config.tasks]}
    if config.layers == 5:
        layers |= {"shared": (hidden, hidden)} | {f"branches.{name}.2": (wide, hidden) for name in names[config.tasks]}
    if config.gates:
        layers |= {"query_gate": (1, dim), "passage_gate": (1, dim)}
    for name, shape in layers.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes | {"raw_bound": ()} | {f"residual_{task}": () for task in config.tasks}


def _sigmoid(values: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.reciprocal(1 + np.exp(-values))
