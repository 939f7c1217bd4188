"""A server over one student alone, as other vendors' clients meet it, and the numbers that they should get."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from d2llm.apps.server.app import make_app
from live_server import serve, wait_until_ready
from tiny_server import tiny_settings

NAME = "tiny"
MAX_TOKENS = 64
QUERY = "the cat by the sea"
LONG = "the cat sat on the mat " * 40
"""Longer than the tiny student reads."""


@contextmanager
def serving(student: Path | str, **settings: Any) -> Generator[str]:
    """The address of a server that is ready."""
    app = make_app(tiny_settings(None, student=str(student), device="cpu", **settings))
    with serve(app) as address:
        wait_until_ready(address)
        yield address


def unit(vectors: NDArray[Any]) -> NDArray[np.float64]:
    """Vectors divided by their lengths."""
    return vectors / np.linalg.norm(vectors.astype(np.float64), axis=-1, keepdims=True)


def sigmoid(logits: NDArray[Any]) -> NDArray[np.float64]:
    """Their probabilities."""
    return 1 / (1 + np.exp(-logits.astype(np.float64)))
