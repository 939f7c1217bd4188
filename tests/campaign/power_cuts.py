"""F1: power cuts. What was not synced may be lost, in part and in any order.

A library that is loaded before libc (disk_log.c) logs what a writer does to the files of an index. From a log, any
number of disks are made, each as one may be found after a cut at some call: bytes and sizes are certain as they were at
a file's last fsync, names as they were at their folder's. Of what came later, blocks of 4 KiB persist or not, each for
itself, and of the changes of a folder's names the first few.
"""

from __future__ import annotations

import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from campaign.frame import Outcome, Row, main
from campaign.store_kills import Writers, check_after, last_entry
from tiny_store import new_store

BLOCK = 4096
CUTS = 10  # of each log
_STEPS = "steps"  # the writer's log, which the cut spares: it says what was acknowledged
_NOT_ON_DISK = "-shm"  # SQLite makes it anew after a restart


class Call(NamedTuple):
    name: str
    path: str
    other: str
    offset: int
    data: bytes


@dataclass
class File:
    """A file's bytes at its last fsync, and the changes since."""

    synced: bytes = b""
    changes: list[Call] = field(default_factory=list[Call])

    def content(self, chooses: Callable[[], bool]) -> bytes:
        """What is found after a cut; ``chooses`` says of each block of a change whether it persists."""
        found = bytearray(self.synced)
        for call in self.changes:
            if call.name == "truncate":
                if chooses():
                    del found[call.offset :]
                    found.extend(bytes(call.offset - len(found)))
                continue
            end = call.offset + len(call.data)
            for first in range(call.offset - call.offset % BLOCK, end, BLOCK):
                begin, stop = max(first, call.offset), min(first + BLOCK, end)
                if chooses():
                    found.extend(bytes(max(0, stop - len(found))))
                    found[begin:stop] = call.data[begin - call.offset : stop - call.offset]
        return bytes(found)


def read_log(path: Path) -> list[Call]:
    content, at = path.read_bytes(), 0
    calls: list[Call] = []
    while at < len(content):
        end = content.index(b"\n", at)
        name, first, second, offset, length = content[at:end].decode().split("\t")
        at = end + 1 + int(length)
        calls.append(Call(name, first, second, int(offset), content[end + 1 : at]))
    return [call for call in calls if _NOT_ON_DISK not in call.path]


class Disk:
    """Files by name: as the running system sees them, and what is certain to be there after a cut."""

    def __init__(self, folder: Path) -> None:
        self.names: dict[str, File | None] = {
            path.relative_to(folder).as_posix(): File(path.read_bytes()) if path.is_file() else None
            for path in sorted(folder.rglob("*"))
            if _NOT_ON_DISK not in path.name
        }
        self.first_names = dict(self.names)
        self.renamings: list[tuple[Call, File | None]] = []  # all changes of names
        self.certain = dict[str, int]()  # how many of the above a folder's last fsync made certain

    def do(self, call: Call) -> None:
        if call.name in ("write", "truncate", "sync"):
            file = self.names.get(call.path)
            if file is not None:  # otherwise it was removed while open
                if call.name == "sync":
                    file.synced, file.changes = file.content(lambda: True), []
                else:
                    file.changes.append(call)
        elif call.name == "sync-folder":
            self.certain[call.path] = len(self.renamings)
        else:
            file = File() if call.name == "create" else None
            change(self.names, call, file)
            self.renamings.append((call, file))

    def after_a_cut(self, chance: random.Random) -> dict[str, File | None]:
        """Names as they may be found."""
        names = dict(self.first_names)
        kept = {"none": 0.0, "all": 1.0}.get(chance.choice(["none", "all", "some"]))
        lost = set[str]()  # folders of which a change is lost, and so all later ones
        for index, (call, file) in enumerate(self.renamings):
            folder = str(Path(call.other or call.path).parent)
            if index >= self.certain.get(folder, 0):
                if chance.random() >= (0.7 if kept is None else kept):
                    lost.add(folder)
                if folder in lost:
                    continue
            change(names, call, file)
        return names


def change(names: dict[str, File | None], call: Call, file: File | None) -> None:
    """Make one change of names; a change of what is not there is none."""
    if call.name in ("create", "folder"):
        names[call.path] = file
    elif call.name == "remove":
        names.pop(call.path, None)
    elif call.path in names:
        moved = [name for name in names if name == call.path or name.startswith(f"{call.path}/")]
        for name in moved:
            target = call.other + name[len(call.path) :]
            names[target] = names[name] if call.name == "link" else names.pop(name)


def write_disk(names: dict[str, File | None], folder: Path, chance: random.Random) -> None:
    rate = chance.choice([0.0, 1.0, chance.random()])
    for name, file in sorted(names.items()):
        if file is None:
            (folder / name).mkdir(parents=True, exist_ok=True)
        elif (folder / name).parent.is_dir():
            kept = 1.0 if name == _STEPS else rate
            (folder / name).write_bytes(file.content(lambda kept=kept: chance.random() < kept))


def compiled(folder: Path) -> Path:
    """The library that logs, compiled."""
    library = folder / "disk_log.so"
    source = Path(__file__).with_name("disk_log.c")
    subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    return library


@contextmanager
def prepare(folder: Path) -> Iterator[Callable[[random.Random], Outcome]]:
    root, log = (folder / "root").resolve(), folder / "log"
    environment = {"LD_PRELOAD": str(compiled(folder)), "DISK_LOG": str(log), "DISK_LOG_FOLDER": str(root)}
    start: dict[str, Any] = {"passages": {}, "snapshots": {}}

    def case(chance: random.Random) -> Outcome:
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir()
        log.unlink(missing_ok=True)
        copies = chance.choice((1, 2))
        new_store(root / "index", vector_copies=copies)
        (root / _STEPS).touch()
        disk = Disk(root)
        writers = Writers(**environment)
        task = {"folder": str(root / "index"), "log": str(root / _STEPS), "state": start}
        writers.run(task | {"seed": chance.getrandbits(32), "kill_at": chance.randint(100, 400), "after": True})
        writers.end()
        calls = read_log(log)
        cuts = sorted(chance.sample(range(1, len(calls)), CUTS))
        for done, call in enumerate(calls, 1):
            disk.do(call)
            if done not in cuts:
                continue
            found = folder / "found"
            found.mkdir()
            write_disk(disk.after_a_cut(chance), found, chance)
            text = (found / _STEPS).read_text()
            try:
                check_after(found / "index", last_entry(text, start))
            except Exception as error:
                doing = last_entry(text, start).get("does", "nothing")
                before = "\n".join(f"{call.name} {call.path} {call.other}" for call in calls[max(0, done - 12) : done])
                raise AssertionError(f"cut after call {done}, while the writer did {doing}:\n{before}") from error
            finally:
                shutil.rmtree(found)
        return Outcome(f"{copies} {'copy' if copies == 1 else 'copies'} of the vectors", cases=CUTS)

    yield case


ROW = Row("power_cuts", "F1", 500, prepare)

if __name__ == "__main__":
    main(ROW)
