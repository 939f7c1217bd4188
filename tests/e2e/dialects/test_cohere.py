"""Cohere's own client against the server."""

from __future__ import annotations

import numpy as np
import pytest

from tiny_models import TEXTS

pytest.importorskip("fastapi", reason="needs FastAPI: pip install 'd2llm[serve]'")
cohere = pytest.importorskip("cohere", reason="needs Cohere's client: pip install cohere")

from tiny_clients import LONG, LONG_TOO, NAME, QUERY, ranking  # noqa: E402


@pytest.fixture
def client(address):
    return cohere.ClientV2(api_key="none", base_url=address)


def test_rerank(client, student):
    order, scores = ranking(student, QUERY, TEXTS)
    answer = client.rerank(model=NAME, query=QUERY, documents=TEXTS)
    assert [result.index for result in answer.results] == order
    assert np.allclose([result.relevance_score for result in answer.results], scores, atol=1e-6)
    read = [*student.encode_passages(TEXTS).lengths, *student.encode_queries([QUERY]).lengths]
    assert answer.meta.tokens.input_tokens == sum(read)
    assert answer.meta.warnings is None
    best = client.rerank(model=NAME, query=QUERY, documents=TEXTS, top_n=2, max_tokens_per_doc=4096, priority=1)
    assert best.results == answer.results[:2]


def test_equal_documents_stay_in_order(client):
    answer = client.rerank(model=NAME, query=QUERY, documents=[TEXTS[0]] * 4)
    assert [result.index for result in answer.results] == [0, 1, 2, 3]


def test_the_answer_tells_what_was_cut(client):
    answer = client.rerank(model=NAME, query=LONG, documents=["a cat", LONG])
    assert answer.meta.warnings == ["the query was cut to 64 tokens", LONG_TOO]


def test_the_first_versions_client_is_answered_by_jinas_route(address, student):
    order, scores = ranking(student, QUERY, TEXTS)
    client = cohere.Client(api_key="none", base_url=address)
    answer = client.rerank(model=NAME, query=QUERY, documents=[{"text": text} for text in TEXTS], return_documents=True)
    assert [result.document.text for result in answer.results] == [TEXTS[place] for place in order]
    assert np.allclose([result.relevance_score for result in answer.results], scores, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"model": "rerank-v3.5"}, cohere.NotFoundError, "there is tiny"),
        ({"documents": []}, cohere.BadRequestError, "the list is empty"),
        ({"documents": ["a", ""]}, cohere.BadRequestError, "number 1 is empty"),
        ({"query": ""}, cohere.BadRequestError, "at least 1 character"),
        ({"top_n": 0}, cohere.BadRequestError, "top_n"),
        ({"documents": ["a"] * 33}, cohere.BadRequestError, "33 texts"),
        ({"max_tokens_per_doc": 10}, cohere.BadRequestError, "texts are cut to 64 tokens; give no less"),
        ({"relevant_spans": {"enabled": True}}, cohere.UnprocessableEntityError, "relevant_spans"),
    ],
)
def test_errors(client, settings, error, message):
    with pytest.raises(error, match=message) as caught:
        client.rerank(**({"model": NAME, "query": QUERY, "documents": TEXTS} | settings))
    assert set(caught.value.body) == {"id", "message"}


def test_overload(client, overloaded):
    with pytest.raises(cohere.TooManyRequestsError) as caught:
        client.rerank(model=NAME, query=QUERY, documents=TEXTS, request_options={"max_retries": 0})
    assert caught.value.headers["retry-after"] == "3"
