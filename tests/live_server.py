"""An ASGI application served on a real socket, in a thread of the test's own process."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import httpx2
import uvicorn

_PATIENCE = 60.0  # seconds to start or to stop


@contextmanager
def serve(app: Any, **settings: Any) -> Generator[str]:
    """The base address, such as ``http://127.0.0.1:51234``, while the application listens there.

    ``settings`` are uvicorn's. Its loop is asyncio's own, which is what the application's tests patch and time.
    """
    quiet = {"log_config": None, "access_log": False}  # the loggers are the whole process's: they stay as they are
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
    deadline = time.monotonic() + _PATIENCE
    while not server.started:
        if not thread.is_alive() or time.monotonic() > deadline:
            raise RuntimeError(f"the server did not start: {failures or 'it took too long'}")
        time.sleep(0.005)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(_PATIENCE)
        if thread.is_alive():
            raise RuntimeError("the server did not stop")


def wait_until_ready(address: str, state: str = "ready") -> dict[str, str]:
    """What ``/health`` says when it first says this state."""
    deadline = time.monotonic() + _PATIENCE
    while True:
        answer: dict[str, str] = httpx2.get(f"{address}/health").json()
        if answer["status"] == state:
            return answer
        if time.monotonic() > deadline:
            raise RuntimeError(f"the server did not become {state}: {answer}")
        time.sleep(0.02)
