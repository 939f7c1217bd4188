"""An index of another student takes the place of the one that is served: together, without a dropped request."""

from __future__ import annotations

import gc
import itertools
import logging
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2
import numpy as np
import pytest

pytest.importorskip("fastapi", reason="needs FastAPI: pip install 'd2llm[serve]'")

from d2llm import Index, Student, encode
from d2llm.apps.server import app as app_module
from d2llm.apps.server.app import make_app
from live_server import serve, wait_until_ready
from tiny_models import randomise, tiny_student_config, write_tiny_model
from tiny_server import tiny_passages, tiny_settings, write_tiny_student

QUERIES = ["the cat by the sea", "bread and salt", "a ship in winter"]
IDS = ["p1", "p5", "p9"]


@dataclass(frozen=True)
class Pair:
    """An index, the student that made it, and what they answer."""

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
        ranking = Index.open(folder, self.student).search(query, top_k=self.number)[0]
        return {place.passage.id: place.score for place in ranking.passages}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Pair, Pair]:
    """Two with vectors of different widths: what mixes them up fails."""
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
    """A thread for each of some paths that asks all the time; answers with the time when they came, and the query."""

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
        with httpx2.Client(base_url=self._address, timeout=60) as http:
            for query in itertools.cycle(QUERIES):
                if self._stop.is_set():
                    return
                answer = http.post(path, json=bodies(query)[path])
                self.answers.append((time.monotonic(), query, answer))


def check(clients: Clients, expected: dict[str, dict[str, dict[str, float]]], dims: dict[int, str]) -> set[str]:
    """Every answer is one of a pair's; returns whose fingerprints were seen."""
    seen: set[str] = set()
    assert {
        (answer.url.path, answer.status_code) for *_, answer in clients.answers if answer.status_code != 200
    } == set()
    for _, query, answer in clients.answers:
        told = answer.json()
        match answer.url.path:
            case "/v1/search":
                fingerprint = told["index"]["fingerprint"]
                found = {place["id"]: place["score"] for place in told["passages"]}
                assert found.keys() == expected[fingerprint][query].keys()
                assert found == pytest.approx(expected[fingerprint][query], abs=1e-3)
            case "/v1/rescore":
                fingerprint = told["fingerprint"]
                wanted = [expected[fingerprint][query][passage_id] for passage_id in IDS]
                np.testing.assert_allclose(told["scores"], wanted, atol=1e-3)
            case "/v1/encode":
                fingerprint = told["fingerprint"]
                assert dims[len(told["vectors"][0])] == fingerprint
            case "/v1/embeddings":
                fingerprint = dims[len(told["data"][0]["embedding"])]
            case _:
                continue
        seen.add(fingerprint)
    return seen


def until(address: str, fingerprint: str) -> None:
    for _ in range(600):
        if httpx2.get(f"{address}/health").json()["fingerprint"] == fingerprint:
            return
        time.sleep(0.02)
    raise AssertionError("the new student was never served")


@contextmanager
def slowly(monkeypatch: pytest.MonkeyPatch, seconds: float) -> Iterator[list[tuple[float, float]]]:
    """Loading a student takes longer; when it was done, from and until."""
    times: list[tuple[float, float]] = []
    load = Student.load

    def slow(*args: object, **kwargs: object) -> Student:
        began = time.monotonic()
        time.sleep(seconds)
        student = load(*args, **kwargs)  # pyright: ignore[reportArgumentType]
        times.append((began, time.monotonic()))
        return student

    with monkeypatch.context() as patch:
        patch.setattr(app_module.Student, "load", slow)
        yield times


def facts(pairs: tuple[Pair, Pair], folders: tuple[Path, Path]) -> tuple[dict, dict]:
    expected = {
        pair.fingerprint: {query: pair.scores(query, folder) for query in QUERIES}
        for pair, folder in zip(pairs, folders, strict=True)
    }
    return expected, {pair.student.vector_dim: pair.fingerprint for pair in pairs}


@pytest.mark.parametrize("way", ["in place", "by a link"])
def test_clients_are_answered_by_one_pair_or_the_other_through_the_swap(
    pairs: tuple[Pair, Pair], way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    old, new = pairs
    old.write(tmp_path / "old")
    new.write(tmp_path / "new")
    expected, dims = facts(pairs, (tmp_path / "old", tmp_path / "new"))
    link = tmp_path / "index"
    if way == "by a link":
        link.symlink_to("old")
    else:
        old.write(link)
    app = make_app(tiny_settings(link, model_name="served"))
    with serve(app) as address, httpx2.Client(base_url=address, timeout=60) as http:
        wait_until_ready(address)
        served = weakref.ref(app.state.serving.now().models.student)
        assert http.get("/health").json()["fingerprint"] == old.fingerprint
        with slowly(monkeypatch, 1.0) as times, Clients(address) as clients:
            time.sleep(0.5)
            if way == "by a link":
                (tmp_path / "next").symlink_to("new")
                (tmp_path / "next").replace(link)
            else:
                new.write(link)
            until(address, new.fingerprint)
            time.sleep(0.5)
        assert check(clients, expected, dims) == {old.fingerprint, new.fingerprint}
        ((began, ended),) = times
        meanwhile = [answer for told, _, answer in clients.answers if began < told < ended]
        paths = {answer.url.path for answer in meanwhile}
        # The texts of an index that is removed cannot be read any more: who asks for them waits for the new pair.
        assert paths >= {*bodies("")} - (set() if way == "by a link" else {"/v1/search", "/v1/rescore"})
        for answer in meanwhile:
            if answer.url.path == "/v1/encode":
                assert answer.json()["fingerprint"] == old.fingerprint

        told = http.get("/v1/index").json()
        assert (told["student"]["fingerprint"], told["num_passages"]) == (new.fingerprint, 40)
        assert (told["student"]["dim"], told["student"]["backbone"]) == (48, "wide")
        assert http.get("/info").json()["model_sha"] == new.fingerprint
        metrics = http.get("/metrics").text
        assert f'd2llm_student_info{{fingerprint="{new.fingerprint}",name="served"}} 1.0' in metrics
        assert "d2llm_index_passages 40.0" in metrics
        again = http.post("/v1/index/reload").json()
        assert again == {"version": told["version"], "fingerprint": new.fingerprint, "changed": False}
        assert http.post("/v1/passages", json={"passages": [{"id": "x", "text": "a cat"}]}).json()["num_added"] == 1
        gc.collect()
        assert served() is None


@pytest.fixture
def folder(pairs: tuple[Pair, Pair], tmp_path: Path) -> Path:
    """A link to an index of the old student."""
    pairs[0].write(tmp_path / "old")
    (tmp_path / "index").symlink_to("old")
    return tmp_path / "index"


def point(link: Path, target: str) -> None:
    (link.parent / "next").symlink_to(target)
    (link.parent / "next").replace(link)


def test_a_request_in_flight_ends_with_the_student_that_it_began_with(pairs: tuple[Pair, Pair], folder: Path):
    old, new = pairs
    new.write(folder.parent / "new")
    texts = [f"{text.text} {n}" for n, text in enumerate(tiny_passages(500))]
    app = make_app(tiny_settings(folder, reload_seconds=1_000))
    with serve(app) as address:
        wait_until_ready(address)
        student, began = app.state.serving.now().models.student, threading.Event()
        encode_tokens = student.encode_tokens

        def slow(ids: object) -> object:
            began.set()
            time.sleep(0.1)
            return encode_tokens(ids)

        student.encode_tokens = slow
        answers: list[httpx2.Response] = []

        def ask() -> None:
            answers.append(httpx2.post(f"{address}/rerank", json={"query": "cat", "texts": texts}, timeout=60))

        asking = threading.Thread(target=ask)
        asking.start()
        assert began.wait(30)
        point(folder, "new")
        assert httpx2.post(f"{address}/v1/index/reload", timeout=60).json()["fingerprint"] == new.fingerprint
        assert not answers  # the swap did not wait for it
        asking.join()
        (answer,) = answers
        assert answer.status_code == 200
        vectors = old.student.encode_passages(texts).vectors
        logits = old.student.score(old.student.encode_queries(["cat"]).vectors[0], vectors, "asymmetric")
        np.testing.assert_allclose(
            sorted(rank["score"] for rank in answer.json()), sorted(1 / (1 + np.exp(-logits.astype(float)))), atol=1e-3
        )


def test_clients_that_have_left_do_not_keep_a_student(pairs: tuple[Pair, Pair], folder: Path):
    pairs[1].write(folder.parent / "new")
    app = make_app(tiny_settings(folder, reload_seconds=1_000))
    with serve(app) as address:
        wait_until_ready(address)
        student = app.state.serving.now().models.student
        encode_tokens = student.encode_tokens

        def slow(ids: object) -> object:
            time.sleep(0.1)
            return encode_tokens(ids)

        student.encode_tokens = slow
        body = {"query": "cat", "texts": [f"a dog and {n} cats" for n in range(500)]}
        with pytest.raises(httpx2.TimeoutException):
            httpx2.post(f"{address}/rerank", json=body, timeout=0.3)
        served = weakref.ref(student)
        del student, encode_tokens, slow
        point(folder, "new")
        assert httpx2.post(f"{address}/v1/index/reload", timeout=60).json()["changed"]
        for _ in range(100):
            gc.collect()
            if served() is None:
                break
            time.sleep(0.05)
        assert served() is None


def test_another_students_index_without_its_student_is_refused_and_the_old_pair_serves_on(
    pairs: tuple[Pair, Pair], folder: Path, caplog: pytest.LogCaptureFixture
):
    old, new = pairs
    Pair(new.student, folder.parent / "gone", 40).write(folder.parent / "new")
    with serve(make_app(tiny_settings(folder))) as address, httpx2.Client(base_url=address, timeout=60) as http:
        wait_until_ready(address)
        with caplog.at_level(logging.ERROR):
            point(folder, "new")
            answer = http.post("/v1/index/reload")
        assert answer.status_code == 409
        told = answer.json()["error"]
        assert told["kind"] == "conflict"
        assert "gone" in told["message"]
        assert str(folder.parent) not in answer.text
        assert str(folder.parent / "gone") in caplog.text
        for _ in range(100):
            health = http.get("/health")
            if health.json()["message"]:
                break
            time.sleep(0.05)
        assert health.status_code == 200
        assert "gone" in health.json()["message"]
        assert str(folder.parent) not in health.text
        assert health.json()["fingerprint"] == old.fingerprint
        found = http.post("/v1/search", json={"query": QUERIES[0], "top_k": 60}).json()
        assert found["index"]["fingerprint"] == old.fingerprint
        assert len(found["passages"]) == 60
        point(folder, "old")
        assert http.post("/v1/index/reload").status_code == 200


def test_the_student_of_the_settings_is_not_exchanged_for_another(pairs: tuple[Pair, Pair], folder: Path):
    old, new = pairs
    new.write(folder.parent / "new")
    settings = tiny_settings(folder, student=str(old.source), reload_seconds=1_000)
    with serve(make_app(settings)) as address, httpx2.Client(base_url=address, timeout=60) as http:
        wait_until_ready(address)
        point(folder, "new")
        answer = http.post("/v1/index/reload")
        assert answer.status_code == 409
        assert new.fingerprint in answer.json()["error"]["message"]
        assert http.post("/v1/search", json={"query": "cat"}).json()["index"]["fingerprint"] == old.fingerprint


def test_an_index_removed_for_one_that_cannot_be_served_is_told_as_that(pairs: tuple[Pair, Pair], tmp_path: Path):
    old, new = pairs
    old.write(tmp_path / "index")
    with serve(make_app(tiny_settings(tmp_path / "index"))) as address, httpx2.Client(base_url=address) as http:
        wait_until_ready(address)
        Pair(new.student, tmp_path / "gone", 40).write(tmp_path / "index")
        answer = http.post("/v1/search", json={"query": "cat"})
        assert answer.status_code == 503
        assert "gone" in answer.json()["error"]["message"]
        assert str(tmp_path) not in answer.text
        assert http.get("/v1/index").status_code == 503
        assert http.post("/v1/passages", json={"passages": [{"id": "x", "text": "a cat"}]}).status_code == 503
        assert http.post("/v1/encode", json={"texts": ["cat"], "kind": "query"}).status_code == 200
        assert http.post("/v1/search", json={"query": "cat", "filter": "nowhere = 1"}).status_code == 400
        new.write(tmp_path / "index")
        assert http.post("/v1/search", json={"query": "cat"}).json()["index"]["fingerprint"] == new.fingerprint


def test_what_is_written_after_the_index_was_replaced_is_of_the_new_student(pairs: tuple[Pair, Pair], folder: Path):
    _, new = pairs
    new.write(folder.parent / "new")
    settings = tiny_settings(folder, reload_seconds=1_000)
    with serve(make_app(settings)) as address, httpx2.Client(base_url=address, timeout=60) as http:
        wait_until_ready(address)
        point(folder, "new")
        passage = {"id": "x", "text": "bread is baked from flour"}
        assert http.post("/v1/passages", json={"passages": [passage]}).status_code == 200
        assert http.get("/health").json()["fingerprint"] == new.fingerprint
    view = Index.open(folder.parent / "new", new.student).view
    wanted = new.student.encode_passages([passage["text"]]).vectors
    np.testing.assert_allclose(view.vectors(view.rows(["x"])), wanted, atol=1e-4)
    assert len(Index.open(folder.parent / "old", pairs[0].student)) == 60


def test_a_student_is_loaded_once_though_who_asked_has_gone(
    pairs: tuple[Pair, Pair], folder: Path, monkeypatch: pytest.MonkeyPatch
):
    _, new = pairs
    new.write(folder.parent / "new")
    with serve(make_app(tiny_settings(folder, reload_seconds=1_000))) as address:
        wait_until_ready(address)
        point(folder, "new")
        with slowly(monkeypatch, 1.0) as times:
            with pytest.raises(httpx2.TimeoutException):
                httpx2.post(f"{address}/v1/index/reload", timeout=0.3)
            answer = httpx2.post(f"{address}/v1/index/reload", timeout=60).json()
            assert (answer["fingerprint"], answer["changed"]) == (new.fingerprint, False)
            assert len(times) == 1


def test_no_memory_for_another_student_is_an_answer_and_not_the_end_of_looking(
    pairs: tuple[Pair, Pair], folder: Path, monkeypatch: pytest.MonkeyPatch
):
    old, new = pairs
    new.write(folder.parent / "new")
    with serve(make_app(tiny_settings(folder))) as address, httpx2.Client(base_url=address, timeout=60) as http:
        wait_until_ready(address)
        with monkeypatch.context() as patch:

            def fail(*_: object, **__: object) -> Student:
                raise MemoryError

            patch.setattr(app_module.Student, "load", fail)
            point(folder, "new")
            answer = http.post("/v1/index/reload")
            assert answer.status_code == 409
            assert "MemoryError" in answer.json()["error"]["message"]
            assert http.post("/v1/search", json={"query": "cat"}).json()["index"]["fingerprint"] == old.fingerprint
            time.sleep(0.3)
        until(address, new.fingerprint)
