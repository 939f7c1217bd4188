"""F6: every route of the server, in every dialect and of the Model Context Protocol, with every kind of key.

The matrix is made from the application's own routes. It has two indexes; one of them has a word in every passage that
no answer to a key without it may show. A key that only reads must change nothing, and without a key nothing but the
open paths is answered, however an address is written and whichever header has the key. No line of the log has a key.
"""

from __future__ import annotations

import io
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.testclient import TestClient
from starlette.routing import BaseRoute, Route

from campaign.frame import Outcome, Row, main
from d2llm import Index, Passage
from d2llm.server.agent_arguments import TOOLS
from d2llm.server.app import make_app
from d2llm.server.keys import SCOPES, add_key, remove_key
from d2llm.server.logs import start_logs
from d2llm.store.index_store import IndexStore
from tiny_server import tiny_settings, write_tiny_index
from waiting import until

SECRET = "zorbleak"
OPEN = {"/", "/docs", "/openapi.json", "/health", "/page/settings.json", "/page/{name}"}
"""The routes that need no key: a new one is written here by hand, or it is a fault."""
_REFUSED = ("nobody", "wrong", "removed")
_ID = "hidden7"
_FORMS: tuple[Callable[[str], str], ...] = (
    lambda path: path,
    lambda path: f"{path}/",
    lambda path: f"/%2f{path.lstrip('/')}",
    lambda path: f"/health/%2e%2e{path}",
    lambda path: f"/page/%2e%2e%2f{path.lstrip('/')}",
    lambda path: f"/indexes/faq{path}",
    lambda path: f"/indexes/faq/%2e%2e/docs{path}",
    lambda path: f"/indexes/docs/%2e%2e/faq{path}",
    lambda path: f"/indexes/docs/indexes/faq{path}",
    lambda path: path.upper(),
)


def routes_of(routes: Iterable[BaseRoute]) -> Iterator[Route]:
    """All routes, those of included routers too."""
    for route in routes:
        inner: Any = getattr(route, "original_router", route)
        if getattr(inner, "routes", None):
            yield from routes_of(inner.routes)
        elif isinstance(route, Route):
            yield route


def requests_of(app: FastAPI) -> list[tuple[str, str, str, Any]]:
    """Each route with each of its methods and, for agents, each tool: the route, method, path and body."""
    passage = {"id": "new", "text": "the cat"}
    body: dict[str, Any] = {
        "query": "the cat",
        "queries": ["the cat"],
        "text_1": "the cat",
        "text_2": ["the dog"],
        "kind": "query",
        "documents": ["the cat"],
        "texts": ["the cat"],
        "input": "the cat",
        "inputs": "the cat",
        "name": "kept",
        "passage_id": _ID,
        "passage_ids": [_ID],
        "passages": [passage],
        "top_k": 50,
        "index": "faq",
        "model": "faq",
        "input_type": "search_query",
        "embedding_types": ["float"],
    }
    special: dict[str, dict[str, Any]] = {
        "/v1/search": {"query": "the cat", "top_k": 50},
        "/v1/context": {"query": "the cat", "top_k": 50},
        "/similarity": {"inputs": {"source_sentence": "the cat", "sentences": ["the dog"]}},
        "/v1/documents": {"documents": [passage | {"id": "long"}]},
        "/v1/rescore": {"query": "the cat", "passages": ["the dog"]},
        "/v1/embeddings": {"input": "the cat", "model": "faq"},
        "/v1/explain": {"query": "the cat", "passage_id": _ID},
    }
    schemas = app.openapi()["components"]["schemas"]

    def body_of(path: str) -> dict[str, Any]:
        described = app.openapi()["paths"].get(path, {}).get("post", {}).get("requestBody", {}).get("content", {})
        name = described.get("application/json", {}).get("schema", {}).get("$ref", "").rpartition("/")[2]
        fields = schemas.get(name, {}).get("properties", body)
        return {field: value for field, value in body.items() if field in fields}

    found: list[tuple[str, str, str, Any]] = []
    for route in routes_of(app.routes):
        path = route.path
        for name, value in (("passage_id:anypath", _ID), ("document_id:anypath", _ID), ("name", "kept")):
            path = path.replace(f"{{{name}}}", value)
        path = path.replace("{model:path}", "faq")
        assert "{" not in path, f"{path}: say what stands there"
        if route.path == "/mcp":
            for tool in TOOLS:
                arguments = {"query": "the cat", "index": "faq", "passage_id": _ID}
                arguments = {key: arguments[key] for key in arguments if key in TOOLS[tool].arguments.model_fields}
                arguments |= {"documents": [passage]} if tool == "upsert" else {}
                params = {"name": tool, "arguments": arguments}
                found.append((f"/mcp {tool}", "POST", path, {"id": 1, "method": "tools/call", "params": params}))
            uri = {"uri": f"d2llm:///faq/{_ID}"}
            found.append(("/mcp resource", "POST", path, {"id": 1, "method": "resources/read", "params": uri}))
            continue
        found += [
            (route.path, method, path, special.get(path) or body_of(path)) for method in sorted(route.methods or ())
        ]
    return found


class Matrix:
    """A server of two indexes, and what was asked of it."""

    def __init__(self, folder: Path, chance: random.Random) -> None:
        self.chance = chance
        self.docs = write_tiny_index(folder, 12, "docs")
        self.faq = folder / "faq"
        index = Index.create(self.faq, folder / "student-0", dtype="float32")
        index.upsert([Passage(f"hidden{n}", f"the cat {SECRET} {n}", title=SECRET) for n in range(9)])
        index.snapshot("kept")
        file = folder / "keys.json"
        self.keys = {
            f"{scope} {'all' if names is None else names[0]}": add_key(
                file, f"{scope}-{names and names[0]}", scope, indexes=names
            )
            for names in (None, ["docs"], ["archive"])
            for scope in SCOPES
        }
        self.removed = add_key(file, "removed", "admin")
        remove_key(file, "removed")
        self.app = make_app(tiny_settings({"docs": self.docs, "faq": self.faq}, keys_file=file))
        self.num_requests = 0

    def ask(self, client: TestClient, method: str, path: str, body: Any, secret: str | None) -> Any:
        headers = {"Accept": "application/json, text/event-stream"}
        if secret is not None:
            is_plain = self.chance.random() < 0.5
            headers |= {"X-API-Key": secret} if is_plain else {"Authorization": f"Bearer {secret}"}
        sent = {"json": {"jsonrpc": "2.0", **body} if "params" in body else body} if method in ("POST", "PUT") else {}
        return client.request(method, path, headers=headers, follow_redirects=False, **sent)

    def problems(self, client: TestClient) -> Iterator[str]:
        """Ask everything with every key, those that may change something last."""
        requests, before = requests_of(self.app), self.state()
        known = [
            ("nobody", None),
            ("wrong", "d2llm_wrong"),
            ("removed", self.removed),
            *sorted(self.keys.items(), key=lambda item: item[0] == "admin all"),
        ]
        for name, secret in known:
            may_read_faq, may_write_faq = name.endswith(" all"), name in ("write all", "admin all")
            if may_write_faq:
                continue
            for route, method, path, body in requests:
                for form in _FORMS:
                    response = self.ask(client, method, form(path), body, secret)
                    self.num_requests += 1
                    what = f"{method} {form(path)} with {name}: {response.status_code}"
                    if response.status_code >= 500:
                        yield f"{what}: {response.text[:300]}"
                    if not may_read_faq and SECRET in response.text + str(response.headers):
                        yield f"{what} shows the other index"
                    is_open = route in OPEN or form(path).startswith(("/page/", "/health/"))
                    if name in _REFUSED and not is_open and response.status_code != 401:
                        yield f"{what}, not refused: {response.text[:100]}"
            docs, faq = self.state()
            if faq != before[1] or (docs != before[0] and name not in ("write docs", "admin docs")):
                yield f"{name} changed an index"
            before = [docs, faq]
        yield from self.control(client, requests)

    def control(self, client: TestClient, requests: list[tuple[str, str, str, Any]]) -> Iterator[str]:
        """The same requests work for who may do everything: otherwise the matrix would show nothing."""
        before, shown, changed = self.state(), set[str](), set[str]()
        for route, method, path, body in sorted(requests, key=lambda request: "ete" in str(request).lower()):
            for form in (_FORMS[0], _FORMS[5]):
                response = self.ask(client, method, form(path), body, self.keys["admin all"])
                self.num_requests += 1
                if SECRET in response.text:
                    shown.add(route)
            if (after := self.state()) != before:
                changed.add(f"{method} {route}")
                before = after
        missing = {"/v1/search", "/v1/context", "/mcp search", "/mcp read"} - shown
        missing |= {"POST /v1/passages", "POST /v1/documents", "DELETE /v1/passages/{passage_id:anypath}"} - changed
        if missing:
            yield f"these do nothing for an admin: {sorted(missing)}"

    def state(self) -> list[Any]:
        return [(store.version, store.snapshots()) for store in (IndexStore.open(self.docs), IndexStore.open(self.faq))]


@contextmanager
def prepare(folder: Path) -> Iterator[Callable[[random.Random], Outcome]]:
    numbers = count()

    def case(chance: random.Random) -> Outcome:
        root = folder / f"matrix-{next(numbers)}"
        root.mkdir()
        matrix = Matrix(root, chance)
        log = io.StringIO()
        stop = start_logs(tiny_settings(matrix.docs), log)
        with TestClient(matrix.app, base_url="http://127.0.0.1:8000") as client:
            until(lambda: client.get("/health").json()["status"] == "ready", "a server that is ready")
            problems = list(matrix.problems(client))
        stop()
        logged = log.getvalue()
        assert logged.count("route=") > matrix.num_requests / 2, "requests are not logged"
        problems += [f"the log has the key {name}" for name, secret in matrix.keys.items() if secret in logged]
        return Outcome("requests", "\n".join(problems[:40]), matrix.num_requests)

    yield case


ROW = Row("keys", "F6", 5_000, prepare)

if __name__ == "__main__":
    main(ROW)
