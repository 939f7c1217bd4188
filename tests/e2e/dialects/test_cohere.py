"""Cohere's own client against the server."""

from __future__ import annotations

import base64

import numpy as np
import pytest

from late_import import late_import
from tiny_models import TEXTS

pytest.importorskip("fastapi", reason="needs FastAPI: pip install 'd2llm[serve]'")
cohere = late_import("cohere", reason="needs Cohere's client: pip install cohere")

from tiny_clients import LONG, LONG_TOO, NAME, QUERY, ranking, unit  # noqa: E402


@pytest.fixture
def client(address):
    return cohere.ClientV2(api_key="none", base_url=address)


def test_rerank(client, student):
    order, scores = ranking(student, QUERY, TEXTS)
    response = client.rerank(model=NAME, query=QUERY, documents=TEXTS)
    assert [result.index for result in response.results] == order
    assert np.allclose([result.relevance_score for result in response.results], scores, atol=1e-6)
    token_counts = [*student.encode_passages(TEXTS).lengths, *student.encode_queries([QUERY]).lengths]
    assert response.meta.tokens.input_tokens == sum(token_counts)
    assert response.meta.warnings is None
    best = client.rerank(model=NAME, query=QUERY, documents=TEXTS, top_n=2, max_tokens_per_doc=4096, priority=1)
    assert best.results == response.results[:2]


def test_equal_documents_stay_in_order(client):
    response = client.rerank(model=NAME, query=QUERY, documents=[TEXTS[0]] * 4)
    assert [result.index for result in response.results] == [0, 1, 2, 3]


def test_the_response_warns_of_truncated_texts(client):
    response = client.rerank(model=NAME, query=LONG, documents=["a cat", LONG])
    assert response.meta.warnings == ["the query was truncated to 64 tokens", LONG_TOO]


def test_the_v1_client_is_served_by_jinas_route(address, student):
    order, scores = ranking(student, QUERY, TEXTS)
    client = cohere.Client(api_key="none", base_url=address)
    response = client.rerank(
        model=NAME, query=QUERY, documents=[{"text": text} for text in TEXTS], return_documents=True
    )
    assert [result.document.text for result in response.results] == [TEXTS[index] for index in order]
    assert np.allclose([result.relevance_score for result in response.results], scores, atol=1e-6)


@pytest.fixture
def passages(student):
    return unit(student.encode_passages(TEXTS).vectors)


@pytest.mark.parametrize("input_type", ["search_document", "classification", "clustering"])
def test_embed(client, student, passages, input_type):
    response = client.embed(model=NAME, texts=TEXTS, input_type=input_type)
    assert np.allclose(response.embeddings.float_, passages, atol=1e-6)
    assert response.texts == TEXTS
    tokens = sum(student.encode_passages(TEXTS).lengths)
    assert response.meta.billed_units.input_tokens == response.meta.tokens.input_tokens == tokens
    assert response.meta.warnings is None


def test_embed_queries_for_inner_products(client, student):
    response = client.embed(model=NAME, texts=[QUERY], input_type="search_query")
    dot_query = student.query_vectors(student.encode_queries([QUERY]).vectors)
    assert np.allclose(response.embeddings.float_, unit(dot_query), atol=1e-6)


def test_embed_with_other_numbers(client, passages):
    types = ["float", "int8", "uint8", "binary", "ubinary", "base64"]
    response = client.embed(model=NAME, texts=TEXTS, input_type="search_document", embedding_types=types)
    numbers = {name: np.array(getattr(response.embeddings, name)) for name in types[1:5]}
    assert np.allclose(response.embeddings.float_, passages, atol=1e-6)
    assert np.abs(numbers["int8"] / 127 - passages).max() <= 0.5 / 127 + 1e-6
    assert (numbers["uint8"] == numbers["int8"] + 128).all()
    assert (np.unpackbits(numbers["ubinary"].astype(np.uint8), axis=1) == (passages > 0)).all()
    assert (numbers["binary"] == numbers["ubinary"] - 128).all()
    decoded = [np.frombuffer(base64.b64decode(text), "<f4") for text in response.embeddings.base64]
    assert np.allclose(decoded, passages, atol=1e-6)
    only = client.embed(model=NAME, texts=TEXTS, input_type="search_document", embedding_types=["ubinary"]).embeddings
    assert only.ubinary == response.embeddings.ubinary
    assert only.float_ is None


def test_embed_by_version_1(address, passages):
    client = cohere.Client(api_key="none", base_url=address)
    texts = TEXTS * 4  # the client sends 96 texts at a time, but no more than this server takes
    response = client.embed(model=NAME, texts=texts[:32], input_type="search_document")
    assert response.response_type == "embeddings_floats"
    assert np.allclose(response.embeddings, np.tile(passages, (4, 1)), atol=1e-6)
    assert np.allclose(client.embed(texts=TEXTS).embeddings, passages, atol=1e-6)
    by_type = client.embed(model=NAME, texts=TEXTS, embedding_types=["int8", "float"])
    assert by_type.response_type == "embeddings_by_type"
    assert np.allclose(by_type.embeddings.float_, passages, atol=1e-6)
    assert len(by_type.embeddings.int8) == len(TEXTS)


def test_embed_truncates_as_asked(client, student):
    response = client.embed(model=NAME, texts=["a cat", LONG], input_type="search_document", max_tokens=64)
    assert response.meta.warnings == [LONG_TOO.replace("documents", "texts")]
    assert np.allclose(response.embeddings.float_[1], unit(student.encode_passages([LONG]).vectors)[0], atol=1e-6)
    with pytest.raises(cohere.BadRequestError, match=r"texts.1: longer than the 64 tokens.*leave truncate out"):
        client.embed(model=NAME, texts=["a cat", LONG], input_type="search_document", truncate="NONE")


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"model": "embed-v4.0"}, "NotFoundError", "there is tiny"),
        ({"texts": []}, "BadRequestError", "the list is empty"),
        ({"texts": ["a"] * 33}, "BadRequestError", "33 texts"),
        ({"images": ["data:image/png;base64,AA=="]}, "BadRequestError", "images: it is not supported"),
        ({"inputs": [{"content": [{"type": "text", "text": "a"}]}]}, "BadRequestError", "inputs: it is not supported"),
        ({"input_type": "image"}, "BadRequestError", "input_type"),
        ({"truncate": "START"}, "BadRequestError", "truncate"),
        ({"embedding_types": ["float16"]}, "BadRequestError", "embedding_types.0"),
        ({"embedding_types": []}, "BadRequestError", "embedding_types"),
        ({"output_dimension": 5}, "BadRequestError", "output_dimension: .* not trained to be cut to 5"),
        ({"max_tokens": 10}, "BadRequestError", "max_tokens: texts are truncated to 64 tokens"),
    ],
)
def test_errors_of_embed(client, settings, error, message):
    with pytest.raises(getattr(cohere, error), match=message) as excinfo:
        client.embed(**({"model": NAME, "texts": TEXTS, "input_type": "search_document"} | settings))
    assert set(excinfo.value.body) == {"id", "message"}


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"model": "rerank-v3.5"}, "NotFoundError", "there is tiny"),
        ({"documents": []}, "BadRequestError", "the list is empty"),
        ({"documents": ["a", ""]}, "BadRequestError", "number 1 is empty"),
        ({"query": ""}, "BadRequestError", "at least 1 character"),
        ({"top_n": 0}, "BadRequestError", "top_n"),
        ({"documents": ["a"] * 33}, "BadRequestError", "33 texts"),
        ({"max_tokens_per_doc": 10}, "BadRequestError", "texts are truncated to 64 tokens; give no less"),
        ({"relevant_spans": {"enabled": True}}, "UnprocessableEntityError", "relevant_spans"),
    ],
)
def test_errors(client, settings, error, message):
    with pytest.raises(getattr(cohere, error), match=message) as excinfo:
        client.rerank(**({"model": NAME, "query": QUERY, "documents": TEXTS} | settings))
    assert set(excinfo.value.body) == {"id", "message"}


def test_overload(client, overloaded):
    with pytest.raises(cohere.TooManyRequestsError) as excinfo:
        client.rerank(model=NAME, query=QUERY, documents=TEXTS, request_options={"max_retries": 0})
    assert excinfo.value.headers["retry-after"] == "3"
