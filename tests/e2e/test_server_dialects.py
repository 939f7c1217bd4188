"""Hugging Face's client and vLLM's routes; what all dialects say of themselves; the shipped student; the guide."""

from __future__ import annotations

import re
from pathlib import Path

import httpx2
import numpy as np
import pytest

from d2llm import Student
from how_to import python_blocks
from tiny_models import TEXTS
from tiny_server import write_tiny_student

pytest.importorskip("fastapi", reason="needs FastAPI: pip install 'd2llm[serve]'")
from huggingface_hub import InferenceClient, constants
from huggingface_hub.errors import HfHubHTTPError

from d2llm.apps.server.errors import OverloadedError
from d2llm.apps.server.model_service import ModelService
from tiny_clients import LONG, NAME, QUERY, serving, sigmoid, unit

DIALECT_TAGS = {"OpenAI", "Cohere", "Jina", "Text Embeddings Inference", "vLLM"}
ROUTES = {"/v1/embeddings", "/v1/models", "/v1/models/{model}", "/v2/rerank", "/v1/rerank"} | {
    *("/embed", "/rerank", "/similarity", "/info", "/score", "/v1/score")
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("dialects")


@pytest.fixture(scope="module")
def student(folder):
    return Student.load(write_tiny_student(folder), device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def address(folder, student):
    with serving(folder / "student-0", model_name=NAME, max_texts=32, max_text_chars=2_000) as found:
        yield found


@pytest.fixture
def post(address):
    def ask(path, body, status=200):
        answer = httpx2.post(address + path, json=body, timeout=60)
        assert answer.status_code == status, answer.text
        return answer.json()

    return ask


@pytest.fixture
def hub_client(address, monkeypatch):
    """Lets the client ask this machine; the tests' environment keeps it from the internet."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return InferenceClient(token="none")


def logits_of(student, query, passages):
    vectors = student.encode_queries([query]).vectors[0], student.encode_passages(passages).vectors
    return student.score(*vectors, "asymmetric")


# Text Embeddings Inference ----------------------------------------------------------------------------------------


def test_feature_extraction(hub_client, address, student):
    url = f"{address}/embed"
    plain = student.encode_passages(TEXTS).vectors
    assert np.allclose(hub_client.feature_extraction(TEXTS, model=url), unit(plain), atol=1e-6)
    assert np.allclose(hub_client.feature_extraction(TEXTS, model=url, normalize=False), plain, atol=1e-5)
    found = hub_client.feature_extraction(TEXTS, model=url, normalize=False, dimensions=4)
    assert np.allclose(found, plain[:, :4], atol=1e-5)


def test_inner_products_of_raw_vectors_are_the_anchors(hub_client, address, student):
    url = f"{address}/embed"
    query = hub_client.feature_extraction(QUERY, model=url, prompt_name="query", normalize=False)[0]
    passages = hub_client.feature_extraction(TEXTS, model=url, prompt_name="passage", normalize=False)
    anchor = student.anchor_queries(student.encode_queries([QUERY]).vectors)[0]
    assert np.allclose(passages @ query, student.encode_passages(TEXTS).vectors @ anchor, rtol=1e-4, atol=1e-3)


def test_feature_extraction_of_long_texts(hub_client, address, student):
    url = f"{address}/embed"
    with pytest.raises(HfHubHTTPError) as caught:
        hub_client.feature_extraction(["a cat", LONG], model=url)
    assert caught.value.response.status_code == 413
    assert caught.value.response.json()["error_type"] == "Validation"
    cut = hub_client.feature_extraction([LONG], model=url, truncate=True)
    assert np.allclose(cut, unit(student.encode_passages([LONG]).vectors), atol=1e-6)


def test_sentence_similarity(hub_client, address, student):
    vectors = unit(student.encode_passages(TEXTS).vectors)
    found = hub_client.sentence_similarity(TEXTS[0], other_sentences=TEXTS[1:], model=f"{address}/similarity")
    assert np.allclose(found, vectors[1:] @ vectors[0], atol=1e-6)


def test_tei_rerank(post, student):
    logits = logits_of(student, QUERY, TEXTS)
    order = sorted(range(len(TEXTS)), key=lambda place: (-logits[place], place))
    answer = post("/rerank", {"query": QUERY, "texts": TEXTS})
    assert [rank["index"] for rank in answer] == order
    assert np.allclose([rank["score"] for rank in answer], sigmoid(logits)[order], atol=1e-6)
    raw = post("/rerank", {"query": QUERY, "texts": TEXTS, "raw_scores": True, "return_text": True})
    assert np.allclose([rank["score"] for rank in raw], logits[order], atol=1e-3)
    assert [rank["text"] for rank in raw] == [TEXTS[place] for place in order]


@pytest.mark.parametrize(
    ("path", "body", "status", "kind"),
    [
        ("/embed", {"inputs": []}, 422, "Tokenizer"),
        ("/embed", {"inputs": ""}, 422, "Tokenizer"),
        ("/embed", {"inputs": ["a"] * 33}, 413, "Validation"),
        ("/embed", {"inputs": "a" * 2_001}, 413, "Validation"),
        ("/embed", {"inputs": "a", "prompt_name": "title"}, 422, "Tokenizer"),
        ("/embed", {"inputs": "a", "truncation_direction": "Left"}, 422, "Tokenizer"),
        ("/rerank", {"query": LONG, "texts": ["a"]}, 413, "Validation"),
        ("/rerank", {"query": "a", "texts": ["a", LONG]}, 413, "Validation"),
        ("/rerank", {"query": "a"}, 422, "Tokenizer"),
        ("/similarity", {"inputs": {"source_sentence": "a", "sentences": []}}, 422, "Tokenizer"),
    ],
)
def test_tei_errors(post, path, body, status, kind):
    answer = post(path, body, status)
    assert set(answer) == {"error", "error_type"}
    assert answer["error_type"] == kind


def test_tei_overload(post, monkeypatch):
    async def refuse(*_arguments, **_settings):
        raise OverloadedError(1.0)

    monkeypatch.setattr(ModelService, "encode", refuse)
    assert post("/embed", {"inputs": "a"}, 429)["error_type"] == "Overloaded"


def test_tei_info(address, student):
    answer = httpx2.get(f"{address}/info").json()
    assert (answer["model_id"], answer["model_sha"], answer["model_dtype"]) == (NAME, student.fingerprint, "float32")
    assert (answer["max_client_batch_size"], answer["max_input_length"]) == (32, 64)


# vLLM -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [("text_1", "text_2"), ("queries", "documents"), ("data_1", "data_2")])
@pytest.mark.parametrize("path", ["/score", "/v1/score"])
def test_vllm_scores_of_one_with_each(post, student, path, names):
    answer = post(path, {names[0]: QUERY, names[1]: TEXTS})
    scores = [one["score"] for one in answer["data"]]
    assert np.allclose(scores, sigmoid(logits_of(student, QUERY, TEXTS)), atol=1e-6)
    tokens = sum(student.encode_queries([QUERY]).lengths) * len(TEXTS) + sum(student.encode_passages(TEXTS).lengths)
    assert answer["usage"]["total_tokens"] == tokens


def test_vllm_scores_of_pairs(post, student):
    queries = [QUERY, TEXTS[3], QUERY]
    answer = post("/v1/score", {"model": NAME, "text_1": queries, "text_2": TEXTS[:3], "use_activation": False})
    logits = [logits_of(student, query, [text])[0] for query, text in zip(queries, TEXTS[:3], strict=True)]
    assert np.allclose([one["score"] for one in answer["data"]], logits, atol=1e-3)


@pytest.mark.parametrize(
    ("settings", "status", "kind"),
    [
        ({"model": "bge-reranker"}, 404, "NotFoundError"),
        ({"text_1": ["a", "b"]}, 400, "BadRequestError"),
        ({"text_2": []}, 400, "BadRequestError"),
        ({"text_1": LONG}, 400, "BadRequestError"),
        ({"text_2": ["a", 1]}, 400, "BadRequestError"),
    ],
)
def test_vllm_errors(post, settings, status, kind):
    error = post("/score", {"text_1": QUERY, "text_2": TEXTS} | settings, status)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["code"]) == (kind, status)


def test_vllm_cuts_on_demand(post, student):
    answer = post("/score", {"text_1": QUERY, "text_2": LONG, "truncate_prompt_tokens": -1, "use_activation": False})
    assert np.isclose(answer["data"][0]["score"], logits_of(student, QUERY, [LONG])[0], atol=1e-3)


# All --------------------------------------------------------------------------------------------------------------


def test_every_route_describes_its_answers_and_errors(address):
    paths = httpx2.get(f"{address}/openapi.json").json()["paths"]
    described = set()
    for path, methods in paths.items():
        for operation in methods.values():
            if not DIALECT_TAGS & set(operation["tags"]):
                continue
            described.add(path)
            assert set(operation["responses"]) == {"200", "4XX", "5XX"}, path
            for answer in operation["responses"].values():
                assert answer["content"]["application/json"]["schema"], path
    assert described == ROUTES


@pytest.fixture(scope="module")
def shipped():
    with serving("d2llm-minilm") as found:
        yield found


def test_the_shipped_student_under_its_name(shipped):
    openai = pytest.importorskip("openai", reason="needs OpenAI's client: pip install openai")
    student = Student.load("d2llm-minilm", device="cpu", dtype="float32")
    with openai.OpenAI(base_url=f"{shipped}/v1", api_key="none") as client:
        passages = client.embeddings.create(model="d2llm-minilm", input=TEXTS)
    assert np.allclose(
        [one.embedding for one in passages.data], unit(student.encode_passages(TEXTS).vectors), atol=1e-5
    )
    cohere = pytest.importorskip("cohere", reason="needs Cohere's client: pip install cohere")
    answer = cohere.ClientV2(api_key="none", base_url=shipped).rerank(
        model="d2llm-minilm", query="what is bread made of?", documents=TEXTS, top_n=1
    )
    assert TEXTS[answer.results[0].index].startswith("bread is baked")


GUIDE = Path(__file__).parents[2] / "docs" / "how-to" / "clients.md"


@pytest.mark.parametrize("block", python_blocks(GUIDE), ids=lambda block: f"line-{block.line}")
def test_the_guides_examples_run(block, shipped, monkeypatch):
    for package in re.findall(r"^(?:from|import) (\w+)", block.code, re.MULTILINE):
        pytest.importorskip(package)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert "http://127.0.0.1:8000" in block.code
    exec(compile(block.code.replace("http://127.0.0.1:8000", shipped), GUIDE.name, "exec"), {})
