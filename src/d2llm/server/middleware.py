"""Middleware, outermost first: index in the address; request id, log and headers; host; origin; CORS; keys; body.

These are pure ASGI classes. Starlette's BaseHTTPMiddleware runs the application in a separate task, which breaks
context variables and hides disconnects.
"""

from __future__ import annotations

import asyncio
import re
import sys
import time
import uuid
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from re import Pattern
from typing import Any, TypeVar

import structlog
from fastapi import FastAPI
from starlette.datastructures import URL, Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Route, compile_path
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from d2llm.server.access import AccessMiddleware, RateLimiter, is_open
from d2llm.server.errors import NotReadyError, Problem, log_failure, problem_for_client, send_problem
from d2llm.server.keys import KeyRing
from d2llm.server.large_bodies import LARGE_BYTES, in_body_thread, problem_of_body, problem_of_text
from d2llm.server.logs import begin_facts, log_request
from d2llm.server.running import Lifecycle
from d2llm.server.settings import ServeSettings
from d2llm.server.telemetry import Telemetry
from d2llm.server.uploads import FILES_PATH, FORM_TYPE

_Value = TypeVar("_Value")

SECURITY_HEADERS: Mapping[str, str] = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": (
        "default-src 'self'; object-src 'none'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
    ),
}
"""Headers of every response; a route may override them."""
CLIENT_CLOSED = 499
"""Status that is logged and counted if the client disconnected before the response started."""
_SANE_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_JSON = re.compile(r"application/(?:[\w.+-]+\+)?json", re.IGNORECASE)
_INDEX_ADDRESS = re.compile(r"/indexes/(?P<name>[^/]+)(?P<path>/.*)?", re.DOTALL)
_LONGEST_LENGTH = 20  # digits of a Content-Length; a number with more is cut, and still larger than every limit
AGENTS_PATH = "/mcp"
_PROBE = "/health"
"""Orchestrators request this by the machine's address, so its Host is not checked."""
_LAST = {"Connection": "close"}  # unread body bytes would be parsed as the connection's next request
_READING_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
_BODY_METHODS = frozenset({"POST", "PUT", "PATCH"})
_CORS_EXPOSED = (
    *("X-Request-ID", "Retry-After", "RateLimit-Limit", "RateLimit-Remaining", "RateLimit-Reset"),
    *("X-Warning", "X-Relevance-Score", "X-Word-Statistics"),
)


def install_middleware(app: FastAPI, settings: ServeSettings, telemetry: Telemetry, lifecycle: Lifecycle) -> None:
    """Add all middleware to ``app``.

    Raises:
        InputError: the file of API keys cannot be read, or the storage of rate limits is not a valid address.
    """
    ring = KeyRing(settings.keys_file) if settings.keys_file is not None else None
    storage = None if settings.rate_limit_storage is None else settings.rate_limit_storage.get_secret_value()
    not_ready = partial(problem_of_state, lifecycle=lifecycle)
    app.add_middleware(Gate, problem_of=not_ready)  # behind the body, whose time is limited in every state
    app.add_middleware(CancelWhenGone)
    app.add_middleware(HeadMiddleware)
    app.add_middleware(BodyMiddleware, max_body_bytes=settings.max_body_bytes, seconds=settings.request_seconds)
    app.add_middleware(
        AccessMiddleware,
        ring=ring,
        limiter=RateLimiter(storage),
        requests_per_minute=settings.requests_per_minute,
        not_ready=not_ready,
    )
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=("GET", "HEAD", "POST", "DELETE"),
            allow_headers=("*",),  # clients add their own, such as X-Stainless-Lang or traceparent
            expose_headers=_CORS_EXPOSED,
        )
    app.add_middleware(Gate, problem_of=partial(problem_of_origin, allowed=settings.cors_origins))
    app.add_middleware(Gate, problem_of=partial(problem_of_host, allowed=settings.host_names))
    app.add_middleware(RequestMiddleware, routes=RouteTable(app), telemetry=telemetry, log_texts=settings.log_texts)
    app.add_middleware(IndexAddressMiddleware)


class IndexAddressMiddleware:
    """Takes an index's name out of the address: ``/indexes/NAME/v1/search`` is ``/v1/search`` of that index.

    So every route works below ``/indexes/NAME`` as on a server of that index alone, and everything that depends on the
    path sees the route's own. The name is ``index_name`` in the request's state, not yet checked.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on with its route's path."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        name, path = split_address(scope["path"])
        named = {} if name is None else {"path": path, "state": {**scope.get("state", {}), "index_name": name}}

        async def send_with_address(message: Message) -> None:
            if message["type"] == "http.response.start" and "location" in (headers := MutableHeaders(scope=message)):
                # A slash is added or removed at the end. Relative, because a proxy may have more before the path.
                target = URL(headers["location"])
                last = target.path.rstrip("/").rpartition("/")[2]
                relative = f"./{last}/" if target.path.endswith("/") else f"../{last}"
                headers["location"] = str(target.replace(scheme="", netloc="", path=relative))
            await send(message)

        await self._app({**scope, **named}, receive, send_with_address)


def split_address(path: str) -> tuple[str | None, str]:
    """The name of the index in a request's path, if any, and the path of the route."""
    address = _INDEX_ADDRESS.fullmatch(path)
    return (None, path) if address is None else (address["name"], address["path"] or "/")


class RequestMiddleware:
    """Assigns each request an id, logs and counts it, and adds the common headers to its response."""

    def __init__(self, app: ASGIApp, routes: RouteTable, telemetry: Telemetry, *, log_texts: bool) -> None:
        self._app = app
        self._routes = routes
        self._telemetry = telemetry
        self._log_texts = log_texts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Give the request an id, pass it on, and log and count it even if it fails."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                self._routes.prepare()
            await self._app(scope, receive, send)
            return
        start_time = time.perf_counter()
        facts = begin_facts(_id_of(Headers(scope=scope)))
        state = scope.setdefault("state", {})
        state["request_id"] = facts.request_id
        status: int | None = None

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = int(message["status"])
                headers = MutableHeaders(scope=message)
                headers["X-Request-ID"] = facts.request_id
                headers["Server-Timing"] = f"total;dur={1e3 * (time.perf_counter() - start_time):.1f}"
                for name, value in SECURITY_HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        self._telemetry.begin_request()
        # What the request uses until its response is sent is entered into the stack.
        with structlog.contextvars.bound_contextvars(request_id=facts.request_id), ExitStack() as state["resources"]:
            try:
                await self._app(scope, receive, send_with_headers)
            except asyncio.CancelledError:  # the time is up for accepted requests
                if status is None:
                    problem = NotReadyError("the server stopped before it had answered this request").problem
                    await send_problem(scope, receive, send_with_headers, problem)
            except Exception as error:  # noqa: BLE001 - the last chance to turn it into a response
                problem = problem_for_client(error)
                log_failure(f"request {facts.request_id}", error, problem.status if status is None else 500)
                if status is None:
                    await send_problem(scope, receive, send_with_headers, problem)
            finally:
                seconds, route = time.perf_counter() - start_time, self._routes.find(scope)
                index = facts.index_name or ""
                self._telemetry.end_request(route, scope["method"], status or CLIENT_CLOSED, seconds, index)
                log_request(facts, route, scope["method"], status or CLIENT_CLOSED, seconds, texts=self._log_texts)


class Gate:
    """Passes requests on, except those of which ``problem_of`` says why they are refused."""

    def __init__(self, app: ASGIApp, problem_of: Callable[[Scope], Problem | None]) -> None:
        self.app = app
        self._problem_of = problem_of

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer with the problem, if there is one, else pass the request on."""
        problem = self._problem_of(scope) if scope["type"] == "http" else None
        if problem is None:
            await self.app(scope, receive, send)
        else:
            await send_problem(scope, receive, send, problem)


def problem_of_host(scope: Scope, *, allowed: Sequence[str]) -> Problem | None:
    """Refuse requests for unknown hosts, as a protection against DNS rebinding.

    A web page in a browser may make its own host name resolve to this machine. It would then have the same origin as
    the server and could read everything.
    """
    hosts = [_host_name(host) for host in Headers(scope=scope).getlist("host")]
    patterns = [name.lower().strip("[]") for name in allowed]
    if scope["path"] == _PROBE or (
        len(hosts) == 1
        and any(
            pattern in ("*", hosts[0]) or (pattern.startswith("*.") and hosts[0].endswith(pattern[1:]))
            for pattern in patterns
        )
    ):
        return None
    message = "this server does not accept the Host of the request; see its setting allowed_hosts"
    return Problem(400, "invalid_request", message)


def problem_of_origin(scope: Scope, *, allowed: Sequence[str]) -> Problem | None:
    """Refuse requests that a page of another origin makes a browser send, except those that only read.

    Browsers send forms, and requests without a body, without asking the server first. CORS only keeps the page from
    reading the answer. Clients that are not browsers send neither ``Origin`` nor ``Sec-Fetch-Site``.
    """
    headers = Headers(scope=scope)
    origins = headers.getlist("origin")
    if (
        scope["method"] in _READING_METHODS
        or "*" in allowed
        or (origins and all(origin in allowed for origin in origins))
    ):
        return None
    site = headers.get("sec-fetch-site", "none")  # no page can set it, and a proxy may have changed Host
    is_own = all(_is_origin(origin, headers.get("host", "")) for origin in origins)
    if site == "same-origin" or (site == "none" and is_own):
        return None
    message = "this server does not accept changes from pages of other origins; see its setting cors_origins"
    return Problem(403, "forbidden", message)


def problem_of_state(scope: Scope, *, lifecycle: Lifecycle) -> Problem | None:
    """Refuse requests (503) until the server is ready, except those that need no model."""
    state = lifecycle.state
    if state in ("ready", "stopping") or is_open(scope["path"]) or scope["path"] == "/metrics":
        return None  # a stopping server still answers accepted requests
    return NotReadyError(f"the server is {state}: {lifecycle.message}").problem


class HeadMiddleware:
    """Answers HEAD as GET, without the body: monitors and load balancers ask so."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on as GET."""
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return

        async def send_head(message: Message) -> None:
            await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

        await self._app({**scope, "method": "GET"}, receive, send_head)


class BodyMiddleware:
    """Reads the whole body before the application does; refuses bodies that are too large, too slow, or not text.

    If no length is declared, it stops reading at the limit, so that a client cannot fill the memory.
    """

    def __init__(self, app: ASGIApp, max_body_bytes: int, seconds: float) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes
        self._seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on with its whole body, or answer with what is wrong with it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        takes_form = scope["path"] == FILES_PATH
        read: bytes | Problem | None = self._problem_of_headers(scope["method"], headers, takes_form)
        if read is None and _has_body(headers):
            try:
                read = await _in_time(self._read(receive), self._seconds)
            except asyncio.TimeoutError:
                read = self._too_slow()
            if read is None:
                return
            if isinstance(read, bytes) and not takes_form:
                read = await self._problem_of(read, of_agent=scope["path"] == AGENTS_PATH) or read
        if isinstance(read, Problem):
            await send_problem(scope, receive, send, read)
            return
        messages: list[Message] = []
        if read is not None:
            messages.append({"type": "http.request", "body": read, "more_body": False})

        async def replay() -> Message:
            return messages.pop() if messages else await receive()

        await self._app(scope, replay, send)

    async def _read(self, receive: Receive) -> bytes | Problem | None:
        """The whole body; None if the client has disconnected."""
        body, more = bytearray(), True  # a list of small messages would take many times the memory
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            if len(body) > self._max_body_bytes:
                return self._too_large()
            more = message.get("more_body", False)
        return bytes(body)

    async def _problem_of(self, body: bytes, *, of_agent: bool) -> Problem | None:
        """What is wrong with a JSON body, or None."""
        if len(body) <= LARGE_BYTES:
            return problem_of_text(body)
        return await in_body_thread(partial(problem_of_body, body, self._max_body_bytes, of_agent=of_agent))

    def _problem_of_headers(self, method: str, headers: Headers, takes_form: bool) -> Problem | None:
        if _length_of(headers) > self._max_body_bytes:
            return self._too_large()
        kind = headers.get("content-type", "").partition(";")[0].strip()
        is_read = kind.lower() == FORM_TYPE if takes_form else _JSON.fullmatch(kind) is not None
        if method in _BODY_METHODS and not is_read and (kind or _has_body(headers)):
            remedy = (
                f"send files as a form ({FORM_TYPE})"
                if takes_form
                else "send JSON with 'Content-Type: application/json'"
            )
            message = f"body type {kind!r} is not supported; {remedy}" if kind else f"the body has no type; {remedy}"
            return Problem(415, "unsupported_media_type", message)
        coding = headers.get("content-encoding", "identity")
        if coding.lower() != "identity" and _has_body(headers):
            message = "compressed bodies are not supported; send the body without Content-Encoding"
            return Problem(415, "unsupported_media_type", message, headers={"Accept-Encoding": "identity"})
        return None

    def _too_large(self) -> Problem:
        message = (
            f"the body is larger than this server's limit of {self._max_body_bytes:,} bytes (max_body_bytes); "
            "send fewer texts at a time"
        )
        return Problem(413, "too_large", message, headers=_LAST)

    def _too_slow(self) -> Problem:
        message = (
            f"the body did not arrive within this server's limit of {self._seconds:g} s (request_seconds); "
            "send fewer texts at a time"
        )
        return Problem(408, "timeout", message, headers=_LAST)


def _has_body(headers: Headers) -> bool:
    return _length_of(headers) > 0 or "transfer-encoding" in headers


def _length_of(headers: Headers) -> int:
    """The body's declared length. Zeros before it do not count: Python refuses to read a number of 5,000 digits."""
    digits = headers.get("content-length", "").strip().lstrip("0")[:_LONGEST_LENGTH]
    return int(digits) if digits.isdecimal() else 0


def _id_of(headers: Headers) -> str:
    """The client's request id if it is safe for logs and headers, else a new one."""
    client_id = headers.get("x-request-id", "")
    return client_id if _SANE_ID.fullmatch(client_id) else uuid.uuid4().hex


def _host_name(host: str) -> str:
    """Host name of ``name:port``, ``[::1]:port``, or of either without a port."""
    host = host.strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rpartition(":")[0] or host


def _is_origin(origin: str, host: str) -> bool:
    """Whether ``origin`` is ``host``, under whichever scheme: a proxy may have taken away the encryption."""
    scheme, separator, name = origin.lower().partition("://")
    port = {"http": ":80", "https": ":443"}.get(scheme, "")
    return bool(separator) and name.removesuffix(port) == host.strip().lower().removesuffix(port)


class CancelWhenGone:
    """Cancels a request's work if its connection is closed before the response is complete.

    Starlette itself would finish the work. Items that wait in a queue are removed (``batching``). It stands behind
    ``BodyMiddleware``, so the first message is the whole body.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, listening for a disconnect."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        work = asyncio.current_task()
        assert work is not None, "an ASGI application runs in a task"
        body: Message | None = await receive()
        answered = is_gone = False

        async def listen() -> None:
            nonlocal is_gone
            while (await receive())["type"] != "http.disconnect":
                pass
            if not answered:
                is_gone = True
                work.cancel()

        async def next_message() -> Message:
            nonlocal body
            if body is None:
                await asyncio.shield(listener)
                return {"type": "http.disconnect"}
            message, body = body, None
            return message

        async def send_on(message: Message) -> None:
            nonlocal answered
            await send(message)
            answered = answered or (message["type"] == "http.response.body" and not message.get("more_body", False))

        listener = asyncio.ensure_future(listen())
        try:
            await self.app(scope, next_message, send_on)
        except asyncio.CancelledError:
            if not is_gone:  # the time is up for accepted requests
                raise
            if sys.version_info >= (3, 11):
                work.uncancel()
        finally:
            answered = True
            listener.cancel()


async def _in_time(work: Coroutine[Any, Any, _Value], seconds: float) -> _Value:
    """``asyncio.wait_for``, which before Python 3.12 starts a task for work that mostly need not wait at all."""
    if sys.version_info < (3, 11):
        return await asyncio.wait_for(work, seconds)
    async with asyncio.timeout(seconds):
        return await work


_TAKES_SLASHES = re.compile(r":(any)?path\}")  # parameters of these kinds
UNMATCHED = "(none)"
"""Stands for the route of a request that matches none."""


class RouteTable:
    """Templates of an application's routes, such as "/v1/passages/{id}", collected when the server starts.

    They are not taken from the request's scope, which has no route if a middleware refused the request, and lacks the
    prefix of included routers.
    """

    def __init__(self, app: FastAPI) -> None:
        self._app = app
        self._table: list[tuple[str, Pattern[str]]] = []

    def prepare(self) -> None:
        """Collect the templates. FastAPI then computes what included routers add to their routes, once."""
        routes = (
            (getattr(route, "path", None), getattr(route, "path_format", None)) for route in _routes_of(self._app)
        )
        # "/v1/passages/all" is not the passage "all"; a parameter that takes slashes takes what nothing else does.
        ordered = sorted(
            {(path, template) for path, template in routes if path and template},
            key=lambda route: (route[0].count("{"), bool(_TAKES_SLASHES.search(route[0])), route[0]),
        )
        self._table = [(template, compile_path(path)[0]) for path, template in ordered]

    def find(self, scope: Scope) -> str:
        """The template of a request's route."""
        if not self._table:  # an application that was never started, as in a test
            self.prepare()
        for template, pattern in self._table:
            if pattern.match(scope["path"]):
                return template
        route = scope.get("route")
        return route.path_format if isinstance(route, Route) else UNMATCHED


def _routes_of(app: FastAPI) -> Iterable[object]:
    """All routes, those of included routers too. Its OpenAPI document has them as well, but takes half a second."""
    try:
        from fastapi.routing import iter_route_contexts
    except ImportError:  # an older FastAPI, whose applications list the routes of included routers as their own
        return app.routes
    return iter_route_contexts(app.routes)
