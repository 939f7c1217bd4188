"""How many requests a minute a key, or a client without one, may make."""

from __future__ import annotations

import time
from dataclasses import dataclass

from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage  # not limits.aio's, which visits every client in a thread at each request
from limits.strategies import MovingWindowRateLimiter


@dataclass(frozen=True, slots=True)
class Allowance:
    """What is left after a request.

    Attributes:
        allowed: whether the request may be answered.
        limit: requests a minute.
        remaining: of them.
        reset: seconds until one more is allowed.
    """

    allowed: bool
    limit: int
    remaining: int
    reset: float

    def headers(self) -> dict[str, str]:
        """As the IETF's draft names them (draft-ietf-httpapi-ratelimit-headers-07)."""
        return {
            "RateLimit-Limit": str(self.limit),
            "RateLimit-Remaining": str(self.remaining),
            "RateLimit-Reset": str(max(1, round(self.reset))),
        }


class RateLimiter:
    """Exact counts over the last sixty seconds, in this process's memory."""

    def __init__(self) -> None:
        self._limiter = MovingWindowRateLimiter(MemoryStorage())

    def take(self, who: str, requests_per_minute: int) -> Allowance:
        """Count a request of ``who``; refused ones do not count."""
        limit = RateLimitItemPerMinute(requests_per_minute)
        allowed = self._limiter.hit(limit, who)
        window = self._limiter.get_window_stats(limit, who)
        return Allowance(allowed, requests_per_minute, window.remaining, max(0.0, window.reset_time - time.time()))
