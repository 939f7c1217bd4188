"""Request ids, response headers, host checks and request bodies, tested over HTTP."""

from __future__ import annotations

import asyncio
import json
import tracemalloc
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="needs the extra 'serve'")

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from d2llm.core.errors import DamagedFileError
from d2llm.server.middleware import SECURITY_HEADERS, BodyMiddleware, CancelWhenGone
from tiny_app import app_of, tiny_client

SEARCH = {"texts": ["q"]}


# Request ids and headers


@pytest.mark.parametrize("request_id", ["abc-1.2_3", "x" * 128])
def test_valid_request_ids_are_kept(request_id: str):
    assert tiny_client().get("/health", headers={"X-Request-ID": request_id}).headers["X-Request-ID"] == request_id


@pytest.mark.parametrize("request_id", ["", "x" * 129, "two words", "{}", "a\tb", "é"])
def test_invalid_request_ids_are_replaced(request_id: str):
    headers = {"X-Request-ID": request_id.encode("latin-1")}
    replacement = tiny_client().get("/health", headers=headers).headers["X-Request-ID"]  # pyright: ignore[reportArgumentType]
    assert len(replacement) == 32
    assert int(replacement, 16)


def test_request_ids_are_unique():
    client = tiny_client()
    assert len({client.get("/health").headers["X-Request-ID"] for _ in range(5)}) == 5


@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/health"), ("GET", "/none"), ("DELETE", "/health"), ("POST", "/v1/fail")]
)
def test_every_response_has_the_common_headers(method: str, path: str):
    response = tiny_client().request(method, path, json=SEARCH)
    assert {name: response.headers[name] for name in SECURITY_HEADERS} == dict(SECURITY_HEADERS)
    assert response.headers["Server-Timing"].startswith("total;dur=")
    assert response.headers["X-Request-ID"]


def test_internal_errors_do_not_reveal_their_cause():
    response = tiny_client().post("/v1/fail", json={"texts": ["my secret"]})
    assert response.status_code == 500
    assert response.json()["error"]["kind"] == "internal"
    assert "secret" not in response.text
    assert response.json()["error"]["request_id"] == response.headers["X-Request-ID"]


# Hosts


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.1:8000", "localhost:9", "LOCALHOST", "[::1]:8000", "[::1]"])
def test_loopback_hosts_are_allowed(host: str):
    assert tiny_client().post("/v1/search", json=SEARCH, headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil.example", "", ":8000"]
)
def test_other_hosts_are_refused(host: str):
    response = tiny_client().post("/v1/search", json=SEARCH, headers={"Host": host})
    assert response.status_code == 400
    assert "allowed_hosts" in response.json()["error"]["message"]


def test_two_host_headers_are_refused():
    headers = [("Host", "localhost"), ("Host", "evil.example")]
    assert tiny_client().get("/v1/passages/a", headers=headers).status_code == 400


def test_allowed_hosts_may_be_patterns():
    client = tiny_client(allowed_hosts=("*.example.org",))
    statuses = {
        host: client.get("/v1/passages/a", headers={"Host": host}).status_code
        for host in ("a.example.org", "example.org", "aexample.org", "127.0.0.1")
    }
    assert statuses == {"a.example.org": 200, "example.org": 400, "aexample.org": 400, "127.0.0.1": 200}
    assert tiny_client(allowed_hosts=("*",)).get("/v1/passages/a", headers={"Host": "any"}).status_code == 200


def test_health_is_served_for_any_host():
    assert tiny_client().get("/health", headers={"Host": "10.1.2.3:8000"}).status_code == 200


# Origins


OWN = {"Host": "127.0.0.1:8000", "Origin": "http://127.0.0.1:8000"}
OTHER = {"Origin": "https://evil.example"}


@pytest.mark.parametrize(
    "headers",
    [
        {},
        OWN,
        {"Host": "127.0.0.1", "Origin": "https://search.example:8443", "Sec-Fetch-Site": "same-origin"},
        {"Sec-Fetch-Site": "none"},
        {"Host": "LOCALHOST", "Origin": "http://localhost"},
        {"Host": "localhost:443", "Origin": "https://localhost"},
    ],
)
def test_programs_and_the_servers_own_page_may_write(headers: dict[str, str]):
    assert tiny_client().post("/v1/index/reload", headers=headers).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        OTHER,
        OWN | OTHER,
        OWN | {"Origin": "http://127.0.0.1:3000"},
        OWN | {"Origin": "http://127.0.0.1"},
        OWN | {"Origin": "null"},
        OWN | {"Origin": ""},
        {"Host": "localhost", "Origin": "localhost"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
)
def test_pages_of_other_origins_may_not_write(headers: dict[str, str]):
    client = tiny_client()
    for method, path in (("POST", "/v1/index/reload"), ("POST", "/v1/search"), ("DELETE", "/v1/passages/a")):
        response = client.request(method, path, headers=headers)
        assert response.status_code == 403
        assert response.json()["error"]["kind"] == "forbidden"
        assert "cors_origins" in response.json()["error"]["message"]
    assert client.get("/v1/passages/a", headers=headers).status_code == 200


def test_a_form_of_another_site_uploads_nothing():
    files = {"file": ("a.txt", b"text")}
    assert tiny_client().post("/v1/files", files=files, headers=OTHER).status_code == 403
    assert tiny_client().post("/v1/files", files=files).status_code == 404  # there is no such route, but it is let in


def test_origins_with_cors_may_write():
    headers = OTHER | {"Sec-Fetch-Site": "cross-site"}
    for allowed in ("https://evil.example", "*"):
        assert tiny_client(cors_origins=(allowed,)).post("/v1/index/reload", headers=headers).status_code == 200
    one = tiny_client(cors_origins=("https://app.example",))
    assert one.post("/v1/index/reload", headers=headers).status_code == 403
    assert one.post("/v1/index/reload", headers={"Sec-Fetch-Site": "cross-site"}).status_code == 403


# Bodies


def body_of(num_bytes: int) -> bytes:
    empty = json.dumps({"texts": [""]})
    return empty.replace('""', '"' + "x" * (num_bytes - len(empty)) + '"').encode()


@pytest.mark.parametrize("chunked", [False, True])
def test_bodies_up_to_the_limit_are_accepted(chunked: bool):
    client = tiny_client(max_body_bytes=1_000)
    for num_bytes, status in ((1_000, 200), (1_001, 413), (100_000, 413)):
        body = body_of(num_bytes)
        assert len(body) == num_bytes
        content = iter([body[at : at + 100] for at in range(0, len(body), 100)]) if chunked else body
        response = client.post("/v1/search", content=content, headers={"Content-Type": "application/json"})
        assert response.status_code == status
        if status == 413:
            assert response.json()["error"]["kind"] == "too_large"
            assert "1,000 bytes" in response.json()["error"]["message"]


def test_a_chunked_body_arrives_whole():
    client = tiny_client()
    body = json.dumps({"texts": ["a", "b", "c"]}).encode()

    def pieces() -> Iterator[bytes]:
        for at in range(len(body)):
            yield body[at : at + 1]

    response = client.post("/v1/search", content=pieces(), headers={"Content-Type": "application/json"})
    assert response.json() == {"num_texts": 3}


@pytest.mark.parametrize("kind", ["application/json", "application/json; charset=utf-8", "Application/JSON"])
def test_json_content_types_are_accepted(kind: str):
    response = tiny_client().post("/v1/search", content=b'{"texts": []}', headers={"Content-Type": kind})
    assert response.status_code == 200


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "application/jsonp", ""]
)
def test_form_content_types_are_refused(kind: str):
    headers = {"Content-Type": kind} if kind else {}
    response = tiny_client().post("/v1/search", content=b'{"texts": []}', headers=headers)
    assert response.status_code == 415
    assert response.json()["error"]["kind"] == "unsupported_media_type"
    assert "application/json" in response.json()["error"]["message"]


def test_an_empty_form_is_refused_but_no_body_is_accepted():
    client = tiny_client()
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    assert client.post("/v1/index/reload", headers=form).status_code == 415
    assert client.post("/v1/index/reload").status_code == 200


def test_a_compressed_body_is_refused():
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    response = tiny_client().post("/v1/search", content=b"...", headers=headers)
    assert response.status_code == 415
    assert response.headers["Accept-Encoding"] == "identity"


def test_many_small_chunks_take_little_memory():
    number = 100_000
    bodies: list[bytes] = []

    async def receive() -> Message:
        nonlocal number
        number -= 1
        return {"type": "http.request", "body": b"x", "more_body": number > 0}

    async def app(_scope: Scope, receive: Receive, _send: Send) -> None:
        bodies.append((await receive())["body"])

    async def send(_message: Message) -> None:
        raise AssertionError("it was refused")

    headers = [(b"content-type", b"application/json"), (b"transfer-encoding", b"chunked")]
    scope = {"type": "http", "method": "POST", "path": "/", "headers": headers}
    tracemalloc.start()
    try:
        asyncio.run(BodyMiddleware(app, max_body_bytes=number, seconds=60)(scope, receive, send))
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()
    assert bodies == [b"x" * 100_000]


@pytest.mark.parametrize(
    "names",
    [
        "authorization, content-type, x-stainless-arch, x-stainless-lang, x-stainless-os, x-stainless-retry-count",
        "traceparent,tracestate",
        "X-Client-Name",
        "openai-beta, openai-organization, cache-control, x-requested-with",
    ],
)
def test_an_allowed_origin_may_send_any_header(names: str):
    client = tiny_client(cors_origins=("https://app.example",))
    preflight = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": names}
    response = client.options("/v1/search", headers={**preflight, "Origin": "https://app.example"})
    assert response.status_code == 200
    allowed = {name.strip().lower() for name in response.headers["Access-Control-Allow-Headers"].split(",")}
    assert {name.strip().lower() for name in names.split(",")} <= allowed
    other = client.options("/v1/search", headers={**preflight, "Origin": "https://other.example"})
    assert other.status_code == 400
    assert "Access-Control-Allow-Origin" not in other.headers


def test_an_allowed_origin_may_read_what_the_dialects_say_in_headers():
    client = tiny_client(cors_origins=("https://app.example",))
    response = client.post("/v1/index/reload", headers={"Origin": "https://app.example"})
    exposed = response.headers["Access-Control-Expose-Headers"].split(", ")
    assert {"X-Warning", "X-Relevance-Score", "X-Word-Statistics"} <= {*exposed}


def test_a_damaged_index_is_answered_with_its_repair_and_without_its_path():
    client = tiny_client()

    def read(_: Request) -> Response:
        raise DamagedFileError(Path("/srv/secret/docs.index/passages.db"), "is not what was written")

    app_of(client).add_route("/damaged", read)
    response = client.get("/damaged")
    assert response.status_code == 500
    assert "verify --repair" in response.json()["error"]["message"]
    assert "secret" not in response.text


def test_whatever_can_be_got_has_a_head():
    client = tiny_client()
    for path in ("/health", "/metrics", "/v1/passages/a"):
        head, whole = client.head(path), client.get(path)
        assert head.status_code == whole.status_code == 200
        assert head.content == b""
        assert head.headers["Content-Type"] == whole.headers["Content-Type"]
    assert client.head("/health").headers["Content-Length"] == client.get("/health").headers["Content-Length"]
    assert client.head("/nothing").status_code == 404
    refused = client.head("/v1/search")
    assert refused.status_code == 405
    assert refused.headers["Allow"] == "POST"
    assert (
        tiny_client(cors_origins=("*",))
        .head("/health", headers={"Origin": "https://a.example"})
        .headers["Access-Control-Allow-Origin"]
    )


# Disconnects


async def _with_client(messages: list[str], work: Callable[[Message], Awaitable[None]]) -> list[Message]:
    """What is sent to a client that sends these messages, and then nothing."""
    waiting: list[Message] = [{"type": f"http.{kind}", "body": b"{}"} for kind in messages]
    sent: list[Message] = []

    async def receive() -> Message:
        await asyncio.sleep(0.01)
        return waiting.pop(0) if waiting else await asyncio.Event().wait()

    async def send(message: Message) -> None:
        sent.append(message)

    async def app(_scope: Scope, receive: Receive, send: Send) -> None:
        await work(await receive())
        await send({"type": "http.response.body", "body": b"done"})
        await asyncio.sleep(0.05)

    await CancelWhenGone(app)({"type": "http"}, receive, send)
    await asyncio.sleep(0)
    return sent


async def _never(_message: Message) -> None:
    await asyncio.Event().wait()


async def _nothing(message: Message) -> None:
    assert message["body"] == b"{}"


def test_work_ends_when_the_client_has_gone():
    assert asyncio.run(asyncio.wait_for(_with_client(["request", "disconnect"], _never), 5)) == []


def test_a_client_that_leaves_after_the_response_cancels_nothing():
    sent = asyncio.run(asyncio.wait_for(_with_client(["request", "disconnect"], _nothing), 5))
    assert [message["body"] for message in sent] == [b"done"]


def test_work_that_is_cancelled_for_another_reason_says_so():
    async def cancel() -> None:
        task = asyncio.ensure_future(_with_client(["request"], _never))
        await asyncio.sleep(0.05)
        task.cancel()
        await task

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(cancel())
