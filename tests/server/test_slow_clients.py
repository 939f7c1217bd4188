"""Clients that keep a connection open without ever finishing their request."""

from __future__ import annotations

import http.client
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

pytest.importorskip("fastapi", reason="needs the extra 'serve'")

from d2llm.server.app import make_app
from d2llm.server.running import Lifecycle
from d2llm.server.settings import ServeSettings
from live_server import patient, serve, wait_until_ready
from running_server import Running, run
from tiny_app import tiny_app
from tiny_server import tiny_settings
from waiting import PATIENCE

SECONDS = 1_000.0  # on a clock that the tests advance
BODY_SECONDS = 0.3  # real time
HEAD = b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 500\r\n\r\n"


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    yield from run(request_seconds=SECONDS)


@pytest.fixture(scope="module", params=["ready", "starting"])
def address(request: pytest.FixtureRequest) -> Iterator[str]:
    lifecycle = Lifecycle()
    lifecycle.state = request.param
    with serve(tiny_app(ServeSettings(max_body_bytes=1_000, request_seconds=BODY_SECONDS), lifecycle)) as url:
        yield url


def connect(address: str) -> socket.socket:
    parts = urlsplit(address)
    return socket.create_connection((parts.hostname, parts.port), timeout=PATIENCE)


def drip(connection: socket.socket, data: bytes) -> None:
    """Send byte by byte until the other side closes the connection."""
    for at in range(len(data)):
        try:
            connection.sendall(data[at : at + 1])
        except OSError:
            return
        time.sleep(0.1)


def receive_all(connection: socket.socket) -> bytes:
    """Receive until the connection is closed."""
    received = b""
    try:
        while part := connection.recv(65_536):
            received += part
    except ConnectionResetError:
        pass
    return received


def is_open(connection: socket.socket) -> bool:
    connection.setblocking(False)
    try:
        return connection.recv(1, socket.MSG_PEEK) != b""
    except BlockingIOError:
        return True
    except ConnectionResetError:
        return False
    finally:
        connection.settimeout(PATIENCE)


@pytest.mark.parametrize("chunked", [False, True])
def test_an_unfinished_body_times_out_and_is_disconnected(address: str, chunked: bool):
    head = HEAD % b"/v1/search"
    if chunked:
        head = head.replace(b"Content-Length: 500", b"Transfer-Encoding: chunked") + b"1f4\r\n"
    with connect(address) as connection:
        began = time.monotonic()
        connection.sendall(head)
        threading.Thread(target=drip, args=(connection, b'{"texts": ["' + b"x" * 400), daemon=True).start()
        received = receive_all(connection)
        assert time.monotonic() - began >= BODY_SECONDS
    assert received.startswith(b"HTTP/1.1 408 ")
    assert b"connection: close" in received.lower()
    assert b'"kind":"timeout"' in received
    assert b"request_seconds" in received
    metrics = patient.get(f"{address}/metrics").text
    assert 'method="POST",route="/v1/search",status="408"' in metrics


def test_a_slow_body_that_finishes_in_time_is_accepted(server: Running):
    body = b'{"texts":["x"]}'
    with server.connect() as connection:
        connection.sendall((HEAD % b"/v1/search").replace(b"500", str(len(body)).encode() + b"\r\nConnection: close"))
        drip(connection, body)
        assert receive_all(connection).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize(
    ("first_bytes", "slow_bytes"),
    [(b"", b""), (b"GET /health HTTP/1.1\r\n", b""), (b"", b"GET /health HTTP/1.1\r\nX-Long: " + b"x" * 400)],
    ids=["nothing", "half", "drop by drop"],
)
def test_unfinished_headers_close_the_connection(server: Running, first_bytes: bytes, slow_bytes: bytes):
    with server.connect() as connection:
        connection.sendall(first_bytes)
        threading.Thread(target=drip, args=(connection, slow_bytes), daemon=True).start()
        server.later(0.9 * SECONDS)
        assert is_open(connection)
        server.later(0.2 * SECONDS)
        assert receive_all(connection) == b""


def test_an_unread_body_closes_the_connection(server: Running):
    head = (HEAD % b"/v1/search").replace(b"application/json", b"text/plain")  # refused because of its content type
    with server.connect() as connection:
        connection.sendall(head)
        threading.Thread(target=drip, args=(connection, b"x" * 400), daemon=True).start()
        received = connection.recv(65_536)
        server.later(0.9 * SECONDS)
        assert is_open(connection)
        server.later(0.2 * SECONDS)
        received += receive_all(connection)
    assert received.startswith(b"HTTP/1.1 415 ")


def test_a_connection_in_use_stays_open(server: Running):
    connection = http.client.HTTPConnection(server.host, server.port, timeout=PATIENCE)
    connection.connect()
    sock = connection.sock
    for _ in range(4):
        connection.request("GET", "/health")
        assert connection.getresponse().read() == b'{"status":"ready"}'
        assert connection.sock is sock
        server.later(0.6 * SECONDS)
    assert is_open(sock)
    connection.close()


def test_a_response_has_no_time_limit(server: Running):
    responses: list[str] = []
    thread = threading.Thread(target=lambda: responses.append(server.get("/held")))
    thread.start()
    assert server.line() == "began"
    server.later(3 * SECONDS)
    assert not responses
    server.get("/let-go")
    thread.join()
    assert responses == ['"done"']


def test_a_response_that_is_not_read_closes_the_connection(server: Running):
    with server.connect() as connection:
        connection.sendall(b"GET /large/30000000 HTTP/1.1\r\nHost: localhost\r\n\r\n")
        for _ in range(3):
            server.later(0.6 * SECONDS)
        assert len(receive_all(connection)) < 30_000_000
    assert server.in_flight() == 0


@pytest.mark.parametrize(
    ("path", "shape"),
    [
        ("/v1/encode", {"error"}),
        ("/v1/embeddings", {"error", "detail"}),
        ("/v2/rerank", {"id", "message"}),
        ("/v1/rerank", {"detail"}),
        ("/embed", {"error", "error_type"}),
        ("/v1/score", {"error"}),
    ],
)
def test_each_api_reports_the_timeout_in_its_own_format(tmp_path: Path, path: str, shape: set[str]):
    with serve(make_app(tiny_settings(tmp_path / "nothing", request_seconds=0.2))) as address:
        wait_until_ready(address, "broken")

        def pieces() -> Iterator[bytes]:
            while True:
                yield b" "
                time.sleep(0.05)

        response = patient.post(address + path, content=pieces(), headers={"Content-Type": "application/json"})
        assert response.status_code == 408
        assert response.json().keys() == shape
        assert "0.2 s" in response.text
