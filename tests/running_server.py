"""A server in its own process, for an application that consists only of middleware."""

from __future__ import annotations

import http.client
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryFile
from urllib.parse import urlsplit

from waiting import PATIENCE, until

PROGRAM = """
import asyncio, sys, time
from types import SimpleNamespace
from fastapi import Response
from d2llm.server import running
from d2llm.server.logs import start_logs
from d2llm.server.running import listen, run_app, url_of
from d2llm.server.settings import ServeSettings
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

@app.get("/held")
async def held():
    print("began", flush=True)
    while not clock.may_end:
        await asyncio.sleep(0.01)
    return "done"

@app.get("/signalled")
async def signalled():
    print("began", flush=True)
    while state.stop_by is None:
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.2)
    return "done"

@app.get("/stuck")
async def stuck():
    print("began", flush=True)
    await asyncio.to_thread(time.sleep, 10_000)

@app.get("/let-go")
async def let_go():
    clock.may_end = True

clock = SimpleNamespace(ahead=0.0, looks=0, may_end=False)
running.time = SimpleNamespace(monotonic=lambda: time.monotonic() + clock.ahead)
running._TICKS_PER_CHECK = 1
look = running._Server._close_stuck

def counted(server, now):
    clock.looks += 1
    look(server, now)

running._Server._close_stuck = counted

@app.get("/later/{{seconds}}")
async def later(seconds: float):
    looks = clock.looks
    while clock.looks < looks + 2:
        await asyncio.sleep(0.01)
    clock.ahead += seconds
    looks = clock.looks
    while clock.looks < looks + 2:
        await asyncio.sleep(0.01)

async def reload():
    print("reloaded", flush=True)
    raise InputError("the new version is broken")

state = SimpleNamespace(state="starting", message="", stop_by=None)

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
    """A server process and its output."""

    def __init__(self, *, state: str = "ready", **settings: float) -> None:
        here = Path(__file__).parent
        self._errors = TemporaryFile("w+")  # noqa: SIM115 - not a pipe, which would fill up and block the server
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here), *sys.path])}
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM.format(state=state, settings={"shutdown_seconds": 10, **settings})],
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=environment,
        )
        address = urlsplit(self.line())
        self.host, self.port = address.hostname or "", address.port or 0

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def get(self, path: str) -> str:
        connection = http.client.HTTPConnection(self.host, self.port, timeout=PATIENCE)
        connection.request("GET", path)
        response = connection.getresponse()
        assert response.status == 200
        return response.read().decode()

    def get_when_listening(self, path: str) -> str:
        def ask() -> str:
            try:
                return self.get(path)
            except ConnectionRefusedError:
                return ""

        return until(ask, "a server that listens")

    def end(self) -> tuple[int, str, str]:
        output, _ = self.process.communicate(timeout=PATIENCE)
        self._errors.seek(0)
        return self.process.returncode, output, self._errors.read()

    def later(self, seconds: float) -> None:
        """Advance the clock by which the server closes idle connections; it checks them before and after."""
        self.get(f"/later/{seconds}")

    def in_flight(self) -> int:
        """The number of requests in flight, without this one."""
        (line,) = [
            line for line in self.get("/metrics").splitlines() if line.startswith("d2llm_http_requests_in_flight ")
        ]
        return int(float(line.split()[1])) - 1

    def connect(self) -> socket.socket:
        return socket.create_connection((self.host, self.port), timeout=PATIENCE)


def run(**settings: float) -> Iterator[Running]:
    """A server that is ready; it is stopped after the test."""
    server = Running(**settings)
    assert server.line() == "ready"
    yield server
    server.process.kill()
    server.process.communicate()
