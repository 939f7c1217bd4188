"""Fields that other programs' clients send: honoured, or refused under the name that was sent, never ignored."""

from __future__ import annotations

import json

import httpx2
import numpy as np
import pytest

from tiny_models import TEXTS

pytest.importorskip("fastapi", reason="needs FastAPI: pip install 'd2llm[serve]'")
from tiny_clients import LONG, NAME, QUERY, serving, unit

MAX_TOKENS = 64
BODIES = {
    "/v1/embeddings": {"model": NAME, "input": TEXTS},
    "/v2/rerank": {"model": NAME, "query": QUERY, "documents": TEXTS},
    "/v1/rerank": {"model": NAME, "query": QUERY, "documents": TEXTS},
    "/v2/embed": {"model": NAME, "texts": TEXTS, "input_type": "search_document"},
    "/v1/embed": {"texts": TEXTS},
    "/rerank": {"query": QUERY, "texts": TEXTS},
    "/predict": {"inputs": [QUERY, TEXTS[0]]},
    "/embed_sparse": {"inputs": TEXTS},
    "/pooling": {"input": TEXTS},
    "/embed": {"inputs": TEXTS},
    "/similarity": {"inputs": {"source_sentence": QUERY, "sentences": TEXTS}},
    "/v1/score": {"text_1": QUERY, "text_2": TEXTS},
    "/score": {"queries": QUERY, "documents": TEXTS},
}


def message_of(path, response):
    body = response.json()
    error = body.get("error", body.get("message", body.get("detail")))
    return error["message"] if isinstance(error, dict) else error


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize(
    "field",
    [
        {"max_chunks_per_doc": 3},
        {"add_special_tokens": False},
        {"softmax": True},
        {"normalise": False},
        {"instruction": "find similar texts"},
        {"mm_processor_kwargs": {"a": 1}},
    ],
    ids=str,
)
def test_unknown_fields_are_refused(address, path, field):
    response = httpx2.post(address + path, json=BODIES[path] | field)
    assert response.status_code in (400, 422)
    assert f"{next(iter(field))}: there is no such field" in message_of(path, response)


def same_facts(answer):
    """An answer without what is new in each."""
    if not isinstance(answer, dict):
        return answer
    return {name: value for name, value in answer.items() if name not in ("id", "created")}


@pytest.mark.parametrize("path", BODIES)
def test_a_field_that_is_null_asks_for_nothing(post, path):
    plain = post(path, BODIES[path])
    other = post(path, BODIES[path] | {"max_chunks_per_doc": None, "instruction": None})
    assert same_facts(plain) == same_facts(other)


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/rerank", {"user": "a", "priority": 1, "request_id": "b"}),
        ("/score", {"user": "a", "priority": 1, "cache_salt": "c"}),
        ("/embed", {"model": "any", "options": {"wait_for_model": True}}),
        ("/v1/embeddings", {"user": "a"}),
        ("/v2/rerank", {"priority": 3}),
    ],
)
def test_fields_that_change_no_answer_are_accepted(post, path, fields):
    plain, other = post(path, BODIES[path]), post(path, BODIES[path] | fields)
    assert same_facts(plain) == same_facts(other)


def test_rank_fields(ask):
    documents = [{"text": text, "title": "ignored"} for text in TEXTS]
    body = {"query": QUERY, "documents": documents}
    plain = ask("/v1/rerank", body).json()["results"]
    assert ask("/v1/rerank", body | {"rank_fields": ["text"]}).json()["results"] == plain
    for fields in (["title"], ["title", "text"], []):
        response = ask("/v1/rerank", body | {"rank_fields": fields}, 422)
        assert "rank_fields: only the field 'text'" in response.text
    assert (
        "rank_fields: there is no such field"
        in ask("/v2/rerank", BODIES["/v2/rerank"] | {"rank_fields": ["text"]}, 422).text
    )


@pytest.mark.parametrize("name", ["activation", "use_activation"])
def test_both_names_of_the_activation_are_honoured(post, name):
    probabilities = [item["score"] for item in post("/score", BODIES["/score"])["data"]]
    logits = [item["score"] for item in post("/score", BODIES["/score"] | {name: False})["data"]]
    assert np.allclose(1 / (1 + np.exp(-np.array(logits))), probabilities, atol=1e-5)
    assert [item["score"] for item in post("/score", BODIES["/score"] | {name: True})["data"]] == probabilities


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/embeddings", {"input": [LONG], "model": NAME}),
        ("/v1/rerank", {"query": QUERY, "documents": [LONG], "return_documents": False}),
        ("/score", {"queries": QUERY, "documents": [LONG]}),
    ],
)
def test_a_limit_of_tokens_at_or_above_the_models_is_accepted(ask, address, path, body):
    expected = ask(path, body | {"truncate_prompt_tokens": -1}).json()
    for tokens in (MAX_TOKENS, MAX_TOKENS + 1, 100_000):
        answer = ask(path, body | {"truncate_prompt_tokens": tokens}).json()
        assert answer.get("data", answer.get("results")) == expected.get("data", expected.get("results"))
    for tokens in (MAX_TOKENS - 1, 1, 0, -2):
        response = httpx2.post(address + path, json=body | {"truncate_prompt_tokens": tokens})
        assert response.status_code in (400, 422)
        assert "truncate_prompt_tokens: " in message_of(path, response)


@pytest.mark.parametrize(
    ("path", "body", "name"),
    [
        ("/score", {"queries": ["a", "b"], "documents": ["a", "b", "c"]}, "queries has 2 texts and documents 3"),
        ("/score", {"data_1": "a", "items": ["a", "b" * 2_001]}, "items.1: 2,001 characters"),
        ("/score", {"queries": "a", "items": LONG}, "items: longer than the 64 tokens"),
        ("/score", {"queries": "a", "documents": ["a"] * 33}, "documents: 33 texts"),
        ("/score", {"queries": 3, "documents": ["a"]}, "queries: it is neither"),
        ("/v1/rerank", {"query": "a", "documents": ["a"], "max_doc_length": 5}, "max_doc_length: texts are truncated"),
        ("/score", {"text_1": "a", "queries": "b", "text_2": "c"}, "queries: it is the same as text_1; send one"),
    ],
)
def test_messages_name_the_field_that_was_sent(address, path, body, name):
    response = httpx2.post(address + path, json=body)
    assert response.status_code in (400, 422)
    assert name in message_of(path, response)


HUGE = LONG + " the sea" * 100_000
"""Also longer than the server's limit of 2,000 characters."""


@pytest.mark.parametrize(
    ("path", "body", "warning"),
    [
        ("/embed", {"inputs": ["a cat", HUGE], "truncate": True}, "texts: truncated to 64 tokens, at positions 1"),
        ("/embed", {"inputs": ["a cat", HUGE]}, "texts: truncated to 64 tokens, at positions 1"),
        (
            "/v1/embeddings",
            {"input": ["a cat", HUGE], "model": NAME, "truncate": "END"},
            "input: truncated to 64 tokens, at positions 1",
        ),
        (
            "/score",
            {"queries": HUGE, "documents": "a", "truncate_prompt_tokens": -1},
            "queries: truncated to 64 tokens, at positions 0",
        ),
        (
            "/rerank",
            {"query": HUGE, "texts": ["a", HUGE], "truncate": True},
            "the query was truncated to 64 tokens; documents: ",
        ),
        (
            "/similarity",
            {"inputs": {"source_sentence": "a", "sentences": [HUGE]}, "parameters": {"truncate": True}},
            "positions 1",
        ),
    ],
)
def test_what_is_too_long_is_cut_whatever_its_length(ask, path, body, warning):
    assert warning in ask(path, body).headers["x-warning"]
    assert "x-warning" not in ask(path, json.loads(json.dumps(body).replace(HUGE, "a"))).headers


@pytest.mark.parametrize("path", ["/v1/rerank", "/v2/rerank"])
def test_rerankers_that_cut_warn_of_texts_of_any_length(post, path):
    body = {"model": NAME, "query": QUERY, "documents": ["a cat", HUGE, "\t" * 5_000 + "dog"]}
    answer = post(path, body)
    assert answer.get("warnings", answer.get("meta", {}).get("warnings")) == [
        "documents: truncated to 64 tokens, at positions 1, 2"
    ]


def test_a_text_cut_by_its_length_has_the_vector_of_its_beginning(post, student):
    vector = post("/embed", {"inputs": HUGE, "truncate": True})[0]
    assert np.allclose(vector, unit(student.encode_passages([HUGE]).vectors)[0], atol=1e-6)


def test_two_thousand_texts_are_one_request(folder):
    """OpenAI's most; LangChain sends 1,000. More are refused, with the server's setting and the client's."""
    with serving(folder / "student-0", model_name=NAME) as address:
        texts = [f"{TEXTS[number % len(TEXTS)]} {number}" for number in range(2_049)]
        response = httpx2.post(f"{address}/v1/embeddings", json={"model": NAME, "input": texts[:-1]}, timeout=300)
        assert response.status_code == 200
        assert len(response.json()["data"]) == 2_048
        refused = httpx2.post(f"{address}/v1/embeddings", json={"model": NAME, "input": texts}, timeout=300)
        assert refused.status_code == 400
        message = refused.json()["error"]["message"]
        assert "2,049 texts; this server takes 2,048 in a request (max_texts)" in message
        assert "chunk_size" in message
