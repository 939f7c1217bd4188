"""Clients that hold a connection without ever coming to an end."""

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
from d2llm.server.settings import ServeSettings
from live_server import patient, serve, wait_until_ready
from running_server import Running, run
from tiny_app import tiny_app
from tiny_server import tiny_settings
from waiting import PATIENCE

SECONDS = 1_000.0  # by a clock that the tests set
BODY_SECONDS = 0.3  # by the true one
HEAD = b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 500\r\n\r\n"


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    yield from run(request_seconds=SECONDS)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with serve(tiny_app(ServeSettings(max_body_bytes=1_000, request_seconds=BODY_SECONDS))) as found:
        yield found


def connect(address: str) -> socket.socket:
    parts = urlsplit(address)
    return socket.create_connection((parts.hostname, parts.port), timeout=PATIENCE)


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
def test_a_body_that_does_not_end_is_answered_and_its_connection_closed(address: str, chunked: bool):
    head = HEAD % b"/v1/search"
    if chunked:
        head = head.replace(b"Content-Length: 500", b"Transfer-Encoding: chunked") + b"1f4\r\n"
    with connect(address) as connection:
        began = time.monotonic()
        connection.sendall(head)
        threading.Thread(target=drip, args=(connection, b'{"texts": ["' + b"x" * 400), daemon=True).start()
        heard = hear(connection)
        assert time.monotonic() - began >= BODY_SECONDS
    assert heard.startswith(b"HTTP/1.1 408 ")
    assert b"connection: close" in heard.lower()
    assert b'"kind":"timeout"' in heard
    assert b"request_seconds" in heard
    counted = patient.get(f"{address}/metrics").text
    assert 'd2llm_http_requests_total{method="POST",route="/v1/search",status="408"}' in counted


def test_one_that_ends_in_time_is_read(server: Running):
    body = b'{"texts":["x"]}'
    with server.connect() as connection:
        connection.sendall((HEAD % b"/v1/search").replace(b"500", str(len(body)).encode() + b"\r\nConnection: close"))
        drip(connection, body)
        assert hear(connection).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize(
    ("sent", "dripped"),
    [(b"", b""), (b"GET /health HTTP/1.1\r\n", b""), (b"", b"GET /health HTTP/1.1\r\nX-Long: " + b"x" * 400)],
    ids=["nothing", "half", "drop by drop"],
)
def test_headers_that_do_not_end_close_the_connection(server: Running, sent: bytes, dripped: bytes):
    with server.connect() as connection:
        connection.sendall(sent)
        threading.Thread(target=drip, args=(connection, dripped), daemon=True).start()
        server.later(0.9 * SECONDS)
        assert is_open(connection)
        server.later(0.2 * SECONDS)
        assert hear(connection) == b""


def test_a_body_that_nobody_reads_closes_the_connection(server: Running):
    head = (HEAD % b"/v1/search").replace(b"application/json", b"text/plain")  # refused by its headers
    with server.connect() as connection:
        connection.sendall(head)
        threading.Thread(target=drip, args=(connection, b"x" * 400), daemon=True).start()
        heard = connection.recv(65_536)
        server.later(0.9 * SECONDS)
        assert is_open(connection)
        server.later(0.2 * SECONDS)
        heard += hear(connection)
    assert heard.startswith(b"HTTP/1.1 415 ")


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


def test_an_answer_may_take_as_long_as_it_takes(server: Running):
    answers: list[str] = []
    asking = threading.Thread(target=lambda: answers.append(server.get("/held")))
    asking.start()
    assert server.line() == "began"
    server.later(3 * SECONDS)
    assert not answers
    server.get("/let-go")
    asking.join()
    assert answers == ['"done"']


def test_an_answer_that_is_not_taken_closes_the_connection(server: Running):
    with server.connect() as connection:
        connection.sendall(b"GET /large/30000000 HTTP/1.1\r\nHost: localhost\r\n\r\n")
        for _ in range(3):
            server.later(0.6 * SECONDS)
        assert len(hear(connection)) < 30_000_000
    assert server.in_flight() == 0


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
            while True:
                yield b" "
                time.sleep(0.05)

        answer = patient.post(address + path, content=pieces(), headers={"Content-Type": "application/json"})
        assert answer.status_code == 408
        assert answer.json().keys() == shape
        assert "0.2 s" in answer.text
