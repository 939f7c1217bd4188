"""Running an application until it is stopped: its state, socket and signals.

Neither uvicorn nor its parser limits the length of an address, of headers, of the extensions of chunks or of trailers.
A client that has not even sent a key could fill the memory with them, and keep the event loop busy. They may have
``MAX_BYTES`` in all; who sends more is answered 431 (414 if it is the address), and the connection is closed.
"""

from __future__ import annotations

import asyncio
import errno
import gc
import json
import logging
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Generator
from contextlib import contextmanager
from http import HTTPStatus
from types import FrameType
from typing import Any, Literal, cast

import uvicorn
from fastapi import FastAPI
from uvicorn import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from d2llm.core.errors import D2LLMError, InputError
from d2llm.server.errors import Problem, ProblemKind, plain_shape
from d2llm.server.settings import ServeSettings

_log = logging.getLogger(__name__)
_POLL_SECONDS = 0.05
_NEW_OBJECTS = 10_000  # a search makes some thousands; a garbage collection begins after so many
_TICKS_PER_CHECK = 5
_LAST_SECONDS = 4.0  # after the limit of a shutdown, for work that is told to stop
_Handler = Callable[[int, FrameType | None], object]
State = Literal["starting", "ready", "broken", "stopping"]


class Lifecycle:
    """The state of a server, with a sentence that explains it; each change is logged."""

    def __init__(self) -> None:
        self.state: State = "starting"
        self.message = "the student and the index are being loaded"
        self.stop_by: float | None = None  # of ``time.monotonic``, once the server has been told to stop

    def become(self, state: State, message: str = "") -> None:
        """Change the state."""
        if (state, message) != (self.state, self.message):
            level = logging.ERROR if state == "broken" else logging.INFO
            _log.log(level, "%s%s", state, f": {message}" if message else "")
        self.state, self.message = state, message


def listen(host: str, port: int) -> socket.socket:
    """A socket bound to an address; port 0 chooses a free port.

    Raises:
        InputError: the port is in use or not allowed, or the host is not an address of this machine.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror as error:
        raise InputError(f"host '{host}' is unknown ({error.strerror}); give an address of this machine") from error
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise InputError(_why_not_bound(host, port, error)) from error
    return bound


def _why_not_bound(host: str, port: int, error: OSError) -> str:
    match error.errno:
        case errno.EADDRINUSE:
            return f"port {port} of {host} is in use; stop the program using it, or give another --port (0: any)"
        case errno.EACCES:
            return f"this user may not listen on port {port} of {host}; give a --port of 1024 or higher"
        case errno.EADDRNOTAVAIL:
            return f"'{host}' is not an address of this machine; give one that is, such as 127.0.0.1"
        case _:
            return f"cannot listen on port {port} of {host} ({error.strerror})"


def url_of(bound: socket.socket) -> str:
    """The URL of a bound socket, with its actual port."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def run_app(
    app: FastAPI,
    settings: ServeSettings,
    bound: socket.socket,
    lifecycle: Lifecycle,
    *,
    on_ready: Callable[[], None],
    on_hangup: Callable[[], Awaitable[object]],
) -> None:
    """Serve until SIGTERM or SIGINT; then finish accepted requests, within ``shutdown_seconds``.

    The process is this server's: it ends at that limit and a few seconds, even if a thread does not.

    Args:
        app: the application.
        settings: settings of the server.
        bound: socket from ``listen``; closed at the end.
        lifecycle: state of the application; changes from "starting" to "ready" or "broken".
        on_ready: called once, when the server is ready.
        on_hangup: called at each SIGHUP.

    Raises:
        D2LLMError: the application never became ready; the message is that of ``lifecycle``.
    """
    config = uvicorn.Config(
        app,
        http=LimitedProtocol,
        lifespan="on",
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=bool(settings.trusted_proxies),
        forwarded_allow_ips=list(settings.trusted_proxies),
        timeout_graceful_shutdown=math.ceil(settings.shutdown_seconds),
    )
    server = _Server(config, settings, lifecycle, on_hangup)

    async def serve() -> None:
        watching = asyncio.create_task(_watch(server, lifecycle, on_ready))
        try:
            await server.serve(sockets=[bound])
        finally:
            watching.cancel()

    with bound:
        if sys.version_info < (3, 11):
            asyncio.run(serve())
        else:  # the event loop that uvicorn would use: uvloop if it is installed
            with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
                runner.run(serve())
    if server.failure is not None:
        raise D2LLMError(server.failure)


async def _watch(server: _Server, lifecycle: Lifecycle, on_ready: Callable[[], None]) -> None:
    while not (server.started and lifecycle.state in ("ready", "broken")):
        await asyncio.sleep(_POLL_SECONDS)
    if lifecycle.state == "broken":
        server.failure = lifecycle.message
        server.should_exit = True
    else:
        _spare_collections()
        on_ready()


def _spare_collections() -> None:
    """Keep what was loaded out of garbage collections: going over millions of objects took 6% of a search's time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(_NEW_OBJECTS, *gc.get_threshold()[1:])


def _end_process() -> None:
    """End the process as it is: what an index has committed stays, and the system frees its lock."""
    _log.error("the time to stop is over and work is still under way; the process ends without it")
    for handler in logging.getLogger().handlers:
        handler.flush()
    sys.stdout.flush()
    os._exit(0)


class _Server(uvicorn.Server):
    """uvicorn's server, but a requested stop exits with success, and SIGHUP is handled.

    It also closes stalled connections. uvicorn waits forever for a first request, for the rest of incomplete headers,
    and for a client that does not read its response.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        settings: ServeSettings,
        lifecycle: Lifecycle,
        on_hangup: Callable[[], Awaitable[object]],
    ) -> None:
        super().__init__(config)
        self.failure: str | None = None
        self._request_seconds = settings.request_seconds
        self._shutdown_seconds = settings.shutdown_seconds
        self._lifecycle = lifecycle
        self._waiting: dict[Any, tuple[tuple[object, int], float]] = {}
        self._on_hangup = on_hangup
        self._tasks: set[asyncio.Task[None]] = set()  # keeps references, since the event loop holds only weak ones

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second."""
        if counter % _TICKS_PER_CHECK == 0:
            self._close_stuck(time.monotonic())
        return await super().on_tick(counter)

    def _close_stuck(self, now: float) -> None:
        """Close connections that have waited too long for the same request, or to send the same bytes of a response."""
        waiting: dict[Any, tuple[tuple[object, int], float]] = {}
        for connection in cast("set[Any]", self.server_state.connections):
            cycle, num_left = connection.cycle, connection.transport.get_write_buffer_size()
            if cycle is not None and not cycle.response_complete and not num_left:
                continue  # it is being answered
            state, since = (cycle, num_left), now
            if connection in self._waiting and self._waiting[connection][0] == state:
                since = self._waiting[connection][1]
            if now - since > self._request_seconds:
                _log.info("closed a stalled connection: its client did not finish the request or read the response")
                connection.transport.abort()
            waiting[connection] = state, since
        self._waiting = waiting

    @contextmanager
    def capture_signals(self) -> Generator[None]:
        """Handle signals while it runs; uvicorn's own handler would raise them again afterwards."""
        if threading.current_thread() is not threading.main_thread():  # signals can only be handled there
            yield
            return
        loop = asyncio.get_running_loop()
        handlers: dict[int, _Handler] = {signal.SIGINT: self._end, signal.SIGTERM: self._end}
        if hasattr(signal, "SIGHUP"):
            handlers[signal.SIGHUP] = lambda _number, _frame: loop.call_soon_threadsafe(self._begin, self._hang_up)
        before = {signal_number: signal.signal(signal_number, handler) for signal_number, handler in handlers.items()}
        try:
            yield
        finally:
            for signal_number, handler in before.items():
                signal.signal(signal_number, handler)

    def _end(self, signal_number: int, frame: FrameType | None) -> None:
        """Stop in time: a thread that does not end would keep the process, and with it the lock of an index."""
        if self._lifecycle.stop_by is None:
            self._lifecycle.stop_by = time.monotonic() + self._shutdown_seconds
            last = threading.Timer(self._shutdown_seconds + _LAST_SECONDS, _end_process)
            last.daemon = True
            last.start()
        self.handle_exit(signal_number, frame)

    def _begin(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        task = asyncio.get_running_loop().create_task(work())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _hang_up(self) -> None:
        try:
            await self._on_hangup()
        except D2LLMError as error:
            _log.error("SIGHUP: %s", error)


MAX_BYTES = 64 << 10
"""Maximum bytes of a request besides its body."""
_BYTES_A_HEADER = 32  # counted for each in addition, as in HTTP/2 (RFC 9113, 6.5.2): looking one up goes over all
_BYTES_A_CHUNK = 12  # of a body in chunks, these are not counted: length, which some clients pad, and two line ends
_PIECE = 16 << 10  # parsed between two checks
_LINGER_SECONDS = 2.0  # a connection that is closed at once is reset, and its client may never read the answer


class LimitedProtocol(HttpToolsProtocol):
    """A connection whose requests have limits."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._num_counted = 0
        self._in_head = True
        self._in_address = False
        self._is_too_long = False
        self._is_refused = False

    def data_received(self, data: bytes) -> None:
        """Parse what has arrived, a little at a time."""
        for start in range(0, len(data), _PIECE):
            if self._is_refused:  # the rest is not read
                return
            piece = data[start : start + _PIECE]
            self._num_counted += len(piece)
            super().data_received(piece)
            if self._num_counted > MAX_BYTES and not self._is_refused:
                self._refuse_length()

    def on_message_begin(self) -> None:
        """A request begins."""
        super().on_message_begin()
        self._in_head = self._in_address = True

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header, or a trailer, which nothing here reads."""
        self._in_address = False
        self._num_counted += _BYTES_A_HEADER
        if self._in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """A body may follow; a request whose headers are too long is not begun."""
        self._in_address = False
        self._is_too_long = self._num_counted - _PIECE > MAX_BYTES  # a piece may also have some of the body
        if not self._is_too_long:
            self._in_head = False
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """A part of the body, which has a limit of its own."""
        self._num_counted -= len(body)
        if not self._is_too_long:
            super().on_body(body)

    def on_chunk_complete(self) -> None:
        """The end of a part."""
        self._num_counted -= _BYTES_A_CHUNK

    def on_message_complete(self) -> None:
        """The end of a request."""
        if not self._is_too_long:
            super().on_message_complete()
            self._num_counted = 0

    def send_400_response(self, msg: str) -> None:
        """What is not HTTP."""
        self._refuse(400, "invalid_request", f"{msg} Send HTTP/1.1")

    def _refuse_length(self) -> None:
        if self._in_address:
            self._refuse(414, "too_large", f"the address is longer than {MAX_BYTES:,} bytes; send texts in a body")
            return
        what = "the headers" if self._in_head else "what the body has besides its content (extensions, trailers)"
        message = f"{what} and the address are longer than {MAX_BYTES:,} bytes; send fewer or shorter ones"
        self._refuse(431, "too_large", message)

    def _refuse(self, status: int, kind: ProblemKind, message: str) -> None:
        """Answer and close the connection, which is read for a while, so that the client reads the answer."""
        self._is_refused = True
        if self.transport.is_closing():
            return
        _log.info("refused a request with status %d: %s", status, message)
        if self.cycle is not None and not self.cycle.response_complete:  # pyright: ignore[reportUnnecessaryComparison]
            is_other = self._in_head or self.cycle.response_started or bool(self.pipeline)
            self.cycle.disconnected = True
            self.cycle.message_event.set()
            if is_other:  # an answer would stand within that to an earlier request
                self.transport.abort()
                return
        _, answer = plain_shape(Problem(status, kind, message))
        body = json.dumps(answer).encode()
        headers = [
            *self.server_state.default_headers,
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]
        head = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n".encode()
        self.transport.write(
            head + b"".join(name + b": " + value + b"\r\n" for name, value in headers) + b"\r\n" + body
        )
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.loop.call_later(_LINGER_SECONDS, self.transport.close)
