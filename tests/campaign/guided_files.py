"""F4: bytes of others, guided by coverage: libFuzzer changes what reaches new lines of Python (atheris).

Each case is a call of a parser, of which ``guided_process.TARGETS`` has all that read documents, data, answers,
recipes, files of models and indexes, and requests. A draw is a process that calls one of them thousands of times. A
fault is an exception that is neither d2llm's nor named by the parser, a crash, over 120 seconds or 2 GiB for an input.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from campaign.frame import Draw, Outcome, Row, main
from campaign.guided_process import TARGETS
from campaign.guided_targets import DEEP

SECONDS, MEBIBYTES = 120, 2 << 10  # what is instrumented takes many times as long
LONGEST = 1 << 13  # bytes of an input
RUNS, TOTAL_SECONDS = 5_000, 8
_DONE = re.compile(r"stat::number_of_executed_units:\s*(\d+)|#(\d+)\tDONE")
_ENDS = {70: f"over {SECONDS} s for", 71: f"over {MEBIBYTES} MiB for", 72: "memory was not given back after"}


def why_not() -> str:
    """Why nothing is guided here; "" if it is."""
    try:
        import atheris  # noqa: F401
    except ImportError as error:
        return f"{error}; it has wheels for Linux on x86-64 and Python from 3.11 on: pip install atheris"
    return ""


def _arguments(folder: Path, seed: int) -> list[str]:
    return [
        f"-runs={RUNS}",
        f"-max_total_time={TOTAL_SECONDS}",
        f"-seed={seed}",
        f"-timeout={SECONDS}",
        f"-rss_limit_mb={MEBIBYTES}",
        f"-max_len={LONGEST}",
        f"-artifact_prefix={folder}/ended-by-",
        "-print_final_stats=1",
        "-len_control=0",
    ]


def _faults_of(folder: Path, status: int, said: str) -> list[str]:
    """What must not have happened in a process: kinds of exceptions, and how it ended."""
    lines = (folder / "faults.jsonl").read_text().splitlines()
    faults = [f"{fault['kind']}: {fault['text']}\n{fault['input']}" for fault in map(json.loads, lines)]
    why = _ENDS.get(status, f"ended with {status} by")
    faults += [f"{why} {path.read_bytes()[:600]!r}\n{said[-1_000:]}" for path in folder.glob("ended-by-*")]
    if status and not faults:
        faults.append(f"ended with {status}: {said[-1_500:]}")
    return faults


@contextmanager
def prepare(folder: Path) -> Iterator[Callable[[Draw], Outcome]]:
    names = sorted(TARGETS)
    corpora = folder / "corpora"
    for name in names:
        (corpora / name).mkdir(parents=True)
        for at, content in enumerate([*TARGETS[name].seeds, *DEEP]):
            (corpora / name / f"seed-{at}").write_bytes(content)

    def case(chance: Draw) -> Outcome:
        name = names[chance.number % len(names)]
        run = folder / "run"
        run.mkdir()
        (run / "faults.jsonl").touch()
        command = [
            sys.executable,
            "-m",
            "campaign.guided_process",
            name,
            str(run / "faults.jsonl"),
            str(corpora / name),
        ]
        ended = subprocess.run(
            [*command, *_arguments(run, 1 + chance.getrandbits(31))],
            env=os.environ | {"PYTHONHASHSEED": "0", "TMPDIR": str(run), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            timeout=10 * (TOTAL_SECONDS + SECONDS),
            check=False,
            start_new_session=True,
        )
        faults = _faults_of(run, ended.returncode, ended.stderr)
        shutil.rmtree(run)
        calls = max((int(found[1] or found[2]) for found in _DONE.finditer(ended.stderr)), default=0)
        if not calls and not faults:
            faults.append(f"nothing was called: {ended.stderr[-1_500:]}")
        return Outcome(name, "\n\n".join([f"{name}: {len(faults)} kinds", *faults]) if faults else "", max(calls, 1))

    yield case


ROW = Row("guided_files", "F4", 100_000, prepare)

if __name__ == "__main__":
    if reason := why_not():
        sys.exit(reason)
    main(ROW)
