"""Each limit of a server on what a request may have: what is beyond it is refused, and the answer names the setting."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="needs FastAPI: pip install 'd2llm[serve]'")

from fastapi.testclient import TestClient

from d2llm.server.app import make_app
from d2llm.server.schemas import MAX_EXPANSIONS
from tiny_server import tiny_settings, write_tiny_index
from waiting import until

LIMITS: dict[str, int] = {
    "max_texts": 3,
    "max_text_chars": 200,
    "max_document_chars": 400,
    "max_top_k": 5,
    "max_num_candidates": 10,
    "max_context_tokens": 50,
}
SEARCH, PASSAGE = {"query": "the cat"}, {"id": "new", "text": "the cat"}
WITHIN: dict[str, tuple[str, dict[str, Any]]] = {
    "max_texts": ("/v1/embeddings", {"input": ["the cat"] * 3, "model": "student-0"}),
    "max_text_chars": ("/v1/search", {"query": "c" * 200}),
    "max_document_chars": ("/v1/documents", {"documents": [{"id": "d", "text": "cat " * 100}]}),
    "max_top_k": ("/v1/search", SEARCH | {"top_k": 5}),
    "max_num_candidates": ("/v1/search", SEARCH | {"num_candidates": 10}),
    "max_context_tokens": ("/v1/context", SEARCH | {"max_tokens": 50}),
}
BEYOND: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "max_texts": [
        ("/v1/embeddings", {"input": ["the cat"] * 4, "model": "student-0"}),
        ("/rerank", {"query": "the cat", "texts": ["a"] * 4}),
        ("/v1/passages", {"passages": [PASSAGE | {"id": f"n{n}"} for n in range(4)]}),
        ("/v1/documents", {"documents": [PASSAGE | {"id": f"n{n}"} for n in range(4)]}),
    ],
    "max_text_chars": [
        ("/v1/search", {"query": "c" * 201}),
        ("/v1/embeddings", {"input": "c" * 201, "model": "student-0"}),
        ("/v1/passages", {"passages": [PASSAGE | {"text": "c" * 201}]}),
    ],
    "max_document_chars": [("/v1/documents", {"documents": [{"id": "d", "text": "cat " * 101}]})],
    "max_top_k": [("/v1/search", SEARCH | {"top_k": 6})],
    "max_num_candidates": [("/v1/search", SEARCH | {"num_candidates": 11})],
    "max_context_tokens": [("/v1/context", SEARCH | {"max_tokens": 51})],
}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    index = write_tiny_index(tmp_path_factory.mktemp("budgets"), 20)
    settings = tiny_settings(index, writable=True, **LIMITS)
    with TestClient(make_app(settings), base_url="http://127.0.0.1:8000") as opened:
        until(lambda: opened.get("/health").json()["status"] == "ready", "a server that is ready")
        yield opened


@pytest.mark.parametrize("name", LIMITS)
def test_what_is_within_a_limit_is_answered(client: TestClient, name: str):
    path, body = WITHIN[name]
    response = client.post(path, json=body)
    assert response.status_code == 200, response.text


@pytest.mark.parametrize(("name", "path", "body"), [(name, *one) for name, many in BEYOND.items() for one in many])
def test_what_is_beyond_a_limit_is_refused_and_the_setting_named(
    client: TestClient, name: str, path: str, body: dict[str, Any]
):
    response = client.post(path, json=body)
    assert response.status_code in (400, 413, 422), response.text
    assert name in response.text


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"expansions": MAX_EXPANSIONS + 1}, "expansions"),
        ({"neighbours": 11}, "neighbours"),
        ({"teacher_passages": 201}, "teacher_passages"),
        ({"filter": "year > 1" + " " * 50_000}, "filter"),
        ({"query": "the cat", "filter": " OR ".join(["year > 1"] * 1_001)}, "filter"),
    ],
)
def test_what_no_setting_changes(client: TestClient, changes: dict[str, Any], field: str):
    response = client.post("/v1/search", json=SEARCH | changes)
    assert response.status_code in (400, 422), response.text
    assert field in response.text
