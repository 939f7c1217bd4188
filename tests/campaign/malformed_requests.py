"""F4: malformed requests to every route: bodies changed in their structure or their bytes, odd addresses and headers.

The requests are those of the matrix of keys, which work. No answer is a 500, names a folder of the server or shows a
traceback, and none takes over ten seconds. No hundred of them take over 64 MiB at any moment, nor does the process grow
by that from the first hundred on. ``make fuzz`` sends what the API's description allows, to a real server.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from fastapi.testclient import TestClient

from campaign.frame import Outcome, Row, main
from campaign.keys import requests_of
from campaign.malformed_files import mutated, restructured
from d2llm.server.app import make_app
from tiny_server import tiny_settings, write_tiny_index
from waiting import until

AT_ONCE = 100  # requests of a draw
SECONDS = 10.0
BYTES = 64 << 20
ADDRESS = "http://127.0.0.1:8000"
_HEADERS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("content-type", ("", "text/plain", "application/json; charset=utf-16", "multipart/form-data", "a/b;" * 500)),
    ("accept", ("", "*/*;q=x", "text/event-stream", "x" * 5_000)),
    ("content-encoding", ("gzip", "br", "identity")),
    ("host", ("", "evil.example", "127.0.0.1:99999", "[::1", "localhost, localhost")),
    ("origin", ("null", "http://evil.example", "\x7f")),
    ("authorization", ("Bearer", "Bearer \xff", "Basic !!", "Bearer " + "x" * 9_000)),
    ("x-request-id", ("\t", "a" * 5_000, "../..")),
    ("traceparent", ("00-0-0-0", "x")),
    ("content-length", ("-1", "99999999999999999999", "abc", "0")),
)


def memory() -> tuple[int, int]:
    """The bytes of memory that this process has, and the most that it had since ``forget_peak``."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["VmRSS"].split()[0]) << 10, int(lines["VmHWM"].split()[0]) << 10


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def draw(chance: random.Random, request: tuple[str, str, str, Any]) -> tuple[str, str, dict[str, Any]]:
    """A malformed request: its method, its address, and its headers and body."""
    route, method, path, body = request
    body = {"jsonrpc": "2.0", **body} if route.startswith("/mcp") else body
    for _ in range(chance.choice([0, 1, 1, 2, 5])):
        body = restructured(body, chance)
    content = json.dumps(body).encode()
    if chance.random() < 0.3:
        content = mutated(content, content, chance)
    headers = {"content-type": "application/json", "accept": "application/json, text/event-stream"}
    if chance.random() < 0.2:
        name, values = chance.choice(_HEADERS)
        headers[name] = chance.choice(values)
    if chance.random() < 0.2:
        at = chance.randrange(1, len(path) + 1)
        odd = chance.choice(["%00", "%ff", "%2e%2e%2f", "/" * 50, "%0d%0aX:1", quote("\u202e中"), "%", "a" * 9_000])
        path = path[:at] + odd + path[at:]
    if chance.random() < 0.2:
        path += "?" + chance.choice(["limit=-1", "limit=1e9", "cursor=%00", "cursor=%ff", "limit=", "&&&", "x" * 9_000])
    if chance.random() < 0.5:
        path = f"/indexes/docs{path}"
    method = (
        chance.choice(["GET", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "X"]) if chance.random() < 0.1 else method
    )
    return (
        method,
        path,
        {"headers": {name: value.encode("latin-1") for name, value in headers.items()}, "content": content},
    )


@contextmanager
def prepare(folder: Path) -> Iterator[Callable[[random.Random], Outcome]]:
    torch.set_num_threads(1)
    index = write_tiny_index(folder, 12, "docs")
    app = make_app(tiny_settings({"docs": index}, max_body_bytes=1 << 20))
    requests = [request for request in requests_of(app) if request[1] != "HEAD"]
    with TestClient(app, base_url=ADDRESS) as client:
        until(lambda: client.get("/health").json()["status"] == "ready", "a server that is ready")

        first = 0

        def fault_of_memory(before: int) -> str:
            nonlocal first
            now, peak = memory()
            first = first or now
            grown = max(peak - before, now - first)
            return f"{grown >> 20} MiB more memory" if grown > BYTES else ""

        def case(chance: random.Random) -> Outcome:
            forget_peak()
            before, _ = memory()
            for _ in range(AT_ONCE):
                method, path, sent = draw(chance, chance.choice(requests))
                what = f"{method} {path[:300]} {sent['headers']} {sent['content'][:1_000]!r}"
                began = time.monotonic()
                try:
                    response = client.request(method, f"{ADDRESS}{path}", follow_redirects=False, **sent)
                except Exception as error:
                    raise AssertionError(what) from error
                seconds = time.monotonic() - began
                if response.status_code >= 500 or seconds > SECONDS:
                    return Outcome("fault", f"{what}: {response.status_code} in {seconds:.1f} s: {response.text[:400]}")
                if str(folder) in response.text or "Traceback" in response.text:
                    return Outcome("fault", f"{what} shows {response.text[:400]}")
            answer = client.post("/v1/search", json={"query": "the cat", "top_k": 1})
            fault = "" if answer.status_code == 200 else f"no search afterwards: {answer.text[:300]}"
            return Outcome("requests", fault or fault_of_memory(before), AT_ONCE)

        yield case


ROW = Row("malformed_requests", "F4", 100_000, prepare)

if __name__ == "__main__":
    main(ROW)
