"""F1: kill -9 at random times of sync, encode, label, train and fit; the same call ends as if nothing had happened.

The result is compared with that of an undisturbed run: every text and vector of an index, every label, the student's
weights bit by bit, and what a fit reports and serves.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from numpy.testing import assert_allclose

from campaign.frame import Draw, Outcome, Row, main
from campaign.histories import fork
from d2llm.cli.main import main as program
from d2llm.data.labels import LabelStore
from d2llm.retrieval.index import Index
from d2llm.store.inspection import verify
from d2llm.store.view import PassageView
from d2llm.training.label import label
from tiny_data import topics
from tiny_distill import Workspace
from tiny_fit import write_documents
from tiny_server import write_tiny_student
from tiny_store import live_rows

_QUERIES = 40
_VERBS = ("sync", "encode", "label", "train")


class Verb(NamedTuple):
    """A verb: what it does in a folder, what it leaves there, and the seconds of an undisturbed run."""

    run: Callable[[Path], object]
    result: Callable[[Path], Any]
    seconds: float
    expected: Any


Runs = dict[str, tuple[Callable[[Path], object], Callable[[Path], Any]]]
"""What each verb does in a folder, and what it leaves there."""


def run_command(*arguments: object) -> None:
    sys.argv = ["d2llm", "--quiet", *map(str, arguments)]
    try:
        program()
    except SystemExit as ended:
        if ended.code:
            raise RuntimeError(f"exit status {ended.code}") from ended


def stored(folder: Path) -> dict[str, Any]:
    """Text and vector of all passages, of an index that is intact."""
    with Index.open(folder) as index:
        assert verify(index.store).problems == []
        view = PassageView(index.store)
        rows = live_rows(view)
        pairs = zip(view.passages(rows), view.vectors(rows), strict=True)
        return {passage.id: (passage.full_text, passage.metadata.get("path"), vector) for passage, vector in pairs}


def labels_of(store: LabelStore) -> dict[str, Any]:
    """The passages of each query, and their log-odds."""
    return {query: (list(store.log_odds(query)), list(store.log_odds(query).values())) for query in store.query_ids}


def check_same(verb: str, found: Any, expected: Any) -> None:
    if verb in ("train", "export", "fit"):
        assert found == expected, f"{verb}: another result"
        return
    assert found.keys() == expected.keys()
    relative = 1e-4 if verb == "label" else 2.0**-7  # stored as bfloat16: a step of it
    for key, values in found.items():
        assert values[:-1] == expected[key][:-1], key
        assert_allclose(values[-1], expected[key][-1], rtol=relative, atol=1e-5)  # other batches


def first_runs(root: Path) -> Runs:
    """The verbs that were killed first."""
    student = write_tiny_student(root)
    documents, workspace = write_documents(root / "documents", 60), Workspace(root / "workspace")
    source, options = topics(num_train=_QUERIES), {"device": "cpu", "dtype": "float32"}

    sync = ("--student", student, "--dtype", "float32")
    return {
        "sync": (
            lambda folder: run_command("index", folder / "index", "sync", documents, *sync),
            lambda folder: stored(folder / "index"),
        ),
        "encode": (
            lambda folder: (
                (folder / "index").exists() or run_command("encode", documents, "--out", folder / "index", *sync)
            ),
            lambda folder: stored(folder / "index"),
        ),
        "label": (
            lambda folder: label([source], folder / "labels", teacher=workspace.teacher, **options),
            lambda folder: labels_of(workspace.store(folder / "labels")),
        ),
        "train": (
            lambda folder: (folder / "student").exists() or workspace.run(folder / "student", checkpoint_every=2),
            lambda folder: json.loads((folder / "student" / "manifest.json").read_text())["fingerprint"],
        ),
    }


def in_a_fork(run: Callable[[Path], object], folder: Path, seconds: float = float("inf")) -> int:
    """Run in a process that is killed after some seconds; returns its status."""

    def work() -> None:
        os.dup2(os.open(folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        os.dup2(2, 1)
        os.setsid()  # what it starts ends with it
        run(folder)

    pid = fork(work)
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return status
        time.sleep(0.002)
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        os.kill(pid, signal.SIGKILL)
    return os.waitpid(pid, 0)[1]


def prepared(root: Path, run: Callable[[Path], object], result: Callable[[Path], Any]) -> Verb:
    """A verb that was run once undisturbed, in ``root``."""
    torch.set_num_threads(1)  # its threads would not be there in a fork
    root.mkdir()
    began = time.monotonic()
    status = in_a_fork(run, root)
    assert status == 0, root.with_suffix(".log").read_text()[-3_000:]
    return Verb(run, result, time.monotonic() - began, result(root))


FIRST = 454
"""Draws of the first verbs, which stay what they were; those after them are of ``fit``, which joined later."""


@contextmanager
def prepare(folder: Path) -> Iterator[Callable[[Draw], Outcome]]:
    from campaign.more_verbs import all_verbs  # which takes from this module

    with all_verbs(folder) as verbs:

        def case(chance: Draw) -> Outcome:
            name = chance.choices([*_VERBS], [4, 2, 2, 1])[0] if chance.number < FIRST else "fit"
            return _killed(name, verbs[name], folder / f"{chance.getrandbits(64):x}", chance)

        yield case


def _killed(name: str, verb: Verb, root: Path, chance: Draw) -> Outcome:
    root.mkdir()
    kills = 0
    for _ in range(chance.randint(1, 4)):
        kills += in_a_fork(verb.run, root, chance.uniform(0, verb.seconds)) == signal.SIGKILL
    status = in_a_fork(verb.run, root)
    assert status == 0, f"{name} after {kills} kills: {root.with_suffix('.log').read_text()[-3_000:]}"
    check_same(name, verb.result(root), verb.expected)
    shutil.rmtree(root)
    root.with_suffix(".log").unlink()
    return Outcome(f"{name}" if kills else f"{name}, which ended before", cases=max(1, kills))


ROW = Row("verb_kills", "F1", 1_100, prepare)

if __name__ == "__main__":
    main(ROW)
