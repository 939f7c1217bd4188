"""A server as a process of its own, over an application that is all middleware."""

from __future__ import annotations

import http.client
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

PROGRAM = """
import asyncio, sys
from types import SimpleNamespace
from fastapi import Response
from d2llm.apps.server.logs import start_logs
from d2llm.apps.server.running import listen, run_app, url_of
from d2llm.apps.server.settings import ServeSettings
from d2llm.core.errors import D2LLMError, InputError
from tiny_app import tiny_app

settings = ServeSettings(max_body_bytes=1000, **{settings})
app = tiny_app(settings)

@app.get("/slow/{{seconds}}")
async def slow(seconds: float):
    print("began", flush=True)
    await asyncio.sleep(seconds)
    return "done"

@app.get("/large/{{num_bytes}}")
async def large(num_bytes: int):
    return Response(b"x" * num_bytes)

async def reload():
    print("reloaded", flush=True)
    raise InputError("the new version is broken")

state = SimpleNamespace(state="starting", message="")

@app.get("/become/{{name}}")
async def become(name: str):
    state.state, state.message = name, "the student is not there"

bound = listen("127.0.0.1", 0)
start_logs(settings)
print(url_of(bound), flush=True)
state.state = "{state}"
try:
    run_app(app, settings, bound, state, on_ready=lambda: print("ready", flush=True), on_hangup=reload)
except D2LLMError as error:
    sys.exit(str(error))
print("ended", flush=True)
"""


class Running:
    """A program with a server, and what it prints."""

    def __init__(self, *, state: str = "ready", **settings: float) -> None:
        here = Path(__file__).parent
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here), *sys.path])}
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM.format(state=state, settings={"shutdown_seconds": 10, **settings})],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        address = urlsplit(self.line())
        self.host, self.port = address.hostname or "", address.port or 0

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def get(self, path: str) -> str:
        connection = http.client.HTTPConnection(self.host, self.port, timeout=30)
        connection.request("GET", path)
        answer = connection.getresponse()
        assert answer.status == 200
        return answer.read().decode()

    def get_when_listening(self, path: str) -> str:
        for _ in range(200):
            try:
                return self.get(path)
            except ConnectionRefusedError:
                time.sleep(0.05)
        return self.get(path)

    def end(self) -> tuple[int, str, str]:
        out, errors = self.process.communicate(timeout=30)
        return self.process.returncode, out, errors

    def connect(self) -> socket.socket:
        return socket.create_connection((self.host, self.port), timeout=20)


def run(**settings: float) -> Iterator[Running]:
    """One that is ready; it ends with the test."""
    server = Running(**settings)
    assert server.line() == "ready"
    yield server
    server.process.kill()
    server.process.communicate()
