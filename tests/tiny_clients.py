"""A server with only a student, for other vendors' clients, and the numbers they should get."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from d2llm import Student
from d2llm.server.app import make_app
from live_server import serve, wait_until_ready
from tiny_server import tiny_settings

NAME = "tiny"
MAX_TOKENS = 64
QUERY = "the cat by the sea"
LONG = "the cat sat on the mat " * 40
"""Longer than the tiny student's limit."""
LONG_TOO = "documents: truncated to 64 tokens, at positions 1"
"""The message in the response when the second text is ``LONG``."""


@contextmanager
def serving(student: Path | str, **settings: Any) -> Generator[str]:
    """Start a server and yield its address once it is ready."""
    app = make_app(tiny_settings(None, student=str(student), device="cpu", **settings))
    with serve(app) as address:
        wait_until_ready(address)
        yield address


def unit(vectors: NDArray[Any]) -> NDArray[np.float64]:
    """Vectors divided by their lengths."""
    return vectors / np.linalg.norm(vectors.astype(np.float64), axis=-1, keepdims=True)


def sigmoid(logits: NDArray[Any]) -> NDArray[np.float64]:
    """Logits as probabilities."""
    return 1 / (1 + np.exp(-logits.astype(np.float64)))


def logits_of(student: Student, query: str, passages: Sequence[str]) -> NDArray[np.float32]:
    """The student's logits of a query with passages."""
    vectors = student.encode_queries([query]).vectors[0], student.encode_passages(passages).vectors
    return student.score(*vectors, "asymmetric")


def ranking(student: Student, query: str, passages: Sequence[str]) -> tuple[list[int], NDArray[np.float64]]:
    """The positions of the passages, best first, and their probabilities in that order."""
    logits = logits_of(student, query, passages)
    order = sorted(range(len(passages)), key=lambda index: (-logits[index], index))
    return order, sigmoid(logits)[order]
