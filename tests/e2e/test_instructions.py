"""Instructions before queries, on the command line and over HTTP."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from d2llm import Index, Student
from d2llm.models.score_features import ScoreFeatures, TaskFeatureWeights
from d2llm.models.token_vectors import TokenProjection
from e2e.command_line import fail, succeed, succeed_with_report
from local_endpoint import Reply, local_endpoint
from tiny_models import randomise, tiny_student_config, write_tiny_model
from tiny_server import tiny_passages, tiny_settings, write_tiny_index

QUERY = "the cat by the sea"
INSTRUCTION = "find a book about trains:\n"
LONG = "snow and rain " * 40


def write_index_with_tokens(folder):
    """An index whose scores count words and token embeddings; its student puts a prefix before queries."""
    model = write_tiny_model(folder / "bert", "bert")
    student = Student.create(tiny_student_config(model, query_prefix="rain "), device="cpu", dtype="float32")
    randomise(student.pooling)
    randomise(student.interaction)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        rarity = [0.0] * 4 + [1.0] * (len(student.backbone.tokenizer) - 4)
        student.token_projection = TokenProjection(student.backbone.dim, 8, rarity)
    weights = TaskFeatureWeights(weights={"bm25": 0.5, "maxsim": 20.0}, dev={}, num_queries={})
    student.score_features = ScoreFeatures(tasks={"asymmetric": weights})
    student.save(folder / "student")
    index = Index.create(folder / "index", folder / "student", dtype="float32", token_vectors="int8")
    index.upsert(tiny_passages())
    return folder / "index"


@pytest.fixture(scope="module", params=["vectors", "tokens"])
def index(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return write_tiny_index(folder) if request.param == "vectors" else write_index_with_tokens(folder)


@pytest.fixture(scope="module")
def address(index):
    pytest.importorskip("fastapi", reason="needs FastAPI: pip install 'd2llm[serve]'")
    from live_server import served

    with served(index, max_text_chars=2_000) as url:
        yield url


def expected(index, query, **settings):
    ranking = Index.open(index, dtype="float32").search(query, **settings)
    return [(hit.passage.id, pytest.approx(hit.score, abs=1e-3)) for hit in ranking.passages]


def results(answer):
    return [(hit["id"], hit["score"]) for hit in answer["passages"]]


class TestServer:
    @pytest.fixture
    def post(self, address):
        from live_server import patient

        def send(path, body, status=200):
            response = patient.post(address + path, json=body)
            assert response.status_code == status, response.text
            return response.json()

        return send

    @pytest.mark.parametrize("body", [{}, {"exact": True}, {"hybrid": 0.5}, {"rescore": "none"}], ids=str)
    def test_a_search_returns_what_the_library_returns(self, index, post, body):
        settings = {name: value for name, value in body.items() if name != "rescore"}
        answer = post("/v1/search", {"query": QUERY, "instruction": INSTRUCTION} | body)
        if body != {"rescore": "none"}:
            assert results(answer) == expected(index, QUERY, instruction=INSTRUCTION, **settings)
        assert answer["query"] == QUERY
        assert results(answer) != results(post("/v1/search", {"query": QUERY} | body))
        bare = post("/v1/search", {"query": QUERY, "instruction": None} | body)
        assert results(bare) == results(post("/v1/search", {"query": QUERY} | body))

    def test_a_context_takes_it(self, index, post):
        body = {"query": QUERY, "instruction": INSTRUCTION, "max_tokens": 200, "near_duplicates": 1.0}
        context = Index.open(index, dtype="float32").context(
            QUERY, max_tokens=200, instruction=INSTRUCTION, near_duplicates=1.0
        )
        assert post("/v1/context", body)["text"] == context.text

    def test_it_counts_among_the_tokens_of_the_query(self, post):
        short = {"query": QUERY}
        assert post("/v1/search", short)["truncated"] is False
        assert post("/v1/search", short | {"instruction": "a dog runs fast across the green field " * 6})["truncated"]
        message = post("/v1/search", short | {"instruction": LONG}, 400)["error"]["message"]
        assert "but the student reads only 64 of instruction and query together; shorten it" in message
        error = post("/v1/search", short | {"instruction": LONG * 10}, 400)["error"]
        assert error["field"] == "instruction"
        assert "this server accepts 2,000" in error["message"]
        post("/v1/search", short | {"instruction": 1}, 422)


def test_a_writer_sees_the_plain_query(tmp_path):
    pytest.importorskip("fastapi", reason="needs FastAPI: pip install 'd2llm[serve]'")
    from d2llm.server.app import make_app
    from live_server import patient, serve, wait_until_ready

    def reply(request, _number):
        assert "trains" not in request.prompt
        return Reply({"choices": [{"message": {"content": "a dog in the field"}, "finish_reason": "stop"}]})

    folder = write_index_with_tokens(tmp_path)
    with local_endpoint(reply) as endpoint:
        settings = tiny_settings(folder, writer="served", writer_endpoint=endpoint.url)
        with serve(make_app(settings)) as url:
            wait_until_ready(url)
            answers = [
                patient.post(f"{url}/v1/search", json={"query": QUERY, "expand": "hyde", "instruction": text}).json()
                for text in (None, INSTRUCTION)
            ]
    assert len(endpoint.requests) >= 2
    assert [answer["expansion"]["texts"] for answer in answers] == [["a dog in the field"]] * 2
    assert results(answers[0]) != results(answers[1])


class TestCommandLine:
    def test_results_are_those_of_the_library(self, index, tmp_path):
        options = ("search", index, QUERY, "--dtype", "float32", "--instruction", INSTRUCTION)
        _, report = succeed_with_report(*options, folder=tmp_path)
        (ranking,) = report["result"]["rankings"]
        found = [(hit["passage"]["id"], hit["score"]) for hit in ranking["passages"]]
        assert found == expected(index, QUERY, instruction=INSTRUCTION)
        assert found != expected(index, QUERY)
        assert ranking["query"]["text"] == QUERY

    def test_a_warning_says_that_it_takes_room(self, index):
        taking = "a dog runs fast across the green field " * 6
        result = succeed("search", index, QUERY, "--dtype", "float32", "--instruction", taking)
        assert "1 of 1 queries is with the instruction longer than the 64 tokens" in result.stderr
        assert "or shorten the instruction" in result.stderr
        fail("search", index, QUERY, "--instruction", LONG, containing=["the instruction has", "shorten it"])


def test_tokens_of_the_server_are_those_of_the_student(tmp_path):
    """The index with tokens is one whose score counts them, so the tests above are about them, too."""
    index = Index.open(write_index_with_tokens(tmp_path), dtype="float32")
    ranking = index.search(QUERY, instruction=INSTRUCTION, explain=True)
    assert np.ptp([hit.explanation.tokens for hit in ranking.passages]) > 0.01
