"""F7: verbs while files cannot grow, descriptors or memory run out, the clock jumps; other time zones and locales.

The verb ends well or with an error of d2llm's (out of memory: also with Python's); then, with nothing in its way, the
same call ends as if nothing had happened.
"""

from __future__ import annotations

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

from campaign.frame import Outcome, Row, main
from campaign.verb_kills import Verb, check_same, in_a_fork, prepared_verbs
from d2llm.core.errors import D2LLMError
from d2llm.core.files import TOO_LITTLE

_ERROR_STATUS, _MEMORY_STATUS = 40, 41


def _limit(kind: int, soft: int) -> None:
    resource.setrlimit(kind, (soft, resource.getrlimit(kind)[1]))


def _no_growth(chance: random.Random) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then a write fails, as on a full disk
    _limit(resource.RLIMIT_FSIZE, int(10 ** chance.uniform(2, 5.5)))


def _few_descriptors(chance: random.Random) -> None:
    _limit(resource.RLIMIT_NOFILE, len([*Path("/proc/self/fd").iterdir()]) + chance.randrange(40))


def _little_memory(chance: random.Random) -> None:
    used = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
    _limit(resource.RLIMIT_DATA, used + int(10 ** chance.uniform(5, 8)))


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


SURROUNDINGS: dict[str, Callable[[random.Random], None]] = {
    "files that cannot grow": _no_growth,
    "few descriptors": _few_descriptors,
    "little memory": _little_memory,
    "a clock that jumps": _jumping_clock,
    "another time zone": _time_zone,
    "another locale": _locale,
}

SCARCE = "little memory"
"""Where a traceback is not promised away yet, as docs/reliability.md says: what is lost is only the run."""


@contextmanager
def prepare(folder: Path) -> Iterator[Callable[[random.Random], Outcome]]:
    verbs: dict[str, Verb] = prepared_verbs(folder)

    def case(chance: random.Random) -> Outcome:
        name, surrounding = chance.choices([*verbs], [3, 2, 2, 1])[0], chance.choice([*SURROUNDINGS])
        verb, root = verbs[name], folder / f"{chance.getrandbits(64):x}"
        root.mkdir()

        def run(where: Path) -> None:
            SURROUNDINGS[surrounding](chance)
            try:
                verb.run(where)
            except D2LLMError:
                os._exit(_ERROR_STATUS)
            except OSError as error:  # the command line makes one line of these
                os._exit(_ERROR_STATUS if error.errno in TOO_LITTLE else 1)
            except MemoryError:
                os._exit(_MEMORY_STATUS)
            except BaseException as error:  # noqa: BLE001
                with suppress(OSError):  # where files cannot grow, the log is one of them
                    print(f"{type(error).__name__}: {error}", traceback.format_exc(), sep="\n", flush=True)
                os._exit(_ERROR_STATUS if str(error) == "exit status 2" else 1)

        status = os.waitstatus_to_exitcode(in_a_fork(run, root, 60.0))
        log = root.with_suffix(".log")
        text = log.read_text(errors="replace")
        is_error = status == _ERROR_STATUS
        is_memory = surrounding == "little memory" and (status == _MEMORY_STATUS or "MemoryError" in text)
        is_traceback = surrounding == SCARCE and status == 1
        if status and not is_error and not is_memory and not is_traceback:
            return Outcome(surrounding, f"{name} with {surrounding} ended with {status}: {text}")
        status = in_a_fork(verb.run, root)
        assert status == 0, f"{name} after {surrounding}: {log.read_text()}"
        check_same(name, verb.result(root), verb.expected)
        shutil.rmtree(root)
        log.unlink()
        ending = "an error" if is_error or is_memory else "a traceback" if is_traceback else "no difference"
        return Outcome(f"{surrounding}: {ending}")

    yield case


ROW = Row("surroundings", "F7", 500, prepare)

if __name__ == "__main__":
    main(ROW)
