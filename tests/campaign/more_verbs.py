"""The verbs that the campaign disturbs besides those of ``verb_kills``: changes of an index, shard, export and fit."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from campaign.verb_kills import Runs, Verb, first_runs, prepared, run_command, stored
from d2llm import Index, Student
from d2llm.fitting.fit import fit
from d2llm.retrieval.shard import shard
from local_endpoint import local_endpoint
from tiny_fit import ask_about_passage, settings_for, write_documents
from tiny_server import tiny_passages, write_tiny_index


def changes(folder: Path) -> Verb:
    """Upsert, delete, compact, take a snapshot and restore it, in an index that is copied into ``folder``."""
    index = write_tiny_index(folder)
    student = Student.load(folder / "student-0", device="cpu", dtype="float32")
    passages = tiny_passages(80)

    def run(root: Path) -> None:
        with Index.open(root / "index", student) as opened:
            opened.upsert(passages[60:70])
            opened.delete([f"p{n}" for n in range(10)])
            opened.compact(timedelta(0), dense=True)
            if "before" not in opened.store.snapshots():
                opened.snapshot("before")
            opened.upsert(passages[70:])
            opened.restore("before")

    shutil.copytree(index, folder / "changed" / "index")
    run(folder / "changed")
    return Verb(run, lambda root: stored(root / "index"), 1.0, stored(folder / "changed" / "index"))


def export(student: Path) -> Callable[[Path], None]:
    """Write a student in each format that the tiny one has."""

    def run(root: Path) -> None:
        for name in ("onnx", "openvino", "numpy", "student", "vespa"):
            run_command("export", student, "--to", name, "--out", root / name)

    return run


def exported(root: Path) -> dict[str, str]:
    """A hash of each file; of OpenVINO's graphs, whose layers get other names each time, the number of layers."""
    hashes: dict[str, str] = {}
    for path in (path for path in root.rglob("*") if path.is_file() and path.name != "filler"):
        content = path.read_bytes()
        if path.suffix == ".xml":
            content = str(len(ElementTree.fromstring(content).findall("layers/layer"))).encode()
        hashes[str(path.relative_to(root))] = hashlib.sha256(content).hexdigest()
    return hashes


def fitted(root: Path) -> dict[str, Any]:
    """What a fit reports of its queries and its verdict, and what it serves."""
    report = json.loads((root / "fit" / "report.json").read_text())
    kept = ("num_passages", "num_kept", "rejected", "data", "kept", "verdict")
    return {key: report[key] for key in kept} | {"ids": sorted(stored(root / "fit"))}


def in_shards(root: Path) -> dict[str, Any]:
    """Text and vector of all passages."""
    return {one: row for path in (root / "shards").glob("shard-*") for one, row in stored(path).items()}


class Verbs(dict[str, Verb]):
    """All verbs by name, each of which is prepared when it is first asked for."""

    def __init__(self, folder: Path, writer: str) -> None:
        """``writer``: the address of what writes the queries of ``fit``."""
        super().__init__()
        self._folder, self._writer = folder, writer
        self._runs = first_runs(folder)

    def __missing__(self, name: str) -> Verb:
        verb = changes(self._folder / "changes") if name == "change" else self._prepared(name)
        self[name] = verb
        return verb

    def _prepared(self, name: str) -> Verb:
        if name not in self._runs:
            self._runs |= self._later_runs(self._folder / "later")
        return prepared(self._folder / f"undisturbed-{name}", *self._runs[name])

    def _later_runs(self, folder: Path) -> Runs:
        index, documents = write_tiny_index(folder), write_documents(folder / "documents")
        student = folder / "student-0"
        settings = settings_for(student, self._writer)
        return {
            "shard": (lambda root: (root / "shards").exists() or shard(index, root / "shards", 3), in_shards),
            "export": (export(student), exported),
            "fit": (lambda root: fit(documents, root / "fit", settings, device="cpu", dtype="float32"), fitted),
        }


@contextmanager
def all_verbs(folder: Path) -> Iterator[Verbs]:
    """The verbs; what writes the queries of ``fit`` is in this process."""
    with local_endpoint(ask_about_passage) as endpoint:
        yield Verbs(folder, endpoint.url)
