"""A server in its own process under attack: how long others wait meanwhile, and how much memory it takes."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import Any
from urllib.parse import urlsplit

from tiny_server import write_tiny_index
from waiting import PATIENCE, until

JSON = {"Content-Type": "application/json"}


@dataclass(frozen=True)
class Answer:
    """What a client got. ``body`` is the parsed JSON, or the bytes if they are none."""

    status: int
    body: Any
    seconds: float


@dataclass(frozen=True)
class Attack:
    """What an attack did: its answer, the longest wait of another client, and the bytes that the process grew by."""

    answer: Any
    longest_wait: float
    grown: int


class AttackedServer:
    """``d2llm serve`` with a tiny index, perhaps with others, in its own process."""

    def __init__(self, index: Path, *others: Path, **settings: Any) -> None:
        self.index = index
        options = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
        always = ("--port", "0", "--dtype", "float32")
        self._errors = TemporaryFile("w+")  # noqa: SIM115 - not a pipe, which would fill up and block the server
        self.process = subprocess.Popen(
            [sys.executable, "-m", "d2llm", "serve", *map(str, (index, *others)), *always, *options],
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "COLUMNS": "200"},
        )
        assert self.process.stdout is not None
        line = until(self.process.stdout.readline, "the server's address")
        address = urlsplit(next(word for word in line.split() if word.startswith("http")).rstrip(",."))
        self.host, self.port = address.hostname or "", address.port or 0
        assert until(lambda: self.get("/health").status == 200, "a server that is ready")

    def request(self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] = JSON) -> Answer:
        began = time.perf_counter()
        connection = http.client.HTTPConnection(self.host, self.port, timeout=PATIENCE)
        try:
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            content = response.read()
        finally:
            connection.close()
        with contextlib.suppress(ValueError):
            return Answer(response.status, json.loads(content), time.perf_counter() - began)
        return Answer(response.status, content, time.perf_counter() - began)

    def get(self, path: str) -> Answer:
        return self.request("GET", path)

    def post(self, path: str, body: Any) -> Answer:
        return self.request("POST", path, body if isinstance(body, bytes) else json.dumps(body).encode())

    def connect(self) -> socket.socket:
        return socket.create_connection((self.host, self.port), timeout=PATIENCE)

    def send(self, *pieces: bytes) -> bytes:
        """The start of the answer to raw bytes, which may never have been read to their end."""
        with self.connect() as connection:
            with contextlib.suppress(ConnectionError):
                for piece in pieces:
                    connection.sendall(piece)
            with contextlib.suppress(ConnectionError):
                return connection.recv(65_536)
        return b""

    def peak_bytes(self) -> int:
        """The most memory that the process has had."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) << 10

    def under(self, attack: Callable[[], Any], ask: Callable[[], Any] | None = None) -> Attack:
        """Run an attack while another client asks again and again, by default for a search."""
        ask = ask or (lambda: self.post("/v1/search", {"query": "the cat by the sea"}))
        ask()
        waits: list[float] = []
        is_over = threading.Event()

        def look() -> None:
            while not is_over.is_set():
                began = time.perf_counter()
                ask()
                waits.append(time.perf_counter() - began)
                time.sleep(0.01)

        other = threading.Thread(target=look)
        before = self.peak_bytes()
        other.start()
        try:
            answer = attack()
        finally:
            is_over.set()
            other.join()
        return Attack(answer, max(waits), self.peak_bytes() - before)

    def stop(self) -> tuple[int, float, str]:
        """Send SIGTERM: its exit status, the seconds until the end, and what it wrote on standard error."""
        began = time.perf_counter()
        self.process.send_signal(signal.SIGTERM)
        status = self.process.wait(PATIENCE)
        seconds = time.perf_counter() - began
        self._errors.seek(0)
        return status, seconds, self._errors.read()

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()
        self._errors.close()


@contextlib.contextmanager
def attacked(**settings: Any) -> Iterator[AttackedServer]:
    """A server that is ready; it is ended afterwards."""
    with TemporaryDirectory() as folder:
        server = AttackedServer(write_tiny_index(Path(folder)), **settings)
        try:
            yield server
        finally:
            server.close()
