"""A server as a process: its port, its signals, its end."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

pytest.importorskip("fastapi", reason="needs the extra 'serve'")

from d2llm.apps.server.running import listen, url_of
from d2llm.core.errors import InputError

PROGRAM = """
import asyncio, sys
from types import SimpleNamespace
from d2llm.apps.server.logs import start_logs
from d2llm.apps.server.running import listen, run_app, url_of
from d2llm.apps.server.settings import ServeSettings
from d2llm.core.errors import D2LLMError, InputError
from tiny_app import tiny_app

settings = ServeSettings(shutdown_seconds={shutdown_seconds}, max_body_bytes=1000)
app = tiny_app(settings)

@app.get("/slow/{{seconds}}")
async def slow(seconds: float):
    print("began", flush=True)
    await asyncio.sleep(seconds)
    return "done"

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

    def __init__(self, *, state: str = "ready", shutdown_seconds: float = 10) -> None:
        here = Path(__file__).parents[1]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here), *sys.path])}
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM.format(state=state, shutdown_seconds=shutdown_seconds)],
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


@pytest.fixture
def running() -> Iterator[Running]:
    """One that a test may end."""
    yield from run()


@pytest.fixture(scope="module")
def shared() -> Iterator[Running]:
    """One that goes on."""
    yield from run()


def run() -> Iterator[Running]:
    server = Running()
    assert server.line() == "ready"
    yield server
    server.process.kill()
    server.process.communicate()


# The port


def test_port_0_takes_a_free_port_that_is_told(shared: Running):
    assert shared.port > 0
    assert shared.get("/health") == '{"status":"ready"}'


def test_a_port_in_use_is_an_error_that_says_what_to_do():
    with listen("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=rf"port {port} of 127\.0\.0\.1 is in use; .*--port"):
            listen("127.0.0.1", port)


@pytest.mark.parametrize(
    ("host", "message"),
    [("no-such-host.invalid", "is not known"), ("192.0.2.1", "is no address of this machine")],
)
def test_a_host_that_is_not_here_is_an_error(host: str, message: str):
    with pytest.raises(InputError, match=message):
        listen(host, 0)


def test_addresses_are_written_as_urls():
    with listen("127.0.0.1", 0) as bound:
        assert url_of(bound) == f"http://127.0.0.1:{bound.getsockname()[1]}"
    try:
        bound = listen("::1", 0)
    except InputError:
        pytest.skip("needs IPv6")
    with bound:
        assert url_of(bound) == f"http://[::1]:{bound.getsockname()[1]}"


# Ready, or not


def test_it_says_that_it_is_ready_only_when_it_is():
    server = Running(state="starting")
    assert server.get_when_listening("/health")  # it listens, but has not said so
    server.get("/become/ready")
    assert server.line() == "ready"
    server.process.terminate()
    assert server.end()[0] == 0


def test_one_that_never_becomes_ready_ends_with_the_reason():
    server = Running(state="starting")
    server.get_when_listening("/become/broken")
    status, out, errors = server.end()
    assert (status, out) == (1, "")  # never "ready"
    assert errors.splitlines()[-1] == "the student is not there"


# Its end


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_when_what_it_accepted_is_answered(running: Running, number: int):
    answers: list[str] = []
    asking = threading.Thread(target=lambda: answers.append(running.get("/slow/1")))
    asking.start()
    assert running.line() == "began"
    running.process.send_signal(number)
    asking.join()
    status, out, _ = running.end()
    assert answers == ['"done"']
    assert (status, out) == (0, "ended\n")
    with pytest.raises(ConnectionRefusedError):
        running.get("/health")


def test_what_takes_too_long_is_cut_off():
    server = Running(shutdown_seconds=1)
    assert server.line() == "ready"
    connection = http.client.HTTPConnection(server.host, server.port, timeout=30)
    connection.request("GET", "/slow/20")
    assert server.line() == "began"
    began = time.monotonic()
    server.process.terminate()
    assert server.end()[0] == 0
    assert time.monotonic() - began < 10


def test_sighup_reloads_and_an_error_there_is_only_logged(running: Running):
    for _ in range(2):
        running.process.send_signal(signal.SIGHUP)
        assert running.line() == "reloaded"
    assert running.get("/health")
    running.process.terminate()
    status, _, errors = running.end()
    assert status == 0
    assert errors.count("SIGHUP: the new version is broken") == 2


# What only a real connection shows


def exchange(server: Running, request: bytes, *more: bytes) -> bytes:
    with socket.create_connection((server.host, server.port), timeout=10) as connection:
        connection.sendall(request)
        for part in more:
            try:
                connection.sendall(part)
            except (BrokenPipeError, ConnectionResetError):  # it has answered and closed
                break
        answer = b""
        try:
            while part := connection.recv(65_536):
                answer += part
        except ConnectionResetError:
            pass
        return answer


HEAD = b"POST /v1/search HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"


def test_an_endless_body_is_refused_at_the_limit(shared: Running):
    chunk = b"190\r\n" + b"x" * 400 + b"\r\n"
    answer = exchange(shared, HEAD + b"Transfer-Encoding: chunked\r\n\r\n", chunk, chunk, chunk)  # and no end
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b'"kind":"too_large"' in answer


def test_a_declared_length_is_refused_before_the_body_comes(shared: Running):
    answer = exchange(shared, HEAD + b"Content-Length: 1000000000000\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"connection: close" in answer.lower()


def test_the_server_does_not_say_what_it_runs_on(shared: Running):
    answer = exchange(shared, b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert b"\r\nserver:" not in answer.lower()


def test_no_host_at_all_is_refused(shared: Running):
    assert exchange(shared, b"GET /v1/passages/a HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 400 ")


def test_a_client_that_leaves_is_logged_as_that(running: Running):
    with socket.create_connection((running.host, running.port), timeout=10) as connection:
        connection.sendall(HEAD + b"Content-Length: 900\r\n\r\n{")
        time.sleep(0.3)
    time.sleep(0.3)
    assert running.get("/health")
    running.process.terminate()
    errors = running.end()[2]
    assert "Traceback" not in errors
    assert "status=499" in next(line for line in errors.splitlines() if "route=/v1/search" in line)
