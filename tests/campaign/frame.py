"""What the rows of the campaign of faults share: cases drawn from a seed, up to a count, and a JSON of what happened.

    PYTHONPATH=tests python -m campaign.histories --count 1000 --minutes 30

A run continues where its JSON ends if that has the same seed; ``make campaign`` runs every row to its full count.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import resource
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

from attacked_server import AttackedServer
from d2llm.core.files import write_json

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "campaign"
_PATHS = re.compile(rf"{re.escape(str(Path(__file__).parents[2]))}/|(?<=\")/\S*/(?=lib/python)")
"""Folders of this machine, which a JSON does not name."""
_SAVED_EVERY = 20.0  # seconds


class Draw(random.Random):
    """The random numbers of a case, and its number, for a row that has a list of cases."""

    def __init__(self, seed: int, number: int) -> None:
        super().__init__(seed * 1_000_000 + number)
        self.number = number


def used_memory() -> int:
    """What RLIMIT_DATA counts of this process, in bytes: with the CUDA build of torch, 600 MB more than without."""
    return int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()


class Outcome(NamedTuple):
    """What a case was, in a few words that are counted, what must not have happened ("" : nothing), and figures."""

    kind: str
    fault: str = ""
    cases: int = 1
    measured: dict[str, float] | None = None


@dataclass(frozen=True)
class Row:
    """A row of the table in docs/reliability.md.

    Attributes:
        name: of its module and JSON.
        id: F1 to F10.
        full: the number of cases of a full run.
        prepare: given an empty folder, yields what runs the case of a generator of random numbers.
    """

    name: str
    id: str
    full: int
    prepare: Callable[[Path], AbstractContextManager[Callable[[Draw], Outcome]]]


class CasesOfServer(Protocol):
    """A server in a folder, and its cases."""

    server: AttackedServer

    def case(self, chance: Draw) -> Outcome: ...


@contextmanager
def served_cases(folder: Path, start: Callable[[Path], CasesOfServer]) -> Iterator[Callable[[Draw], Outcome]]:
    """The cases of a server below a folder; after a fault of another one, so that none is counted again."""
    place = folder / "served"

    def begin() -> CasesOfServer:
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        return start(place)

    served = begin()

    def case(chance: Draw) -> Outcome:
        nonlocal served
        has_fault = True
        try:
            outcome = served.case(chance)
            has_fault = bool(outcome.fault)
            return outcome
        finally:
            if has_fault:
                served.server.close()
                served = begin()

    try:
        yield case
    finally:
        served.server.close()


@dataclass
class Result:
    """What a JSON holds: ``faults`` by the number that draws the case, ``measured`` in the order of the draws."""

    id: str
    seed: int
    full: int
    reached: int = 0
    draws: int = 0
    seconds: float = 0.0
    kinds: dict[str, int] = field(default_factory=dict[str, int])
    faults: dict[str, str] = field(default_factory=dict[str, str])
    measured: list[dict[str, float]] = field(default_factory=list[dict[str, float]])


def _load(row: Row, seed: int, path: Path | None) -> Result:
    if path is not None and path.exists():
        found = Result(**(json.loads(path.read_text(encoding="utf-8")) | {"full": row.full}))  # rows may grow
        if found.seed == seed:
            return found
    return Result(row.id, seed, row.full)


def run(
    row: Row, count: int, *, seed: int = 1, minutes: float = float("inf"), path: Path | None = None, only: int = -1
) -> Result:
    """Run cases of a row until ``count`` are reached or ``minutes`` are over; ``only`` repeats that draw alone."""
    result = Result(row.id, seed, row.full, draws=only) if only >= 0 else _load(row, seed, path)
    kinds = Counter(result.kinds)
    began, before, saved = time.monotonic(), result.seconds, time.monotonic()

    def save() -> None:
        result.kinds = dict(sorted(kinds.items()))
        result.seconds = round(before + time.monotonic() - began, 1)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, asdict(result))

    with tempfile.TemporaryDirectory() as folder, row.prepare(Path(folder)) as case:
        while result.reached < count and time.monotonic() < began + 60 * minutes:
            try:
                outcome = case(Draw(seed, result.draws))
            except Exception:  # noqa: BLE001 - whatever a case did not expect must not have happened
                outcome = Outcome("fault", traceback.format_exc())
            if outcome.fault:
                result.faults[str(result.draws)] = _PATHS.sub("", outcome.fault.replace(folder, "FOLDER"))[-2_000:]
            if outcome.measured is not None:
                result.measured.append(outcome.measured)
            kinds[outcome.kind] += outcome.cases
            result.reached += outcome.cases
            result.draws += 1
            if only >= 0:
                break
            if time.monotonic() > saved + _SAVED_EVERY:
                saved = time.monotonic()
                save()
    save()
    return result


def main(row: Row) -> None:
    """The command line of a row; exits with 1 if anything happened that must not."""
    parser = argparse.ArgumentParser(description=f"{row.id}: {row.name}")
    parser.add_argument("--count", type=int, default=row.full)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--json", type=Path, default=RESULTS / f"{row.name}.json")
    parser.add_argument("--only", type=int, default=-1, help="repeat this draw alone, and write no JSON")
    options = parser.parse_args()
    path = None if options.only >= 0 else options.json
    result = run(row, options.count, seed=options.seed, minutes=options.minutes, path=path, only=options.only)
    print(f"{row.id} {row.name}: {result.reached:,} of {row.full:,} cases in {result.seconds:,.0f} s")
    for kind, number in sorted(result.kinds.items(), key=lambda item: -item[1]):
        print(f"{number:9,}  {kind}")
    for draw, fault in result.faults.items():
        print(f"draw {draw}: {fault}")
    sys.exit(bool(result.faults))
