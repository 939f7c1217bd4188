"""Waits for conditions with a timeout long enough for a busy machine."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from typing import TypeVar

PATIENCE = float(os.environ.get("D2LLM_TEST_PATIENCE", "120"))  # seconds; only a failing test waits this long
_Value = TypeVar("_Value")


def until(condition: Callable[[], _Value], what: str = "what was waited for", *, pause: float = 0.01) -> _Value:
    """Call the condition, with pauses of some seconds, until it returns a true value, and return that value."""
    deadline = time.monotonic() + PATIENCE
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{what} did not come, {value!r} after {PATIENCE:g} s"
        time.sleep(pause)
    return value


async def soon(condition: Callable[[], _Value], what: str = "what was waited for") -> _Value:
    """``until`` for an event loop, which keeps running."""
    deadline = time.monotonic() + PATIENCE
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{what} did not come, {value!r} after {PATIENCE:g} s"
        await asyncio.sleep(0.001)
    return value
