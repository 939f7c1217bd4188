"""Rate limits: requests per minute of a key, or of a client without one."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass

from limits import RateLimitItem, RateLimitItemPerMinute, WindowStats, aio
from limits.errors import StorageError
from limits.storage import MemoryStorage  # limits.aio's goes over every client in a thread at each request
from limits.strategies import MovingWindowRateLimiter

from d2llm.core.errors import InputError
from d2llm.core.extras import require

_log = logging.getLogger(__name__)
_SCHEMES = ("redis://", "rediss://")
_PATIENCE = 1.0  # seconds to wait for the storage
_PAUSE = 5.0  # seconds before the storage is tried again after a failure


@dataclass(frozen=True, slots=True)
class Allowance:
    """The state of a rate limit after a request.

    Attributes:
        allowed: whether the request may be answered.
        limit: requests per minute.
        remaining: requests left.
        reset: seconds until another request is allowed.
    """

    allowed: bool
    limit: int
    remaining: int
    reset: float

    def headers(self) -> dict[str, str]:
        """Response headers, as in the IETF draft (draft-ietf-httpapi-ratelimit-headers-07)."""
        return {
            "RateLimit-Limit": str(self.limit),
            "RateLimit-Remaining": str(self.remaining),
            "RateLimit-Reset": str(max(1, round(self.reset))),
        }


class RateLimiter:
    """Exact counts over the last sixty seconds: in this process's memory, or in a Redis that several servers share.

    If Redis does not answer, this process counts by itself and tries Redis again every few seconds. So every request is
    counted, and an unreachable Redis does not block clients.
    """

    def __init__(self, storage: str | None = None) -> None:
        """``storage`` is the address of the Redis: ``redis://HOST:PORT``, ``rediss://`` with TLS.

        Raises:
            InputError: it is not a Redis address.
            MissingExtraError: the extra ``redis`` is not installed.
        """
        self._alone = MovingWindowRateLimiter(MemoryStorage())
        self._together: aio.strategies.MovingWindowRateLimiter | None = None
        self._next_try = 0.0
        if storage is not None:
            require("redis", extra="redis", purpose="counting the requests of several servers together")
            if not storage.startswith(_SCHEMES):
                raise InputError("rate_limit_storage: give the address of a Redis, as in redis://localhost:6379")
            redis = aio.storage.RedisStorage(f"async+{storage}", wrap_exceptions=True, implementation="redispy")
            self._together = aio.strategies.MovingWindowRateLimiter(redis)

    async def take(self, client: str, requests_per_minute: int) -> Allowance:
        """Count a request of ``client``; refused requests do not count."""
        limit = RateLimitItemPerMinute(requests_per_minute)
        if self._together is not None and time.monotonic() >= self._next_try:
            try:
                return await asyncio.wait_for(_take(self._together, limit, client), _PATIENCE)
            except (StorageError, asyncio.TimeoutError) as error:
                self._next_try = time.monotonic() + _PAUSE
                _log.error("rate limits: the storage does not answer (%s); counting locally", type(error).__name__)
        allowed = self._alone.hit(limit, client)
        return _allowance(allowed, limit, self._alone.get_window_stats(limit, client))


async def _take(limiter: aio.strategies.MovingWindowRateLimiter, limit: RateLimitItem, client: str) -> Allowance:
    allowed = await limiter.hit(limit, client)
    return _allowance(allowed, limit, await limiter.get_window_stats(limit, client))


def _allowance(allowed: bool, limit: RateLimitItem, window: WindowStats) -> Allowance:
    return Allowance(allowed, limit.amount, window.remaining, max(0.0, window.reset_time - time.time()))
