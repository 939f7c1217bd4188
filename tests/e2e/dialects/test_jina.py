"""Rerankers of Haystack and LlamaIndex that are made for Jina, against the server, and what they do not send."""

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

    def ask(model, **settings):
        ranker = module.JinaRanker(
            model, api_key=Secret.from_token("none"), base_url=f"{address}/v1/rerank", **settings
        )
        return ranker.run(query=QUERY, documents=[Document(content=text) for text in TEXTS])

    order, scores = ranking(student, QUERY, TEXTS)
    found = ask(NAME)
    assert [document.content for document in found["documents"]] == [TEXTS[place] for place in order]
    assert np.allclose([document.score for document in found["documents"]], scores, atol=1e-6)
    assert found["meta"]["model"] == NAME
    assert found["meta"]["usage"]["total_tokens"] > 0
    assert ask(NAME, top_k=3)["documents"] == found["documents"][:3]
    with pytest.raises(RuntimeError, match="there is tiny"):
        ask("jina-reranker-v3")


def test_llama_indexs_ranker(address, student):
    module = pytest.importorskip(
        "llama_index.postprocessor.jinaai_rerank",
        reason="needs LlamaIndex's ranker: pip install llama-index-postprocessor-jinaai-rerank",
    )
    from llama_index.core.schema import NodeWithScore, TextNode

    def ask(model):
        ranker = module.JinaRerank(top_n=3, model=model, base_url=f"{address}/v1", api_key="none")
        return ranker.postprocess_nodes([NodeWithScore(node=TextNode(text=text)) for text in TEXTS], query_str=QUERY)

    order, scores = ranking(student, QUERY, TEXTS)
    assert [node.text for node in ask(NAME)] == [TEXTS[place] for place in order[:3]]
    assert np.allclose([node.score for node in ask(NAME)], scores[:3], atol=1e-6)
    with pytest.raises(RuntimeError, match="there is tiny"):
        ask("jina-reranker-v1-base-en")


def test_documents_may_be_objects_and_are_repeated(post, student):
    order, _ = ranking(student, QUERY, TEXTS)
    documents = [text if place % 2 else {"text": text} for place, text in enumerate(TEXTS)]
    answer = post("/v1/rerank", {"model": NAME, "query": QUERY, "documents": documents})
    assert [result["document"]["text"] for result in answer["results"]] == [TEXTS[place] for place in order]
    assert set(answer) == {"id", "model", "object", "usage", "results"}
    assert post("/v1/rerank", {"query": QUERY, "documents": TEXTS[0]})["results"][0]["document"] == {"text": TEXTS[0]}
    body = {"query": QUERY, "documents": TEXTS, "top_n": 3, "return_documents": False}
    assert [set(result) for result in post("/v1/rerank", body)["results"]] == [{"index", "relevance_score"}] * 3


def test_long_documents_are_cut_unless_that_is_unwanted(post):
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
        ({"max_doc_length": 10}, "max_tokens_per_doc", "invalid_request", "cut to 64 tokens; give no less"),
        ({"truncation_side": "left"}, "truncation_side", "literal_error", "'right'"),
        ({"return_embeddings": True}, "return_embeddings", "invalid_request", "no vectors"),
    ],
)
def test_errors_name_the_field(post, settings, field, kind, message):
    answer = post("/v1/rerank", {"query": QUERY, "documents": TEXTS} | settings, 422)
    assert set(answer) == {"detail", "request_id", "errors"}
    (error,) = answer["errors"]
    assert (error["field"], error["type"], error["input"]) == (f"body -> {field}", kind, None)
    assert error["message"] == answer["detail"]
    assert re.search(message, answer["detail"])


def test_overload(ask, overloaded):
    answer = ask("/v1/rerank", {"query": QUERY, "documents": TEXTS}, 429)
    assert answer.headers["retry-after"] == "3"
    assert set(answer.json()["detail"]) == {"message", "request_id", "code"}
    assert answer.json()["detail"]["code"] == "overloaded"
