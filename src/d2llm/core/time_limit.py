"""A time limit for work that can stop between two items.

    with time_limit(60.0):
        evaluate(...)

Whatever runs inside the block and shows its progress (``core.progress.progress_bar``) stops with an ``OutOfTimeError``
at the first item that it finishes after the limit. That is like Ctrl-C: complete files are kept, and the next call
continues from them. Of nested limits the earliest counts, as in Trio's cancel scopes. A limit holds in the thread that
sets it, and not in workers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar

from d2llm.core.errors import OutOfTimeError

_end: ContextVar[float] = ContextVar("when the time of the work is over, by time.monotonic", default=math.inf)


@contextmanager
def time_limit(seconds: float) -> Generator[None]:
    """Limit the time of what runs inside this block; with no seconds left, its first item is its last."""
    token = _end.set(min(_end.get(), time.monotonic() + seconds))
    try:
        yield
    finally:
        _end.reset(token)


def seconds_left() -> float:
    """Seconds until the limit, negative after it; infinite without a limit."""
    return _end.get() - time.monotonic()


def check_time() -> None:
    """Stop if the limit has passed.

    Raises:
        OutOfTimeError: it has.
    """
    if seconds_left() < 0:
        raise OutOfTimeError("the time for this work is over; what is finished is kept")
