"""F9: processes write and read one index at the same time; their calls must be linearizable.

A history is what each call was given, what it returned, and when it began and ended. It is linearizable if the calls
have an order that keeps those that did not overlap in order, and in which a plain dictionary would have returned the
same. Wing and Gong's search finds such an order (J. Parallel Distrib. Comput. 17, 1993), with the memory of Lowe
(Concurrency Computat. 29, 2017) for what was tried. The index is one object, not a register for each key: a search
reads all of it. A call of a killed process may have happened or not.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from campaign.frame import Outcome, Row, main
from d2llm.core.errors import IndexLockedError
from d2llm.models.student import Student
from d2llm.retrieval.index import Index
from tiny_server import write_tiny_student

KEYS = ("a", "b", "c", "d")
CALLS = 10  # of each process
_NEVER = float("inf")

State = dict[str, str]


class Call(NamedTuple):
    """A call: what (a name and its argument), what it returned, and when, in nanoseconds."""

    name: str
    argument: Any
    result: Any
    began: float
    ended: float = _NEVER


def after(state: State, call: Call) -> State | None:
    """The state after a call on a dictionary; None if the dictionary would have returned something else."""
    is_known = call.ended < _NEVER
    if call.name == "upsert":
        return state | call.argument
    if call.name == "delete":
        remaining = {key: text for key, text in state.items() if key not in call.argument}
        return remaining if not is_known or call.result == len(state) - len(remaining) else None
    if call.name in ("compact", "verify") or not is_known:
        return state if not call.result else None
    wanted = {key: text for key, text in state.items() if call.name == "search" or key in call.argument}
    return state if wanted == call.result else None


def is_linearizable(calls: Sequence[Call]) -> bool:
    """Whether some order of the calls explains all results, from an empty index on."""
    open_calls: list[tuple[frozenset[int], State]] = [(frozenset(range(len(calls))), {})]
    tried = set[tuple[frozenset[int], frozenset[tuple[str, str]]]]()
    while open_calls:
        remaining, state = open_calls.pop()
        first_end = min((calls[index].ended for index in remaining), default=_NEVER)
        if first_end == _NEVER:
            return True
        for index in remaining:
            following = after(state, calls[index]) if calls[index].began <= first_end else None
            if following is not None:
                reached = remaining - {index}, frozenset(following.items())
                if reached not in tried:
                    tried.add(reached)
                    open_calls.append((reached[0], following))
    return False


def draw_call(chance: random.Random, client: int, step: int) -> tuple[str, Any]:
    name = chance.choices(["upsert", "delete", "get", "search", "compact", "verify"], [5, 2, 4, 3, 0.5, 0.5])[0]
    keys = chance.sample(KEYS, chance.randint(1, 3))
    if name == "upsert":
        return name, {key: f"the cat and text {client} {step} {key}" for key in keys}
    return name, keys if name in ("delete", "get") else None


def execute(index: Index, name: str, argument: Any) -> Any:
    if name == "upsert":
        index.upsert([{"id": key, "text": text} for key, text in argument.items()])
        return None
    if name == "delete":
        return index.delete(argument)
    if name == "compact":
        return index.compact(dense=True) and None
    if name == "verify":
        return list(index.verify().problems)
    index.refresh()
    if name == "get":
        return {passage.id: passage.text for passage in index.get(argument)}
    return {hit.passage.id: hit.passage.text for hit in index.search("the cat", top_k=len(KEYS))}


def be_client(folder: Path, student: Student, chance: random.Random, client: int, record: int) -> None:
    """Make calls, and write a line before and after each of them."""
    index = Index.open(folder, student)
    for step in range(CALLS):
        name, argument = draw_call(chance, client, step)
        if chance.random() < 0.1:
            index = Index.open(folder, student)
        while True:
            began = time.monotonic_ns()
            os.write(record, json.dumps([name, argument, None, began]).encode() + b"\n")
            try:
                result = execute(index, name, argument)
            except IndexLockedError:  # as a user does: try again; if it did something nevertheless, nobody explains it
                os.write(record, b"null\n")
                time.sleep(chance.random() * 0.003)
                continue
            ended = time.monotonic_ns()
            os.write(record, json.dumps([name, argument, result, began, ended]).encode() + b"\n")
            break


def calls_of(lines: Sequence[str]) -> list[Call]:
    """The calls of a client; the last may have no end. A refused one is left out."""
    records = [json.loads(line) for line in lines]
    ended = [Call(*record) for record in records if record is not None and len(record) == 5]
    is_open = bool(records) and records[-1] is not None and len(records[-1]) == 4
    return [*ended, *([Call(*records[-1])] if is_open else [])]


def fork(work: Callable[[], None]) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        work()
        status = 0
    finally:
        os._exit(status)


@contextmanager
def prepare(folder: Path) -> Iterator[Callable[[random.Random], Outcome]]:
    torch.set_num_threads(1)  # its threads would not be there in a fork
    source = write_tiny_student(folder)
    student = Student.load(source, dtype="float32")
    warm = Index.create(folder / "warm", student, student_source=str(source))
    for call in (("upsert", {"a": "the cat"}), ("search", None), ("compact", None)):  # compiled once, not in each fork
        execute(warm, *call)
    counts = iter(range(1_000_000_000))

    def case(chance: random.Random) -> Outcome:
        root = folder / f"history-{next(counts)}"
        index = root / "index"
        Index.create(index, student, student_source=str(source)).close()
        num_clients, seed = chance.randint(2, 5), chance.random()
        records = [root / f"record-{client}" for client in range(num_clients)]
        pids: list[int] = []
        for client, path in enumerate(records):

            def work(client: int = client, path: Path = path) -> None:
                record = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                try:
                    be_client(index, student, random.Random(f"{seed} {client}"), client, record)
                except BaseException:
                    path.with_suffix(".error").write_text(traceback.format_exc())
                    raise

            pids.append(fork(work))
        victim = chance.choice(pids) if chance.random() < 0.5 else None
        if victim is not None:
            time.sleep(chance.uniform(0.02, 0.5))
            os.kill(victim, signal.SIGKILL)
        statuses = {pid: os.waitpid(pid, 0)[1] for pid in pids}
        lines = [path.read_text().split("\n")[:-1] if path.exists() else [] for path in records]
        errors = [path.read_text() for path in root.glob("*.error")]
        shutil.rmtree(root)
        calls = [call for client in lines for call in calls_of(client)]
        was_killed = victim is not None and statuses[victim] == signal.SIGKILL
        kind = f"{num_clients} processes{', one killed' if was_killed else ''}"
        if errors:
            return Outcome(kind, "\n".join(errors))
        history = "\n".join(map(str, sorted(calls, key=lambda call: call.began)))
        return Outcome(kind, "" if is_linearizable(calls) else f"not linearizable:\n{history}")

    yield case


ROW = Row("histories", "F9", 1_000, prepare)

if __name__ == "__main__":
    main(ROW)
