"""F7: a disk that is full at every page, and at every file, that a verb writes.

Each verb runs where 0, 1, 2, ... pages or files are left, up to what it needs (``export``: every second number,
``fit``: every eighth). It ends with an error of d2llm's. Then the disk grows, and the same call ends as if nothing had
happened. The disk is a tmpfs in a namespace.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from campaign.frame import Draw, Outcome, Row, main
from campaign.namespaces import enter, run_as_root
from campaign.surroundings import ERROR_STATUS, end_with_status
from campaign.verb_kills import Runs, Verb, check_same, in_a_fork, prepared_verbs, run_command, stored
from d2llm import Index, Student
from d2llm.fitting.fit import fit
from d2llm.retrieval.shard import shard
from local_endpoint import local_endpoint
from tiny_fit import ask_about_passage, settings_for, write_documents
from tiny_server import tiny_passages, write_tiny_index

_PAGE = 4  # KiB
_MUCH = 50_000
NEEDS = {"sync": (72, 13), "encode": (72, 13), "label": (6, 8), "train": (131, 15), "change": (92, 20)}
"""Pages and files with which a verb ends well; ``prepare`` checks them."""
NEEDS_LATER = {"shard": (106, 32), "export": (328, 38), "fit": (352, 104)}
"""Those of verbs that joined later, so that the draws of the first stay what they were."""
_STEPS = {"export": 2, "fit": 8}
"""Between two numbers that are tried; else 1."""
_STRIDE = 389  # of consecutive draws, so that a few of them are of all verbs


def _cases(needs: dict[str, tuple[int, int]]) -> list[tuple[str, str, int]]:
    """Verb, what is scarce and how much of it is left, in the order of the draws."""
    cases = [
        (verb, kind, left)
        for verb, needed in needs.items()
        for kind, count in zip(("pages", "files"), needed, strict=True)
        for left in range(0, count, _STEPS.get(verb, 1))
    ]
    return [cases[number * _STRIDE % len(cases)] for number in range(len(cases))]


CASES = _cases(NEEDS) + _cases(NEEDS_LATER)


class Disk:
    """A file system of memory, whose free space and number of files can be set while it is in use."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder = folder
        run_as_root("mount", "-n", "-t", "tmpfs", "none", folder)
        (folder / "filler").write_bytes(b"a page, as no pages mean no limit")

    def leave(self, *, pages: int = _MUCH, files: int = _MUCH) -> None:
        """Leave so many pages and files free."""
        now = os.statvfs(self.folder)
        used_pages, used_files = now.f_blocks - now.f_bfree, now.f_files - now.f_ffree
        options = f"size={_PAGE * (used_pages + pages)}k,nr_inodes={used_files + files}"
        run_as_root("mount", "-n", "-o", f"remount,{options}", self.folder)

    def remove(self) -> None:
        run_as_root("umount", "-n", "--lazy", self.folder)
        self.folder.rmdir()
        self.folder.with_suffix(".log").unlink(missing_ok=True)


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


@contextmanager
def later_verbs(folder: Path) -> Iterator[dict[str, Verb]]:
    """``shard``, ``export`` and ``fit``, whose writer is in this process."""
    run_as_root("ip", "link", "set", "lo", "up")
    index, documents = write_tiny_index(folder), write_documents(folder / "documents")
    student = folder / "student-0"
    with local_endpoint(ask_about_passage) as endpoint:
        settings = settings_for(student, endpoint.url)
        runs: Runs = {
            "shard": (lambda root: (root / "shards").exists() or shard(index, root / "shards", 3), in_shards),
            "export": (export(student), exported),
            "fit": (lambda root: fit(documents, root / "fit", settings, device="cpu", dtype="float32"), fitted),
        }
        yield prepared_verbs(folder, runs)


@contextmanager
def prepare(folder: Path) -> Iterator[Callable[[Draw], Outcome]]:
    with later_verbs(folder / "later") as later:
        yield _prepared_case(folder, prepared_verbs(folder) | {"change": changes(folder / "changes")} | later)


def _prepared_case(folder: Path, verbs: dict[str, Verb]) -> Callable[[Draw], Outcome]:
    @contextmanager
    def disk_for(name: str) -> Iterator[Disk]:
        disk = Disk(folder / "disk")
        try:
            if name == "change":
                shutil.copytree(folder / "changes" / "index", disk.folder / "index")
            yield disk
        finally:
            disk.remove()

    for name, (pages, files) in (NEEDS | NEEDS_LATER).items():
        with disk_for(name) as disk:
            disk.leave(pages=pages, files=files)
            assert in_a_fork(verbs[name].run, disk.folder) == 0, (
                f"{name} needs more than {pages} pages and {files} files"
            )

    def case(chance: Draw) -> Outcome:
        name, kind, left = CASES[chance.number % len(CASES)]
        verb, what = verbs[name], f"{name} with {left} {kind} left"
        with disk_for(name) as disk:
            log = disk.folder.with_suffix(".log")
            disk.leave(**{kind: left})
            status = os.waitstatus_to_exitcode(in_a_fork(partial(end_with_status, verb.run), disk.folder, 300.0))
            disk.leave()
            if status not in (0, ERROR_STATUS):
                return Outcome(name, f"{what} ended with {status}: {log.read_text()}")
            if status == 0:
                check_same(name, verb.result(disk.folder), verb.expected)
            again = in_a_fork(verb.run, disk.folder)
            assert again == 0, f"{what}, then enough: {log.read_text()}"
            check_same(name, verb.result(disk.folder), verb.expected)
        return Outcome(f"{name}, few {kind}: {'an error' if status else 'no difference'}")

    return case


ROW = Row("full_disks", "F7", len(CASES), prepare)

if __name__ == "__main__":
    enter("campaign.full_disks")
    main(ROW)
