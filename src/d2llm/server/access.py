"""Access control: API keys, their scopes and indexes, and rate limits, checked before a request is read.

A rate limit is a number of requests per minute of a key, or of a client without one.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from d2llm.core.errors import InputError
from d2llm.core.extras import require
from d2llm.server import keys
from d2llm.server.errors import Problem, send_problem
from d2llm.server.keys import ApiKey, KeyRing
from d2llm.server.logs import current_facts
from d2llm.server.uploads import FILES_PATH

if TYPE_CHECKING:
    from limits import aio

_log = logging.getLogger(__name__)
_SCHEMES = ("redis://", "rediss://")
_PATIENCE = 1.0  # seconds to wait for the storage
_PAUSE = 5.0  # seconds before the storage is tried again after a failure
_WINDOW = 60.0  # seconds over which requests are counted


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
        self._times: dict[str, deque[float]] = {}  # of each client's requests; limits' memory obeys a clock set back
        self._forgotten = time.monotonic()
        self._together: aio.strategies.MovingWindowRateLimiter | None = None
        self._next_try = 0.0
        if storage is not None:
            for package in ("redis", "limits"):
                require(package, extra="redis", purpose="counting the requests of several servers together")
            if not storage.startswith(_SCHEMES):
                raise InputError("rate_limit_storage: give the address of a Redis, as in redis://localhost:6379")
            from limits import aio

            redis = aio.storage.RedisStorage(f"async+{storage}", wrap_exceptions=True, implementation="redispy")
            self._together = aio.strategies.MovingWindowRateLimiter(redis)

    async def take(self, client: str, requests_per_minute: int) -> Allowance:
        """Count a request of ``client``; refused requests do not count."""
        if self._together is not None and time.monotonic() >= self._next_try:
            from limits.errors import StorageError

            try:
                return await asyncio.wait_for(_take(self._together, client, requests_per_minute), _PATIENCE)
            except (StorageError, asyncio.TimeoutError) as error:
                self._next_try = time.monotonic() + _PAUSE
                _log.error("rate limits: the storage does not answer (%s); counting locally", type(error).__name__)
        return self._take_alone(client, requests_per_minute)

    def _take_alone(self, client: str, requests_per_minute: int) -> Allowance:
        now = time.monotonic()
        if now - self._forgotten > _WINDOW:
            self._times = {name: times for name, times in self._times.items() if now - times[-1] < _WINDOW}
            self._forgotten = now
        times = self._times.setdefault(client, deque())
        while times and now - times[0] >= _WINDOW:
            times.popleft()
        allowed = len(times) < requests_per_minute
        if allowed:
            times.append(now)
        remaining = max(0, requests_per_minute - len(times))
        return Allowance(allowed, requests_per_minute, remaining, _WINDOW - (now - times[0]))


async def _take(limiter: aio.strategies.MovingWindowRateLimiter, client: str, requests_per_minute: int) -> Allowance:
    from limits import RateLimitItemPerMinute

    limit = RateLimitItemPerMinute(requests_per_minute)
    allowed = await limiter.hit(limit, client)
    window = await limiter.get_window_stats(limit, client)
    return Allowance(allowed, limit.amount, window.remaining, max(0.0, window.reset_time - time.time()))


OPEN_PATHS = ("/health", "/docs", "/openapi.json", "/page")
"""Paths that need no key, including paths below them; "/" needs none either. They reveal nothing about the index. The
page itself asks the user for a key."""
_WRITE_PATHS = ("/v1/passages", "/v1/documents", FILES_PATH)
_ADMIN_PATHS = ("/v1/index",)
_WHOLE_SERVER_PATHS = ("/metrics",)
"""Paths whose answers name all indexes."""
_READING = frozenset({"GET", "HEAD"})
_CHANGING = frozenset({"PUT", "PATCH", "DELETE"})


def is_open(path: str) -> bool:
    """Whether a path needs no key and is not rate-limited."""
    return path == "/" or _is_below(path, OPEN_PATHS)


def wrong_index(key: ApiKey, name: str) -> Problem:
    """Why a key may not use an index. Names that are not the key's are not confirmed to exist."""
    return _forbidden(f"the key '{key.name}' may not use the index '{name}', only {_indexes_of(key)}; use another key")


def no_index(key: ApiKey) -> Problem:
    """Why a key may use nothing of a server that has none of its indexes."""
    return _forbidden(f"the key '{key.name}' is for {_indexes_of(key)}, which this server does not have")


def scope_needed(method: str, path: str) -> keys.Scope:
    """The scope that a key must have for a request."""
    if method not in _READING:
        if _is_below(path, _ADMIN_PATHS):
            return "admin"
        if method in _CHANGING or _is_below(path, _WRITE_PATHS):
            return "write"
    return "read"


class AccessMiddleware:
    """Refuses requests without a valid key (401), with a key of insufficient scope (403), or over the limit (429).

    A key for some indexes is refused if the address names another one; a name in the body is left to the route, which
    gets the key as ``api_key`` in the request's state. A request that comes while the server is ``not_ready`` for it
    does not count for the limit: clients repeat it every second, and would have none left when the server is ready.
    """

    def __init__(
        self,
        app: ASGIApp,
        ring: KeyRing | None,
        limiter: RateLimiter,
        requests_per_minute: int | None,
        not_ready: Callable[[Scope], Problem | None],
    ) -> None:
        self._app = app
        self._ring = ring
        self._limiter = limiter
        self._requests_per_minute = requests_per_minute
        self._not_ready = not_ready

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check one request and pass it on, or refuse it."""
        if scope["type"] != "http" or is_open(scope["path"]):
            await self._app(scope, receive, send)
            return
        key = None
        if self._ring is not None:
            key, problem = self._identify(self._ring, scope)
            if problem is not None:
                await send_problem(scope, receive, send, problem)
                return
            scope.setdefault("state", {})["api_key"] = key
        allowance = await self._count(scope, key)
        if allowance is None:
            await self._app(scope, receive, send)
        elif allowance.allowed:
            await self._app(scope, receive, _with_headers(send, allowance))
        else:
            wait = max(1, round(allowance.reset))
            message = f"more than {allowance.limit} requests in a minute; try again in {wait} s"
            headers = allowance.headers()
            problem = Problem(429, "rate_limited", message, retry_after=allowance.reset, headers=headers)
            await send_problem(scope, receive, send, problem)

    def _identify(self, ring: KeyRing, scope: Scope) -> tuple[ApiKey | None, Problem | None]:
        secret = _secret_of(Headers(scope=scope))
        if secret is None:
            message = "this server needs an API key: send it as 'Authorization: Bearer KEY', or as 'X-API-Key: KEY'"
            return None, _unauthorized(message, "")
        key = ring.find(secret)
        if key is None:
            message = "this server does not know the API key; check it, or ask the operator of the server for another"
            return None, _unauthorized(message, ', error="invalid_token"')
        current_facts().key_name = key.name
        needed = scope_needed(scope["method"], scope["path"])
        if not key.allows(needed):
            message = f"the key '{key.name}' has the scope '{key.scope}', but this needs '{needed}'; use another key"
            return None, _forbidden(message, f', scope="{needed}"')
        return key, _problem_of_index(key, scope)

    async def _count(self, scope: Scope, key: ApiKey | None) -> Allowance | None:
        if self._not_ready(scope) is not None:
            return None
        if key is not None and key.requests_per_minute is not None:
            return await self._limiter.take(f"key {key.name}", key.requests_per_minute)
        if self._requests_per_minute is None:
            return None
        client = scope.get("client")
        caller = f"key {key.name}" if key is not None else f"address {client[0] if client else 'unknown'}"
        return await self._limiter.take(caller, self._requests_per_minute)


def _problem_of_index(key: ApiKey, scope: Scope) -> Problem | None:
    name = scope.get("state", {}).get("index_name")
    if name is not None and not key.allows_index(name):
        return wrong_index(key, name)
    if key.indexes is not None and _is_below(scope["path"], _WHOLE_SERVER_PATHS):
        return _forbidden(
            f"the key '{key.name}' is only for {_indexes_of(key)}, but this is about all; use another key"
        )
    return None


def _indexes_of(key: ApiKey) -> str:
    names = key.indexes or ()
    return f"{'index' if len(names) == 1 else 'indexes'} {', '.join(names)}"


def _forbidden(message: str, detail: str = "") -> Problem:
    challenge = f'Bearer realm="d2llm", error="insufficient_scope"{detail}'
    return Problem(403, "forbidden", message, headers={"WWW-Authenticate": challenge})


def _is_below(path: str, tops: tuple[str, ...]) -> bool:
    return any(path == top or path.startswith(top + "/") for top in tops)


def _secret_of(headers: Headers) -> str | None:
    kind, _, secret = headers.get("authorization", "").partition(" ")
    if kind.lower() == "bearer" and secret.strip():
        return secret.strip()
    return headers.get("x-api-key") or None


def _unauthorized(message: str, detail: str) -> Problem:
    return Problem(401, "unauthorized", message, headers={"WWW-Authenticate": f'Bearer realm="d2llm"{detail}'})


def _with_headers(send: Send, allowance: Allowance) -> Send:
    async def send_with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message).update(allowance.headers())
        await send(message)

    return send_with_headers
