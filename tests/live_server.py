"""Serves an ASGI application on a real socket, in a thread of the test process."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import httpx2
import uvicorn

from d2llm import Student
from tiny_server import tiny_settings
from waiting import PATIENCE, until

patient = httpx2.Client(timeout=PATIENCE, limits=httpx2.Limits(max_keepalive_connections=0))
"""A client with a long timeout for busy machines; each request uses a new connection, as servers come and go."""


@contextmanager
def serve(app: Any, **settings: Any) -> Generator[str]:
    """Serve the application and yield its base address, such as ``http://127.0.0.1:51234``.

    ``settings`` are uvicorn's. It uses asyncio's own event loop, which the tests patch and time.
    """
    quiet = {"log_config": None, "access_log": False}  # loggers are global to the process, so leave them unchanged
    config = uvicorn.Config(app, host="127.0.0.1", port=0, loop="asyncio", **quiet, **settings)
    server = uvicorn.Server(config)
    failures: list[BaseException] = []

    def run() -> None:
        try:
            asyncio.run(server.serve())
        except (OSError, RuntimeError, SystemExit) as error:
            failures.append(error)

    thread = threading.Thread(target=run, name="server", daemon=True)
    thread.start()
    until(lambda: server.started or not thread.is_alive(), "a server that listens")
    if not server.started:
        raise RuntimeError(f"the server did not start: {failures}")
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(PATIENCE)
        if thread.is_alive():
            raise RuntimeError("the server did not stop")


def wait_until_ready(address: str, state: str = "ready") -> dict[str, str]:
    """Wait until ``/health`` reports this state, and return its response."""
    health: dict[str, str] = {}

    def is_there() -> bool:
        health.update(patient.get(f"{address}/health").json())
        assert health["status"] in (state, "starting"), health
        return health["status"] == state

    until(is_there, f"a server that is {state}")
    return health


@contextmanager
def served(*index: Any, **settings: Any) -> Generator[str]:
    """The address of a server that is ready; it has ``tiny_settings``."""
    from d2llm.server.app import make_app

    with serve(make_app(tiny_settings(*index, **settings))) as address:
        wait_until_ready(address)
        yield address


def wait_until_closed(address: str) -> None:
    """Wait until connections are refused: the server has begun to stop."""
    host, port = urlsplit(address).hostname, urlsplit(address).port
    assert host is not None
    assert port is not None

    def is_closed() -> bool:
        try:
            socket.create_connection((host, port)).close()
        except ConnectionRefusedError:
            return True
        return False

    until(is_closed, "a server that stops")


class HeldStudent:
    """Blocks encoding until the test sets ``may_end``; ``began`` is set when the first texts arrive."""

    def __init__(self, student: Student) -> None:
        self.began, self.may_end = threading.Event(), threading.Event()
        encode = student.encode_tokens

        def held(ids: Sequence[Sequence[int]]) -> Any:
            self.began.set()
            assert self.may_end.wait(PATIENCE), "a test did not let the texts through"
            return encode(ids)

        student.encode_tokens = held

    def wait(self) -> None:
        """Wait until texts are being held."""
        assert self.began.wait(PATIENCE), "no text came"


class LeavingClient:
    """A client that sends a request and disconnects with ``leave`` before the response."""

    def __init__(self, address: str, path: str, body: object) -> None:
        content = json.dumps(body).encode()
        head = (
            f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(content)}\r\n\r\n"
        )
        self._connection = socket.create_connection((urlsplit(address).hostname, urlsplit(address).port))
        self._connection.sendall(head.encode() + content)

    def leave(self) -> None:
        self._connection.close()
