"""F7: a disk that is full at every page, and at every file, that a verb writes.

Each verb runs where 0, 1, 2, ... pages or files are left, up to what it needs (``export``: every second number,
``fit``: every eighth). It ends with an error of d2llm's. Then the disk grows, and the same call ends as if nothing had
happened. The disk is a tmpfs in a namespace.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path

from campaign.frame import Draw, Outcome, Row, main
from campaign.more_verbs import Verbs, all_verbs
from campaign.namespaces import enter, run_as_root
from campaign.surroundings import ERROR_STATUS, end_with_status
from campaign.verb_kills import check_same, in_a_fork

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


@contextmanager
def prepare(folder: Path) -> Iterator[Callable[[Draw], Outcome]]:
    run_as_root("ip", "link", "set", "lo", "up")
    with all_verbs(folder) as verbs:
        yield _prepared_case(folder, verbs)


def _prepared_case(folder: Path, verbs: Verbs) -> Callable[[Draw], Outcome]:
    @contextmanager
    def disk_for(name: str) -> Iterator[Disk]:
        disk = Disk(folder / "disk")
        try:
            if name == "change":
                shutil.copytree(folder / "changes" / "index", disk.folder / "index")
            yield disk
        finally:
            disk.remove()

    @cache
    def require_enough(name: str) -> None:
        pages, files = (NEEDS | NEEDS_LATER)[name]
        with disk_for(name) as disk:
            disk.leave(pages=pages, files=files)
            assert in_a_fork(verbs[name].run, disk.folder) == 0, (
                f"{name} needs more than {pages} pages and {files} files"
            )

    def case(chance: Draw) -> Outcome:
        name, kind, left = CASES[chance.number % len(CASES)]
        verb, what = verbs[name], f"{name} with {left} {kind} left"
        require_enough(name)
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
