"""Clients that hold a connection without ever coming to an end."""

from __future__ import annotations

import http.client
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

pytest.importorskip("fastapi", reason="needs the extra 'serve'")

from d2llm.apps.server.app import make_app
from live_server import serve, wait_until_ready
from running_server import Running, run
from tiny_server import tiny_settings

SECONDS = 1.0
HEAD = b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 500\r\n\r\n"


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    yield from run(request_seconds=SECONDS)


def drip(connection: socket.socket, data: bytes) -> None:
    """Send byte by byte, until the other side has had enough."""
    for at in range(len(data)):
        try:
            connection.sendall(data[at : at + 1])
        except OSError:
            return
        time.sleep(0.1)


def hear(connection: socket.socket) -> bytes:
    """All that comes until the connection is closed."""
    heard = b""
    try:
        while part := connection.recv(65_536):
            heard += part
    except ConnectionResetError:
        pass
    return heard


def seconds_until_closed(server: Running, sent: bytes, dripped: bytes = b"") -> tuple[float, bytes]:
    with server.connect() as connection:
        connection.sendall(sent)
        began = time.monotonic()
        threading.Thread(target=drip, args=(connection, dripped), daemon=True).start()
        heard = hear(connection)
        return time.monotonic() - began, heard


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_does_not_end_is_answered_and_its_connection_closed(server: Running, chunked: bool):
    head = HEAD % b"/v1/search"
    if chunked:
        head = head.replace(b"Content-Length: 500", b"Transfer-Encoding: chunked") + b"1f4\r\n"
    seconds, heard = seconds_until_closed(server, head, b'{"texts": ["' + b"x" * 400)
    assert SECONDS <= seconds < SECONDS + 2
    assert heard.startswith(b"HTTP/1.1 408 ")
    assert b"connection: close" in heard.lower()
    assert b'"kind":"timeout"' in heard
    assert b"request_seconds" in heard
    counted = server.get("/metrics")
    assert 'd2llm_http_requests_total{method="POST",route="/v1/search",status="408"}' in counted


def test_one_that_ends_in_time_is_read(server: Running):
    body = b'{"texts":["x"]}'
    with server.connect() as connection:
        connection.sendall((HEAD % b"/v1/search").replace(b"500", str(len(body)).encode() + b"\r\nConnection: close"))
        for at in range(len(body)):
            connection.sendall(body[at : at + 1])
            time.sleep(0.6 * SECONDS / len(body))
        assert hear(connection).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize(
    ("sent", "dripped"),
    [(b"", b""), (b"GET /health HTTP/1.1\r\n", b""), (b"", b"GET /health HTTP/1.1\r\nX-Long: " + b"x" * 400)],
    ids=["nothing", "half", "drop by drop"],
)
def test_headers_that_do_not_end_close_the_connection(server: Running, sent: bytes, dripped: bytes):
    seconds, heard = seconds_until_closed(server, sent, dripped)
    assert heard == b""
    assert SECONDS <= seconds < SECONDS + 2


def test_a_body_that_nobody_reads_closes_the_connection(server: Running):
    head = (HEAD % b"/v1/search").replace(b"application/json", b"text/plain")  # refused by its headers
    seconds, heard = seconds_until_closed(server, head, b"x" * 400)
    assert heard.startswith(b"HTTP/1.1 415 ")
    assert SECONDS <= seconds < SECONDS + 2


def test_a_connection_in_use_stays_open(server: Running):
    connection = http.client.HTTPConnection(server.host, server.port, timeout=20)
    connection.connect()
    sock = connection.sock
    for _ in range(6):
        connection.request("GET", "/health")
        assert connection.getresponse().read() == b'{"status":"ready"}'
        assert connection.sock is sock
        time.sleep(0.5 * SECONDS)
    connection.close()


def test_an_answer_may_take_as_long_as_it_takes(server: Running):
    assert server.get(f"/slow/{2 * SECONDS}") == '"done"'


def test_an_answer_that_is_not_taken_closes_the_connection(server: Running):
    with server.connect() as connection:
        connection.sendall(b"GET /large/30000000 HTTP/1.1\r\nHost: localhost\r\n\r\n")
        time.sleep(3 * SECONDS)
        assert len(hear(connection)) < 30_000_000
    assert "d2llm_http_requests_in_flight 1.0" in server.get("/metrics")  # this one


@pytest.mark.parametrize(
    ("path", "shape"),
    [
        ("/v1/encode", {"error"}),
        ("/v1/embeddings", {"error"}),
        ("/v2/rerank", {"id", "message"}),
        ("/v1/rerank", {"detail"}),
        ("/embed", {"error", "error_type"}),
        ("/v1/score", {"error"}),
    ],
)
def test_each_interface_says_it_in_its_own_words(tmp_path: Path, path: str, shape: set[str]):
    with serve(make_app(tiny_settings(tmp_path / "nothing", request_seconds=0.2))) as address:
        wait_until_ready(address, "broken")

        def pieces() -> Iterator[bytes]:
            for _ in range(20):
                yield b" "
                time.sleep(0.1)

        answer = httpx2.post(address + path, content=pieces(), headers={"Content-Type": "application/json"})
        assert answer.status_code == 408
        assert answer.json().keys() == shape
        assert "0.2 s" in answer.text
