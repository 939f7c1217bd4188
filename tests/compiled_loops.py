"""Tests of compiled loops and of NumPy, which does the same."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from d2llm.ops import kernels


@contextmanager
def compiled(is_compiled: bool) -> Iterator[None]:
    """Within it, indexes of any size are searched by compiled loops, or none is."""
    for loops in (kernels.BM25, kernels.MAXSIM):
        assert loops.load() is not None
    before = kernels.MIN_PARTS
    kernels.MIN_PARTS = 0 if is_compiled else 1 << 60
    try:
        yield
    finally:
        kernels.MIN_PARTS = before
