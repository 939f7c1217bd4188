"""F1: kill -9 at random points of upsert, delete, compaction, snapshot and restore of a store.

Afterwards the store opens, is what it was before or after the step that was cut off, and can be written to at once.
"""

from __future__ import annotations

import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from campaign.frame import Outcome, Row, main
from d2llm.core.types import Passage
from d2llm.store.index_store import IndexStore
from d2llm.store.inspection import verify
from d2llm.store.view import PassageView
from store_writer import passages_of
from tiny_store import check_contents, live_rows, new_store, put, vector_of
from waiting import PATIENCE

TESTS = Path(__file__).parents[1]
KILLS = 4  # one after the other, of the same store


class Writers:
    """Writer processes, one at a time, all forked from a parent that has the libraries loaded."""

    def __init__(self, **environment: str) -> None:
        path = os.pathsep.join([str(TESTS.parent / "src"), str(TESTS)])
        self.mother = subprocess.Popen(
            [sys.executable, str(TESTS / "store_writer.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": path} | environment,
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
        return last_entry(text, task["state"])

    def end(self) -> None:
        self.mother.kill()
        self.mother.wait()


def last_entry(log: str, start: dict[str, Any]) -> dict[str, Any]:
    """The last complete line of a writer's log; the one before an incomplete one says as much."""
    lines = log.split("\n")[:-1]
    return json.loads(lines[-1]) if lines else {"now": start}


def _as_passages(state: dict[str, list[Any]]) -> dict[str, Passage]:
    return {passage.id: passage for passage in passages_of(state)}


def _check_snapshots(store: IndexStore, last: dict[str, Any]) -> dict[str, Any]:
    """Checks that the snapshots are those from before or after the last step, with their contents; returns them."""
    after = last.get("next", last["now"])
    names = store.snapshots()
    assert set(names) in (set(last["now"]["snapshots"]), set(after["snapshots"])), f"the snapshots are {names}"
    known = last["now"]["snapshots"] | after["snapshots"]
    for name in names:
        check_contents(PassageView(IndexStore.open(store.snapshot_folder(name))), _as_passages(known[name]))
    return {name: known[name] for name in names}


def check_after(folder: Path, last: dict[str, Any]) -> dict[str, Any]:
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


@contextmanager
def prepare(folder: Path) -> Iterator[Callable[[random.Random], Outcome]]:
    writers = Writers()

    def case(chance: random.Random) -> Outcome:
        root = folder / f"{chance.getrandbits(64):x}"
        root.mkdir()
        copies = chance.choice((1, 2))
        new_store(root / "index", vector_copies=copies)
        state: dict[str, Any] = {"passages": {}, "snapshots": {}}
        steps = set[str]()
        for kill in range(KILLS):
            task = {"folder": str(root / "index"), "log": str(root / f"log-{kill}"), "state": state}
            task["seed"] = chance.getrandbits(32)
            if at_a_call := chance.random() < 0.6:
                task |= {"kill_at": chance.randint(1, 60), "after": chance.random() < 0.5}
            last = writers.run(task, seconds=None if at_a_call else chance.uniform(0.02, 0.4))
            steps.add(last.get("does", "between two steps"))
            state = check_after(root / "index", last)
        shutil.rmtree(root)
        return Outcome(f"{copies} {'copy' if copies == 1 else 'copies'} of the vectors", cases=KILLS)

    try:
        yield case
    finally:
        writers.end()


ROW = Row("store_kills", "F1", 1_000, prepare)

if __name__ == "__main__":
    main(ROW)
