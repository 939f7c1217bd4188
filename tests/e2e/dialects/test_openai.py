"""OpenAI's and LangChain's clients against the server: they get the library's numbers and raise their own errors."""

from __future__ import annotations

import asyncio
import base64
import time

import numpy as np
import pytest

from d2llm import Student
from late_import import late_import
from tiny_models import TEXTS, randomise, tiny_student_config, write_tiny_model

pytest.importorskip("fastapi", reason="needs FastAPI: pip install 'd2llm[serve]'")
openai = late_import("openai", reason="needs OpenAI's client: pip install openai")

from d2llm.server.errors import OverloadedError  # noqa: E402
from d2llm.server.model_service import ModelService  # noqa: E402
from live_server import patient  # noqa: E402
from tiny_clients import LONG, MAX_TOKENS, NAME, QUERY, serving, unit  # noqa: E402


@pytest.fixture
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as openai_client:
        yield openai_client


@pytest.mark.parametrize("settings", [{}, {"encoding_format": "float"}, {"encoding_format": "base64"}])
def test_embeddings_are_the_students_unit_vectors(client, student, settings):
    response = client.embeddings.create(model=NAME, input=TEXTS, **settings)
    embeddings = [item.embedding for item in response.data]
    if settings.get("encoding_format") == "base64":  # requested explicitly, so the client does not decode it
        embeddings = [np.frombuffer(base64.b64decode(item), "<f4") for item in embeddings]
    encoded = student.encode_passages(TEXTS)
    assert np.allclose(embeddings, unit(encoded.vectors), atol=1e-6)
    assert [item.index for item in response.data] == list(range(len(TEXTS)))
    assert response.model == NAME
    assert response.usage.prompt_tokens == response.usage.total_tokens == sum(encoded.lengths)


def test_the_full_number_of_dimensions_may_be_requested(client, student):
    response = client.embeddings.create(model=NAME, input=TEXTS[0], dimensions=student.vector_dim)
    assert np.allclose(response.data[0].embedding, unit(student.encode_passages(TEXTS[:1]).vectors)[0], atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [{"model": f"{NAME}:query"}, {"model": NAME, "extra_body": {"input_type": "query"}}],
    ids=["name", "field"],
)
def test_query_vectors_rank_passages_by_the_inner_product(client, student, options):
    query = np.array(client.embeddings.create(input=QUERY, **options).data[0].embedding)
    dot_query = student.query_vectors(student.encode_queries([QUERY]).vectors)
    assert np.allclose(query, unit(dot_query)[0], atol=1e-6)
    assert not np.allclose(query, unit(student.encode_queries([QUERY]).vectors)[0], atol=1e-2)


def test_passage_is_the_default_input_type(client):
    models = (NAME, f"{NAME}:passage")
    plain, passage = (client.embeddings.create(model=model, input=QUERY).data[0].embedding for model in models)
    assert plain == passage


def test_a_student_without_an_inner_product_gives_plain_query_vectors(folder):
    config = tiny_student_config(write_tiny_model(folder / "plain", "bert"))
    config = config.model_copy(update={"interaction": config.interaction.model_copy(update={"head": "paper"})})
    student = Student.create(config, dtype="float32")
    randomise(student.interaction)
    student.save(folder / "paper")
    with serving(folder / "paper") as address, openai.OpenAI(base_url=f"{address}/v1", api_key="none") as client:
        embedding = client.embeddings.create(model="paper:query", input=QUERY).data[0].embedding
    assert np.allclose(embedding, unit(student.encode_queries([QUERY]).vectors)[0], atol=1e-6)


def test_the_async_client_with_concurrent_requests(address, student):
    async def embed_all():
        async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none") as client:
            return await asyncio.gather(*(client.embeddings.create(model=NAME, input=text) for text in TEXTS))

    embeddings = [response.data[0].embedding for response in asyncio.run(embed_all())]
    assert np.allclose(embeddings, unit(student.encode_passages(TEXTS).vectors), atol=1e-5)


def test_models(client):
    names = [model.id for model in client.models.list()]
    assert names == [NAME, f"{NAME}:query", f"{NAME}:passage"]
    assert client.models.retrieve(f"{NAME}:query").id == f"{NAME}:query"
    with pytest.raises(openai.NotFoundError, match="there is tiny") as excinfo:
        client.models.retrieve("gpt-4")
    assert excinfo.value.code == "model_not_found"


def test_an_unknown_model_is_not_found(client):
    with pytest.raises(openai.NotFoundError, match="there is tiny, tiny:query, tiny:passage") as excinfo:
        client.embeddings.create(model="text-embedding-3-small", input="text")
    assert (excinfo.value.code, excinfo.value.param, excinfo.value.type) == (
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
        ({"input": ["a", 3]}, "number 1 is not a text", "input"),
        ({"input": [1, 2]}, "check_embedding_ctx_length=False", "input"),
        ({"input": [[1, 2], [3]]}, "token ids are not supported", "input"),
        ({"input": ["a"] * 33}, "33 texts; this server takes 32 in a request", "input"),
        ({"input": ["a", "b" * 2_001]}, "2,001 characters; 2,000 are allowed", "input.1"),
        ({"input": ["a", LONG]}, f"longer than the {MAX_TOKENS} tokens", "input.1"),
        ({"input": "a", "dimensions": 5}, "have 32 components and were not trained to be cut to 5", "dimensions"),
        ({"input": "a", "dimensions": 33}, "have 32 components, not 33", "dimensions"),
        ({"input": "a", "dimensions": 0}, "must be at least 1", "dimensions"),
        ({"input": "a", "dimensions": True}, "must be a whole number", "dimensions"),
        ({"input": "a", "encoding_format": "hex"}, "'float' or 'base64'", "encoding_format"),
        ({"input": "a", "extra_body": {"colour": "red"}}, "no such field", "colour"),
        (
            {"input": "a", "model": f"{NAME}:query", "extra_body": {"input_type": "passage"}},
            "contradicts",
            "input_type",
        ),
    ],
)
def test_invalid_requests_are_bad_request_errors(client, settings, message, param):
    with pytest.raises(openai.BadRequestError, match=message) as excinfo:
        client.embeddings.create(**({"model": NAME} | settings))
    assert (excinfo.value.param, excinfo.value.type) == (param, "invalid_request_error")


@pytest.mark.parametrize("options", [{"truncate": "END"}, {"truncate_prompt_tokens": -1}], ids=str)
def test_a_long_text_is_truncated_on_request(client, student, options):
    response = client.embeddings.create(model=NAME, input=[LONG], user="someone", extra_body=options)
    assert np.allclose(response.data[0].embedding, unit(student.encode_passages([LONG]).vectors)[0], atol=1e-6)
    assert response.usage.prompt_tokens == MAX_TOKENS


@pytest.fixture
def overloaded_once(monkeypatch):
    """The first request is refused as if the queue were full."""
    calls: list[float] = []
    encode = ModelService.encode

    async def refuse_first(self, *arguments, **settings):
        calls.append(time.monotonic())
        if len(calls) == 1:
            raise OverloadedError(2.0)
        return await encode(self, *arguments, **settings)

    monkeypatch.setattr(ModelService, "encode", refuse_first)
    return calls


def test_overload_is_a_rate_limit_error(client, overloaded_once):
    with pytest.raises(openai.RateLimitError, match="at its limit") as excinfo:
        client.embeddings.create(model=NAME, input="text")
    assert excinfo.value.response.headers["retry-after"] == "2"
    assert excinfo.value.code == "rate_limit_exceeded"


def test_the_client_retries_after_the_requested_delay(client, overloaded_once):
    response = client.with_options(max_retries=1).embeddings.create(model=NAME, input="text")
    assert len(response.data[0].embedding) == 32
    first, second = overloaded_once
    assert second - first >= 1.9


def test_protocol_errors_have_openais_format(address):
    for response in (
        patient.post(f"{address}/v1/embeddings", content=b"text", headers={"content-type": "text/plain"}),
        patient.get(f"{address}/v1/embeddings"),
        patient.post(f"{address}/v1/embeddings", content=b"{", headers={"content-type": "application/json"}),
    ):
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
        assert response.status_code in (400, 405, 415)


def test_langchain_embeddings(address, student):
    module = pytest.importorskip("langchain_openai", reason="needs LangChain: pip install langchain-openai")
    settings = {"base_url": f"{address}/v1", "api_key": "none", "check_embedding_ctx_length": False}
    passages = module.OpenAIEmbeddings(model=NAME, **settings).embed_documents(TEXTS)
    query = module.OpenAIEmbeddings(model=f"{NAME}:query", **settings).embed_query(QUERY)
    assert np.allclose(passages, unit(student.encode_passages(TEXTS).vectors), atol=1e-6)
    assert np.allclose(query, unit(student.query_vectors(student.encode_queries([QUERY]).vectors))[0], atol=1e-6)
