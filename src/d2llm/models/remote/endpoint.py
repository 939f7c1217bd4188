"""A model behind an OpenAI-compatible endpoint: its requests, and errors that say what to do.

Remote teachers, writers and backbones differ only in what they ask for and how they read the answer: ``Endpoint`` sends
the requests of all, ``Completions`` (``models.remote.completions``) those with a prompt.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import re
import threading
import time
import weakref
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping
from concurrent.futures import wait
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

from d2llm.core.errors import InputError, ModelError, ModelNotFoundError
from d2llm.core.extras import require
from d2llm.core.json_values import parse_json
from d2llm.core.progress import Advance
from d2llm.models.remote.kept_answers import kept_answers
from d2llm.recipe import EndpointConfig

if TYPE_CHECKING:
    import httpx2
    import tenacity


_log = logging.getLogger(__name__)

_Answer = TypeVar("_Answer")

TOO_LONG = re.compile(
    r"context.?(length|window|size)|maximum (model|input|context)|max_model_len|too long|longer than", re.I
)
_UNKNOWN_MODEL = re.compile(
    r"model.*(not exist|not found|unknown)|(unknown|no such|invalid) model|model_not_found", re.I
)
_QUOTED = 300  # characters of a server's message to quote
_LONGEST_BACK_OFF = 60.0  # seconds
_LONG_WAIT = 10.0  # seconds: waits of at least this long are logged as warnings
_IDLE_SECONDS = 30.0  # how long a connection stays open that nobody uses
_STOP_SECONDS = 5.0  # how long a caller that is interrupted waits until its requests are cancelled


@dataclass(frozen=True, slots=True)
class Answers(Generic[_Answer]):
    """What there was when the work ended: answers by the index of their request, in order.

    ``error`` is what ended it before all were there, if anything did. Ctrl-C is one too: what was answered is paid for.
    """

    by_index: dict[int, _Answer]
    error: BaseException | None = None

    def all(self) -> list[_Answer]:
        """All answers, or the error."""
        if self.error is not None:
            raise self.error
        return [*self.by_index.values()]


class _EventLoop:
    """An event loop in a thread of its own, in which all requests of this process run.

    So connections outlive the call that opened them, calls work inside a notebook's loop too, and Ctrl-C cancels
    running requests. The thread ends with the process.
    """

    _of_process: tuple[int, _EventLoop] | None = None
    _starting = threading.Lock()

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="remote models", daemon=True).start()

    @classmethod
    def of_process(cls) -> _EventLoop:
        """That of this process: a forked one has the memory of its parent, but not the thread."""
        with cls._starting:
            if cls._of_process is None or cls._of_process[0] != os.getpid():
                cls._of_process = os.getpid(), cls()
            return cls._of_process[1]

    def run(self, work: Coroutine[Any, Any, None]) -> None:
        """Run it to its end, or cancel it if the caller is interrupted."""
        ended = threading.Event()

        async def run() -> None:
            try:
                await work
            finally:
                ended.set()

        running = asyncio.run_coroutine_threadsafe(run(), self._loop)
        try:
            while wait([running], timeout=1.0).not_done:
                pass  # without a limit, Python would overlook a Ctrl-C that comes just before the wait
            running.result()
        finally:
            if not running.done():
                running.cancel()
                ended.wait(_STOP_SECONDS)

    def close(self, client: httpx2.AsyncClient) -> None:
        """Close its connections, without waiting until they are."""
        asyncio.run_coroutine_threadsafe(client.aclose(), self._loop)


class Endpoint(Generic[_Answer]):
    """One model at one address, over connections that stay open from one call to the next.

    If the address has never answered, a failure is raised at once. Later, while the endpoint is unreachable or
    overloaded (429, 408, 5xx, timeout), requests are retried. A delay that the endpoint
    requests itself (Retry-After) applies to all requests.

    Args:
        model: the model's name at the endpoint.
        config: address, key and pace.
        read: makes an answer of a successful response's JSON; an answer of another form may raise any ``LookupError``,
            ``TypeError``, ``ValueError`` or ``AttributeError``.
        path: of the requests, below the address.
        section: the section of the settings that names the model (``teacher``); ``config`` is its ``remote``. Errors
            name both.
        text: what a request sends, for errors ("a prompt").
        answer: what the endpoint gives, for errors ("a completion").
        shorten: what to do if a text is too long, for errors.
        check: what to look at if a request is refused for another reason, for errors; "" if there is nothing special.
        kept_as: the dataclass that ``read`` makes, if answers are kept for the next process should this one be killed
            (``models.remote.kept_answers``).
        read_refusal: makes an answer of a refusal (its status and text), or raises an error of its own; None: it is a
            refusal like any other.

    Raises:
        MissingExtraError: the packages of the extra ``remote`` are not installed.
        InputError: the key's variable is not set, or holds no key.
    """

    def __init__(
        self,
        model: str,
        config: EndpointConfig,
        read: Callable[[Any], _Answer],
        *,
        path: str,
        section: str,
        text: str,
        answer: str,
        shorten: str,
        check: str = "",
        kept_as: type[_Answer] | None = None,
        read_refusal: Callable[[int, str], _Answer | None] = lambda _status, _reason: None,
    ) -> None:
        for package in ("httpx2", "tenacity"):
            require(package, extra="remote", purpose=f"a remote {section.rpartition('.')[2]}")
        self.model = model
        self.config = config
        self.address = f"{config.url.rstrip('/')}/{path}"
        self.retries = Retries(self.address, config)
        self._read, self._read_refusal = read, read_refusal
        self._section, self._text, self._answer = section, text, answer
        self._shorten, self._check, self._kept_as = shorten, check, kept_as
        self._key = _read_key(config.api_key_env)
        self._answered = False
        self._opened: tuple[_EventLoop, httpx2.AsyncClient] | None = None
        self._opening = threading.Lock()
        self._warned: set[str] = set()

    def ask(
        self,
        bodies: Iterable[Mapping[str, Any]],
        *,
        advance: Advance | None = None,
        keep: Callable[[int, _Answer], None] | None = None,
    ) -> Answers[_Answer]:
        """The answers to requests, which start in their order; what a killed process left is not asked again.

        Once an error occurs, no more requests start, and those on their way are waited for. The errors are:

        - ModelNotFoundError: the endpoint has no such model, or the address does not exist.
        - InputError: a text is longer than the model can read, or answers cannot be kept (disk full).
        - ModelError: the endpoint is unreachable, refuses the key, or answers in another form.

        Args:
            bodies: the fields of each request's body besides the model's name.
            advance: called with 1 for each answer, from another thread.
            keep: called with each answer as soon as it is there, and the index of its request, from another thread; an
                error that it raises ends the call.
        """
        named = [{"model": self.model, **body} for body in bodies]
        kept = None if self._kept_as is None else kept_answers()
        answers: dict[int, _Answer] = {}

        def take(index: int, answer: _Answer, *, is_new: bool = True) -> None:
            answers[index] = answer
            if kept is not None and is_new:
                kept.add(self._identity(named[index]), asdict(cast("Any", answer)))
            if keep is not None:
                keep(index, answer)
            if advance is not None:
                advance(1)

        error: BaseException | None = None
        try:
            for index, body in enumerate(named):
                values = None if kept is None else kept.take(self._identity(body))
                if values is not None and self._kept_as is not None:
                    take(index, self._kept_as(**values), is_new=False)
            missing = [(index, body) for index, body in enumerate(named) if index not in answers]
            loop, client = self._open()
            loop.run(self._send_all(client, iter(missing), len(missing), take))
        except BaseException as reason:  # noqa: BLE001 - returned
            error = reason
            if kept is not None:
                kept.is_broken_off = True
        return Answers(dict(sorted(answers.items())), error)

    def warn_once(self, what: str, message: str, *values: object) -> None:
        """Log something about this endpoint, with its address in front: a warning, later only at level INFO."""
        level = logging.INFO if what in self._warned else logging.WARNING
        self._warned.add(what)
        _log.log(level, f"%s: {message}", self.config.url, *values)

    def _identity(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """What makes a request the same as another one."""
        return {"revision": self.config.revision, "body": body}

    def _open(self) -> tuple[_EventLoop, httpx2.AsyncClient]:
        """The event loop of this process, and what holds the connections there."""
        loop = _EventLoop.of_process()
        with self._opening:
            if self._opened is None or self._opened[0] is not loop:
                client = self._client()
                weakref.finalize(self, loop.close, client).atexit = False
                self._opened = loop, client
            return self._opened

    def _client(self) -> httpx2.AsyncClient:
        import httpx2

        concurrency = self.config.concurrency
        return httpx2.AsyncClient(
            headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
            timeout=httpx2.Timeout(self.config.timeout_seconds, pool=None),
            limits=httpx2.Limits(max_connections=concurrency, keepalive_expiry=_IDLE_SECONDS),
        )

    async def _send_all(
        self,
        client: httpx2.AsyncClient,
        bodies: Iterator[tuple[int, dict[str, Any]]],
        num_bodies: int,
        take: Callable[[int, _Answer], None],
    ) -> None:
        errors: list[Exception] = []

        async def work() -> None:
            for index, body in bodies:  # all workers share one iterator, so neighbours are sent together
                try:
                    answer = await self._send(client, body, worth_it=lambda: self._answered and not errors)
                    take(index, answer)
                except Exception as error:  # noqa: BLE001 - raised when the others are answered
                    errors.append(error)
                if errors:  # nothing more is sent; requests on their way are answered, and paid for
                    return

        workers = [asyncio.create_task(work()) for _ in range(min(self.config.concurrency, num_bodies))]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
        if errors:
            raise errors[0]

    async def _send(self, client: httpx2.AsyncClient, body: dict[str, Any], *, worth_it: Callable[[], bool]) -> _Answer:
        try:
            return await self.retries.send(lambda: self._post(client, body), worth_it=worth_it)
        except BusyError as error:
            timeout = f"{self._section}.remote.timeout_seconds"
            if not self._answered:
                slow = f"raise {timeout} if it is only slow, or " if error.is_slow else ""
                raise ModelError(
                    f"{self.address} cannot be reached: {error}; {slow}start the server there, or correct "
                    f"{self._section}.remote.url"
                ) from error
            slow = f"{timeout}, or " if error.is_slow else ""
            raise ModelError(
                f"{self.address}: {error}; {self.retries.why_ended(error)}. Run the "
                "command again when the endpoint works again: it continues where it stopped. Or raise "
                f"{slow}{self._section}.remote.patience_minutes, or send fewer requests (concurrency, "
                "requests_per_minute)"
            ) from error

    async def _post(self, client: httpx2.AsyncClient, body: dict[str, Any]) -> _Answer:
        import httpx2

        try:
            response = await client.post(self.address, json=body)
        except httpx2.TimeoutException as error:
            is_slow = not isinstance(error, httpx2.ConnectTimeout)
            raise BusyError(f"no answer within {self.config.timeout_seconds:g} seconds", is_slow=is_slow) from error
        except httpx2.TransportError as error:
            raise BusyError(f"no connection ({error or type(error).__name__})") from error
        self._answered = True
        if not response.is_success:
            refusal = self._read_refusal(response.status_code, self._quote(response))
            if refusal is None:
                raise self._error_of(response)
            return refusal
        try:
            return self._read(parse_json(response.content))
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ModelError(
                f"{self.address} did not answer with {self._answer}: {self._quote(response)}; give the address of an "
                "OpenAI-compatible endpoint, up to /v1"
            ) from error

    def _error_of(self, response: httpx2.Response) -> Exception:
        """The exception for an unsuccessful response, from its status and text."""
        status, reason = response.status_code, self._quote(response)
        if status in (401, 403):
            remedy = f"set {self._section}.remote.api_key_env"
            if self._key:
                remedy = f"check the key in {self.config.api_key_env}"
            return ModelError(
                f"{self.address} refuses {'the key' if self._key else 'access'} ({status}): {reason}; {remedy}"
            )
        if status in (408, 429) or status >= 500:
            wait = retry_after(response.headers.get("Retry-After"))
            if wait:
                self.retries.pause(wait)
            return BusyError(f"answers {status}: {reason}", wait=wait)
        if status == 404 or _UNKNOWN_MODEL.search(reason):
            return ModelNotFoundError(
                f"{self.address} has no model '{self.model}', or the address is wrong ({status}): {reason}; check "
                f"{self._section}.model and {self._section}.remote.url (up to /v1)"
            )
        if status == 413 or TOO_LONG.search(reason):
            return InputError(
                f"{self.address}: {self._text} is longer than '{self.model}' can read there ({status}): {reason}; "
                f"{self._shorten}, or start the server with a longer context"
            )
        return ModelError(
            f"{self.address} refuses the request ({status}): {reason}; check [{self._section}.remote]"
            + (f", {self._check}" if self._check else "")
        )

    def _quote(self, response: httpx2.Response) -> str:
        """The beginning of the server's message, on one line and without the key."""
        text = response.text
        if self._key:
            text = text.replace(self._key, "***")
        return quoted(text, _QUOTED)


def quoted(text: str, most: int) -> str:
    """The beginning of a text, at most ``most`` characters, on one line and in quotes."""
    text = " ".join(text.split())
    return repr(text if len(text) <= most else text[:most] + " ...")


def _read_key(variable: str | None) -> str | None:
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise InputError(f"the environment variable {variable} is not set; put the endpoint's key there")
    if not (key.isascii() and key.isprintable() and " " not in key):
        raise InputError(f"the environment variable {variable} holds characters that no key has; set it again")
    return key


# Pace, retries, and the delays that an endpoint asks for --------------------------------------------------------------


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


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of time, of tokens read and written, and of their cost in the currency of the prices; None: no limit."""

    minutes: float | None = None
    tokens: int | None = None
    cost: float | None = None

    def reached(self, minutes: float, tokens: int, cost: float | None) -> tuple[str, int | float] | None:
        """Name and value of the first limit that this much reaches, if it reaches one."""
        for name, spent in (("minutes", minutes), ("tokens", tokens), ("cost", cost or 0.0)):
            limit = getattr(self, name)
            if limit is not None and spent >= limit:
                return name, limit
        return None
