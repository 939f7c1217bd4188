"""Replacing the served index by another student's: index and student change together, and no request is dropped."""

from __future__ import annotations

import gc
import itertools
import logging
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2
import numpy as np
import pytest

pytest.importorskip("fastapi", reason="needs FastAPI: pip install 'd2llm[serve]'")

from _pytest.logging import LogCaptureHandler
from fastapi import FastAPI

from d2llm import Index, Student, encode
from d2llm.server import app as app_module
from d2llm.server.app import make_app
from live_server import HeldStudent, LeavingClient, patient, serve, served, wait_until_ready
from tiny_models import randomise, tiny_student_config, write_tiny_model
from tiny_server import tiny_passages, tiny_settings, write_tiny_student
from waiting import PATIENCE, until

QUERIES = ["the cat by the sea", "bread and salt", "a ship in winter"]
IDS = ["p1", "p5", "p9"]


@dataclass(frozen=True)
class Pair:
    """A student and the index that it makes, with the scores to expect from them."""

    student: Student
    source: Path
    number: int

    def write(self, folder: Path) -> None:
        passages = tiny_passages(self.number)
        encode(passages, self.student, folder, student_source=str(self.source), overwrite=True, vector_format="float32")

    @property
    def fingerprint(self) -> str:
        return self.student.fingerprint

    def scores(self, query: str, folder: Path) -> dict[str, float]:
        ranking = Index.open(folder, self.student).search(query, top_k=self.number)
        return {hit.passage.id: hit.score for hit in ranking.passages}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Pair, Pair]:
    """Two pairs whose vectors differ in width, so that mixing them up fails."""
    root = tmp_path_factory.mktemp("pairs")
    old = write_tiny_student(root)
    wide = write_tiny_model(root / "wide", "bert", hidden_size=48)
    student = Student.create(tiny_student_config(wide), dtype="float32")
    randomise(student.interaction)
    student.save(root / "new")
    loaded = [Student.load(path, dtype="float32") for path in (old, root / "new")]
    return Pair(loaded[0], old, 60), Pair(loaded[1], root / "new", 40)


def bodies(query: str) -> dict[str, dict[str, object]]:
    return {
        "/v1/search": {"query": query, "top_k": 60},
        "/v1/rescore": {"query": query, "passage_ids": IDS},
        "/v1/encode": {"texts": [query], "kind": "query"},
        "/v1/embeddings": {"input": [query], "model": "served:query"},
        "/rerank": {"query": query, "texts": ["a cat", "a dog"]},
    }


class Clients:
    """One thread per path that sends requests all the time; keeps each response with its arrival time and its query."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._stop = threading.Event()
        self.answers: list[tuple[float, str, httpx2.Response]] = []
        self._threads = [threading.Thread(target=self._ask, args=(path,)) for path in bodies("")]

    def __enter__(self) -> Clients:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _ask(self, path: str) -> None:
        with httpx2.Client(base_url=self._address, timeout=PATIENCE) as http:
            for query in itertools.cycle(QUERIES):
                if self._stop.wait(0.005):  # otherwise five busy clients leave the server no time
                    return
                response = http.post(path, json=bodies(query)[path])
                self.answers.append((time.monotonic(), query, response))

    def answered(self, since: float = 0.0) -> set[str]:
        """The paths with a response since the given time."""
        return {response.url.path for arrived, _, response in self.answers if arrived > since}


def check(clients: Clients, expected: dict[str, dict[str, dict[str, float]]], dims: dict[int, str]) -> set[str]:
    """Checks that each response comes from a single pair; returns the fingerprints of the pairs seen."""
    fingerprints: set[str] = set()
    assert {
        (response.url.path, response.status_code) for *_, response in clients.answers if response.status_code != 200
    } == set()
    for _, query, response in clients.answers:
        content = response.json()
        match response.url.path:
            case "/v1/search":
                fingerprint = content["index"]["fingerprint"]
                scores = {hit["id"]: hit["score"] for hit in content["passages"]}
                assert scores.keys() == expected[fingerprint][query].keys()
                assert scores == pytest.approx(expected[fingerprint][query], abs=1e-3)
            case "/v1/rescore":
                fingerprint = content["fingerprint"]
                expected_scores = [expected[fingerprint][query][passage_id] for passage_id in IDS]
                np.testing.assert_allclose(content["scores"], expected_scores, atol=1e-3)
            case "/v1/encode":
                fingerprint = content["fingerprint"]
                assert dims[len(content["vectors"][0])] == fingerprint
            case "/v1/embeddings":
                fingerprint = dims[len(content["data"][0]["embedding"])]
            case _:
                continue
        fingerprints.add(fingerprint)
    return fingerprints


def until_served(address: str, fingerprint: str) -> None:
    until(lambda: patient.get(f"{address}/health").json()["fingerprint"] == fingerprint, "the new student")


@dataclass
class Loads:
    """When students began and ended loading; each is held until ``may_end`` is true of the time when it began."""

    may_end: Callable[[float], bool]
    began: threading.Event
    times: list[tuple[float, float]]


@contextmanager
def held_loads(monkeypatch: pytest.MonkeyPatch, may_end: Callable[[float], bool]) -> Iterator[Loads]:
    """Makes loading a student take as long as the test needs."""
    loads = Loads(may_end, threading.Event(), [])
    load = Student.load

    def held(*args: object, **kwargs: object) -> Student:
        began = time.monotonic()
        loads.began.set()
        until(lambda: loads.may_end(began), "the end of loading")
        student = load(*args, **kwargs)  # pyright: ignore[reportArgumentType]
        loads.times.append((began, time.monotonic()))
        return student

    with monkeypatch.context() as patch:
        patch.setattr(app_module.Student, "load", held)
        yield loads


def expected_answers(pairs: tuple[Pair, Pair], folders: tuple[Path, Path]) -> tuple[dict, dict]:
    expected = {
        pair.fingerprint: {query: pair.scores(query, folder) for query in QUERIES}
        for pair, folder in zip(pairs, folders, strict=True)
    }
    return expected, {pair.student.vector_dim: pair.fingerprint for pair in pairs}


@pytest.mark.parametrize("way", ["in place", "by a link"])
def test_each_response_comes_from_one_pair_during_the_swap(pairs, way: str, tmp_path, monkeypatch):
    old, new = pairs
    old.write(tmp_path / "old")
    new.write(tmp_path / "new")
    expected, dims = expected_answers(pairs, (tmp_path / "old", tmp_path / "new"))
    link = tmp_path / "index"
    if way == "by a link":
        link.symlink_to("old")
    else:
        old.write(link)
    app = make_app(tiny_settings(link, model_name="served"))
    with serve(app) as address, httpx2.Client(base_url=address, timeout=PATIENCE) as http:
        wait_until_ready(address)
        served = weakref.ref(app.state.serving.now().models.student)
        assert http.get("/health").json()["fingerprint"] == old.fingerprint
        clients = Clients(address)
        # The texts of a removed index cannot be read any more: requests that need them wait for the new pair.
        waiting_paths = set() if way == "by a link" else {"/v1/search", "/v1/rescore"}

        def all_were_answered(since: float) -> bool:
            return clients.answered(since) >= {*bodies("")} - waiting_paths

        with held_loads(monkeypatch, all_were_answered) as loads, clients:
            until(lambda: clients.answered() == {*bodies("")}, "an answer to all")
            if way == "by a link":
                point_link(link, "new")
            else:
                new.write(link)
            until_served(address, new.fingerprint)
            served_from = time.monotonic()
            until(lambda: clients.answered(served_from) == {*bodies("")}, "an answer of the new pair to all")
        assert check(clients, expected, dims) == {old.fingerprint, new.fingerprint}
        ((began, ended),) = loads.times
        during_load = [response for arrived, _, response in clients.answers if began < arrived < ended]
        for response in during_load:
            if response.url.path == "/v1/encode":
                assert response.json()["fingerprint"] == old.fingerprint

        info = http.get("/v1/index").json()
        assert (info["student"]["fingerprint"], info["num_passages"]) == (new.fingerprint, 40)
        assert (info["student"]["dim"], info["student"]["backbone"]) == (48, "wide")
        assert http.get("/info").json()["model_sha"] == new.fingerprint
        metrics = http.get("/metrics").text
        assert f'd2llm_student_info{{fingerprint="{new.fingerprint}",index="index",name="served"}} 1.0' in metrics
        assert 'd2llm_index_passages{index="index"} 40.0' in metrics
        reload = http.post("/v1/index/reload").json()
        expected = {"version": info["version"], "fingerprint": new.fingerprint, "student": "served", "changed": False}
        assert reload == expected
        assert http.post("/v1/passages", json={"passages": [{"id": "x", "text": "a cat"}]}).json()["num_added"] == 1

        wait_until_released(served)


def wait_until_released(served: weakref.ref[Student]) -> None:
    """Waits until nothing references the student; a thread may still be finishing its last response."""

    def is_gone() -> bool:
        forget_log_records()
        gc.collect()
        return served() is None

    until(is_gone, "the end of the old student")


def forget_log_records() -> None:
    """Removes what pytest keeps of the log: a record with a traceback keeps the objects of its frames alive."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, LogCaptureHandler):  # two: one for the fixture `caplog`, one for reports
            handler.records.clear()


def point_link(link: Path, target: str) -> None:
    (link.parent / "next").symlink_to(target)
    (link.parent / "next").replace(link)


def requests_in_flight(app: FastAPI) -> float:
    return app.state.telemetry.registry.get_sample_value("d2llm_http_requests_in_flight")


@pytest.fixture
def folder(pairs: tuple[Pair, Pair], tmp_path: Path) -> Path:
    """A link to an index of the old student."""
    pairs[0].write(tmp_path / "old")
    (tmp_path / "index").symlink_to("old")
    return tmp_path / "index"


def test_a_request_finishes_with_the_student_it_began_with(pairs: tuple[Pair, Pair], folder: Path):
    old, new = pairs
    new.write(folder.parent / "new")
    texts = [f"{text.text} {n}" for n, text in enumerate(tiny_passages(500))]
    app = make_app(tiny_settings(folder, reload_seconds=1_000))
    with serve(app) as address:
        wait_until_ready(address)
        held = HeldStudent(app.state.serving.now().models.student)
        responses: list[httpx2.Response] = []

        def rerank() -> None:
            responses.append(patient.post(f"{address}/rerank", json={"query": "cat", "texts": texts}))

        client = threading.Thread(target=rerank)
        client.start()
        held.wait()
        point_link(folder, "new")
        assert patient.post(f"{address}/v1/index/reload").json()["fingerprint"] == new.fingerprint
        assert not responses  # the swap did not wait for the request
        held.may_end.set()
        client.join()
        (response,) = responses
        assert response.status_code == 200
        vectors = old.student.encode_passages(texts).vectors
        logits = old.student.score(old.student.encode_queries(["cat"]).vectors[0], vectors, "asymmetric")
        np.testing.assert_allclose(
            sorted(result["score"] for result in response.json()),
            sorted(1 / (1 + np.exp(-logits.astype(float)))),
            atol=1e-3,
        )


def test_disconnected_clients_do_not_keep_a_student_alive(pairs: tuple[Pair, Pair], folder: Path):
    pairs[1].write(folder.parent / "new")
    app = make_app(tiny_settings(folder, reload_seconds=1_000))
    with serve(app) as address:
        wait_until_ready(address)
        student = app.state.serving.now().models.student
        held, served = HeldStudent(student), weakref.ref(student)
        del student
        client = LeavingClient(
            address, "/rerank", {"query": "cat", "texts": [f"a dog and {n} cats" for n in range(500)]}
        )
        held.wait()
        point_link(folder, "new")
        assert patient.post(f"{address}/v1/index/reload").json()["changed"]
        client.leave()
        until(lambda: requests_in_flight(app) == 0, "that the server sees who has gone")
        held.may_end.set()
        wait_until_released(served)


def test_an_index_whose_student_is_missing_is_refused(pairs, folder, caplog):
    old, new = pairs
    Pair(new.student, folder.parent / "gone", 40).write(folder.parent / "new")
    with served(folder) as address, httpx2.Client(base_url=address, timeout=PATIENCE) as http:
        with caplog.at_level(logging.ERROR):
            point_link(folder, "new")
            response = http.post("/v1/index/reload")
        assert response.status_code == 409
        error = response.json()["error"]
        assert error["kind"] == "conflict"
        assert "gone" in error["message"]
        assert str(folder.parent) not in response.text
        assert str(folder.parent / "gone") in caplog.text
        until(lambda: http.get("/health").json()["message"], "a word of the trouble")
        health = http.get("/health")
        assert health.status_code == 200
        assert "gone" in health.json()["message"]
        assert str(folder.parent) not in health.text
        assert health.json()["fingerprint"] == old.fingerprint
        results = http.post("/v1/search", json={"query": QUERIES[0], "top_k": 60}).json()
        assert results["index"]["fingerprint"] == old.fingerprint
        assert len(results["passages"]) == 60
        point_link(folder, "old")
        assert http.post("/v1/index/reload").status_code == 200


def test_a_student_named_in_the_settings_is_not_replaced(pairs: tuple[Pair, Pair], folder: Path):
    old, new = pairs
    new.write(folder.parent / "new")
    settings = tiny_settings(folder, student=str(old.source), reload_seconds=1_000)
    with serve(make_app(settings)) as address, httpx2.Client(base_url=address, timeout=PATIENCE) as http:
        wait_until_ready(address)
        point_link(folder, "new")
        response = http.post("/v1/index/reload")
        assert response.status_code == 409
        assert new.fingerprint in response.json()["error"]["message"]
        assert http.post("/v1/search", json={"query": "cat"}).json()["index"]["fingerprint"] == old.fingerprint


def test_an_index_replaced_by_an_unusable_one_is_reported(pairs: tuple[Pair, Pair], tmp_path: Path):
    old, new = pairs
    old.write(tmp_path / "index")
    with (
        serve(make_app(tiny_settings(tmp_path / "index"))) as address,
        httpx2.Client(base_url=address, timeout=PATIENCE) as http,
    ):
        wait_until_ready(address)
        Pair(new.student, tmp_path / "gone", 40).write(tmp_path / "index")
        assert http.post("/v1/search", json={"query": "cat"}).status_code == 200  # of the old one, which is still open
        response = http.post("/v1/index/reload")
        assert response.status_code in (409, 503)
        assert "gone" in response.json()["error"]["message"]
        assert str(tmp_path) not in response.text
        assert http.post("/v1/search", json={"query": "cat"}).json()["index"]["fingerprint"] == old.fingerprint
        assert http.post("/v1/passages", json={"passages": [{"id": "x", "text": "a cat"}]}).status_code == 503
        assert http.post("/v1/encode", json={"texts": ["cat"], "kind": "query"}).status_code == 200
        assert http.post("/v1/search", json={"query": "cat", "filter": "nowhere = 1"}).status_code == 400
        new.write(tmp_path / "index")
        assert http.post("/v1/index/reload").status_code == 200
        assert http.post("/v1/search", json={"query": "cat"}).json()["index"]["fingerprint"] == new.fingerprint


def test_writes_after_a_swap_use_the_new_student(pairs: tuple[Pair, Pair], folder: Path):
    _, new = pairs
    new.write(folder.parent / "new")
    settings = tiny_settings(folder, reload_seconds=1_000)
    with serve(make_app(settings)) as address, httpx2.Client(base_url=address, timeout=PATIENCE) as http:
        wait_until_ready(address)
        point_link(folder, "new")
        passage = {"id": "x", "text": "bread is baked from flour"}
        assert http.post("/v1/passages", json={"passages": [passage]}).status_code == 200
        assert http.get("/health").json()["fingerprint"] == new.fingerprint
    view = Index.open(folder.parent / "new", new.student).view
    expected = new.student.encode_passages([passage["text"]]).vectors
    np.testing.assert_allclose(view.vectors(view.rows(["x"])), expected, atol=1e-4)
    assert len(Index.open(folder.parent / "old", pairs[0].student)) == 60


def test_a_student_is_loaded_once_even_if_the_client_leaves(pairs, folder, monkeypatch):
    _, new = pairs
    new.write(folder.parent / "new")
    app, has_left = make_app(tiny_settings(folder, reload_seconds=1_000)), threading.Event()
    with serve(app) as address:
        wait_until_ready(address)
        point_link(folder, "new")
        with held_loads(monkeypatch, lambda _: has_left.is_set()) as loads:
            client = LeavingClient(address, "/v1/index/reload", {})
            assert loads.began.wait(PATIENCE)
            client.leave()
            until(lambda: requests_in_flight(app) == 0, "that the server sees who has gone")
            has_left.set()
            response = patient.post(f"{address}/v1/index/reload").json()
            assert (response["fingerprint"], response["changed"]) == (new.fingerprint, False)
            assert len(loads.times) == 1


def test_out_of_memory_is_reported_and_loading_tried_again(pairs, folder, monkeypatch):
    old, new = pairs
    new.write(folder.parent / "new")
    with served(folder) as address, httpx2.Client(base_url=address, timeout=PATIENCE) as http:
        with monkeypatch.context() as patch:
            num_tried = 0

            def fail(*_: object, **__: object) -> Student:
                nonlocal num_tried
                num_tried += 1
                raise MemoryError

            patch.setattr(app_module.Student, "load", fail)
            point_link(folder, "new")
            response = http.post("/v1/index/reload")
            assert response.status_code == 409
            assert "MemoryError" in response.json()["error"]["message"]
            assert http.post("/v1/search", json={"query": "cat"}).json()["index"]["fingerprint"] == old.fingerprint
            until(lambda: num_tried > 2, "that the server looks again by itself")
        until_served(address, new.fingerprint)
