"""API keys, scopes and rate limits, tested over HTTP."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="needs the extra 'serve'")

from d2llm.server.access import Allowance, RateLimiter, is_open, scope_needed
from d2llm.server.keys import add_key, remove_key
from d2llm.server.running import Lifecycle
from tiny_app import tiny_client

SEARCH = {"texts": ["q"]}


@pytest.fixture
def keys_file(tmp_path: Path) -> Path:
    path = tmp_path / "keys.json"
    add_key(path, "nobody")
    return path


def bearer(secret: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret}"}


def test_without_keys_everybody_may_search():
    assert tiny_client().post("/v1/search", json=SEARCH).status_code == 200


def test_a_missing_key_error_explains_how_to_send_one(keys_file: Path):
    response = tiny_client(keys_file).post("/v1/search", json=SEARCH)
    assert response.status_code == 401
    assert response.headers["WWW-Authenticate"] == 'Bearer realm="d2llm"'
    error = response.json()["error"]
    assert error["kind"] == "unauthorized"
    assert "Authorization: Bearer KEY" in error["message"]
    assert error["request_id"] == response.headers["X-Request-ID"]


@pytest.mark.parametrize("header", ["Bearer wrong", "Basic abc", "Bearer", "Bearer ", ""])
def test_a_wrong_key_is_refused(keys_file: Path, header: str):
    response = tiny_client(keys_file).post("/v1/search", json=SEARCH, headers={"Authorization": header})
    assert response.status_code == 401


def test_a_key_is_accepted_in_either_header(keys_file: Path):
    secret = add_key(keys_file, "page")
    client = tiny_client(keys_file)
    for headers in (bearer(secret), {"Authorization": f"bearer  {secret}"}, {"X-API-Key": secret}):
        assert client.post("/v1/search", json=SEARCH, headers=headers).status_code == 200


def test_keys_come_and_go_while_the_server_runs(keys_file: Path):
    client = tiny_client(keys_file)
    secret = add_key(keys_file, "page")
    assert client.post("/v1/search", json=SEARCH, headers=bearer(secret)).status_code == 200
    remove_key(keys_file, "page")
    assert client.post("/v1/search", json=SEARCH, headers=bearer(secret)).status_code == 401


@pytest.mark.parametrize(
    ("method", "path", "needed"),
    [
        ("POST", "/v1/search", "read"),
        ("GET", "/v1/passages/p1", "read"),
        ("POST", "/v1/passages", "write"),
        ("DELETE", "/v1/passages/p1", "write"),
        ("POST", "/v1/index/reload", "admin"),
    ],
)
def test_each_request_needs_its_scope(keys_file: Path, method: str, path: str, needed: str):
    client = tiny_client(keys_file)
    body = SEARCH if path == "/v1/search" else None
    scopes = ["read", "write", "admin"]
    for scope in scopes:
        secret = add_key(keys_file, scope, scope)  # pyright: ignore[reportArgumentType]
        response = client.request(method, path, json=body, headers=bearer(secret))
        if scopes.index(scope) >= scopes.index(needed):
            assert response.status_code == 200
        else:
            assert response.status_code == 403
            assert response.json()["error"]["kind"] == "forbidden"
            assert f'scope="{needed}"' in response.headers["WWW-Authenticate"]


def test_the_scope_that_each_endpoint_needs():
    assert scope_needed("POST", "/v1/documents") == "write"
    assert scope_needed("POST", "/v1/files") == "write"
    assert scope_needed("DELETE", "/v1/documents/d1") == "write"
    assert scope_needed("POST", "/v1/index/snapshots/x/restore") == "admin"
    assert scope_needed("GET", "/v1/index/snapshots") == "read"
    assert scope_needed("PUT", "/v1/passages/p1") == "write"
    assert scope_needed("POST", "/v1/passages/") == "write"
    assert scope_needed("DELETE", "/v1/anything") == "write"
    assert scope_needed("POST", "/v1/index/snapshots") == "admin"
    assert scope_needed("DELETE", "/v1/index/snapshots/x") == "admin"
    assert scope_needed("GET", "/v1/index") == "read"


def test_only_public_paths_are_open_without_a_key(keys_file: Path):
    client = tiny_client(keys_file)
    for path in ("/health", "/docs", "/openapi.json"):
        assert client.get(path).status_code == 200
    assert client.get("/metrics").status_code == 401
    assert client.get("/nothing-here").status_code == 401  # which paths exist is not revealed without a key
    assert is_open("/")
    assert is_open("/page/search.js")
    assert not is_open("/pages")


def test_cors_preflight_needs_no_key(keys_file: Path):
    """A preflight request carries no key, and its response reveals no results."""
    client = tiny_client(keys_file, cors_origins=("https://app.example",))
    preflight = {"Origin": "https://app.example", "Access-Control-Request-Method": "POST"}
    response = client.options("/v1/search", headers={**preflight, "Access-Control-Request-Headers": "authorization"})
    assert response.status_code == 200
    assert response.headers["Access-Control-Allow-Origin"] == "https://app.example"
    refused = client.post("/v1/search", json=SEARCH, headers={"Origin": "https://app.example"})
    assert refused.status_code == 401
    assert refused.headers["Access-Control-Allow-Origin"] == "https://app.example"  # so the page can read the error
    assert {"X-Warning", "X-Relevance-Score"} <= set(refused.headers["Access-Control-Expose-Headers"].split(", "))
    other = client.options("/v1/search", headers={**preflight, "Origin": "https://other.example"})
    assert "Access-Control-Allow-Origin" not in other.headers


# Rate limits


def test_exceeding_a_keys_limit_returns_retry_after(keys_file: Path):
    client = tiny_client(keys_file, requests_per_minute=3)
    slow, fast = add_key(keys_file, "slow"), add_key(keys_file, "fast", requests_per_minute=50)
    remaining = []
    for _ in range(3):
        response = client.post("/v1/search", json=SEARCH, headers=bearer(slow))
        assert response.status_code == 200
        assert response.headers["RateLimit-Limit"] == "3"
        remaining.append(response.headers["RateLimit-Remaining"])
    assert remaining == ["2", "1", "0"]
    refused = client.post("/v1/search", json=SEARCH, headers=bearer(slow))
    assert refused.status_code == 429
    assert refused.json()["error"]["kind"] == "rate_limited"
    assert 50 <= int(refused.headers["Retry-After"]) <= 60
    assert refused.headers["RateLimit-Remaining"] == "0"
    assert client.post("/v1/search", json=SEARCH, headers=bearer(fast)).headers["RateLimit-Remaining"] == "49"
    assert client.get("/health").status_code == 200


def test_without_keys_addresses_are_limited_only_if_configured():
    unlimited = tiny_client()
    assert "RateLimit-Limit" not in unlimited.post("/v1/search", json=SEARCH).headers
    limited = tiny_client(requests_per_minute=1)
    statuses = [limited.post("/v1/search", json=SEARCH).status_code for _ in range(3)]
    assert statuses == [200, 429, 429]


def test_what_is_refused_because_the_server_is_not_ready_does_not_count():
    client = tiny_client(requests_per_minute=1, lifecycle=(lifecycle := Lifecycle()))
    assert {client.post("/v1/search", json=SEARCH).status_code for _ in range(3)} == {503}
    assert [client.get("/metrics").status_code for _ in range(2)] == [200, 429]  # answered in every state
    lifecycle.become("ready")
    assert client.post("/v1/search", json=SEARCH).status_code == 429  # the same client


def test_requests_are_forgotten_after_a_minute_whatever_the_clock_says(monkeypatch: pytest.MonkeyPatch):
    now = [1_000.0]
    monkeypatch.setattr("d2llm.server.access.time.monotonic", lambda: now[0])
    limiter = RateLimiter()

    def take(client_id: str) -> Allowance:
        return limiter._take_alone(client_id, 2)

    assert [(one := take("a")).allowed and one.remaining for _ in range(3)] == [1, 0, False]
    assert take("b").allowed
    monkeypatch.setattr("time.time", lambda: 0.0)  # set back
    now[0] += 30
    assert take("a").reset == pytest.approx(30)
    now[0] += 31
    assert take("a").allowed
    assert list(limiter._times) == ["a"]  # clients that left take no memory


def test_the_message_names_the_limit():
    client = tiny_client(requests_per_minute=1)
    client.post("/v1/search", json=SEARCH)
    message = client.post("/v1/search", json=SEARCH).json()["error"]["message"]
    assert re.fullmatch(r"more than 1 requests in a minute; try again in \d+ s", message)
