"""The pace and the retries of requests to a remote model, and the delays that its endpoint asks for."""

from __future__ import annotations

import asyncio
import logging
import random
import re
import time
from collections.abc import Awaitable, Callable
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, TypeVar

from d2llm.recipe import EndpointConfig

if TYPE_CHECKING:
    import tenacity

_log = logging.getLogger(__name__)

_Answer = TypeVar("_Answer")

_LONGEST_BACK_OFF = 60.0  # seconds
_LONG_WAIT = 10.0  # seconds: waits of at least this long are logged as warnings


class BusyError(Exception):
    """A temporary failure that can be retried.

    ``wait`` is the delay in seconds that the endpoint requests; ``is_slow`` says that it was reached and did not answer
    in time.
    """

    def __init__(self, reason: str, *, wait: float | None = None, is_slow: bool = False) -> None:
        super().__init__(reason)
        self.wait, self.is_slow = wait, is_slow


class Retries:
    """The pace of an endpoint's requests, and the retries of those that fail with a ``BusyError``.

    One request starts at a time, at most ``requests_per_minute``, and none during a pause that the endpoint asked for.
    Retries go on for up to ``patience_minutes``, with exponential backoff and jitter.
    """

    def __init__(self, address: str, config: EndpointConfig) -> None:
        self.count = 0
        self._address = address
        self._patience_minutes = config.patience_minutes
        self._interval = 60 / config.requests_per_minute if config.requests_per_minute else 0.0
        self._next = self._paused_until = 0.0

    async def send(self, request: Callable[[], Awaitable[_Answer]], *, worth_it: Callable[[], bool]) -> _Answer:
        """The answer to a request, which is sent again while it fails with a ``BusyError`` and that is worth it."""
        import tenacity

        retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception(lambda error: isinstance(error, BusyError) and worth_it()),
            wait=_back_off,
            stop=tenacity.stop_before_delay(60 * self._patience_minutes),
            before_sleep=self._log_retry,
            reraise=True,
        )
        return await retrying(self._send_in_turn, request)

    async def _send_in_turn(self, request: Callable[[], Awaitable[_Answer]]) -> _Answer:
        while (wait := max(self._next, self._paused_until) - time.monotonic()) > 0:
            if self._paused_until - time.monotonic() > 60 * self._patience_minutes:
                raise BusyError(f"asks to wait {wait:,.0f} seconds", wait=wait)
            await asyncio.sleep(wait)
        self._next = time.monotonic() + self._interval
        return await request()

    def pause(self, seconds: float) -> None:
        """Send nothing for this many seconds."""
        self._paused_until = max(self._paused_until, time.monotonic() + seconds)

    def why_ended(self, error: BusyError) -> str:
        """Why there were no more retries after this error."""
        minutes = self._patience_minutes
        if error.wait is not None and error.wait > 60 * minutes:
            return f"that is longer than patience_minutes ({minutes:g})"
        return f"retried for up to {minutes:g} minutes"

    def _log_retry(self, state: tenacity.RetryCallState) -> None:
        self.count += 1
        wait = state.next_action.sleep if state.next_action else 0.0
        error = state.outcome.exception() if state.outcome else None
        level = logging.WARNING if wait >= _LONG_WAIT else logging.INFO
        _log.log(level, "%s: %s; trying again in %.1f seconds", self._address, error, wait)


def _back_off(state: tenacity.RetryCallState) -> float:
    """Seconds until the next try: a random time up to 1, 2, 4 ... 60, but at least the endpoint's own delay."""
    error = state.outcome.exception() if state.outcome else None
    requested = (error.wait or 0.0) if isinstance(error, BusyError) else 0.0
    return max(requested, random.uniform(0, min(_LONGEST_BACK_OFF, 2.0 ** (state.attempt_number - 1))))


def retry_after(header: str | None) -> float | None:
    """Seconds to wait, from a ``Retry-After`` header with seconds or a date; None if it is missing or unreadable."""
    if header is None:
        return None
    try:
        if re.fullmatch(r"\s*[0-9.]+\s*", header):
            return float(header)
        date = parsedate_to_datetime(header)
    except ValueError:
        return None
    if date.tzinfo is None:
        date = date.replace(tzinfo=timezone.utc)
    return max(0.0, (date - datetime.now(timezone.utc)).total_seconds())
