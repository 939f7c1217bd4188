"""F5: files that change under what reads them: of a served index and its student, and of a folder of documents.

While a server runs, a file of its index or student is deleted, or another one takes its name: cut, empty or of other
bytes. Each answer is right, or an error that is not the server's fault; nothing hangs, nothing crashes, and with the
file back everything is right again. While documents are read, others are cut, deleted, replaced and grow: the others
are read, and each is read or named; after that, reading once more finds what is there.
"""

from __future__ import annotations

import random
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from attacked_server import AttackedServer
from campaign.frame import Draw, Outcome, Row, main, served_cases
from campaign.malformed_files import FILES, TEXTS, outcome_of
from d2llm.data.documents import find_documents
from tiny_server import write_tiny_index

REQUESTS: dict[str, tuple[str, str, Any]] = {
    "search": ("POST", "/v1/search", {"query": "the cat by the sea", "top_k": 9}),
    "exact": ("POST", "/v1/search", {"query": "bread and salt", "top_k": 9, "exact": True}),
    "words": ("POST", "/v1/search", {"query": "bread and salt", "top_k": 9, "hybrid": 0.5}),
    "passage": ("GET", "/v1/passages/p1", None),
    "embeddings": ("POST", "/v1/embeddings", {"input": ["the cat"], "model": "student-0"}),
    "rerank": ("POST", "/rerank", {"query": "the cat", "texts": ["the cat sat", "a dog"]}),
    "index": ("GET", "/v1/index", None),
}
CHANGING = ("search", "exact", "words", "passage", "embeddings", "rerank")
"""The requests whose answers are known; the others must only be answered."""
GOOD = {"good.md": "# Good\n\nThe cat sleeps.", "good.txt": "The dog runs."}


def answer_of(server: AttackedServer, name: str) -> tuple[int, Any]:
    method, path, body = REQUESTS[name]
    found = server.get(path) if method == "GET" else server.post(path, body)
    return found.status, found.body


def essence(name: str, body: Any) -> Any:
    """What of an answer does not depend on times and versions."""
    if name == "passage":
        return body["text"]
    if name == "embeddings":
        return [round(value, 3) for one in body["data"] for value in one["embedding"]]
    if name == "rerank":
        return [(one["index"], round(one["score"], 3)) for one in body]
    return [(one["id"], one["text"], round(one["score"], 3)) for one in body["passages"]]


class Served:
    """A server, its files, and what it answers while they are there."""

    def __init__(self, folder: Path) -> None:
        self.index = write_tiny_index(folder)
        self.files = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock")
        self.server = AttackedServer(self.index, reload_seconds=0.2)
        self.expected = {name: essence(name, self.right(name)) for name in CHANGING}

    def right(self, name: str) -> Any:
        status, body = answer_of(self.server, name)
        assert status == 200, f"{name}: {status} {str(body)[:500]}"
        return body

    def problems(self, *, is_whole: bool) -> list[str]:
        """What is wrong with the answers now."""
        found: list[str] = []
        for name in REQUESTS:
            status, body = answer_of(self.server, name)
            if self.server.process.poll() is not None:
                return [*found, f"{name}: the server ended with {self.server.process.returncode}"]
            if status == 200:
                if name in CHANGING and essence(name, body) != self.expected[name]:
                    found.append(f"{name}: another answer")
            elif is_whole or status in (400, 404, 422) or "internal error;" in str(body) or "Traceback" in str(body):
                found.append(f"{name}: {status} {str(body)[:300]}")
        return found

    def case(self, chance: random.Random) -> Outcome:
        path = chance.choice(self.files)
        kept = path.with_name(f".{path.name}.kept")
        shutil.copy2(path, kept)
        change = chance.choice(["deleted", "cut", "empty", "other bytes"])
        content = kept.read_bytes()
        draft = path.with_name(f".{path.name}.draft")
        cut = content[: chance.randrange(len(content) + 1)]
        draft.write_bytes({"cut": cut, "empty": b"", "other bytes": chance.randbytes(len(content))}.get(change, b""))
        _ = path.unlink() if change == "deleted" else draft.replace(path)
        draft.unlink(missing_ok=True)
        if is_asked := chance.random() < 0.5:
            self.server.post("/v1/index/reload", {})
        found = [f"{path.name} {change}: {problem}" for problem in self.problems(is_whole=False)]
        kept.replace(path)
        if self.server.process.poll() is None:
            self.server.post("/v1/index/reload", {})
            time.sleep(0.3)
            found += [f"{path.name} is back: {problem}" for problem in self.problems(is_whole=True)]
        return Outcome(f"served, {change}{', read again' if is_asked else ''}", "\n".join(found))


def disturb(folder: Path, chance: random.Random, done: threading.Event) -> None:
    """Change documents until the time is up, in place and by another file of the same name."""
    whole = {path: path.read_bytes() for path in folder.iterdir() if path.name not in GOOD}
    while not done.wait(chance.uniform(0, 0.02)):
        path = chance.choice([*whole])
        with suppress(OSError):
            match chance.randrange(6):
                case 0:
                    path.unlink(missing_ok=True)
                case 1 if path.exists():
                    with path.open("r+b") as file:
                        file.truncate(chance.randrange(len(whole[path]) + 1))
                case 2:
                    with path.open("ab") as file:
                        file.write(chance.randbytes(chance.choice([10, 100_000])))
                case 3:
                    path.unlink(missing_ok=True)
                    path.mkdir()
                case 4:
                    path.chmod(0)
                case _:
                    shutil.rmtree(path, ignore_errors=True)
                    path.unlink(missing_ok=True)
                    path.write_bytes(whole[path])


def read(folder: Path) -> None:
    """Read a folder that changes: what does not change is read, and each file is read or named."""
    documents = find_documents([folder], seconds_per_file=20, memory_per_file=1 << 30, ocr="none")
    texts = {of_file.file.path.name: [d.full_text for d in of_file.documents] for of_file in documents.by_file()}
    missing = GOOD.keys() - texts.keys()
    assert not missing, f"{missing} were not read"
    assert all("The" in texts[name][0] for name in GOOD), "what does not change was not read"
    named = texts.keys() | {Path(file.path).name for file in documents.skipped}
    assert {file.path.name for file in documents.files} <= named, "a file is left out without a word"


def _documents(folder: Path, chance: random.Random) -> Outcome:
    workspace = folder / f"{chance.getrandbits(64):x}"
    workspace.mkdir()
    whole = {path.name: path.read_bytes() for path in FILES.iterdir()}
    whole |= {f"{n}{name}": text.encode() for name, text in TEXTS.items() for n in range(3)}
    for name in chance.sample(sorted(whole), 24):
        (workspace / name).write_bytes(whole[name])
    for name, text in GOOD.items():
        (workspace / name).write_text(text)
    done = threading.Event()
    disturber = threading.Thread(target=disturb, args=(workspace, random.Random(chance.random()), done))
    disturber.start()
    try:
        said, fault = outcome_of(lambda: read(workspace), seconds=120)
    finally:
        done.set()
        disturber.join()
    again, fault_again = outcome_of(lambda: read(workspace), seconds=120)
    shutil.rmtree(workspace, ignore_errors=True)
    if not fault and not fault_again and {said, again} != {"read"}:
        fault = f"the folder was {said}, then {again}"
    return Outcome("documents", "\n".join(filter(None, (fault, fault_again))))


@contextmanager
def prepare(folder: Path) -> Iterator[Callable[[Draw], Outcome]]:
    torch.set_num_threads(1)  # its threads would not be there in a fork
    with served_cases(folder, Served) as served:
        yield lambda chance: _documents(folder, chance) if chance.random() < 0.3 else served(chance)


ROW = Row("changing_files", "F5", 300, prepare)

if __name__ == "__main__":
    main(ROW)
