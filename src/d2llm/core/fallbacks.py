"""Fallbacks from a fast path to a slower one: each is counted, and logged once for each reason."""

from __future__ import annotations

import logging
from collections import Counter
from threading import Lock

_log = logging.getLogger(__name__)
_lock = Lock()
_counts: Counter[str] = Counter()
_logged: set[tuple[str, str]] = set()


def fell_back(fast_path: str, reason: str, *, level: int = logging.WARNING) -> None:
    """Count that a fast path could not be used, and log it the first time for each reason.

    Args:
        fast_path: the fast path in a few words; also a metric label.
        reason: why it was not used, and what is done instead.
        level: log level; below a warning if nothing is wrong.
    """
    count_fallback(fast_path)
    with _lock:
        is_new = (fast_path, reason) not in _logged
        _logged.add((fast_path, reason))
    if is_new:
        _log.log(level, "%s: %s", fast_path, reason)


def count_fallback(fast_path: str) -> None:
    """Count a fallback without logging it, for callers that report the reason themselves."""
    with _lock:
        _counts[fast_path] += 1


def fallback_counts() -> dict[str, int]:
    """How often each fast path could not be used in this process, by name."""
    with _lock:
        return dict(sorted(_counts.items()))
