"""What all dialects share: API descriptions, keys, unreadable bodies, and the client versions in the guide."""

from __future__ import annotations

import re

import httpx2
import pytest

pytest.importorskip("fastapi", reason="needs FastAPI: pip install 'd2llm[serve]'")
from d2llm.server.keys import add_key
from tiny_clients import NAME, serving

TAGS = {"OpenAI", "Cohere", "Jina", "Text Embeddings Inference", "vLLM"}
ROUTES = {"/v1/embeddings", "/v1/models", "/v1/models/{model}", "/v2/rerank", "/v1/rerank"} | {
    *("/v2/embed", "/v1/embed", "/embed", "/embed_all", "/embed_sparse", "/predict", "/rerank", "/similarity"),
    *("/info", "/score", "/v1/score", "/pooling"),
}
ERROR_FIELDS = {
    "/v1/embeddings": {"error", "detail"},
    "/v2/rerank": {"id", "message"},
    "/v2/embed": {"id", "message"},
    "/v1/embed": {"id", "message"},
    "/v1/rerank": {"detail"},
    "/rerank": {"error", "error_type"},
    "/predict": {"error", "error_type"},
    "/score": {"error"},
    "/pooling": {"error"},
}


def test_every_route_describes_its_answers_and_errors(post):
    paths = post("/openapi.json")["paths"]
    described = set()
    for path, methods in paths.items():
        for operation in methods.values():
            if not TAGS & set(operation["tags"]):
                continue
            described.add(path)
            assert set(operation["responses"]) == {"200", "4XX", "5XX"}, path
            for response in operation["responses"].values():
                assert response["content"]["application/json"]["schema"], path
    assert described == ROUTES


@pytest.mark.parametrize(
    ("path", "status"),
    [("/v1/embeddings", 400), ("/v2/rerank", 400), ("/v1/rerank", 422), ("/rerank", 400), ("/score", 400)],
)
def test_invalid_json_is_rejected(address, path, status):
    response = httpx2.post(address + path, content=b"{", headers={"content-type": "application/json"})
    assert response.status_code == status
    assert "not valid JSON" in response.text


@pytest.mark.parametrize("path", ["/v1/embeddings", "/v2/rerank", "/embed", "/v1/encode"])
@pytest.mark.parametrize(("body", "message"), [("[1]", "the body must be a JSON object"), ("", "the body is empty")])
def test_a_body_that_is_no_object_is_called_so(address, path, body, message):
    response = httpx2.post(address + path, content=body, headers={"content-type": "application/json"})
    assert 400 <= response.status_code <= 422
    assert message in response.text


@pytest.mark.parametrize(
    ("path", "status"),
    [("/v1/embeddings", 400), ("/v2/rerank", 400), ("/v1/rerank", 422), ("/embed", 422), ("/score", 400)],
)
@pytest.mark.parametrize("body", ['{"\\udc00": 1}', '{"unread": {"a": ["\\ud83d"]}}'], ids=["name", "value"])
def test_lone_surrogates_are_rejected_in_any_field(address, path, status, body):
    response = httpx2.post(address + path, content=body, headers={"content-type": "application/json"})
    assert response.status_code == status
    assert "surrogate" in response.text
    assert ERROR_FIELDS.get(path, {"error", "error_type"}) <= response.json().keys()


@pytest.fixture(scope="module")
def guarded(folder, student, tmp_path_factory):
    """The address of a server that requires an API key, and the key."""
    keys_file = tmp_path_factory.mktemp("keys") / "keys.json"  # a process may come to this module twice
    secret = add_key(keys_file, "client")
    with serving(folder / "student-0", model_name=NAME, keys_file=keys_file) as address:
        yield address, secret


@pytest.mark.parametrize("path", ERROR_FIELDS)
def test_a_missing_key_gets_an_error_in_the_dialects_format(guarded, path):
    response = httpx2.post(guarded[0] + path, json={})
    assert response.status_code == 401
    assert set(response.json()) == ERROR_FIELDS[path]
    assert isinstance(response.json().get("detail", ""), str)


def test_openais_client_sends_the_key(guarded):
    openai = pytest.importorskip("openai", reason="needs OpenAI's client: pip install openai")
    address, secret = guarded
    with openai.OpenAI(base_url=f"{address}/v1", api_key=secret) as client:
        assert len(client.embeddings.create(model=NAME, input="text").data) == 1
        with pytest.raises(openai.AuthenticationError) as excinfo:
            client.with_options(api_key="wrong").embeddings.create(model=NAME, input="text")
    assert (excinfo.value.code, excinfo.value.type) == ("invalid_api_key", "invalid_request_error")


def test_coheres_client_sends_the_key(guarded):
    cohere = pytest.importorskip("cohere", reason="needs Cohere's client: pip install cohere")
    address, secret = guarded
    body = {"model": NAME, "query": "text", "documents": ["a", "b"]}
    assert len(cohere.ClientV2(api_key=secret, base_url=address).rerank(**body).results) == 2
    with pytest.raises(cohere.UnauthorizedError):
        cohere.ClientV2(api_key="wrong", base_url=address).rerank(**body)


def test_the_guide_names_the_versions_that_are_tested(repository):
    guide = (repository / "docs" / "how-to" / "clients.md").read_text(encoding="utf-8")
    documented = re.findall(r"^\| `([a-z0-9_-]+)` ([0-9.]+) \|", guide, re.MULTILINE)
    pins = (repository / "constraints.txt").read_text(encoding="utf-8")
    pinned = {
        name.lower().replace("_", "-"): version for name, version in re.findall(r"^([\w.-]+)==([\w.]+)", pins, re.M)
    }
    assert len(documented) >= 10
    assert {name: pinned[name] for name, _ in documented} == dict(documented)
