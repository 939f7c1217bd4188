"""Haystack's components for vLLM, and OpenAI's client calling vLLM's routes, against the server."""

from __future__ import annotations

import base64
from dataclasses import replace

import numpy as np
import pytest

from tiny_models import TEXTS

pytest.importorskip("fastapi", reason="needs FastAPI: pip install 'd2llm[serve]'")
from tiny_clients import LONG, NAME, QUERY, logits_of, ranking, sigmoid, unit


@pytest.fixture
def documents():
    haystack = pytest.importorskip("haystack", reason="needs Haystack: pip install 'd2llm[haystack]'")
    pytest.importorskip("haystack_integrations.common.vllm", reason="needs its components: pip install vllm-haystack")
    return [haystack.Document(content=text) for text in TEXTS]


@pytest.mark.parametrize("base", ["/v1", ""], ids=["/v1/rerank", "/rerank"])
def test_haystacks_ranker(address, student, documents, base):
    from haystack_integrations.components.rankers.vllm import VLLMRanker

    order, scores = ranking(student, QUERY, TEXTS)
    ranker = VLLMRanker(
        model=NAME, api_base_url=address + base, top_k=3, extra_parameters={"truncate_prompt_tokens": -1}
    )
    results = ranker.run(query=QUERY, documents=documents)
    assert [document.content for document in results["documents"]] == [TEXTS[index] for index in order[:3]]
    assert np.allclose([document.score for document in results["documents"]], scores[:3], atol=1e-6)
    assert results["meta"]["usage"]["prompt_tokens"] == results["meta"]["usage"]["total_tokens"] > 0
    with pytest.raises(RuntimeError, match="there is tiny"):
        VLLMRanker(model="bge-reranker", api_base_url=address + base).run(query=QUERY, documents=documents)


def test_haystacks_embedders(address, student, documents):
    from haystack_integrations.components.embedders.vllm import VLLMDocumentEmbedder, VLLMTextEmbedder

    settings = {"api_base_url": f"{address}/v1", "extra_parameters": {"truncate_prompt_tokens": -1}}
    query = VLLMTextEmbedder(model=f"{NAME}:query", **settings).run(QUERY)["embedding"]
    dot_query = student.query_vectors(student.encode_queries([QUERY]).vectors)
    assert np.allclose(query, unit(dot_query)[0], atol=1e-6)
    passages = [replace(documents[0], content=LONG), *documents[1:]]
    embedded = VLLMDocumentEmbedder(model=NAME, **settings).run(passages)["documents"]
    vectors = student.encode_passages([LONG, *TEXTS[1:]]).vectors
    assert np.allclose([document.embedding for document in embedded], unit(vectors), atol=1e-6)


@pytest.fixture
def score(address):
    """Posts with OpenAI's client, as vLLM's users do to routes for which it has no method."""
    openai = pytest.importorskip("openai", reason="needs OpenAI's client: pip install openai")
    with openai.OpenAI(base_url=address, api_key="none", max_retries=0) as client:
        yield lambda body, path="/score": client.post(path, body=body, cast_to=object)


@pytest.mark.parametrize(
    "names", [("text_1", "text_2"), ("queries", "documents"), ("queries", "items"), ("data_1", "data_2")]
)
@pytest.mark.parametrize("path", ["/score", "/v1/score"])
def test_scores_of_one_text_with_each_of_several(score, student, path, names):
    response = score({names[0]: QUERY, names[1]: TEXTS}, path)
    scores = [item["score"] for item in response["data"]]
    assert np.allclose(scores, sigmoid(logits_of(student, QUERY, TEXTS)), atol=1e-6)
    tokens = sum(student.encode_queries([QUERY]).lengths) + sum(student.encode_passages(TEXTS).lengths)
    assert response["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0}
    assert response["id"].startswith("score-")


def test_scores_of_pairs(score, student):
    queries = [QUERY, TEXTS[3], QUERY]
    response = score({"model": NAME, "text_1": queries, "text_2": TEXTS[:3], "use_activation": False})
    logits = [logits_of(student, query, [text])[0] for query, text in zip(queries, TEXTS[:3], strict=True)]
    assert np.allclose([item["score"] for item in response["data"]], logits, atol=1e-3)


@pytest.fixture
def pool(score):
    return lambda body: score(body, "/pooling")


def test_pooling_of_texts(pool, student):
    encoded = student.encode_passages(TEXTS)
    response = pool({"model": NAME, "input": TEXTS, "task": "embed"})
    assert [(item["index"], item["object"]) for item in response["data"]] == [(n, "pooling") for n in range(len(TEXTS))]
    assert np.allclose([item["data"] for item in response["data"]], unit(encoded.vectors), atol=1e-6)
    assert response["usage"]["prompt_tokens"] == sum(encoded.lengths)
    raw = pool({"input": TEXTS, "use_activation": False})
    assert np.allclose([item["data"] for item in raw["data"]], encoded.vectors, atol=1e-5)
    query = pool({"model": f"{NAME}:query", "input": QUERY, "encoding_format": "base64"})
    dot_query = student.query_vectors(student.encode_queries([QUERY]).vectors)
    vector = np.frombuffer(base64.b64decode(query["data"][0]["data"]), "<f4")
    assert np.allclose(vector, unit(dot_query)[0], atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message", "param"),
    [
        ({"task": "token_embed"}, "tiny has no token embeddings", None),
        ({"task": "classify"}, "task: ", "task"),
        ({"input": ["a", LONG]}, "input.1: longer than the 64 tokens", "input.1"),
        ({"input": [1, 2]}, "token ids are not supported", "input"),
        ({"dimensions": 5}, "not trained to be cut to 5", "dimensions"),
        ({"messages": []}, "messages: there is no such field", "messages"),
    ],
)
def test_errors_of_pooling(pool, settings, message, param):
    import openai

    with pytest.raises(openai.BadRequestError, match=message) as excinfo:
        pool({"input": TEXTS} | settings)
    assert excinfo.value.param == param


@pytest.mark.parametrize(
    ("settings", "status", "kind", "param"),
    [
        ({"model": "bge-reranker"}, 404, "NotFoundError", "model"),
        ({"text_1": ["a", "b"]}, 400, "BadRequestError", "text_1"),
        ({"text_1": LONG}, 400, "BadRequestError", "text_1"),
        ({"text_2": ["a", LONG]}, 400, "BadRequestError", "text_2.1"),
        ({"max_tokens_per_doc": 10}, 400, "BadRequestError", "max_tokens_per_doc"),
        ({"text_2": []}, 400, "Bad Request", "text_2"),
        ({"text_2": ["a", 1]}, 400, "Bad Request", "text_2"),
        ({"truncate_prompt_tokens": 10}, 400, "BadRequestError", "truncate_prompt_tokens"),
    ],
)
def test_errors(score, settings, status, kind, param):
    import openai

    with pytest.raises(openai.APIStatusError) as excinfo:
        score({"text_1": QUERY, "text_2": TEXTS} | settings)
    assert (excinfo.value.status_code, excinfo.value.code) == (status, str(status))
    assert (excinfo.value.type, excinfo.value.param) == (kind, param)


@pytest.mark.parametrize("options", [{"truncate_prompt_tokens": -1}, {"max_tokens_per_doc": 64}], ids=str)
def test_texts_are_truncated_on_request(score, student, options):
    response = score({"text_1": QUERY, "text_2": LONG, "use_activation": False} | options)
    assert np.isclose(response["data"][0]["score"], logits_of(student, QUERY, [LONG])[0], atol=1e-3)


def test_overload(score, overloaded):
    import openai

    with pytest.raises(openai.RateLimitError) as excinfo:
        score({"text_1": QUERY, "text_2": TEXTS})
    assert excinfo.value.type == "Too Many Requests"
