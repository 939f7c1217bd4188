"""Hugging Face's client, and Haystack's and LlamaIndex's for Text Embeddings Inference, against the server."""

from __future__ import annotations

import numpy as np
import pytest

from d2llm.store.background_words import background_for
from d2llm.store.bm25 import WordIndex
from d2llm.store.word_segment import CountedTerms
from tiny_models import TEXTS

pytest.importorskip("fastapi", reason="needs FastAPI: pip install 'd2llm[serve]'")
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError

from tiny_clients import LONG, NAME, QUERY, logits_of, ranking, sigmoid, unit


@pytest.fixture
def client(online):
    return InferenceClient(token="none")


def test_feature_extraction(client, address, student):
    url = f"{address}/embed"
    plain = student.encode_passages(TEXTS).vectors
    assert np.allclose(client.feature_extraction(TEXTS, model=url), unit(plain), atol=1e-6)
    assert np.allclose(client.feature_extraction(TEXTS, model=url, normalize=False), plain, atol=1e-5)
    full_width = client.feature_extraction(TEXTS, model=url, normalize=False, dimensions=student.vector_dim)
    assert np.allclose(full_width, plain, atol=1e-5)
    with pytest.raises(HfHubHTTPError, match="not trained to be cut to 4"):
        client.feature_extraction(TEXTS, model=url, dimensions=4)


def test_inner_products_of_raw_vectors_are_the_inner_products(client, address, student):
    url = f"{address}/embed"
    query = client.feature_extraction(QUERY, model=url, prompt_name="query", normalize=False)[0]
    passages = client.feature_extraction(TEXTS, model=url, prompt_name="passage", normalize=False)
    dot_query = student.query_vectors(student.encode_queries([QUERY]).vectors)[0]
    assert np.allclose(passages @ query, student.encode_passages(TEXTS).vectors @ dot_query, rtol=1e-4, atol=1e-3)


def test_feature_extraction_of_long_texts(client, address, student):
    url = f"{address}/embed"
    truncated = client.feature_extraction(["a cat", LONG], model=url)
    assert np.allclose(truncated, unit(student.encode_passages(["a cat", LONG]).vectors), atol=1e-6)
    with pytest.raises(HfHubHTTPError) as excinfo:
        client.feature_extraction(["a cat", LONG], model=url, truncate=False)
    assert excinfo.value.response.status_code == 422
    assert excinfo.value.response.json()["error_type"] == "Validation"


def test_sentence_similarity(client, address, student):
    vectors = unit(student.encode_passages(TEXTS).vectors)
    similarities = client.sentence_similarity(TEXTS[0], other_sentences=TEXTS[1:], model=f"{address}/similarity")
    assert np.allclose(similarities, vectors[1:] @ vectors[0], atol=1e-6)


def test_haystack(address, student, online):
    reason = "needs Haystack's components: pip install huggingface-api-haystack"
    rankers = pytest.importorskip("haystack_integrations.components.rankers.huggingface_api", reason=reason)
    from haystack import Document
    from haystack_integrations.components.embedders.huggingface_api import HuggingFaceAPITextEmbedder

    ranker = rankers.HuggingFaceTEIRanker(url=address, top_k=3, token=None, max_retries=1)
    order, scores = ranking(student, QUERY, TEXTS)
    ranked = ranker.run(query=QUERY, documents=[Document(content=text) for text in TEXTS])["documents"]
    assert [document.content for document in ranked] == [TEXTS[index] for index in order[:3]]
    assert np.allclose([document.score for document in ranked], scores[:3], atol=1e-6)
    with pytest.raises(RuntimeError, match="33 texts; this server takes 32 in a request"):
        ranker.run(query=QUERY, documents=[Document(content=f"text {number}") for number in range(33)])
    embedder = HuggingFaceAPITextEmbedder(
        "text_embeddings_inference", {"url": f"{address}/embed"}, token=None, normalize=True
    )
    vector = embedder.run(LONG)["embedding"]
    assert np.allclose(vector, unit(student.encode_passages([LONG]).vectors)[0], atol=1e-6)


def test_llama_index(address, student):
    reason = "needs LlamaIndex's clients: pip install llama-index-postprocessor-tei-rerank"
    rankers = pytest.importorskip("llama_index.postprocessor.tei_rerank", reason=reason)
    embedders = pytest.importorskip("llama_index.embeddings.text_embeddings_inference", reason=reason)
    from llama_index.core.schema import NodeWithScore, TextNode

    passages = [*TEXTS, LONG]
    nodes = [NodeWithScore(node=TextNode(text=text)) for text in passages]
    ranked = rankers.TextEmbeddingInference(base_url=address, top_n=3).postprocess_nodes(nodes, query_str=QUERY)
    assert np.allclose([node.score for node in ranked], ranking(student, QUERY, passages)[1][:3], atol=1e-6)
    probabilities = dict(zip(passages, sigmoid(logits_of(student, QUERY, passages)), strict=True))
    assert np.allclose([node.score for node in ranked], [probabilities[node.text] for node in ranked], atol=1e-6)
    embedder = embedders.TextEmbeddingsInference(model_name=NAME, base_url=address)
    vectors = unit(student.encode_passages(passages).vectors)
    assert np.allclose(embedder.get_text_embedding_batch(passages), vectors, atol=1e-5)


def test_rerank_returns_raw_scores_and_texts_on_request(post, student):
    order, _ = ranking(student, QUERY, TEXTS)
    response = post("/rerank", {"query": QUERY, "texts": TEXTS, "raw_scores": True, "return_text": True})
    assert [result["index"] for result in response] == order
    assert np.allclose([result["score"] for result in response], logits_of(student, QUERY, TEXTS)[order], atol=1e-3)
    assert [result["text"] for result in response] == [TEXTS[index] for index in order]


def test_predict(post, student):
    pairs = [[QUERY, TEXTS[0]], [TEXTS[1], TEXTS[2]]]
    logits = [logits_of(student, query, [text])[0] for query, text in pairs]
    predictions = post("/predict", {"inputs": pairs})
    assert [[prediction["label"] for prediction in one] for one in predictions] == [["LABEL_0"], ["LABEL_0"]]
    assert np.allclose([one[0]["score"] for one in predictions], sigmoid(np.array(logits)), atol=1e-6)
    raw = post("/predict", {"inputs": pairs, "raw_scores": True})
    assert np.allclose([one[0]["score"] for one in raw], logits, atol=1e-3)
    assert post("/predict", {"inputs": pairs[0]}) == predictions[0]


def test_embed_all_needs_token_embeddings(post):
    response = post("/embed_all", {"inputs": TEXTS}, 422)
    assert response["error_type"] == "Validation"
    assert "tiny has no token embeddings" in response["error"]


def test_sparse_products_are_bm25_by_the_background(ask):
    queries, passages = [QUERY, "snow in winter, snow"], [*TEXTS, "a cat and a cat"]
    response = ask("/embed_sparse", {"inputs": queries, "prompt_name": "query"})
    assert response.headers["x-word-statistics"] == "background"
    table, words = background_for(QUERY), WordIndex.from_texts(passages).within(background_for(QUERY).statistics)
    sparse = [
        {item["index"]: item["value"] for item in text} for text in ask("/embed_sparse", {"inputs": passages}).json()
    ]
    for text, query in zip(queries, response.json(), strict=True):
        counted = CountedTerms.from_text(text)
        weighted = counted.weighted(table.count_words(counted.hashes), table.statistics.num_passages)
        expected, _ = words.score(weighted, np.arange(len(passages)))
        products = [sum(item["value"] * one.get(item["index"], 0.0) for item in query) for one in sparse]
        assert np.allclose(products, expected, rtol=1e-5)
        assert max(expected) > 0


@pytest.mark.parametrize(
    ("path", "body", "status", "kind"),
    [
        ("/predict", {"inputs": [QUERY]}, 422, "Validation"),
        ("/predict", {"inputs": [["a", "b"], ["a"]]}, 422, "Validation"),
        ("/predict", {"inputs": [["a", ""]]}, 400, "Empty"),
        ("/predict", {"inputs": [[LONG, "a"]], "truncate": False}, 422, "Validation"),
        ("/embed_sparse", {"inputs": []}, 400, "Empty"),
        ("/embed_sparse", {"inputs": "a", "normalize": True}, 422, "Validation"),
        ("/embed", {"inputs": []}, 400, "Empty"),
        ("/embed", {"inputs": ["a", ""]}, 400, "Empty"),
        ("/rerank", {"query": "", "texts": ["a"]}, 400, "Empty"),
        ("/similarity", {"inputs": {"source_sentence": "a", "sentences": []}}, 400, "Empty"),
        ("/embed", {"inputs": ["a"] * 33}, 422, "Validation"),
        ("/embed", {"inputs": "a" * 2_001, "truncate": False}, 422, "Validation"),
        ("/embed", {"inputs": "a", "prompt_name": "title"}, 422, "Validation"),
        ("/embed", {"inputs": "a", "truncation_direction": "Left"}, 422, "Validation"),
        ("/embed", {"inputs": "a", "dimensions": 33}, 422, "Validation"),
        ("/rerank", {"query": LONG, "texts": ["a"], "truncate": False}, 422, "Validation"),
        ("/rerank", {"query": "a", "documents": 3}, 422, "Validation"),
        ("/rerank", ["a"], 422, "Validation"),
    ],
)
def test_errors(post, path, body, status, kind):
    response = post(path, body, status)
    assert set(response) == {"error", "error_type"}
    assert response["error_type"] == kind


def test_rerank_errors_name_the_fields_of_one_interface(post):
    assert post("/rerank", {"query": "a"}, 422)["error"] == "texts: Field required"
    assert post("/rerank", {"documents": ["a"]}, 422)["error"] == "query: Field required"


def test_overload(post, overloaded):
    assert post("/embed", {"inputs": "a"}, 429)["error_type"] == "Overloaded"


def test_info(ask, student):
    response = ask("/info").json()
    assert (response["model_id"], response["model_sha"], response["model_dtype"]) == (
        NAME,
        student.fingerprint,
        "float32",
    )
    assert (response["max_client_batch_size"], response["max_input_length"]) == (32, 64)
    assert response["auto_truncate"]
