"""HTTP as uvicorn speaks it, with limits for what comes before a body and between its parts.

Neither uvicorn nor its parser limits the length of an address, of headers, of the extensions of chunks or of trailers.
A client that has not even sent a key could fill the memory with them, and keep the event loop busy. They may have
``MAX_BYTES`` in all; who sends more is answered 431 (414 if it is the address), and the connection is closed.
"""

from __future__ import annotations

import asyncio
import json
import logging
from http import HTTPStatus
from typing import Any

from uvicorn import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from d2llm.server.errors import Problem, ProblemKind, plain_shape

_log = logging.getLogger(__name__)

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
