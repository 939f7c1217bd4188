"""Haystack's and LlamaIndex's rerankers for Jina against the server, and requests that those do not send."""

from __future__ import annotations

import re

import numpy as np
import pytest

from tiny_models import TEXTS

pytest.importorskip("fastapi", reason="needs FastAPI: pip install 'd2llm[serve]'")
from tiny_clients import LONG, LONG_TOO, NAME, QUERY, ranking


def test_haystacks_ranker(address, student):
    module = pytest.importorskip(
        "haystack_integrations.components.rankers.jina", reason="needs Haystack's ranker: pip install jina-haystack"
    )
    from haystack import Document
    from haystack.utils import Secret

    def rerank(model, **settings):
        ranker = module.JinaRanker(
            model, api_key=Secret.from_token("none"), base_url=f"{address}/v1/rerank", **settings
        )
        return ranker.run(query=QUERY, documents=[Document(content=text) for text in TEXTS])

    order, scores = ranking(student, QUERY, TEXTS)
    results = rerank(NAME)
    assert [document.content for document in results["documents"]] == [TEXTS[index] for index in order]
    assert np.allclose([document.score for document in results["documents"]], scores, atol=1e-6)
    assert results["meta"]["model"] == NAME
    assert results["meta"]["usage"]["total_tokens"] > 0
    assert rerank(NAME, top_k=3)["documents"] == results["documents"][:3]
    with pytest.raises(RuntimeError, match="there is tiny"):
        rerank("jina-reranker-v3")


def test_llamaindexs_ranker(address, student):
    module = pytest.importorskip(
        "llama_index.postprocessor.jinaai_rerank",
        reason="needs LlamaIndex's ranker: pip install llama-index-postprocessor-jinaai-rerank",
    )
    from llama_index.core.schema import NodeWithScore, TextNode

    def rerank(model):
        ranker = module.JinaRerank(top_n=3, model=model, base_url=f"{address}/v1", api_key="none")
        return ranker.postprocess_nodes([NodeWithScore(node=TextNode(text=text)) for text in TEXTS], query_str=QUERY)

    order, scores = ranking(student, QUERY, TEXTS)
    assert [node.text for node in rerank(NAME)] == [TEXTS[index] for index in order[:3]]
    assert np.allclose([node.score for node in rerank(NAME)], scores[:3], atol=1e-6)
    with pytest.raises(RuntimeError, match="there is tiny"):
        rerank("jina-reranker-v1-base-en")


def test_documents_may_be_objects_and_are_returned(post, student):
    order, _ = ranking(student, QUERY, TEXTS)
    documents = [text if index % 2 else {"text": text} for index, text in enumerate(TEXTS)]
    response = post("/v1/rerank", {"model": NAME, "query": QUERY, "documents": documents})
    assert [result["document"]["text"] for result in response["results"]] == [TEXTS[index] for index in order]
    assert set(response) == {"id", "model", "object", "usage", "results"}
    assert post("/v1/rerank", {"query": QUERY, "documents": TEXTS[0]})["results"][0]["document"] == {"text": TEXTS[0]}
    body = {"query": QUERY, "documents": TEXTS, "top_n": 3, "return_documents": False}
    assert [set(result) for result in post("/v1/rerank", body)["results"]] == [{"index", "relevance_score"}] * 3


def test_long_documents_are_cut_unless_truncation_is_off(post):
    body = {"query": QUERY, "documents": ["a", LONG]}
    assert post("/v1/rerank", body | {"max_doc_length": 64, "truncate_prompt_tokens": -1})["warnings"] == [LONG_TOO]
    for name in ("truncate", "truncation"):
        error = post("/v1/rerank", body | {name: False}, 422)["errors"][0]
        assert error["field"] == "body -> documents -> 1"
        assert error["message"].startswith("documents.1: longer than the 64 tokens")


@pytest.mark.parametrize(
    ("settings", "field", "kind", "message"),
    [
        ({"model": "jina-reranker-v2"}, "model", "not_found", "there is tiny"),
        ({"documents": []}, "documents", "empty", "at least one document"),
        ({"documents": ["a", {"title": "b"}]}, "documents", "value_error", "number 1 is neither a text nor"),
        ({"top_n": True}, "top_n", "int_type", "valid integer"),
        ({"documents": ["a"] * 33}, "documents", "too_large", "33 texts"),
        ({"max_doc_length": 10}, "max_doc_length", "invalid_request", "truncated to 64 tokens; give no less"),
        ({"truncation_side": "left"}, "truncation_side", "literal_error", "'right'"),
        ({"return_embeddings": True}, "return_embeddings", "invalid_request", "no vectors"),
    ],
)
def test_errors_name_the_field(post, settings, field, kind, message):
    response = post("/v1/rerank", {"query": QUERY, "documents": TEXTS} | settings, 422)
    assert set(response) == {"detail", "request_id", "errors"}
    (error,) = response["errors"]
    assert (error["field"], error["type"], error["input"]) == (f"body -> {field}", kind, None)
    assert error["message"] == response["detail"]
    assert re.search(message, response["detail"])


def test_overload(ask, overloaded):
    response = ask("/v1/rerank", {"query": QUERY, "documents": TEXTS}, 429)
    assert response.headers["retry-after"] == "3"
    assert set(response.json()["detail"]) == {"message", "request_id", "code"}
    assert response.json()["detail"]["code"] == "overloaded"
