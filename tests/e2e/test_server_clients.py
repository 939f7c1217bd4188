"""Other vendors' own clients against the server: they get the library's numbers, and their own errors."""

from __future__ import annotations

import asyncio
import base64
import re
import time

import httpx2
import numpy as np
import pytest

from d2llm import Student
from tiny_models import TEXTS, randomise, tiny_student_config, write_tiny_model
from tiny_server import write_tiny_student

pytest.importorskip("fastapi", reason="needs FastAPI: pip install 'd2llm[serve]'")
openai = pytest.importorskip("openai", reason="needs OpenAI's client: pip install openai")
cohere = pytest.importorskip("cohere", reason="needs Cohere's client: pip install cohere")

from d2llm.apps.server.errors import OverloadedError  # noqa: E402
from d2llm.apps.server.keys import add_key  # noqa: E402
from d2llm.apps.server.model_service import ModelService  # noqa: E402
from tiny_clients import LONG, MAX_TOKENS, NAME, QUERY, serving, sigmoid, unit  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("clients")


@pytest.fixture(scope="module")
def student(folder):
    return Student.load(write_tiny_student(folder), device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def address(folder, student):
    with serving(folder / "student-0", model_name=NAME, max_texts=32, max_text_chars=2_000) as found:
        yield found


@pytest.fixture
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as found:
        yield found


@pytest.fixture
def cohere_client(address):
    return cohere.ClientV2(api_key="none", base_url=address)


@pytest.fixture
def post(address):
    def ask(path, body, status=200):
        answer = httpx2.post(address + path, json=body, timeout=60)
        assert answer.status_code == status, answer.text
        return answer.json()

    return ask


# OpenAI -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"encoding_format": "float"}, {"encoding_format": "base64"}])
def test_openai_embeddings_are_the_students_of_length_one(client, student, settings):
    answer = client.embeddings.create(model=NAME, input=TEXTS, **settings)
    found = [one.embedding for one in answer.data]
    if settings.get("encoding_format") == "base64":  # asked for by name, the client leaves it as it is
        found = [np.frombuffer(base64.b64decode(one), "<f4") for one in found]
    encoded = student.encode_passages(TEXTS)
    assert np.allclose(found, unit(encoded.vectors), atol=1e-6)
    assert [one.index for one in answer.data] == list(range(len(TEXTS)))
    assert answer.model == NAME
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == sum(encoded.lengths)


def test_openai_dimensions_are_the_first_ones_again_of_length_one(client, student):
    answer = client.embeddings.create(model=NAME, input=TEXTS[0], dimensions=5)
    assert np.allclose(answer.data[0].embedding, unit(student.encode_passages(TEXTS[:1]).vectors[:, :5])[0], atol=1e-6)


@pytest.mark.parametrize(
    "how", [{"model": f"{NAME}:query"}, {"model": NAME, "extra_body": {"input_type": "query"}}], ids=["name", "field"]
)
def test_openai_query_vectors_rank_passages_by_the_anchor(client, student, how):
    query = np.array(client.embeddings.create(input=QUERY, **how).data[0].embedding)
    anchor = student.anchor_queries(student.encode_queries([QUERY]).vectors)
    assert np.allclose(query, unit(anchor)[0], atol=1e-6)
    assert not np.allclose(query, unit(student.encode_queries([QUERY]).vectors)[0], atol=1e-2)


def test_openai_passage_is_the_default_side(client):
    models = (NAME, f"{NAME}:passage")
    plain, passage = (client.embeddings.create(model=model, input=QUERY).data[0].embedding for model in models)
    assert plain == passage


def test_a_student_without_an_anchor_gives_plain_query_vectors(folder):
    config = tiny_student_config(write_tiny_model(folder / "plain", "bert"))
    config = config.model_copy(update={"interaction": config.interaction.model_copy(update={"head": "paper"})})
    student = Student.create(config, dtype="float32")
    randomise(student.interaction)
    student.save(folder / "paper")
    with serving(folder / "paper") as address, openai.OpenAI(base_url=f"{address}/v1", api_key="none") as client:
        found = client.embeddings.create(model="paper:query", input=QUERY).data[0].embedding
    assert np.allclose(found, unit(student.encode_queries([QUERY]).vectors)[0], atol=1e-6)


def test_openai_async_client_with_many_at_once(address, student):
    async def ask():
        async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none") as client:
            return await asyncio.gather(*(client.embeddings.create(model=NAME, input=text) for text in TEXTS))

    found = [answer.data[0].embedding for answer in asyncio.run(ask())]
    assert np.allclose(found, unit(student.encode_passages(TEXTS).vectors), atol=1e-5)


def test_openai_models(client):
    names = [model.id for model in client.models.list()]
    assert names == [NAME, f"{NAME}:query", f"{NAME}:passage"]
    assert client.models.retrieve(f"{NAME}:query").id == f"{NAME}:query"
    with pytest.raises(openai.NotFoundError, match="there is tiny") as caught:
        client.models.retrieve("gpt-4")
    assert caught.value.code == "model_not_found"


def test_openai_an_unknown_model_is_not_found(client):
    with pytest.raises(openai.NotFoundError, match="there is tiny, tiny:query, tiny:passage") as caught:
        client.embeddings.create(model="text-embedding-3-small", input="text")
    assert (caught.value.code, caught.value.param, caught.value.type) == (
        "model_not_found",
        "model",
        "invalid_request_error",
    )


@pytest.mark.parametrize(
    ("settings", "message", "param"),
    [
        ({"input": []}, "the list is empty", "input"),
        ({"input": ""}, "it is empty", "input"),
        ({"input": ["a", ""]}, "number 1 is empty", "input"),
        ({"input": ["a", 3]}, "number 1 is no text", "input"),
        ({"input": [1, 2]}, "check_embedding_ctx_length=False", "input"),
        ({"input": [[1, 2], [3]]}, "token ids are not read", "input"),
        ({"input": ["a"] * 33}, "33 texts; a request may have 32", "input"),
        ({"input": ["a", "b" * 2_001]}, "2,001 characters; 2,000 are allowed", "input.1"),
        ({"input": ["a", LONG]}, f"longer than the {MAX_TOKENS} tokens", "input.1"),
        ({"input": "a", "dimensions": 33}, "the model has 32, 33 were asked for", "dimensions"),
        ({"input": "a", "dimensions": 0}, "greater than or equal to 1", "dimensions"),
        ({"input": "a", "dimensions": True}, "valid integer", "dimensions"),
        ({"input": "a", "encoding_format": "hex"}, "'float' or 'base64'", "encoding_format"),
        ({"input": "a", "extra_body": {"colour": "red"}}, "not permitted", "colour"),
        (
            {"input": "a", "model": f"{NAME}:query", "extra_body": {"input_type": "passage"}},
            "contradicts",
            "input_type",
        ),
    ],
)
def test_openai_wrong_requests(client, settings, message, param):
    with pytest.raises(openai.BadRequestError, match=message) as caught:
        client.embeddings.create(**({"model": NAME} | settings))
    assert (caught.value.param, caught.value.type) == (param, "invalid_request_error")


def test_openai_a_long_text_is_cut_on_demand(client, student):
    answer = client.embeddings.create(model=NAME, input=[LONG], extra_body={"truncate": "END"})
    assert np.allclose(answer.data[0].embedding, unit(student.encode_passages([LONG]).vectors)[0], atol=1e-6)
    assert answer.usage.prompt_tokens == MAX_TOKENS


@pytest.fixture
def overloaded_once(monkeypatch):
    """The first request finds the queue full."""
    calls: list[float] = []
    encode = ModelService.encode

    async def refuse_first(self, *arguments, **settings):
        calls.append(time.monotonic())
        if len(calls) == 1:
            raise OverloadedError(2.0)
        return await encode(self, *arguments, **settings)

    monkeypatch.setattr(ModelService, "encode", refuse_first)
    return calls


def test_openai_overload_is_a_rate_limit_error(client, overloaded_once):
    with pytest.raises(openai.RateLimitError, match="at its limit") as caught:
        client.embeddings.create(model=NAME, input="text")
    assert caught.value.response.headers["retry-after"] == "2"
    assert caught.value.code == "rate_limit_exceeded"


def test_openai_waits_as_long_as_it_is_told_and_tries_again(client, overloaded_once):
    answer = client.with_options(max_retries=1).embeddings.create(model=NAME, input="text")
    assert len(answer.data[0].embedding) == 32
    first, second = overloaded_once
    assert second - first >= 1.9


def test_a_wrong_content_type_and_method_have_openais_shape(address):
    for answer in (
        httpx2.post(f"{address}/v1/embeddings", content=b"text", headers={"content-type": "text/plain"}),
        httpx2.get(f"{address}/v1/embeddings"),
        httpx2.post(f"{address}/v1/embeddings", content=b"{", headers={"content-type": "application/json"}),
    ):
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        assert answer.status_code in (400, 405, 415)


def test_langchain_embeddings(address, student):
    module = pytest.importorskip("langchain_openai", reason="needs LangChain: pip install langchain-openai")
    settings = {"base_url": f"{address}/v1", "api_key": "none", "check_embedding_ctx_length": False}
    passages = module.OpenAIEmbeddings(model=NAME, **settings).embed_documents(TEXTS)
    query = module.OpenAIEmbeddings(model=f"{NAME}:query", **settings).embed_query(QUERY)
    assert np.allclose(passages, unit(student.encode_passages(TEXTS).vectors), atol=1e-6)
    assert np.allclose(query, unit(student.anchor_queries(student.encode_queries([QUERY]).vectors))[0], atol=1e-6)


def test_a_key_is_sent_as_each_client_sends_it(folder, student):
    ring = folder / "keys.json"
    secret = add_key(ring, "client")
    with serving(folder / "student-0", model_name=NAME, keys_file=ring) as address:
        for key, answered in ((secret, True), ("wrong", False)):
            with openai.OpenAI(base_url=f"{address}/v1", api_key=key) as one:
                other = cohere.ClientV2(api_key=key, base_url=address)
                if answered:
                    assert len(one.embeddings.create(model=NAME, input="text").data) == 1
                    assert len(other.rerank(model=NAME, query="text", documents=["a", "b"]).results) == 2
                    continue
                with pytest.raises(openai.AuthenticationError) as caught:
                    one.embeddings.create(model=NAME, input="text")
                assert caught.value.code == "invalid_api_key"
                with pytest.raises(cohere.UnauthorizedError):
                    other.rerank(model=NAME, query="text", documents=["a", "b"])


# Cohere and Jina --------------------------------------------------------------------------------------------------


def expected(student):
    query, passages = student.encode_queries([QUERY]).vectors[0], student.encode_passages(TEXTS).vectors
    logits = student.score(query, passages, "asymmetric")
    return logits, sorted(range(len(TEXTS)), key=lambda place: (-logits[place], place))


def test_cohere_rerank(cohere_client, student):
    logits, order = expected(student)
    answer = cohere_client.rerank(model=NAME, query=QUERY, documents=TEXTS)
    assert [result.index for result in answer.results] == order
    assert np.allclose([result.relevance_score for result in answer.results], sigmoid(logits)[order], atol=1e-6)
    assert answer.meta.tokens.input_tokens == sum(student.encode_passages(TEXTS).lengths) + sum(
        student.encode_queries([QUERY]).lengths
    )
    assert answer.meta.warnings is None
    best = cohere_client.rerank(model=NAME, query=QUERY, documents=TEXTS, top_n=2)
    assert best.results == answer.results[:2]


def test_equal_documents_stay_in_order(cohere_client):
    answer = cohere_client.rerank(model=NAME, query=QUERY, documents=[TEXTS[0]] * 4)
    assert [result.index for result in answer.results] == [0, 1, 2, 3]


def test_cohere_tells_what_was_cut(cohere_client):
    answer = cohere_client.rerank(model=NAME, query=LONG, documents=["a cat", LONG])
    assert answer.meta.warnings == ["the query was cut to 64 tokens", "documents were cut to 64 tokens: 1"]


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"model": "rerank-v3.5"}, cohere.NotFoundError, "there is tiny"),
        ({"documents": []}, cohere.BadRequestError, "the list is empty"),
        ({"documents": ["a", ""]}, cohere.BadRequestError, "number 1 is empty"),
        ({"query": ""}, cohere.BadRequestError, "at least 1 character"),
        ({"top_n": 0}, cohere.BadRequestError, "top_n"),
        ({"documents": ["a"] * 33}, cohere.BadRequestError, "33 texts"),
        ({"max_tokens_per_doc": 10}, cohere.BadRequestError, "documents are cut to 64 tokens here"),
    ],
)
def test_cohere_errors(cohere_client, settings, error, message):
    with pytest.raises(error, match=message) as caught:
        cohere_client.rerank(**({"model": NAME, "query": QUERY, "documents": TEXTS} | settings))
    assert set(caught.value.body) == {"id", "message"}


def test_cohere_overload(cohere_client, monkeypatch):
    async def refuse(*_arguments, **_settings):
        raise OverloadedError(3.0)

    monkeypatch.setattr(ModelService, "score", refuse)
    with pytest.raises(cohere.TooManyRequestsError) as caught:
        cohere_client.rerank(model=NAME, query=QUERY, documents=TEXTS, request_options={"max_retries": 0})
    assert caught.value.headers["retry-after"] == "3"


def test_jina_rerank(post, student):
    logits, order = expected(student)
    documents = [text if place % 2 else {"text": text} for place, text in enumerate(TEXTS)]
    answer = post("/v1/rerank", {"model": NAME, "query": QUERY, "documents": documents})
    assert [result["index"] for result in answer["results"]] == order
    assert np.allclose([result["relevance_score"] for result in answer["results"]], sigmoid(logits)[order], atol=1e-6)
    assert [result["document"]["text"] for result in answer["results"]] == [TEXTS[place] for place in order]
    assert set(answer) == {"model", "object", "usage", "results"}
    body = {"model": NAME, "query": QUERY, "documents": TEXTS, "top_n": 3, "return_documents": False}
    assert [set(result) for result in post("/v1/rerank", body)["results"]] == [{"index", "relevance_score"}] * 3
    assert post("/v1/rerank", body | {"documents": ["a", LONG]})["warnings"] == ["documents were cut to 64 tokens: 1"]


@pytest.mark.parametrize(
    ("settings", "status", "message"),
    [
        ({"model": "jina-reranker-v2"}, 404, "there is tiny"),
        ({"documents": []}, 422, "at least one document"),
        ({"documents": ["a", {"title": "b"}]}, 422, "number 1 is neither a text nor"),
        ({"top_n": True}, 422, "valid integer"),
        ({"documents": ["a"] * 33}, 422, "33 texts"),
    ],
)
def test_jina_errors(post, settings, status, message):
    answer = post("/v1/rerank", {"model": NAME, "query": QUERY, "documents": TEXTS} | settings, status)
    assert set(answer) == {"detail"}
    assert re.search(message, answer["detail"])
