"""A process that forks a writer for each input line of JSON; writers change stores until they are killed.

A writer records each step in a log that outlives it: before the step ``{"now": state, "next": state}``, after it
``{"now": state}``; a state is {"passages": {id: [text, year]}, "snapshots": {name: passages}}. With ``kill_at`` it
kills itself before or after that call of one of the functions that write.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch  # noqa: F401  # before the fork: otherwise a writer might be killed while importing

import d2llm.store.inspection  # noqa: F401
from d2llm.core.types import Passage
from d2llm.store import word_files
from d2llm.store.index_store import IndexStore
from d2llm.store.passage_table import PassageTable
from d2llm.store.schema import MetadataSchema
from d2llm.store.vector_file import VectorFile
from tiny_store import put

State = dict[str, Any]

HOOKED: list[tuple[Any, str]] = [
    (os, "fsync"),
    (Path, "replace"),
    (Path, "rename"),
    (Path, "unlink"),
    (Path, "hardlink_to"),
    (shutil, "rmtree"),
    (VectorFile, "append"),
    (word_files, "write_segment"),
    (word_files, "update_word_files"),
    (PassageTable, "put"),
    (PassageTable, "delete"),
    (PassageTable, "replace_all"),
    (PassageTable, "remove_older"),
    (PassageTable, "copy_to"),
]


def passages_of(state: dict[str, list[Any]]) -> list[Passage]:
    return [Passage(key, text, metadata={"year": year}) for key, (text, year) in state.items()]


def _kill_at(number: int, *, after: bool) -> None:
    calls = 0

    def hooked(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            last = calls == number
            if last and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            value = function(*args, **kwargs)
            if last:
                os.kill(os.getpid(), signal.SIGKILL)
            return value

        return call

    for owner, name in HOOKED:
        setattr(owner, name, hooked(getattr(owner, name)))


def _next_state(chance: random.Random, state: State) -> tuple[State, str, Any]:
    """A random action: the state after it, its name and its argument."""
    passages, snapshots = state["passages"], state["snapshots"]
    does = chance.choices(
        ["upsert", "delete", "compact", "dense", "update_word_files", "snapshot", "restore", "drop", "fields"],
        [8, 4, 1, 2, 1, 2, 2, 1, 1],
    )[0]
    if does == "upsert":
        chosen = {f"p{chance.randrange(40)}": chance.randrange(50) for _ in range(chance.randint(1, 12))}
        new = {
            key: passages[key] if key in passages and number < 10 else [f"word text {number}", number % 5]
            for key, number in chosen.items()
        }
        new |= {key: [text, year + 1] for key, (text, year) in passages.items() if key not in new and key < "p12"}
        return {"passages": passages | new, "snapshots": snapshots}, does, new
    if does == "delete":
        deleted = chance.sample(sorted(passages), min(len(passages), chance.choice([0, 1, 5, 40])))
        remaining = {key: value for key, value in passages.items() if key not in deleted}
        return {"passages": remaining, "snapshots": snapshots}, does, deleted
    if does == "snapshot":
        name = chance.choice([name for name in "abcd" if name not in snapshots] or [""])
        return {"passages": passages, "snapshots": snapshots | ({name: passages} if name else {})}, does, name
    if does in ("restore", "drop") and snapshots:
        name = chance.choice(sorted(snapshots))
        remaining = snapshots if does == "restore" else {key: value for key, value in snapshots.items() if key != name}
        return {"passages": snapshots[name] if does == "restore" else passages, "snapshots": remaining}, does, name
    return state, does, f"extra{chance.randrange(5)}" if does == "fields" else None


def _do(store: IndexStore, does: str, what: Any) -> None:
    if does == "upsert":
        put(store, passages_of(what))
    elif does == "delete":
        store.delete(what)
    elif does == "snapshot" and what:
        store.snapshot(what)
    elif does == "restore" and what:
        store.restore(what)
    elif does == "drop" and what:
        store.drop_snapshot(what)
    elif does == "fields":
        store.add_fields(MetadataSchema({what: "integer"}))
    elif does in ("compact", "dense"):
        store.compact(timedelta(0), dense=does == "dense")
    else:
        store.update_word_files()


def _write(task: dict[str, Any]) -> None:
    chance, state = random.Random(task["seed"]), task["state"]
    store = IndexStore.open(Path(task["folder"]))
    log = os.open(task["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    if task.get("kill_at"):
        _kill_at(task["kill_at"], after=task["after"])
    while True:
        after, does, what = _next_state(chance, state)
        os.write(log, json.dumps({"now": state, "next": after, "does": does}).encode() + b"\n")
        _do(store, does, what)
        state = after
        os.write(log, json.dumps({"now": state}).encode() + b"\n")


def main() -> None:
    """Fork a writer for each line; print its process id, then when it has ended, and after another line its status."""
    print("ready", flush=True)
    while line := sys.stdin.readline():
        pid = os.fork()
        if pid == 0:
            try:
                _write(json.loads(line))
            finally:
                os._exit(1)
        print(pid, flush=True)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # keeps the id, so that no other process can be killed
        print("ended", flush=True)
        sys.stdin.readline()
        print(os.waitpid(pid, 0)[1], flush=True)


if __name__ == "__main__":
    main()
