"""A writer killed at any point leaves everything it had committed intact, and the lock free.

``D2LLM_TEST_TIMES=10`` kills ten times as many writers, ``D2LLM_TEST_SEED`` makes them do other things.
"""

from __future__ import annotations

import json
import os
import random
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from d2llm.core.types import Passage
from d2llm.store.index_manifest import VectorCopies
from d2llm.store.index_store import IndexStore
from d2llm.store.inspection import verify
from d2llm.store.view import PassageView
from store_writer import passages_of
from tiny_store import check_contents, live_rows, new_store, put, vector_of
from waiting import PATIENCE

TESTS = Path(__file__).parents[1]
TIMES = int(os.environ.get("D2LLM_TEST_TIMES", "1"))


class Writers:
    """Writer processes, one at a time, all forked from a parent that has the libraries loaded."""

    def __init__(self) -> None:
        self.mother = subprocess.Popen(
            [sys.executable, str(TESTS / "store_writer.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS.parent / "src"), str(TESTS)])},
        )
        assert self.answer() == "ready"

    def answer(self) -> str:
        assert self.mother.stdout is not None
        return self.mother.stdout.readline().strip()

    def run(self, task: dict[str, Any], *, seconds: float | None = None) -> dict[str, Any]:
        """Runs a writer until it kills itself, or kills it after ``seconds``; returns its last complete log entry."""
        assert self.mother.stdin is not None
        self.mother.stdin.write(json.dumps(task) + "\n")
        self.mother.stdin.flush()
        pid = int(self.answer())
        ended, *_ = select.select([self.mother.stdout], [], [], PATIENCE if seconds is None else seconds)
        os.kill(pid, signal.SIGKILL)
        assert ended or seconds is not None, "the writer did not come to where it kills itself"
        assert self.answer() == "ended"
        self.mother.stdin.write("\n")
        self.mother.stdin.flush()
        assert os.WTERMSIG(int(self.answer())) == signal.SIGKILL, "the writer failed instead of being killed"
        text = Path(task["log"]).read_text() if Path(task["log"]).exists() else ""
        lines = text.split("\n")[:-1]  # the last line may be incomplete; the one before says as much
        return json.loads(lines[-1]) if lines else {"now": task["state"]}


@pytest.fixture(scope="module")
def writers() -> Iterator[Writers]:
    pool = Writers()
    yield pool
    pool.mother.kill()
    pool.mother.wait()


def _as_passages(state: dict[str, list[Any]]) -> dict[str, Passage]:
    return {passage.id: passage for passage in passages_of(state)}


def _check_snapshots(store: IndexStore, last: dict[str, Any]) -> dict[str, Any]:
    """Checks that the snapshots are those from before or after the last step, with their contents; returns them."""
    after = last.get("next", last["now"])
    names = store.snapshots()
    assert set(names) in (set(last["now"]["snapshots"]), set(after["snapshots"]))
    known = last["now"]["snapshots"] | after["snapshots"]
    for name in names:
        check_contents(PassageView(IndexStore.open(store.snapshot_folder(name))), _as_passages(known[name]))
    return {name: known[name] for name in names}


def _check_after(folder: Path, last: dict[str, Any]) -> dict[str, Any]:
    """Checks that the store is intact, is as before or after the last step, and can be searched and written to."""
    store = IndexStore.open(folder)
    assert verify(store).problems == []
    view = PassageView(store)
    states = [last["now"]["passages"], last.get("next", last["now"])["passages"]]
    stored = {passage.id: passage for passage in view.passages(live_rows(view))}
    state = next((candidate for candidate in states if _as_passages(candidate) == stored), None)
    assert state is not None, f"{sorted(stored)} is neither {sorted(states[0])} nor {sorted(states[1])}"
    check_contents(view, _as_passages(state))
    if len(view):
        first = _as_passages(state)[min(state)]
        matches = view.scan(vector_of(first), len(view))
        assert sorted(view.ids(matches.rows)) == sorted(state)
        assert sorted(view.ids(view.match("word", 100).rows)) == sorted(state)
    snapshots = _check_snapshots(store, last)
    new = {"after": [f"word after {view.version}", 1]}
    put(store, passages_of(new))  # the lock is free at once
    state = state | new
    store.update_word_files()
    after = PassageView(store)
    assert sorted(after.ids(after.match("word", 100).rows)) == sorted(state)
    check_contents(after, _as_passages(state))
    return {"passages": state, "snapshots": snapshots}


def _start(folder: Path, vector_copies: VectorCopies) -> dict[str, Any]:
    new_store(folder, vector_copies=vector_copies)
    return {"passages": {}, "snapshots": {}}


@pytest.mark.parametrize(("vector_copies", "num_kills"), [(2, 8), (1, 6)])
def test_a_writer_killed_at_any_time(tmp_path, writers, vector_copies, num_kills):
    steps_hit = _kill(writers, tmp_path, vector_copies, num_kills, lambda rng: ({}, rng.uniform(0.02, 0.4)))
    assert len({*steps_hit}) >= 2  # kinds of write; which ones, depends on the timing


@pytest.mark.parametrize(("vector_copies", "num_kills"), [(2, 12), (1, 10)])
def test_a_writer_killed_before_or_after_a_write_call(tmp_path, writers, vector_copies, num_kills):
    def at_a_call(rng):
        return {"kill_at": rng.randint(1, 40), "after": rng.random() < 0.5}, None

    steps_hit = _kill(writers, tmp_path, vector_copies, num_kills, at_a_call)
    assert len({*steps_hit}) >= 3
    assert "upsert" in steps_hit  # the most common step


def _kill(writers, tmp_path, vector_copies, num_kills, choose):
    """Kills writers, each as ``choose`` says (what it is told, and seconds); returns what each was doing."""
    seed = int(os.environ.get("D2LLM_TEST_SEED", "5"))
    rng = random.Random(seed)
    folder, log = tmp_path / "index", tmp_path / "log"
    state, steps_hit = _start(folder, vector_copies), []
    for number in range(TIMES * num_kills):
        log.unlink(missing_ok=True)
        told, seconds = choose(rng)
        task = {"folder": str(folder), "log": str(log), "state": state, "seed": seed * 1000 + number} | told
        last = writers.run(task, seconds=seconds)
        print("seed", task["seed"], told, "killed in", last.get("does", "between two steps"))
        steps_hit.append(last.get("does"))
        state = _check_after(folder, last)
    return steps_hit
