"""Waiting for what must come, as long as a busy machine needs; nobody guesses how long it takes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TypeVar

PATIENCE = 120.0  # seconds; only a test that fails waits so long
_Value = TypeVar("_Value")


def until(condition: Callable[[], _Value], what: str = "what was waited for") -> _Value:
    """Ask again and again until the answer is true, and return it."""
    deadline = time.monotonic() + PATIENCE
    while not (answer := condition()):
        assert time.monotonic() < deadline, f"{what} did not come, {answer!r} after {PATIENCE:g} s"
        time.sleep(0.01)
    return answer


async def soon(condition: Callable[[], _Value], what: str = "what was waited for") -> _Value:
    """``until`` in an event loop, which goes on meanwhile."""
    deadline = time.monotonic() + PATIENCE
    while not (answer := condition()):
        assert time.monotonic() < deadline, f"{what} did not come, {answer!r} after {PATIENCE:g} s"
        await asyncio.sleep(0.001)
    return answer
