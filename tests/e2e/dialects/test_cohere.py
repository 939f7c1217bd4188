"""Cohere's own client against the server."""

from __future__ import annotations

import numpy as np
import pytest

from late_import import late_import
from tiny_models import TEXTS

pytest.importorskip("fastapi", reason="needs FastAPI: pip install 'd2llm[serve]'")
cohere = late_import("cohere", reason="needs Cohere's client: pip install cohere")

from tiny_clients import LONG, LONG_TOO, NAME, QUERY, ranking  # noqa: E402


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
