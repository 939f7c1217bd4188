"""F7: a disk that is full at every page, and at every file, that a verb writes.

Each verb runs where 0, 1, 2, ... pages or files are left, up to what it needs. It ends with an error of d2llm's. Then
the disk grows, and the same call ends as if nothing had happened. The disk is a tmpfs in a namespace.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path

from campaign.frame import Draw, Outcome, Row, main
from campaign.namespaces import enter, run_as_root
from campaign.surroundings import ERROR_STATUS, end_with_status
from campaign.verb_kills import Verb, check_same, in_a_fork, prepared_verbs, stored
from d2llm import Index, Student
from tiny_server import tiny_passages, write_tiny_index

_PAGE = 4  # KiB
_MUCH = 50_000
NEEDS = {"sync": (72, 13), "encode": (72, 13), "label": (6, 8), "train": (131, 15), "change": (92, 20)}
"""Pages and files with which a verb ends well; ``prepare`` checks them."""
CASES = [
    (verb, kind, left)
    for verb, needed in NEEDS.items()
    for kind, count in zip(("pages", "files"), needed, strict=True)
    for left in range(count)
]
_STRIDE = 389  # of consecutive draws, so that a few of them are of all verbs


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


@contextmanager
def prepare(folder: Path) -> Iterator[Callable[[Draw], Outcome]]:
    verbs = prepared_verbs(folder) | {"change": changes(folder / "changes")}

    @contextmanager
    def disk_for(name: str) -> Iterator[Disk]:
        disk = Disk(folder / "disk")
        try:
            if name == "change":
                shutil.copytree(folder / "changes" / "index", disk.folder / "index")
            yield disk
        finally:
            disk.remove()

    for name, (pages, files) in NEEDS.items():
        with disk_for(name) as disk:
            disk.leave(pages=pages, files=files)
            assert in_a_fork(verbs[name].run, disk.folder) == 0, (
                f"{name} needs more than {pages} pages and {files} files"
            )

    def case(chance: Draw) -> Outcome:
        name, kind, left = CASES[chance.number * _STRIDE % len(CASES)]
        verb, what = verbs[name], f"{name} with {left} {kind} left"
        with disk_for(name) as disk:
            log = disk.folder.with_suffix(".log")
            disk.leave(**{kind: left})
            status = os.waitstatus_to_exitcode(in_a_fork(partial(end_with_status, verb.run), disk.folder, 300.0))
            disk.leave()
            if status not in (0, ERROR_STATUS):
                return Outcome(name, f"{what} ended with {status}: {log.read_text()}")
            again = in_a_fork(verb.run, disk.folder)
            assert again == 0, f"{what}, then enough: {log.read_text()}"
            check_same(name, verb.result(disk.folder), verb.expected)
        return Outcome(f"{name}, few {kind}: {'an error' if status else 'no difference'}")

    yield case


ROW = Row("full_disks", "F7", len(CASES), prepare)

if __name__ == "__main__":
    enter("campaign.full_disks")
    main(ROW)
