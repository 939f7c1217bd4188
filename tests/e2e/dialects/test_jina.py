"""Haystack's and LlamaIndex's clients for Jina against the server, and requests that those do not send."""

from __future__ import annotations

import base64
import re

import numpy as np
import pytest

from tiny_models import TEXTS

pytest.importorskip("fastapi", reason="needs FastAPI: pip install 'd2llm[serve]'")
from tiny_clients import LONG, LONG_TOO, NAME, QUERY, ranking, unit


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
        ({"top_n": True}, "top_n", "int_type", "must be a whole number"),
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


@pytest.fixture
def passages(student):
    return unit(student.encode_passages(TEXTS).vectors)


@pytest.fixture
def dot_query(student):
    return unit(student.query_vectors(student.encode_queries([QUERY]).vectors))[0]


def test_haystacks_embedders(address, passages, dot_query):
    module = pytest.importorskip(
        "haystack_integrations.components.embedders.jina",
        reason="needs Haystack's embedders: pip install jina-haystack",
    )
    from haystack import Document
    from haystack.utils import Secret

    settings = {"api_key": Secret.from_token("none"), "base_url": f"{address}/v1/embeddings"}
    query = module.JinaTextEmbedder(model=NAME, task="retrieval.query", **settings).run(QUERY)
    assert np.allclose(query["embedding"], dot_query, atol=1e-6)
    assert query["meta"]["usage"]["total_tokens"] > 0
    embedder = module.JinaDocumentEmbedder(model=NAME, task="retrieval.passage", progress_bar=False, **settings)
    embedded = embedder.run([Document(content=text) for text in TEXTS])["documents"]
    assert np.allclose([document.embedding for document in embedded], passages, atol=1e-6)
    with pytest.raises(RuntimeError, match="late_chunking: each text is embedded by itself"):
        module.JinaTextEmbedder(model=NAME, late_chunking=True, **settings).run(QUERY)


def test_llamaindexs_embedder(address, passages, dot_query):
    module = pytest.importorskip(
        "llama_index.embeddings.jinaai", reason="needs LlamaIndex's client: pip install llama-index-embeddings-jinaai"
    )

    def embedder(model=NAME, **settings):
        made = module.JinaEmbedding(api_key="none", model=model, **settings)
        made._api.api_url = f"{address}/v1/embeddings"  # it takes no address
        return made

    assert np.allclose(embedder(task="retrieval.query").get_query_embedding(QUERY), dot_query, atol=1e-6)
    for kind in ("binary", "ubinary"):
        bits = embedder(encoding_documents=kind).get_text_embedding_batch(TEXTS)
        assert (bits == (passages > 0)).all()
    with pytest.raises(RuntimeError, match="there is tiny"):
        embedder("jina-embeddings-v3").get_query_embedding(QUERY)


def test_embedding_types(post, passages, student):
    body = {"model": NAME, "input": [TEXTS[0], {"text": TEXTS[1]}], "task": "text-matching"}

    def values(**settings):
        return [item["embedding"] for item in post("/v1/embeddings", body | settings)["data"]]

    assert np.allclose(values(), passages[:2], atol=1e-6)
    decoded = [np.frombuffer(base64.b64decode(text), "<f4") for text in values(embedding_type="base64")]
    assert np.allclose(decoded, passages[:2], atol=1e-6)
    assert (np.array(values(embedding_type="int8")) == np.rint(127 * passages[:2])).all()
    plain = student.encode_passages(TEXTS[:2]).vectors
    assert np.allclose(values(normalized=False), plain, atol=1e-5)


def test_long_texts_are_an_error_unless_truncated(ask):
    body = {"model": NAME, "input": ["a", LONG], "truncate": False}
    assert "input.1: longer than the 64 tokens" in ask("/v1/embeddings", body, 400).text
    response = ask("/v1/embeddings", body | {"truncate": True})
    assert response.headers["x-warning"] == "input: truncated to 64 tokens, at positions 1"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": "translation"}, "task: must be 'retrieval.query'"),
        ({"embedding_type": "float16"}, "embedding_type: must be"),
        ({"embedding_type": "binary", "normalized": False}, "normalized: binary is made of vectors of length 1"),
        ({"return_multivector": True}, "return_multivector: for vectors of tokens, use /pooling"),
        ({"input": [{"image": "https://example.org/a.png"}]}, "number 0 is neither a text nor"),
        ({"dimensions": 5, "task": "text-matching"}, "not trained to be cut to 5"),
        ({"task": "text-matching", "user": "a"}, "user: there is no such field"),
    ],
)
def test_errors_of_embeddings(post, settings, message):
    response = post("/v1/embeddings", {"model": NAME, "input": TEXTS} | settings, 400)
    assert message in response["error"]["message"]
    assert response["detail"] == response["error"]["message"]
