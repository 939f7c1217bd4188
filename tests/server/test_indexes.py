"""Several indexes in one server: their addresses, their names as models, their keys, and their versions."""

from __future__ import annotations

import gc
import io
import json
import weakref
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="needs the extra 'serve'")

from fastapi.testclient import TestClient

from d2llm import Index, Student
from d2llm.core.errors import D2LLMError
from d2llm.core.types import Passage
from d2llm.server import app as app_module
from d2llm.server.app import load, make_app
from d2llm.server.keys import add_key
from d2llm.server.logs import start_logs
from d2llm.server.telemetry import Telemetry
from d2llm.store import vector_file
from tiny_app import app_of
from tiny_models import TEXTS
from tiny_server import tiny_settings, write_tiny_index, write_tiny_student
from waiting import until

QUERY = "the cat by the sea"
RERANK = {"query": QUERY, "documents": TEXTS[:4]}


def write_faq(folder: Path, student: Path) -> Path:
    """An index of another task than that of ``write_tiny_index``, with other passages."""
    index = Index.create(folder, student, task="symmetric", dtype="float32")
    index.upsert([Passage(f"q{n}", text) for n, text in enumerate(TEXTS)])
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two indexes of one student, by name."""
    folder = tmp_path_factory.mktemp("indexes")
    docs = write_tiny_index(folder, 12, "docs")
    return {"docs": docs, "faq": write_faq(folder / "questions.index", folder / "student-0")}


@contextmanager
def serving(folders: dict[str, Path] | Path, **settings: Any) -> Generator[TestClient]:
    with TestClient(make_app(tiny_settings(folders, **settings)), base_url="http://127.0.0.1:8000") as client:
        until(lambda: client.get("/health").json()["status"] == "ready", "a server that is ready")
        yield client


@pytest.fixture(scope="module")
def client(folders: dict[str, Path]) -> Iterator[TestClient]:
    with serving(folders) as ready:
        yield ready


@pytest.fixture(scope="module")
def keys(folders: dict[str, Path]) -> dict[str, str]:
    file = folders["docs"].parent / "keys.json"
    return {
        "all": add_key(file, "all", "admin"),
        "docs": add_key(file, "docs", "write", indexes=["docs"]),
        "reader": add_key(file, "reader", "read", indexes=["docs"]),
        "both": add_key(file, "both", "read", indexes=["faq", "docs"]),
        "gone": add_key(file, "gone", "read", indexes=["archive"]),
    }


@pytest.fixture(scope="module")
def guarded(folders: dict[str, Path], keys: dict[str, str]) -> Iterator[TestClient]:
    with serving(folders, keys_file=folders["docs"].parent / "keys.json") as ready:
        yield ready


def bearer(secret: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret}"}


def ids(response: Any) -> set[str]:
    assert response.status_code == 200, response.text
    return {hit["id"] for hit in response.json()["passages"]}


# Addresses


def test_an_index_is_used_below_its_address(client: TestClient):
    body = {"query": QUERY, "top_k": 100}
    docs, faq = (client.post(f"/indexes/{name}/v1/search", json=body) for name in ("docs", "faq"))
    assert ids(docs) == {f"p{n}" for n in range(12)}
    assert ids(faq) == {f"q{n}" for n in range(8)}
    assert (docs.json()["index"]["name"], faq.json()["index"]["name"]) == ("docs", "faq")
    facts = client.get("/indexes/faq/v1/index").json()
    assert (facts["name"], facts["task"], facts["num_passages"]) == ("faq", "symmetric", 8)
    assert client.get("/indexes/faq/v1/passages/q3").json()["text"] == TEXTS[3]
    assert client.get("/indexes/docs/v1/passages/q3").status_code == 404
    body = {"query": QUERY, "passage_id": "q3"}
    assert client.post("/indexes/faq/v1/explain", json=body).json()["text"] == TEXTS[3]


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v1/search", {"query": QUERY}, 400),
        ("/v1/passages", {"passages": [{"id": "x", "text": "a cat"}]}, 400),
        ("/v1/passages/p1", None, 400),
        ("/v1/index", None, 400),
        ("/v1/encode", {"texts": ["cat"], "kind": "query"}, 400),
        ("/embed", {"inputs": "cat"}, 422),
        ("/rerank", {"query": QUERY, "texts": ["a cat"]}, 422),
        ("/v1/rerank", RERANK, 422),
        ("/score", {"text_1": "cat", "text_2": "dog"}, 400),
    ],
)
def test_a_request_that_names_no_index_is_refused_with_the_names(client: TestClient, path: str, body: Any, status: int):
    response = client.get(path) if body is None else client.post(path, json=body)
    assert response.status_code == status
    assert "docs, faq" in response.text
    assert "/indexes/docs/v1/search" in response.text


def test_an_unknown_index_is_refused_with_the_names(client: TestClient):
    response = client.post("/indexes/docz/v1/search", json={"query": QUERY})
    assert response.status_code == 404
    assert response.json()["error"]["message"] == "there is no index 'docz'; there is docs, faq"
    assert client.post("/indexes/docz/embed", json={"inputs": "cat"}).json()["error_type"] == "Validation"


def test_a_write_changes_the_named_index_alone(client: TestClient):
    passage = {"id": "new", "text": "the dog by the house"}
    response = client.post("/indexes/faq/v1/passages", json={"passages": [passage]})
    assert response.json()["num_added"] == 1
    numbers = {index["name"]: index["num_passages"] for index in client.get("/v1/indexes").json()["indexes"]}
    assert numbers == {"docs": 12, "faq": 9}
    assert client.delete("/indexes/docs/v1/passages/new").status_code == 404
    assert client.delete("/indexes/faq/v1/passages/new").json()["num_deleted"] == 1


def test_a_redirect_keeps_the_address(client: TestClient):
    response = client.get("/indexes/faq/v1/index/", follow_redirects=False)
    assert (response.status_code, response.headers["Location"]) == (307, "../index")
    assert client.get("/indexes/faq/v1/index/").json()["name"] == "faq"
    for name in ("faq", "a:b"):  # not an address with the scheme "a"
        response = client.get(f"/indexes/{name}?q=a%20b", follow_redirects=False)
        assert response.headers["Location"] == f"./{name}/?q=a%20b"


def test_the_page_and_the_api_description_are_below_each_address(client: TestClient):
    for path in ("/indexes/faq", "/indexes/faq/", "/indexes/faq/docs", "/indexes/faq/page/main.js"):
        assert client.get(path).content == client.get(path.removeprefix("/indexes/faq") or "/").content
    description = client.get("/indexes/faq/openapi.json").text
    assert "/v1/indexes" in description
    assert "faq" not in description


def test_a_server_of_one_index_needs_no_name(folders: dict[str, Path]):
    with serving(folders["faq"]) as client:
        assert client.get("/v1/index").json()["name"] == "questions.index"
        assert client.get("/indexes/questions.index/v1/index").json()["name"] == "questions.index"
        models = [model["id"] for model in client.get("/v1/models").json()["data"]]
        assert models == ["student-0", "student-0:query", "student-0:passage"]
        assert client.post("/v1/rerank", json=RERANK | {"model": "questions.index"}).status_code == 422
        assert client.get("/health").json()["message"] == ""


# Names of models


def test_models_are_named_after_indexes(client: TestClient):
    models = [model["id"] for model in client.get("/v1/models").json()["data"]]
    assert models == ["docs", "docs:query", "docs:passage", "faq", "faq:query", "faq:passage"]
    assert client.get("/v1/models/faq:query").json()["id"] == "faq:query"
    below = [model["id"] for model in client.get("/indexes/faq/v1/models").json()["data"]]
    assert below == [*models[3:], "student-0", "student-0:query", "student-0:passage"]
    unknown = client.post("/v1/embeddings", json={"model": "student-0", "input": "cat"})
    assert unknown.status_code == 404
    assert unknown.json()["error"]["code"] == "model_not_found"
    assert "there is docs, docs:query, docs:passage, faq" in unknown.json()["error"]["message"]


def test_embeddings_are_those_of_the_named_indexs_task(client: TestClient):
    def embed(address: str, model: str) -> list[float]:
        response = client.post(f"{address}/v1/embeddings", json={"model": model, "input": QUERY})
        assert response.json()["model"] == model
        return response.json()["data"][0]["embedding"]

    assert embed("", "faq:query") == embed("/indexes/faq", "student-0:query")
    assert embed("", "docs:query") == embed("/indexes/docs", "docs:query")
    assert embed("", "faq:query") != embed("", "docs:query")


@pytest.mark.parametrize("path", ["/v1/rerank", "/v2/rerank", "/rerank", "/score"])
def test_rerankers_score_with_the_named_indexs_task(client: TestClient, path: str):
    body = {"text_1": QUERY, "text_2": TEXTS[:4]} if path == "/score" else RERANK

    def scores(address: str, model: str | None) -> Any:
        response = client.post(address + path, json=body | ({"model": model} if model else {}))
        assert response.status_code == 200, response.text
        assert response.json().get("model", model) == (model or "student-0")
        return response.json().get("results") or response.json()["data"]

    docs, faq = (scores("", name) for name in ("docs", "faq"))
    assert docs != faq
    assert faq == scores("/indexes/faq", "student-0")
    if path != "/v2/rerank":  # Cohere's needs a model
        assert docs == scores("/indexes/docs", None)


# Students and versions


def test_a_shared_student_is_loaded_once(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch):
    loads: list[object] = []
    really_load = Student.load

    def counted(*args: Any, **kwargs: Any) -> Student:
        loads.append(args)
        return really_load(*args, **kwargs)

    monkeypatch.setattr(app_module.Student, "load", counted)
    served = load(tiny_settings(folders), Telemetry(), [])
    assert len(loads) == len(served.loaded) == 1
    assert served.now("docs").models is served.now("faq").models


def test_each_index_changes_to_another_student_by_itself(folders: dict[str, Path], tmp_path: Path):
    other = write_tiny_student(tmp_path, seed=3)
    new = write_faq(tmp_path / "new", other)
    links = {name: tmp_path / f"{name}.link" for name in folders}
    for name, folder in folders.items():
        links[name].symlink_to(folder)

    def point(name: str) -> None:
        links[name].unlink()
        links[name].symlink_to(new)

    with serving(links, reload_seconds=1_000) as client:
        served = app_of(client).state.serving
        (old,) = served.loaded
        point("faq")
        assert client.post("/indexes/faq/v1/index/reload").json()["changed"]
        fingerprints = {index["name"]: index["fingerprint"] for index in client.get("/health").json()["indexes"]}
        assert fingerprints["docs"] == old.fingerprint != fingerprints["faq"]
        health = client.get("/health").json()
        assert (health["fingerprint"], health["engine"]) == (None, None)
        assert {index["engine"] for index in health["indexes"]} == {old.student.engine}
        assert len(served.loaded) == 2
        for name in folders:  # the old student still works for the index that has it
            assert client.post(f"/indexes/{name}/v1/search", json={"query": QUERY}).status_code == 200
        point("docs")
        client.portal.call(served.reload)  # pyright: ignore[reportOptionalMemberAccess]
        until(lambda: len(served.loaded) == 1, "the end of the old student")
        health = client.get("/health").json()
        assert served.loaded[0].fingerprint == fingerprints["faq"] == health["fingerprint"]
        assert health["engine"] == old.student.engine
        assert ids(client.post("/indexes/docs/v1/search", json={"query": QUERY})) == {f"q{n}" for n in range(8)}


def test_a_replaced_student_leaves_memory_at_once(folders: dict[str, Path], tmp_path: Path):
    """Not when a garbage collection finds it, which in a server may be hours later, and many students."""
    new = write_faq(tmp_path / "new", write_tiny_student(tmp_path, seed=3))
    link = tmp_path / "faq"
    link.symlink_to(folders["faq"])
    with serving(link, reload_seconds=1_000) as client:
        served = app_of(client).state.serving
        replaced = [
            weakref.ref(one) for one in (served.loaded[0], served.loaded[0].student, served.indexes["faq"].version)
        ]
        for path, body in (
            ("/v1/search", {"query": QUERY}),
            ("/rerank", RERANK),
            ("/v1/embeddings", {"model": "student-0", "input": QUERY}),
        ):
            assert client.post(path, json=body).status_code == 200
        link.unlink()
        link.symlink_to(new)
        gc.collect()
        gc.disable()
        try:
            assert client.post("/v1/index/reload").json()["changed"]
            until(lambda: not any(one() for one in replaced), "the end of the old student")
        finally:
            gc.enable()


def test_a_new_version_compares_only_what_it_adds(folders, tmp_path, monkeypatch):
    folder = write_faq(tmp_path / "faq", folders["docs"].parent / "student-0")
    compared: list[int] = []
    checksum = vector_file._checksum
    with serving(folder, reload_seconds=1_000) as client:
        before = app_of(client).state.serving.indexes["faq"].version
        monkeypatch.setattr(vector_file, "_JOINED_ROWS", 0)
        Index.open(folder).upsert([Passage("new", "one more")])
        monkeypatch.setattr(vector_file, "_checksum", lambda codes: compared.append(len(codes)) or checksum(codes))
        assert client.post("/v1/index/reload").json()["changed"]
        assert app_of(client).state.serving.indexes["faq"].version.view.version > before.view.version
    assert compared == [1]


def test_an_index_that_cannot_be_read_again_does_not_stop_the_others(folders: dict[str, Path], tmp_path: Path):
    links = {name: tmp_path / f"{name}.link" for name in folders}
    for name, folder in folders.items():
        links[name].symlink_to(folder)
    with serving(links) as client:
        links["docs"].unlink()
        until(lambda: client.get("/health").json()["message"], "a word of the trouble")
        assert client.get("/health").json()["message"].startswith("docs: a new version cannot be read: ")
        problems = {index["name"]: index["problem"] for index in client.get("/v1/indexes").json()["indexes"]}
        assert problems["docs"]
        assert problems["faq"] == ""
        metrics = client.get("/metrics").text.splitlines()
        assert {'d2llm_index_unreadable{index="docs"} 1.0', 'd2llm_index_unreadable{index="faq"} 0.0'} <= {*metrics}
        assert str(tmp_path) not in client.get("/health").text
        assert len(ids(client.post("/indexes/faq/v1/search", json={"query": QUERY}))) == 8
        links["docs"].symlink_to(folders["docs"])
        until(lambda: not client.get("/health").json()["message"], "the end of the trouble")


def test_an_index_that_cannot_be_opened_stops_the_start(folders: dict[str, Path], tmp_path: Path):
    with pytest.raises(D2LLMError, match=r"^index 'faq': .*elsewhere"):
        load(tiny_settings({"docs": folders["docs"], "faq": tmp_path / "elsewhere"}), Telemetry(), [])


# Keys


def test_a_key_for_one_index_needs_no_name(guarded: TestClient, keys: dict[str, str]):
    key = bearer(keys["docs"])
    body = {"query": QUERY, "top_k": 100}
    for address in ("", "/indexes/docs"):
        assert len(ids(guarded.post(f"{address}/v1/search", json=body, headers=key))) == 12
    assert [index["name"] for index in guarded.get("/v1/indexes", headers=key).json()["indexes"]] == ["docs"]
    models = [model["id"] for model in guarded.get("/v1/models", headers=key).json()["data"]]
    assert models[::3] == ["docs", "student-0"]
    passage = {"id": "new", "text": "the dog by the house"}
    assert guarded.post("/v1/passages", json={"passages": [passage]}, headers=key).json()["num_added"] == 1
    assert guarded.delete("/indexes/docs/v1/passages/new", headers=key).status_code == 200


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/indexes/{}/v1/search", {"query": QUERY}),
        ("/indexes/{}/v1/models", None),
        ("/indexes/{}/embed", {"inputs": "cat"}),
        ("/v1/embeddings", {"model": "{}", "input": "cat"}),
        ("/v2/rerank", RERANK | {"model": "{}"}),
        ("/v1/rerank", RERANK | {"model": "{}"}),
        ("/v1/models/{}", None),
    ],
)
def test_a_key_for_other_indexes_is_refused_alike_whether_or_not_there_is_one(
    guarded, keys, path: str, body: dict[str, Any] | None
):
    answers: list[str] = []
    for name in ("faq", "nope"):
        at, content = path.format(name), body and {key: name if value == "{}" else value for key, value in body.items()}
        method = "GET" if content is None else "POST"
        response = guarded.request(method, at, json=content, headers=bearer(keys["docs"]) | {"X-Request-ID": "r"})
        assert response.status_code == 403
        assert 'error="insufficient_scope"' in response.headers["WWW-Authenticate"]
        assert f"the key 'docs' may not use the index '{name}', only index docs" in response.text
        answers.append(response.text.replace(name, "NAME"))
        assert guarded.request(method, at, json=content, headers=bearer(keys["both"])).status_code == (
            200 if name == "faq" else 403
        )
    assert answers[0] == answers[1]


def test_what_names_all_indexes_needs_a_key_for_all(guarded: TestClient, keys: dict[str, str]):
    refused = guarded.get("/metrics", headers=bearer(keys["docs"]))
    assert refused.status_code == 403
    assert "for index docs" in refused.json()["error"]["message"]
    assert 'd2llm_index_passages{index="faq"} 8.0' in guarded.get("/metrics", headers=bearer(keys["all"])).text
    assert guarded.get("/health").json()["indexes"] is None  # it needs no key
    assert guarded.get("/indexes/faq/health").json() == guarded.get("/indexes/nope/health").json()
    several = guarded.post("/v1/search", json={"query": QUERY}, headers=bearer(keys["both"]))
    assert several.status_code == 400
    assert "docs, faq" in several.json()["error"]["message"]


def test_a_key_for_indexes_that_are_not_served_may_use_nothing(guarded: TestClient, keys: dict[str, str]):
    for path in ("/v1/indexes", "/v1/models", "/v1/index"):
        response = guarded.get(path, headers=bearer(keys["gone"]))
        assert response.status_code == 403
        assert "is for index archive, which this server does not have" in response.text
        assert "docs" not in response.text


def test_an_address_does_not_hide_which_scope_a_request_needs(guarded: TestClient, keys: dict[str, str]):
    body = {"passages": [{"id": "x", "text": "a cat"}]}
    for address in ("/indexes/docs", "/indexes/docs/indexes/docs", "/indexes/faq/indexes/docs"):
        response = guarded.post(f"{address}/v1/passages", json=body, headers=bearer(keys["reader"]))
        assert response.status_code in (403, 404), address
    response = guarded.post("/indexes/docs/v1/passages", json=body, headers=bearer(keys["reader"]))
    assert 'scope="write"' in response.headers["WWW-Authenticate"]
    assert guarded.post("/indexes/docs/v1/index/reload", headers=bearer(keys["docs"])).status_code == 403
    assert guarded.post("/indexes/docs/v1/index/reload", headers=bearer(keys["all"])).status_code == 200
    assert guarded.get("/indexes/docs/v1/passages/x", headers=bearer(keys["all"])).status_code == 404


# Metrics and logs


def test_requests_are_counted_and_logged_by_index(client: TestClient):
    stream = io.StringIO()
    stop = start_logs(tiny_settings(None, student="none", log_format="json"), stream)
    value = app_of(client).state.telemetry.registry.get_sample_value

    def count(route: str, index: str, status: int = 200) -> float:
        labels = {"route": route, "method": "POST", "status": str(status), "index": index}
        return value("d2llm_http_requests_total", labels) or 0.0

    before = count("/v1/search", "faq"), count("/v2/rerank", "docs"), count("/v1/search", "", 404)
    client.post("/indexes/faq/v1/search", json={"query": QUERY})
    client.post("/v2/rerank", json=RERANK | {"model": "docs"})
    client.post("/indexes/secret/v1/search", json={"query": QUERY})
    stop()
    after = count("/v1/search", "faq"), count("/v2/rerank", "docs"), count("/v1/search", "", 404)
    assert [now - then for then, now in zip(before, after, strict=True)] == [1, 1, 1]
    assert value("d2llm_student_info", {"index": "faq", **student_labels(client)}) == 1
    assert value("d2llm_index_passages", {"index": "docs"}) == 12
    records = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [(record["route"], record["index"]) for record in records if record["event"] == "request"] == [
        ("/v1/search", "faq"),
        ("/v2/rerank", "docs"),
        ("/v1/search", None),
    ]
    assert "secret" not in stream.getvalue() + client.get("/metrics").text


def student_labels(client: TestClient) -> dict[str, str]:
    models = app_of(client).state.serving.now("faq").models
    client.get("/metrics")  # fills them in
    return {"name": models.name, "fingerprint": models.fingerprint}
