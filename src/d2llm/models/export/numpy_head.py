"""A student's head in pure numpy: scores a query vector against passage vectors, without torch or d2llm.

``d2llm export STUDENT --to numpy --out FOLDER`` writes the weights as ``head.npz`` together with this file, which can
be copied into any program::

    head = load("FOLDER")
    logits = head.score(query_vector, passage_vectors, "asymmetric")

The logit of vectors a and b is m(a) b + r r_q(a) r_p(b) tanh(g(a, b)). m(a) is the output of ``query_vectors``, so any
inner-product index can find candidates. The head ``paper`` is g alone, the head ``cosine`` m(a) b alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

FILE_NAME = "head.npz"
TASKS = ("symmetric", "asymmetric")
"""Whether a passage says the same as the query (symmetric), or answers it (asymmetric)."""
_BLOCK = 512  # passages scored at a time, so that the activations stay in a core's cache


def load(folder: str | Path) -> NumpyHead:
    """Load the weights that the export wrote; nothing in the file is executed."""
    with np.load(Path(folder) / FILE_NAME, allow_pickle=False) as file:
        return NumpyHead({name: file[name] for name in file.files})


class NumpyHead:
    """The float32 weights by name: those of one task as ``task/name``, those that both tasks share as ``name``."""

    def __init__(self, weights: Mapping[str, np.ndarray]) -> None:
        self._weights = weights
        self.has_dot = self._find("dot", TASKS[0]) is not None
        """Whether the score has an inner-product part that an index can search (heads ``dot`` and ``cosine``)."""
        self.has_interaction = self._find("last", TASKS[0]) is not None
        """Whether the score has an interaction part (heads ``dot`` and ``paper``)."""

    def query_vectors(self, query_vectors: np.ndarray, task: str) -> np.ndarray:
        """The vectors [queries, dim] whose inner product with a passage vector is the inner product part of the score.

        Raises:
            ValueError: the head is ``paper``, or there is no such task.
        """
        dot = self._find("dot", task)
        if dot is None:
            raise ValueError("this head is 'paper', which has no inner product; use a student with the head 'dot'")
        queries = np.asarray(query_vectors, np.float32)
        return queries * dot if dot.ndim == 0 else queries @ dot

    def bound(self, query_vectors: np.ndarray, task: str) -> np.ndarray:
        """The queries' part r r_q(a) [queries] of the interaction's bound; 0 if the interaction changes nothing."""
        queries = np.asarray(query_vectors, np.float32)
        bound = self._find("bound", task)
        return (np.float32(0) if bound is None else bound) * self._gate("query_gate", queries, task)

    def passage_bound(self, passage_vectors: np.ndarray) -> np.ndarray:
        """The passages' part r_p(b) [passages] of the interaction's bound; 1 without gates."""
        return self._gate("passage_gate", np.asarray(passage_vectors, np.float32), TASKS[0])

    def score(self, query_vector: np.ndarray, passage_vectors: np.ndarray, task: str) -> np.ndarray:
        """Logits [passages] of one query vector [dim] with passage vectors [passages, dim], float32.

        Raises:
            ValueError: there is no such task, or the vectors have another shape.
        """
        query, passages = np.asarray(query_vector, np.float32), np.asarray(passage_vectors, np.float32)
        if query.ndim != 1 or passages.ndim != 2 or passages.shape[1] != len(query):
            raise ValueError(
                f"expected one query vector [dim] and passage vectors [passages, dim], got {list(query.shape)} "
                f"and {list(passages.shape)}"
            )
        if not self.has_dot:
            return self._interaction(query, passages, task)
        dots = passages @ self.query_vectors(query[None], task)[0]
        bound = self.bound(query[None], task)[0]
        if bound == 0:
            return dots
        return dots + bound * self.passage_bound(passages) * np.tanh(self._interaction(query, passages, task))

    def _interaction(self, query: np.ndarray, passages: np.ndarray, task: str) -> np.ndarray:
        """The network's part g of the logit [passages]."""
        # The first layer is linear in [a; b; a * b; |a - b|]: the part that depends on the query alone is computed
        # once, and the columns of the product, scaled by the query, are added to those of the passage.
        constant = self._weight("query", task) @ query + self._weight("first_bias", task)
        weight, product = self._weight("passage", task), self._find("product", task)
        weight = weight if product is None else weight + product * query
        difference = self._find("difference", task)
        logits = [np.zeros(0, np.float32)]
        for start in range(0, len(passages), _BLOCK):
            block = passages[start : start + _BLOCK]
            hidden = block @ weight.T + constant
            if difference is not None:
                hidden += np.abs(block - query) @ difference.T
            hidden = np.maximum(hidden, 0)
            for layer in ("inner_0", "inner_1"):
                if self._find(f"{layer}_weight", task) is None:
                    continue  # an interaction of three layers has one here
                product_of_layer = hidden @ self._weight(f"{layer}_weight", task).T
                hidden = np.maximum(product_of_layer + self._weight(f"{layer}_bias", task), 0)
            logits.append(hidden @ self._weight("last", task) + self._weight("constant", task))
        return np.concatenate(logits)

    def _gate(self, name: str, vectors: np.ndarray, task: str) -> np.ndarray:
        weight = self._find(f"{name}_weight", task)
        if weight is None:
            return np.ones(len(vectors), np.float32)
        # Sigmoid by way of tanh, because exp would overflow for closed gates.
        return (1 + np.tanh((vectors @ weight + self._weight(f"{name}_bias", task)) / 2)) / 2

    def _find(self, name: str, task: str) -> np.ndarray | None:
        if task not in TASKS:
            raise ValueError(f"there is no task '{task}'; use one of {', '.join(TASKS)}")
        return self._weights.get(f"{task}/{name}", self._weights.get(name))

    def _weight(self, name: str, task: str) -> np.ndarray:
        weight = self._find(name, task)
        if weight is None:
            raise ValueError(f"the weights '{name}' are missing; export the student again")
        return weight
