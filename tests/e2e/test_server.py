"""The server as clients see it: the library's results, writes, new versions, failures and overload."""

from __future__ import annotations

import asyncio
import base64
import threading
from collections import Counter
from dataclasses import asdict

import httpx2
import numpy as np
import pytest

from d2llm import Index, Passage, encode
from d2llm.models.teachers.pair_teacher import load_teacher
from d2llm.models.writers.writer import load_writer
from d2llm.ops.rereading import StudentError
from d2llm.recipe import TeacherConfig, WriterConfig, WriterEndpointConfig
from d2llm.retrieval.calibrate import write_error
from d2llm.retrieval.context import build_context
from d2llm.retrieval.expansion import Expansion
from d2llm.retrieval.rewriting import Rewriter
from d2llm.store.shards import Storage
from local_endpoint import Reply, chat, local_endpoint
from tiny_models import write_tiny_model
from tiny_server import tiny_passages, tiny_settings, write_tiny_index, write_tiny_student

pytest.importorskip("fastapi", reason="needs FastAPI: pip install 'd2llm[serve]'")

from d2llm.server.app import make_app
from d2llm.server.model_service import ModelService
from live_server import HeldStudent, LeavingClient, patient, serve, served, wait_until_closed, wait_until_ready
from waiting import PATIENCE, until

QUERY = "the cat by the sea"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("server")


@pytest.fixture(scope="module")
def index(folder):
    return write_tiny_index(folder)


@pytest.fixture(scope="module")
def address(index):
    with served(index) as url:
        yield url


@pytest.fixture
def post(address):
    def send(path, body, status=200):
        response = patient.post(address + path, json=body)
        assert response.status_code == status, response.text
        return response.json()

    return send


@pytest.mark.parametrize(
    ("body", "settings"),
    [
        ({}, {}),
        (
            {"top_k": 3, "filter": "year > 2004 AND language = 'en'"},
            {"top_k": 3, "filter": "year > 2004 AND language = 'en'"},
        ),
        ({"exact": True, "top_k": 5}, {"exact": True, "top_k": 5}),
        ({"hybrid": 0.5}, {"hybrid": 0.5, "sources": ("vectors", "bm25")}),
        ({"hybrid": 0.0}, {"hybrid": 0.0}),
        ({"hybrid": 0.5, "sources": ["bm25"], "top_k": 60}, {"hybrid": 0.5, "sources": ("bm25",), "top_k": 60}),
        ({"sources": ["bm25"], "num_candidates": 20}, {"sources": ("bm25",), "num_candidates": 20}),
        ({"group": "best", "top_k": 4}, {"group": "best", "top_k": 4}),
        ({"task": "symmetric", "neighbours": 1}, {"task": "symmetric", "neighbours": 1}),
        (
            {"mmr": 0.4, "near_duplicates": 0.9, "select_from": 30},
            {"mmr": 0.4, "near_duplicates": 0.9, "select_from": 30},
        ),
    ],
    ids=lambda value: "-".join(value) or "plain",
)
def test_a_search_returns_what_the_library_returns(index, post, body, settings):
    response = post("/v1/search", {"query": QUERY, "explain": True} | body)
    ranking = Index.open(index, dtype="float32").search(QUERY, explain=True, **settings)
    assert [hit["id"] for hit in response["passages"]] == [hit.passage.id for hit in ranking.passages]
    np.testing.assert_allclose(
        [hit["score"] for hit in response["passages"]], [hit.score for hit in ranking.passages], atol=1e-4
    )
    assert [hit["explanation"]["terms"] for hit in response["passages"]] == [
        hit.explanation.terms for hit in ranking.passages
    ]
    assert [[neighbour["id"] for neighbour in hit["after"]] for hit in response["passages"]] == [
        [neighbour.id for neighbour in hit.after] for hit in ranking.passages
    ]
    assert response["seconds"].keys() >= {"queue", "encode", "candidates", "score"}
    assert response["index"]["version"] == ranking.index_version
    assert (response["certificate"] is None) == (ranking.certificate is None)
    selection = ranking.selection
    assert response["selection"] == (selection and asdict(selection) | {"ranks": [*selection.ranks]})


def test_excerpts_are_those_of_the_library(index, post):
    body = {"query": QUERY, "top_k": 6, "neighbours": 1}
    excerpts = post("/v1/search", body | {"excerpts": True})["excerpts"]
    library = Index.open(index, dtype="float32")
    expected = library.around(library.search(QUERY, top_k=6).passages, 1)
    assert [(excerpt["passage_ids"], excerpt["ranks"], excerpt["text"]) for excerpt in excerpts] == [
        ([p.id for p in excerpt.passages], [hit.rank for hit in excerpt.results], excerpt.text) for excerpt in expected
    ]
    assert post("/v1/search", body)["excerpts"] is None


@pytest.mark.parametrize("order", ["rank", "document"])
def test_a_context_is_that_of_the_library(index, post, order):
    body = {"query": QUERY, "max_tokens": 300, "order": order, "neighbours": 1, "filter": "year > 2002"}
    response = post("/v1/context", body)
    library = Index.open(index, dtype="float32")
    context = library.context(QUERY, max_tokens=300, order=order, neighbours=1, filter="year > 2002")
    assert response["text"] == context.text != ""
    assert (response["num_tokens"], response["left_out"]) == (context.num_tokens, list(context.left_out))
    assert [source["passage_ids"] for source in response["sources"]] == [list(s.passage_ids) for s in context.sources]
    assert response["sources"][0]["metadata"] == context.sources[0].metadata
    assert response["selection"]["selected_from"] == context.ranking.selection.selected_from
    assert response["index"]["version"] == context.ranking.index_version


def test_answering_needs_probabilities(index, address):
    response = httpx2.post(f"{address}/v1/context", json={"query": QUERY, "answering": 0.5}, timeout=PATIENCE)
    assert response.status_code == 400
    assert "not calibrated" in response.json()["error"]["message"]


def test_without_rescoring_the_inner_product_ranks(index, post):
    response = post("/v1/search", {"query": QUERY, "rescore": "none", "top_k": 60})
    scores = [hit["score"] for hit in response["passages"]]
    np.testing.assert_allclose(scores, [hit["dot_score"] for hit in response["passages"]], atol=1e-4)
    rescored = post("/v1/search", {"query": QUERY, "top_k": 60})
    assert [hit["id"] for hit in rescored["passages"]] != [hit["id"] for hit in response["passages"]]


def test_concurrent_clients_each_get_their_own_results(index, address):
    library = Index.open(index, dtype="float32")
    searches = [(f"the {word} number {n}", n % 4 + 1) for n, word in enumerate(["cat", "ship", "snow", "bread"] * 10)]

    async def main():
        async with httpx2.AsyncClient(base_url=address, timeout=PATIENCE) as http:
            return await asyncio.gather(
                *(http.post("/v1/search", json={"query": query, "top_k": top_k}) for query, top_k in searches)
            )

    for (query, top_k), response in zip(searches, asyncio.run(main()), strict=True):
        expected = [hit.passage.id for hit in library.search(query, top_k=top_k).passages]
        assert [hit["id"] for hit in response.json()["passages"]] == expected


def test_an_explanation_splits_the_score_into_parts(index, post):
    ranking = Index.open(index, dtype="float32").search(QUERY, top_k=1, explain=True)
    hit = ranking.passages[0]
    response = post("/v1/explain", {"query": QUERY, "passage_id": hit.passage.id})
    assert response["score"] == pytest.approx(hit.score, rel=0.01)  # the index holds bfloat16
    assert response["dot"] + response["interaction"] == pytest.approx(response["score"], abs=1e-4)
    text = f"{response['title']}\n{response['text']}" if response["title"] else response["text"]
    assert [text[word["start"] : word["end"]] for word in response["words"]][:2] == text.split()[:2]
    assert response["teacher"] is None


def test_vectors_and_scores_are_the_students(index, post):
    texts = [passage.full_text for passage in tiny_passages(3)]
    student = Index.open(index, dtype="float32").student
    query = post("/v1/encode", {"texts": [QUERY], "kind": "query"})["vectors"][0]
    response = post("/v1/encode", {"texts": texts, "kind": "passage"})
    vectors = student.encode_passages(texts).vectors
    np.testing.assert_allclose(response["vectors"], vectors, atol=1e-4)
    binary = post("/v1/encode", {"texts": texts, "kind": "passage", "encoding_format": "base64"})["vectors"]
    read = np.stack([np.frombuffer(base64.b64decode(one), "<f4") for one in binary])
    np.testing.assert_allclose(read, vectors, atol=1e-4)
    expected = student.score(np.array(query, np.float32), vectors, "asymmetric")
    vectors_alone = (
        {"passages": texts, "query_vector": query},
        {"passage_vectors": response["vectors"], "query_vector": query},
        {"passage_vectors": response["vectors"], "query": QUERY},
    )
    for body in vectors_alone:
        np.testing.assert_allclose(post("/v1/rescore", body)["scores"], expected, atol=1e-4)
    stored = post("/v1/rescore", {"query": QUERY, "passage_ids": ["p0", "p1", "p2"]})["scores"]
    np.testing.assert_allclose(stored, expected, rtol=0.02, atol=0.1)  # the index holds bfloat16
    np.testing.assert_allclose(post("/v1/rescore", {"query": QUERY, "passages": texts})["scores"], stored, rtol=1e-4)


@pytest.mark.parametrize(
    ("path", "body", "status", "fragment"),
    [
        ("/v1/search", {}, 422, "query"),
        ("/v1/search", {"query": "  "}, 422, "text is empty"),
        ("/v1/search", {"query": "cat", "top_k": 10**6}, 400, "top_k"),
        ("/v1/search", {"query": "cat", "topk": 3}, 422, "topk"),
        ("/v1/search", {"query": "cat", "filter": "yeer > 3"}, 400, "did you mean 'year'"),
        ("/v1/search", {"query": "cat", "exact": True, "hybrid": 0.5}, 400, "exact"),
        ("/v1/search", {"query": "cat", "teacher_ms": 5}, 400, "teacher_ms"),
        ("/v1/search", {"query": "cat", "rescore": "teacher"}, 400, "no teacher"),
        ("/v1/search", {"query": "cat", "expand": "hyde"}, 400, "start it with --writer"),
        ("/v1/context", {"query": "cat", "history": ["dog"]}, 400, "no writer to rewrite the query"),
        (
            "/v1/search",
            {"query": "cat", "history": [{"role": "system", "content": "dog"}]},
            422,
            "'user' or 'assistant'",
        ),
        ("/v1/search", {"query": "cat", "history": ["dog"] * 101}, 422, "at most 100 value(s)"),
        ("/v1/search", {"query": "cat", "expand": "multi", "expansions": 11}, 422, "expansions"),
        ("/v1/context", {"query": "cat", "expand": "hyde", "rescore": "cascade"}, 400, "leave out expand"),
        ("/v1/search", {"query": "cat" * 50_000}, 400, "characters"),
        ("/v1/search", {"query": "cat", "sources": "bm25"}, 422, "sources: must be a list"),
        (
            "/v1/search",
            {"query": "cat", "sources": ["bm26"] * 1_000},
            422,
            "sources.0: must be 'vectors', 'ann' or",
        ),
        ("/v1/search", {"query": "cat", "score_features": {}}, 422, "score_features: there is no such field"),
        ("/v1/search", {"query": "cat", "mmr": 0.5, "select_from": 10**6}, 400, "select_from"),
        ("/v1/context", {"query": "cat", "max_tokens": 10**6}, 400, "max_tokens"),
        ("/v1/context", {"query": "cat", "group": "best"}, 422, "group"),
        ("/v1/explain", {"query": "cat", "passage_id": "nowhere"}, 404, "nowhere"),
        (
            "/v1/encode",
            {"texts": ["a"] * 3_000, "kind": "query"},
            400,
            "3,000 is more than this server takes in a request (2,048",
        ),
        ("/v1/encode", {"texts": ["a"], "kind": "answer"}, 422, "kind"),
        ("/v1/rescore", {"query": "cat", "passage_vectors": [[1.0, 2.0]]}, 400, "components"),
        ("/v1/rescore", {"query": "cat", "passage_vectors": [[1e300] * 32]}, 400, "float32"),
        ("/v1/rescore", {"query": "cat"}, 422, "one of"),
        ("/v1/passages", {"passages": [{"id": "a", "text": "b"}] * 2}, 400, "share the id"),
        ("/v1/passages", {"passages": [{"id": "a", "text": "b", "metadata": {"year": "soon"}}]}, 400, "year"),
        ("/v1/passages", {"passages": [{"id": "a", "text": "b", "metadata": {"year": [1]}}]}, 400, "metadata"),
        ("/v1/documents", {"documents": [{"id": "a", "text": "b"}], "chunk_tokens": 10**6}, 400, "tokens"),
        ("/v1/index/snapshots", {"name": "../up"}, 422, "name"),
    ],
)
def test_invalid_bodies_get_an_explanation(post, path, body, status, fragment):
    error = post(path, body, status)["error"]
    assert fragment in error["message"]
    assert error["kind"] in {"invalid_request", "not_found"}
    assert error["request_id"]


def test_the_limit_of_candidates_holds_for_documents(index, post):
    body = {"query": QUERY, "group": "best", "num_candidates": 3, "top_k": 14}
    assert post("/v1/search", body)["num_candidates"] > 30
    with served(index, max_num_candidates=20) as address:
        assert patient.post(f"{address}/v1/search", json=body).json()["num_candidates"] == 20


def test_defaults_above_a_limit_are_lowered_and_values_of_clients_refused(index):
    limits = {"max_top_k": 4, "max_num_candidates": 7, "max_context_tokens": 50}
    with served(index, **limits) as address:

        def send(path, status=200, **fields):
            response = patient.post(f"{address}/v1/{path}", json={"query": QUERY} | fields)
            assert response.status_code == status, response.text
            return response.json()

        answer = send("search")
        assert (len(answer["passages"]), answer["num_candidates"]) == (4, 7)
        assert send("search", mmr=0.5)["selection"]["selected_from"] == 7
        context = send("context")
        assert (context["max_tokens"], context["selection"]["selected_from"]) == (50, 7)
        for name, value in (("top_k", 5), ("num_candidates", 100), ("select_from", 8)):
            assert name in send("search", 400, mmr=0.5, **{name: value})["error"]["message"]
        assert "max_tokens" in send("context", 400, max_tokens=51)["error"]["message"]


def test_wrong_methods_paths_types_and_json_are_explained(address):
    for send, status in (
        (lambda: patient.get(f"{address}/v1/search"), 405),
        (lambda: patient.get(f"{address}/v1/nothing"), 404),
        (lambda: patient.post(f"{address}/v1/search", content=b"{", headers={"Content-Type": "application/json"}), 400),
        (lambda: patient.post(f"{address}/v1/search", content=b"x", headers={"Content-Type": "text/plain"}), 415),
        (
            lambda: patient.post(
                f"{address}/v1/rescore",
                content=b'{"query": "a", "passage_vectors": [[NaN]]}',
                headers={"Content-Type": "application/json"},
            ),
            422,
        ),
    ):
        response = send()
        assert response.status_code == status
        assert response.json()["error"]["message"]


def test_written_passages_are_found_and_deleted_ones_are_not(tmp_path):
    with served(write_tiny_index(tmp_path)) as address, httpx2.Client(base_url=address, timeout=PATIENCE) as http:
        before = http.get("/v1/index").json()
        new = {"id": "new/1", "text": "stars and planets over the sea", "metadata": {"year": 1999}}
        report = http.post("/v1/passages", json={"passages": [new]}).json()
        assert report["num_added"] == 1
        assert report["version"] > before["version"]
        results = http.post("/v1/search", json={"query": "stars", "filter": "year = 1999"}).json()
        assert [hit["id"] for hit in results["passages"]] == ["new/1"]
        assert http.get("/v1/passages/new/1").json()["text"] == new["text"]
        long_document = {"id": "long", "text": " ".join(passage.text + "." for passage in tiny_passages(10))}
        ingested = http.post("/v1/documents", json={"documents": [long_document], "chunk_tokens": 32}).json()
        assert ingested["num_documents"] == 1
        assert ingested["num_added"] > 3
        assert http.delete("/v1/passages/new/1").json()["num_deleted"] == 1
        assert http.delete("/v1/passages/new/1").status_code == 404
        assert http.get("/v1/passages/new/1").status_code == 404
        assert http.post("/v1/index/snapshots", json={"name": "then"}).json()["snapshots"] == ["then"]
        after = http.get("/v1/index").json()
        assert after["num_passages"] == before["num_passages"] + ingested["num_added"]


def test_a_long_context_does_not_delay_other_reads(index, monkeypatch):
    began, may_end = threading.Event(), threading.Event()

    def held(*arguments, **options):
        began.set()
        assert may_end.wait(PATIENCE)
        return build_context(*arguments, **options)

    monkeypatch.setattr("d2llm.server.served_index.build_context", held)
    answers = []
    with served(index) as address:
        thread = threading.Thread(
            target=lambda: answers.append(patient.post(f"{address}/v1/context", json={"query": QUERY}))
        )
        thread.start()
        try:
            assert began.wait(PATIENCE)
            assert httpx2.get(f"{address}/v1/passages/p0", timeout=10).status_code == 200
        finally:
            may_end.set()
            thread.join()
    assert answers[0].json()["text"]


def test_a_read_only_server_refuses_changes(index):
    with served(index, writable=False) as address:
        for method, path, body in (
            ("POST", "/v1/passages", {"passages": [{"id": "a", "text": "b"}]}),
            ("POST", "/v1/documents", {"documents": [{"id": "a", "text": "b"}]}),
            ("POST", "/v1/index/snapshots", {"name": "a"}),
            ("POST", "/v1/index/snapshots/a/restore", None),
            ("DELETE", "/v1/index/snapshots/a", None),
            ("DELETE", "/v1/passages/p0", None),
            ("DELETE", "/v1/documents/d0", None),
            ("POST", "/v1/files", None),
        ):
            response = patient.request(method, address + path, json=body)
            assert response.status_code == 403
            assert "writable" in response.json()["error"]["message"]


def test_new_versions_and_indexes_load_without_failed_requests(tmp_path):
    folder = write_tiny_index(tmp_path)
    responses, stop = [], threading.Event()

    def ask(address):
        with httpx2.Client(base_url=address, timeout=PATIENCE) as http:
            while not stop.is_set():
                responses.append(http.post("/v1/search", json={"query": QUERY, "top_k": 5}))

    with served(folder) as address:
        threads = [threading.Thread(target=ask, args=(address,)) for _ in range(4)]
        for thread in threads:
            thread.start()

        def wait_for(num_passages):
            until(
                lambda: patient.get(f"{address}/v1/index").json()["num_passages"] == num_passages,
                f"an index of {num_passages} passages",
            )

        try:
            writer = Index.open(folder, dtype="float32")  # as another process would
            writer.upsert([Passage("later", "the cat by the sea")])
            wait_for(61)
            writer.delete(["p1", "p2"])
            writer.compact(dense=True)
            wait_for(59)
            corpus = tmp_path / "corpus.jsonl"
            corpus.write_text('{"_id": "only", "text": "the cat by the sea"}\n', encoding="utf-8")
            encode(corpus, writer.student, folder, student_source=str(tmp_path / "student-0"), overwrite=True)
            wait_for(1)
            found_one = {"query": "the cat by the sea"}
            until(
                lambda: len(patient.post(f"{address}/v1/search", json=found_one).json()["passages"]) == 1,
                "searches of the new index",
            )
            until(lambda: len(responses[-1].json()["passages"]) == 1, "an answer of the new index")
        finally:
            stop.set()
            for thread in threads:
                thread.join()
    assert {response.status_code for response in responses} == {200}
    sizes = {len(response.json()["passages"]) for response in responses}
    assert sizes == {5, 1}


def test_an_index_that_disappears_is_reported_in_health(tmp_path):
    folder = write_tiny_index(tmp_path)
    with served(folder) as address:
        folder.rename(tmp_path / "elsewhere")
        until(lambda: "cannot be read" in patient.get(f"{address}/health").json()["message"], "a word of the trouble")
        assert patient.get(f"{address}/health").status_code == 200
        (tmp_path / "elsewhere").rename(folder)
        until(lambda: patient.get(f"{address}/health").json()["message"] == "", "the end of the trouble")


def test_a_server_without_its_index_is_broken_and_explains_why(tmp_path):
    with serve(make_app(tiny_settings(tmp_path / "nothing"))) as address:
        health = wait_until_ready(address, "broken")
        assert "nothing" in health["message"]
        response = patient.post(f"{address}/v1/search", json={"query": "cat"})
        assert response.status_code == 503
        assert response.headers["Retry-After"]
        assert response.json()["error"]["kind"] == "not_ready"


def test_a_student_can_be_served_without_an_index(folder, index):
    with served(None, student=str(folder / "student-0")) as address:
        assert patient.post(f"{address}/v1/encode", json={"texts": ["cat"], "kind": "query"}).status_code == 200
        response = patient.post(f"{address}/v1/search", json={"query": "cat"})
        assert response.status_code == 404
        assert "no index" in response.json()["error"]["message"]


def test_a_student_that_did_not_make_the_index_is_refused(folder, index):
    settings = tiny_settings(index, student=str(write_tiny_student(folder, seed=1)))
    with serve(make_app(settings)) as address:
        assert "student" in wait_until_ready(address, "broken")["message"]


def test_a_teacher_reads_again(tmp_path):
    folder = write_tiny_index(tmp_path)
    teacher = write_tiny_model(tmp_path / "teacher", "llama")
    model = load_teacher(TeacherConfig(model=str(teacher), prompt="short"), dtype="float32")
    write_error(Storage.open(folder), model, "asymmetric", StudentError(1.0, 0.0, 2.0))
    passages = {passage.id: passage for passage in tiny_passages()}
    with (
        served(folder, teacher=str(teacher), prompt="short", teacher_ms=60_000) as address,
        httpx2.Client(base_url=address, timeout=PATIENCE) as http,
    ):
        facts = http.get("/v1/index").json()
        assert facts["rescore"] == ["none", "iem", "cascade", "teacher"]
        body = {"query": QUERY, "top_k": 5}
        reread = http.post("/v1/search", json=body | {"rescore": "teacher", "teacher_passages": 12}).json()
        log_odds = [hit["log_odds"] for hit in reread["passages"]]
        assert log_odds == sorted(log_odds, reverse=True)
        pairs = [(QUERY, passages[hit["id"]].full_text) for hit in reread["passages"]]
        np.testing.assert_allclose(log_odds, model.score_pairs(pairs, "asymmetric").log_odds, atol=1e-3)
        assert len(reread["reranking"]["read"]) == 12
        assert "rerank" in reread["seconds"]
        cascade = http.post("/v1/search", json=body | {"rescore": "cascade", "teacher_passages": 3}).json()
        assert len(cascade["reranking"]["read"]) <= 3
        best = reread["passages"][0]
        explanation = http.post("/v1/explain", json={"query": QUERY, "passage_id": best["id"], "teacher": True}).json()
        assert explanation["teacher"]["log_odds"] == pytest.approx(best["log_odds"], abs=1e-3)
        assert 0 <= explanation["teacher"]["probability"] <= 1


def test_a_writer_expands_queries(tmp_path):
    folder = write_tiny_index(tmp_path)
    answers = {"fails": Reply("no more money: http://10.0.0.1", status=402)}

    def reply(request, number):
        if "Number of queries" in request.prompt:
            text = "1. a ship on the sea\n2. the dog by the house"
        else:
            text = "The cat sat by the sea and watched the ship."
        plain = Reply({"choices": [{"message": {"content": text}, "finish_reason": "stop"}]})
        return answers["fails"] if "bread" in request.prompt else plain

    with local_endpoint(reply) as endpoint:
        settings = tiny_settings(folder, writer="served", writer_endpoint=endpoint.url)
        with serve(make_app(settings)) as address, httpx2.Client(base_url=address, timeout=PATIENCE) as http:
            wait_until_ready(address)
            assert http.get("/v1/index").json()["writer"] == "served"
            library = Index.open(folder, dtype="float32")
            remote = WriterEndpointConfig(url=endpoint.url)
            writer = load_writer(WriterConfig(model="served", kind="remote", remote=remote))
            for method, number in [("multi", 2), ("hyde", None)]:
                body = {"query": QUERY, "top_k": 20, "expand": method, "expansions": number}
                answer = http.post("/v1/search", json=body).json()
                expected = library.search(QUERY, top_k=20, expansion=Expansion(writer, method, number))
                assert [hit["id"] for hit in answer["passages"]] == [hit.passage.id for hit in expected.passages]
                np.testing.assert_allclose(
                    [hit["score"] for hit in answer["passages"]], [hit.score for hit in expected.passages], atol=1e-4
                )
                assert answer["expansion"]["texts"] == list(expected.expansion.texts) != []
                assert answer["seconds"].keys() >= {"queue", "expansion", "encode", "candidates", "score"}
            plain = library.search(QUERY, top_k=20)
            assert [hit["id"] for hit in answer["passages"]] != [hit.passage.id for hit in plain.passages]
            context = http.post("/v1/context", json={"query": QUERY, "expand": "hyde", "rescore": "none"}).json()
            assert context["expansion"]["method"] == "hyde"
            assert context["sources"]
            refused = http.post("/v1/search", json={"query": QUERY, "expand": "multi", "exact": True})
            assert (refused.status_code, "fusion" in refused.text) == (400, True)
            failed = http.post("/v1/search", json={"query": "the bread", "expand": "multi"}).json()
            assert failed["expansion"]["texts"] == []
            assert failed["expansion"]["problem"] == "the writer failed; the server's log says why"
            plain = library.search("the bread")
            assert [hit["id"] for hit in failed["passages"]] == [hit.passage.id for hit in plain.passages]


def test_a_writer_rewrites_the_last_question_of_a_conversation(tmp_path):
    folder = write_tiny_index(tmp_path)

    def reply(request, number):
        status = 402 if "bread" in request.prompt else 200
        return Reply(chat("where is the ship on the sea?"), status=status)

    with local_endpoint(reply) as endpoint:
        settings = tiny_settings(folder, writer="served", writer_endpoint=endpoint.url, max_text_chars=1_000)
        with serve(make_app(settings)) as address, httpx2.Client(base_url=address, timeout=PATIENCE) as http:
            wait_until_ready(address)
            history = ["what is a ship?", {"role": "assistant", "content": "a large boat"}]
            body = {"query": "where is it?", "top_k": 5, "history": history}
            answer = http.post("/v1/search", json=body).json()
            plain = http.post("/v1/search", json={"query": "where is the ship on the sea?", "top_k": 5}).json()
            assert answer["query"] == plain["query"]
            assert answer["rewriting"]["asked"] == "where is it?"
            assert answer["passages"] == plain["passages"]
            assert plain["rewriting"] is None
            num_requests = len(endpoint.requests)
            context = http.post("/v1/context", json=body).json()
            assert (context["query"], context["rewriting"]["seconds"]) == (answer["query"], 0)
            assert len(endpoint.requests) == num_requests
            remote = WriterEndpointConfig(url=endpoint.url)
            rewriter = Rewriter(load_writer(WriterConfig(model="served", kind="remote", remote=remote)))
            library = Index.open(folder, dtype="float32")
            assert library.context("where is it?", history=history, rewriter=rewriter, top_k=5).text == context["text"]
            failed = http.post("/v1/search", json={"query": "and it?", "history": ["the bread"]}).json()
            assert failed["query"] == "and it?"
            assert failed["rewriting"]["problem"] == "the writer failed; the server's log says why"
            long = http.post("/v1/search", json={"query": "and it?", "history": ["a", "b" * 1_001]})
            assert (long.status_code, "history.1: 1,001 characters" in long.text) == (400, True)


async def ask_at_once(address, number, path, body, held):
    """Sends ``number`` requests at once; no text is encoded before the first response is there."""
    async with httpx2.AsyncClient(base_url=address, timeout=PATIENCE) as http:
        requests = [asyncio.create_task(http.post(path, json=body)) for _ in range(number)]
        await asyncio.wait(requests, return_when=asyncio.FIRST_COMPLETED)
        held.may_end.set()
        return await asyncio.gather(*requests)


def test_overload_is_refused_but_admitted_requests_succeed(index):
    app = make_app(tiny_settings(index, queue_texts=4))
    with serve(app) as address:
        wait_until_ready(address)
        held = HeldStudent(app.state.serving.now().models.student)
        body = {"texts": [tiny_passages()[0].text] * 200, "kind": "passage"}
        responses = asyncio.run(ask_at_once(address, 12, "/v1/encode", body, held))
    assert {response.status_code for response in responses} == {200, 429}
    assert all(int(response.headers["Retry-After"]) >= 1 for response in responses if response.status_code == 429)


def test_refused_searches_never_encode_their_query(index, monkeypatch):
    encoded = []
    encode = ModelService.encode

    async def counted(self, texts, kind, **options):
        encoded.extend(texts)
        return await encode(self, texts, kind, **options)

    monkeypatch.setattr(ModelService, "encode", counted)
    app = make_app(tiny_settings(index, queue_texts=3))
    with serve(app) as address:
        wait_until_ready(address)
        held = HeldStudent(app.state.serving.now().models.student)
        responses = asyncio.run(ask_at_once(address, 40, "/v1/search", {"query": QUERY}, held))
    counts = Counter(response.status_code for response in responses)
    assert counts.keys() == {200, 429}
    assert len(encoded) == counts[200] >= 3


def test_a_disconnected_client_frees_its_place_in_the_queue(index):
    app = make_app(tiny_settings(index))
    with serve(app) as address:
        wait_until_ready(address)
        models = app.state.serving.now().models
        held = HeldStudent(models.student)
        texts = [passage.text for passage in tiny_passages()] * 8
        client = LeavingClient(address, "/v1/encode", {"texts": texts, "kind": "passage"})
        held.wait()
        assert models.num_queued > 0
        client.leave()
        until(lambda: models.num_queued == 0, "an empty queue")  # though none of them has been encoded
        held.may_end.set()
        assert patient.post(f"{address}/v1/encode", json={"texts": ["cat"], "kind": "query"}).status_code == 200
        assert models.num_queued == 0


def test_of_64_clients_each_is_answered_also_when_the_server_stops(index):
    """Searches first, without an error; then a text each, which is still to be encoded when the server stops."""
    num_clients = 64
    statuses = []

    def ask(address):
        search = f"{address}/v1/search"
        statuses.extend(patient.post(search, json={"query": QUERY}).status_code for _ in range(4))
        have_searched.wait(PATIENCE)
        may_encode.wait(PATIENCE)
        body = {"texts": [QUERY], "kind": "query"}
        statuses.append(patient.post(f"{address}/v1/encode", json=body).status_code)

    def release_when_it_stops(address):
        wait_until_closed(address)
        held.may_end.set()

    def all_are_in_flight():
        return f"\nd2llm_http_requests_in_flight {num_clients + 1}.0\n" in patient.get(f"{address}/metrics").text

    have_searched, may_encode = threading.Barrier(num_clients + 1), threading.Event()
    app = make_app(tiny_settings(index))
    with serve(app) as address:
        wait_until_ready(address)
        threads = [threading.Thread(target=ask, args=(address,)) for _ in range(num_clients)]
        for thread in threads:
            thread.start()
        have_searched.wait(PATIENCE)
        assert statuses == [200] * (4 * num_clients)
        held = HeldStudent(app.state.serving.now().models.student)
        may_encode.set()
        until(all_are_in_flight, "64 requests at once")
        threads.append(threading.Thread(target=release_when_it_stops, args=(address,)))
        threads[-1].start()
    for thread in threads:
        thread.join()
    assert statuses == [200] * (5 * num_clients)


def test_responses_do_not_reveal_where_files_are(index, address, folder):
    response = patient.post(f"{address}/v1/rescore", json={"query": "cat", "passage_ids": ["nowhere"]})
    assert response.status_code == 400
    assert "nowhere" in response.json()["error"]["message"]
    assert str(folder) not in response.text
    with serve(make_app(tiny_settings(folder / "absent"))) as broken:
        assert str(folder) not in wait_until_ready(broken, "broken")["message"]


def test_a_relative_index_path_does_not_reveal_its_folder(tmp_path, monkeypatch, caplog):
    index = write_tiny_index(tmp_path)
    (index / "write.lock").unlink()
    (index / "write.lock").mkdir()
    monkeypatch.chdir(tmp_path)
    with served(index.relative_to(tmp_path)) as address:
        response = patient.post(f"{address}/v1/passages", json={"passages": [{"id": "new", "text": "a cat"}]})
        assert response.status_code == 507
        assert "write.lock" in response.text
        assert str(tmp_path) not in response.text
        (logged,) = [record for record in caplog.records if "failed" in record.getMessage()]
        assert "write.lock" in logged.getMessage()
        assert logged.exc_info is None  # the message says it all


def test_a_wrong_method_gets_all_allowed_ones(address):
    for path in ("/v1/passages/p1", "/v1/passages/with/slash"):
        response = patient.request("PATCH", address + path)
        assert response.status_code == 405
        assert response.headers["Allow"] == "DELETE, GET, HEAD"
    assert patient.get(f"{address}/v1/search").headers["Allow"] == "POST"
    assert patient.get(f"{address}/v1/index/snapshots/x/restore").headers["Allow"] == "POST"


def test_a_cascade_needs_the_students_calibrated_error(tmp_path):
    folder, teacher = write_tiny_index(tmp_path), write_tiny_model(tmp_path / "teacher", "llama")
    with served(folder, teacher=str(teacher), prompt="short") as address:
        assert patient.get(f"{address}/v1/index").json()["rescore"] == ["none", "iem", "teacher"]
        response = patient.post(f"{address}/v1/search", json={"query": "cat", "rescore": "cascade"})
        assert response.status_code == 400
        assert "calibrate" in response.json()["error"]["message"]
