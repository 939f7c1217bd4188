"""F3: mixed traffic for hours: searches, reranking, embeddings, writes, swaps of students, compaction, a reader beside.

A draw is a window of a thousand requests to one server in a process of its own. Each client owns passages, so that it
knows at every moment what must be found and what must not. After each window this process opens the index itself and
compares all of it; every few windows it compacts the index, and swaps the student of another one, under load.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np

from attacked_server import JSON, AttackedServer
from campaign.frame import Outcome, Row, main
from d2llm import Index, Student, encode
from d2llm.core.errors import IndexLockedError
from d2llm.ops.kernels import MIN_CALLS, MIN_PARTS
from tiny_models import TEXTS
from tiny_server import WORDS, tiny_passages, write_tiny_student
from waiting import PATIENCE

CLIENTS, WINDOW = 8, 1_000
STATIC = 60  # passages that nobody changes
OWNED = 30  # of each client, at most
SECONDS_OF_START = 300.0  # after which memory may not grow by more than
GROWTH = 1.25
KEPT = timedelta(seconds=30)
PAUSE = float(os.environ.get("D2LLM_SOAK_PAUSE", "0"))
"""Seconds that a client waits before a request, on average: without, the server always has eight at once."""


class Client:
    """A connection, the passages that it owns, and how long its requests took."""

    def __init__(self, name: int, server: AttackedServer, fixed: dict[str, Any]) -> None:
        self.name, self.server, self.fixed = name, server, fixed
        self.passages: dict[str, str] = {}
        self.seconds: list[float] = []
        self.connection = http.client.HTTPConnection(server.host, server.port, timeout=PATIENCE)

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        """The answer; while another process writes, a write is refused and asked again."""
        while True:
            began = time.perf_counter()
            try:
                self.connection.request(method, path, None if body is None else json.dumps(body), JSON)
            except BrokenPipeError:  # the server has closed an idle connection
                self.connection.close()
                continue
            response = self.connection.getresponse()
            content = response.read()
            self.seconds.append(time.perf_counter() - began)
            if response.status != 503:
                assert response.status == 200, f"{method} {path} {body}: {response.status} {content[:500]!r}"
                return json.loads(content)
            time.sleep(0.05)

    def step(self, chance: random.Random) -> None:
        if PAUSE:
            time.sleep(PAUSE * chance.expovariate(1))
        actions = [self.write, self.delete, self.search_own, self.get, self.unchanged]
        chance.choices(actions, [2, 1, 16, 4, 37])[0](chance)

    def write(self, chance: random.Random) -> None:
        ids = [f"own{self.name}-{chance.randrange(OWNED)}" for _ in range(chance.choice((1, 1, 4)))]
        new = {one: f"{chance.choice(TEXTS)} {chance.choice(WORDS)} {chance.randrange(1_000)}" for one in ids}
        passages = [{"id": one, "text": text, "metadata": {"owner": self.name}} for one, text in new.items()]
        self.ask("POST", "/indexes/docs/v1/passages", {"passages": passages})
        self.passages |= new

    def delete(self, chance: random.Random) -> None:
        if self.passages:
            gone = chance.choice([*self.passages])
            self.ask("DELETE", f"/indexes/docs/v1/passages/{gone}")
            del self.passages[gone]

    def search_own(self, chance: random.Random) -> None:
        body = {"query": chance.choice(TEXTS), "top_k": 100, "filter": f"owner = {self.name}"}
        body |= chance.choice([{}, {"exact": True}, {"hybrid": 0.5}])
        found = self.ask("POST", "/indexes/docs/v1/search", body)["passages"]
        assert {one["id"]: one["text"] for one in found} == self.passages, f"client {self.name}: another result"

    def get(self, chance: random.Random) -> None:
        if self.passages:
            name = chance.choice([*self.passages])
            answer = self.ask("GET", f"/indexes/docs/v1/passages/{name}")
            assert answer["text"] == self.passages[name], name

    def unchanged(self, chance: random.Random) -> None:
        """A request whose answer is always one of those that it may have: one for each student of the other index."""
        name = chance.choice([*self.fixed])
        path, body, allowed = self.fixed[name]
        answer = numbers_of(self.ask("POST", path, body))
        assert any(len(answer) == len(one) and np.allclose(answer, one, rtol=1e-3, atol=1e-3) for one in allowed), name


def numbers_of(answer: Any) -> list[float]:
    """The scores or vectors of an answer in its order."""
    if isinstance(answer, list):
        return [one["score"] for one in sorted(answer, key=lambda one: one["index"])]
    if "data" in answer:
        return [value for one in answer["data"] for value in one["embedding"]]
    return [one["score"] for one in answer["passages"]]


def requests_of(chance: random.Random) -> dict[str, tuple[str, Any]]:
    text = chance.choice(TEXTS)
    return {
        f"rerank {text}": ("/indexes/docs/rerank", {"query": text, "texts": TEXTS[:4]}),
        f"embeddings {text}": ("/indexes/docs/v1/embeddings", {"input": [text, TEXTS[0]], "model": "docs"}),
        f"search of the static {text}": (
            "/indexes/docs/v1/search",
            {"query": text, "top_k": 20, "filter": "owner = -1"},
        ),
        f"search of the other {text}": ("/indexes/other/v1/search", {"query": text, "top_k": 20}),
    }


class Soak:
    """The server, its clients, and the two indexes that the other one is in turn."""

    def __init__(self, folder: Path) -> None:
        first, second = (write_tiny_student(folder, seed=seed) for seed in (0, 1))
        students = {path.name: Student.load(path, dtype="float32") for path in (first, second)}
        for path, student in zip((first, second), students.values(), strict=True):
            encode(tiny_passages(40), student, folder / f"of-{path.name}", student_source=str(path))
        self.docs, self.other, self.turn = folder / "docs", folder / "other", 0
        self.targets = [folder / f"of-{name}" for name in students]
        self.student = students[first.name]
        self.static = {f"static{n}": f"{p.text}" for n, p in enumerate(tiny_passages(STATIC))}
        index = Index.create(self.docs, self.student, student_source=str(first), metadata={"owner": "integer"})
        index.upsert([{"id": one, "text": text, "metadata": {"owner": -1}} for one, text in self.static.items()])
        index.close()
        self.point()
        large = folder / "large"
        with Index.create(large, self.student, student_source=str(first)) as index:
            index.upsert([{"id": f"long{n}", "text": f"{TEXTS[0]} {n} " * (MIN_PARTS // 50)} for n in range(25)])
        self.server = AttackedServer(self.docs, self.other, large, reload_seconds=0.2)
        for _ in range(2 * MIN_CALLS):  # at the start the server loads its compiled loops, which take memory once
            assert self.server.post("/indexes/large/v1/search", {"query": TEXTS[0], "hybrid": 0.5}).status == 200
        self.began = time.monotonic()
        self.highest = 0
        self.fixed = self.answers()
        self.clients = [Client(n, self.server, self.fixed) for n in range(CLIENTS)]

    def point(self) -> None:
        """Let the other index be the next one, as a user swaps a student."""
        following = self.other.with_name("following")
        following.symlink_to(self.targets[self.turn % 2])
        following.replace(self.other)
        self.turn += 1

    def answers(self) -> dict[str, tuple[str, Any, list[list[float]]]]:
        """Requests with their answers before the load, with each student."""
        chance = random.Random(0)
        requests = {name: one for _ in range(10) for name, one in requests_of(chance).items()}
        fixed: dict[str, tuple[str, Any, list[list[float]]]] = {name: (*one, []) for name, one in requests.items()}
        for _ in self.targets:
            for path, body, allowed in fixed.values():
                allowed.append(numbers_of(self.server.post(path, body).body))
            self.point()
            self.server.post("/indexes/other/v1/index/reload", {})
        return fixed

    def memory(self) -> int:
        """Bytes that the server's process holds."""
        return int(Path(f"/proc/{self.server.process.pid}/statm").read_text().split()[1]) * 4096

    def disturb(self, chance: random.Random, done: threading.Event) -> None:
        """While clients ask: another student, a compaction from this process, and a reader that opens the index."""
        self.point()
        while not done.wait(0.2):
            with Index.open(self.docs, self.student) as index:
                found = {one.id: one.text for one in index.get([*self.static])}
                assert found == self.static, "a reader misses what nobody changes"
                if chance.random() < 0.05:
                    try:
                        index.compact(KEPT)
                    except IndexLockedError:  # the server is writing
                        continue

    def check(self) -> None:
        """All of the index, as another process sees it, and that it is intact."""
        expected = self.static | {name: text for client in self.clients for name, text in client.passages.items()}
        with Index.open(self.docs, self.student) as index:
            found = index.get(index.list_passages(limit=1_000))
            assert {one.id: one.text for one in found} == expected
            assert index.verify().problems == []

    def window(self, chance: random.Random) -> Outcome:
        done = threading.Event()
        began = time.monotonic()
        with ThreadPoolExecutor(CLIENTS + 1) as threads:
            beside = threads.submit(self.disturb, random.Random(chance.random()), done)
            seeds = [random.Random(chance.random()) for _ in self.clients]
            asked = [
                threads.submit(lambda one=client, own=seed: [one.step(own) for _ in range(WINDOW // CLIENTS)])
                for client, seed in zip(self.clients, seeds, strict=True)
            ]
            problems = [str(one.exception()) for one in asked if one.exception() is not None]
            done.set()
            beside.result()
        self.check()
        seconds, memory = [value for client in self.clients for value in client.seconds], self.memory()
        for client in self.clients:
            client.seconds.clear()
            client.connection.close()  # or the server does, if the next window is late
        after_start = began > self.began + SECONDS_OF_START
        if after_start and memory > GROWTH * self.highest:
            problems.append(f"the server holds {memory >> 20} MiB, at its start {self.highest >> 20} MiB")
        self.highest = self.highest if after_start else max(self.highest, memory)
        measured = {
            "seconds": round(began - self.began, 1),
            "mebibytes": memory >> 20,
            "p50_ms": round(1e3 * float(np.percentile(seconds, 50)), 1),
            "p99_ms": round(1e3 * float(np.percentile(seconds, 99)), 1),
        }
        return Outcome("requests", "\n".join(problems), len(seconds), measured)


@contextmanager
def prepare(folder: Path) -> Iterator[Callable[[random.Random], Outcome]]:
    soak = Soak(folder)
    try:
        yield soak.window
    finally:
        soak.server.close()


ROW = Row("soak", "F3", 1_000_000, prepare)

if __name__ == "__main__":
    main(ROW)
