"""Limits of what a request has besides its body, before any key is checked."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator

import pytest

pytest.importorskip("fastapi", reason="needs the extra 'serve'")

from attacked_server import AttackedServer, attacked
from d2llm.server.running import MAX_BYTES
from running_server import Running, run

GET = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"
POST = b"POST /v1/search HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
MB = 1 << 20
LONGEST_WAIT = 5.0  # seconds on a busy machine; a header of 103 MB took 22 s on an idle one
MAX_GROWTH = 100 * MB


@pytest.fixture(scope="module")
def server() -> Iterator[AttackedServer]:
    with attacked() as running:
        yield running


@pytest.fixture(scope="module")
def small() -> Iterator[Running]:
    yield from run(request_seconds=60)


ATTACKS = {
    "one long header": (431, [GET, b"X-Long: ", *[b"x" * MB] * 103]),
    "a long name of a header": (431, [GET, *[b"x" * MB] * 50, b": 1\r\n\r\n"]),
    "many headers": (431, [GET, *[b"".join(b"X-%d: 1\r\n" % n for n in range(200_000))], b"\r\n"]),
    "many tiny headers": (431, [GET, b"a:\r\n" * 10_000, b"\r\n"]),
    "a folded header": (400, [GET, b"X-Long: a\r\n", *[b" b\r\n" * (MB // 4)] * 20]),
    "a long address": (414, [b"GET /health?", *[b"x" * MB] * 50, b" HTTP/1.1\r\n\r\n"]),
    "extensions of a chunk": (431, [CHUNKED, b"1;", *[b"x" * MB] * 200]),
    "extensions of many chunks": (431, [CHUNKED, *[b"1;x=" + b"x" * 1_000 + b"\r\n \r\n"] * 50_000]),
    "trailers": (431, [CHUNKED, b"1\r\n \r\n0\r\n", *[b"X-Long: " + b"x" * MB + b"\r\n"] * 50]),
    "many trailers": (431, [CHUNKED, b"1\r\n \r\n0\r\n", *[b"a: b\r\n" * 100_000] * 20]),
    "line ends before a request": (431, [b"\r\n" * MB] * 8),
    "no HTTP": (400, [b"\x16\x03\x01 hello\r\n\r\n"]),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_what_is_too_long_is_refused_by_the_http_layer(server: AttackedServer, name: str):
    status, pieces = ATTACKS[name]
    attack = server.under(lambda: server.send(*pieces))
    head, _, body = attack.answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status), attack.answer[:200]
    assert b"connection: close" in head.lower()
    assert json.loads(body)["error"]["kind"] == ("too_large" if status != 400 else "invalid_request")
    assert attack.longest_wait < LONGEST_WAIT
    assert attack.grown < MAX_GROWTH


def answer_of(server: Running, request: bytes) -> bytes:
    with server.connect() as connection:
        connection.sendall(request)
        received = b""
        with contextlib.suppress(ConnectionResetError):
            while part := connection.recv(65_536):
                received += part
        return received


def test_headers_within_the_limit_are_read(small: Running):
    head = GET + b"Connection: close\r\n"
    long = b"X-Long: " + b"x" * (MAX_BYTES - len(head) - 200) + b"\r\n\r\n"
    assert answer_of(small, head + long).startswith(b"HTTP/1.1 200 ")
    many = b"".join(b"X-%d: 1\r\n" % number for number in range(1_000))
    assert answer_of(small, head + many + b"\r\n").startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("size", [1, 7, 500])
def test_the_lengths_of_chunks_do_not_count(small: Running, size: int):
    body = b'{"texts": ["' + b"x" * 800 + b'"]}'
    head = POST.replace(b"Host", b"Connection: close\r\nHost") + b"Transfer-Encoding: chunked\r\n\r\n"
    parts = [body[start : start + size] for start in range(0, len(body), size)]
    chunks = b"".join(b"%08x\r\n%s\r\n" % (len(part), part) for part in parts)
    assert answer_of(small, head + chunks + b"0\r\n\r\n").startswith(b"HTTP/1.1 200 ")


def test_each_request_of_a_connection_has_its_own_limit(small: Running):
    request = GET + b"X-Long: " + b"x" * 30_000 + b"\r\n\r\n"
    last = request.replace(b"Host", b"Connection: close\r\nHost")
    assert answer_of(small, request * 20 + last).count(b"HTTP/1.1 200 ") == 21


def test_trailers_are_no_headers(small: Running):
    head = POST.replace(b"Host", b"Connection: close\r\nHost") + b"Transfer-Encoding: chunked\r\n\r\n"
    received = answer_of(small, head + b'd\r\n{"texts":[""]\r\n1\r\n}\r\n0\r\nX-Request-ID: from-a-trailer\r\n\r\n')
    assert b"from-a-trailer" not in received


def test_nothing_is_said_within_the_answer_to_an_earlier_request(small: Running):
    request = GET.replace(b"/health", b"/slow/1") + b"\r\n"
    received = answer_of(small, request + GET + b"X-Long: " + b"x" * (2 * MAX_BYTES))
    assert received[:13] in (b"", b"HTTP/1.1 200 ")
    assert b" 431 " not in received


@pytest.mark.parametrize("zeros", [5_000, 60_000])
@pytest.mark.parametrize("length", ["", "15", "99999999999999999"])
def test_zeros_before_a_length_do_not_count(small: Running, zeros: int, length: str):
    head = POST.replace(b"Host", b"Connection: close\r\nHost")
    head += b"Content-Length: " + b"0" * zeros + length.encode() + b"\r\n\r\n"
    received = answer_of(small, head + (b'{"texts": ["x"]}'[:15] if length == "15" else b""))
    assert received.split()[1] in {"": [b"422", b"415"], "15": [b"422", b"400"]}.get(length, [b"413"])


def test_the_answer_to_head_ends_after_its_headers(small: Running):
    head = b"HEAD /health HTTP/1.1\r\nHost: localhost\r\n"
    received = answer_of(small, head + b"\r\n" + head + b"Connection: close\r\n\r\n")
    assert received.count(b"HTTP/1.1 200 ") == 2
    assert received.endswith(b"\r\n\r\n")
    assert b"content-length: 18\r\n" in received.lower()
