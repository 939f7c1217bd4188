"""Fast paths that could not be used: each fallback to a slower one is counted, and logged once for each reason."""

from __future__ import annotations

import logging
from collections import Counter
from threading import Lock

_log = logging.getLogger(__name__)
_lock = Lock()
_counts: Counter[str] = Counter()
_said: set[tuple[str, str]] = set()


def fell_back(fast_way: str, reason: str, *, level: int = logging.WARNING) -> None:
    """Count that a fast way could not be taken; the first time for this reason, log it.

    Args:
        fast_way: what would have been quicker, in a few words; a label of a metric.
        reason: why not, and what is done instead.
        level: of the log line; below a warning where nothing is wrong.
    """
    count_fallback(fast_way)
    with _lock:
        is_new = (fast_way, reason) not in _said
        _said.add((fast_way, reason))
    if is_new:
        _log.log(level, "%s: %s", fast_way, reason)


def count_fallback(fast_way: str) -> None:
    """Count alone, where the caller says why."""
    with _lock:
        _counts[fast_way] += 1


def fallback_counts() -> dict[str, int]:
    """How often each fast way could not be taken in this process, by its name."""
    with _lock:
        return dict(sorted(_counts.items()))
