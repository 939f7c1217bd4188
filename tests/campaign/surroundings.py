"""F7: verbs where nothing may be written, or disk, descriptors or memory run out; clocks that jump; zones and locales.

The verb ends well or with an error of d2llm's; with little memory, perhaps with a crash of a library, or it waits for a
thread that never started. Then, with nothing in its way, the same call ends as if nothing had happened.
"""

from __future__ import annotations

import ctypes
import locale
import os
import random
import resource
import shutil
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from campaign.frame import Draw, Outcome, Row, main, used_memory
from campaign.more_verbs import Verbs, all_verbs
from campaign.verb_kills import check_same, in_a_fork
from d2llm.cli.main import _told

ERROR_STATUS = 40


def _limit(kind: int, soft: int) -> None:
    resource.setrlimit(kind, (soft, resource.getrlimit(kind)[1]))


def _no_growth(chance: random.Random) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then a write fails, as on a full disk
    _limit(resource.RLIMIT_FSIZE, int(10 ** chance.uniform(2, 5.5)))


def _few_descriptors(chance: random.Random) -> None:
    _limit(resource.RLIMIT_NOFILE, len([*Path("/proc/self/fd").iterdir()]) + chance.randrange(40))


def _little_memory(chance: random.Random) -> None:
    _limit(resource.RLIMIT_DATA, used_memory() + int(10 ** chance.uniform(5, 8)))


def _no_writing(_: random.Random) -> None:
    """Root may write whatever the permissions of a folder, until it gives up its capabilities."""
    header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert ctypes.CDLL(None, use_errno=True).capset(header, none) == 0


def _jumping_clock(chance: random.Random) -> None:
    real = time.time
    time.time = lambda: max(0.0, real() + chance.choice([-3e8, 0.0, 3e8]))


def _time_zone(chance: random.Random) -> None:
    os.environ["TZ"] = chance.choice(["Pacific/Kiritimati", "America/St_Johns", "XXX-24:59", ""])
    time.tzset()


def _locale(chance: random.Random) -> None:
    name = chance.choice(["C", "POSIX", "tr_TR.UTF-8", "de_DE.UTF-8"])
    os.environ.update(LC_ALL=name, LANG=name)
    with suppress(locale.Error):
        locale.setlocale(locale.LC_ALL, name)


READ_ONLY = "a folder that is read-only"
SCARCE = "little memory"
"""Where a crash of a library is not promised away, as docs/reliability.md says: what is lost is only the run."""
_NO_THREAD = "Exception ignored in thread started by"
"""Said by Python (until 3.12 at least) whose ``Thread.start`` waits for ever then."""
SURROUNDINGS: dict[str, Callable[[random.Random], None]] = {
    READ_ONLY: _no_writing,
    "files that cannot grow": _no_growth,
    "few descriptors": _few_descriptors,
    SCARCE: _little_memory,
    "a clock that jumps": _jumping_clock,
    "another time zone": _time_zone,
    "another locale": _locale,
}


def _set_writable(folder: Path, *, is_writable: bool) -> None:
    for path in (folder, *folder.rglob("*")):
        if path.is_dir():
            path.chmod(0o755 if is_writable else 0o555)
        elif not path.is_symlink():
            path.chmod(0o644 if is_writable else 0o444)


def end_with_status(run: Callable[[Path], object], where: Path) -> None:
    """End with 0; with ``ERROR_STATUS`` after an error that the command line shows in one line; or with 1."""
    try:
        run(where)
    except BaseException as error:  # noqa: BLE001
        told = _told(error, "this") if isinstance(error, Exception) else None
        if told is not None:
            with suppress(OSError):
                print(told, flush=True)
            os._exit(ERROR_STATUS)
        with suppress(OSError):  # where files cannot grow, the log is one of them
            print(f"{type(error).__name__}: {error}", traceback.format_exc(), sep="\n", flush=True)
        os._exit(ERROR_STATUS if str(error) == "exit status 2" else 1)
    os._exit(0)


WEIGHTS = {"sync": 3, "encode": 2, "label": 2, "train": 1, "change": 3, "shard": 2, "export": 1, "fit": 1}
"""How often each verb is drawn."""


@contextmanager
def prepare(folder: Path) -> Iterator[Callable[[Draw], Outcome]]:
    with all_verbs(folder) as verbs:
        yield _prepared_case(folder, verbs)


def _prepared_case(folder: Path, verbs: Verbs) -> Callable[[Draw], Outcome]:
    def case(chance: Draw) -> Outcome:
        name, surrounding = chance.choices([*WEIGHTS], [*WEIGHTS.values()])[0], chance.choice([*SURROUNDINGS])
        verb, root = verbs[name], folder / f"{chance.getrandbits(64):x}"
        root.mkdir()
        if name == "change":
            shutil.copytree(folder / "changes" / "index", root / "index")

        def run(where: Path) -> None:
            SURROUNDINGS[surrounding](chance)
            end_with_status(verb.run, where)

        if surrounding == READ_ONLY:
            if name != "change" and chance.random() < 0.7:
                in_a_fork(verb.run, root, chance.uniform(0, verb.seconds))
            _set_writable(root, is_writable=False)
        status = os.waitstatus_to_exitcode(in_a_fork(run, root, 300.0))
        _set_writable(root, is_writable=True)
        log = root.with_suffix(".log")
        ending = {0: "no difference", ERROR_STATUS: "an error"}.get(status)
        if surrounding == SCARCE and status < 0:
            ending = "a crash"
            if status == -signal.SIGKILL:
                ending = "a thread that never started" if _NO_THREAD in log.read_text() else None
        if ending is None:
            return Outcome(surrounding, f"{name} with {surrounding} ended with {status}: {log.read_text()}")
        status = in_a_fork(verb.run, root)
        assert status == 0, f"{name} after {surrounding}: {log.read_text()}"
        check_same(name, verb.result(root), verb.expected)
        shutil.rmtree(root)
        log.unlink()
        return Outcome(f"{surrounding}: {ending}")

    return case


ROW = Row("surroundings", "F7", 500, prepare)

if __name__ == "__main__":
    main(ROW)
