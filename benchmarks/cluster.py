"""Labelling and encoding here and on Ray: what two workers gain over one, what Ray costs, and the driver's memory.

    python benchmarks/cluster.py                                  2,000 passages, 512 pairs
    python benchmarks/cluster.py --passages 2000 20000 200000     how the driver's memory grows with the corpus
    python benchmarks/cluster.py --json benchmarks/results/cluster.json

Each run is a process of its own with one thread for each worker, so that a local run and a run with one worker do the
same arithmetic. The seconds are those of the verb, including the start of Ray and its workers; `--passages` large
enough makes these small. Only an idle machine with at least two cores for the workers and one for the driver shows what
two workers gain: on two cores, the driver takes part of one.

efficiency      seconds with one worker / (2 x seconds with two)
overhead        seconds with one worker / seconds here, minus 1
peak memory     of the process that hands out the work, in MiB: for encoding it holds the index's table, but no texts
own memory      its highest part that is not mapped from files, seen ten times a second (Linux alone): pages of the
                index's vectors, which the system takes away when it needs them, do not count
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

STUDENT, TEACHER = "d2llm-minilm", "smollm2-tuned"
RUNNERS = ("local", "ray-1", "ray-2")
WORDS = "pump valve seal motor bearing filter oil water pressure heat clean replace check weekly loose noise cold fast"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passages", type=int, nargs="*", default=[2_000], help="sizes of the corpora to encode")
    parser.add_argument("--pairs", type=int, default=512, help="pairs to label; 0: none")
    parser.add_argument("--student", default=STUDENT, help="a student's folder or name")
    parser.add_argument("--teacher", default=TEACHER, help="a teacher's folder or name")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    parser.add_argument("--one", nargs=3, metavar=("VERB", "RUNNER", "SIZE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one is not None:
        verb, runner, size = arguments.one
        print(json.dumps(measure(verb, runner, int(size), arguments.student, arguments.teacher)))
        return
    try:
        import ray
    except ImportError:
        print("skipped: Ray is not installed; pip install 'd2llm[ray]'")
        return
    works = [("label", arguments.pairs)] if arguments.pairs else []
    works += [("encode", size) for size in arguments.passages]
    load_before = round(os.getloadavg()[0], 1)
    rows = [compare(verb, size, arguments) for verb, size in works]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    from d2llm import __version__
    from d2llm.core.manifest import package_versions

    figures = {
        "machine": {"cores": cores, "load_before": load_before, "python": platform.python_version()},
        "versions": {"d2llm": __version__, "ray": ray.__version__, "torch": package_versions().get("torch")},
        "student": arguments.student,
        "teacher": arguments.teacher,
        "rows": rows,
    }
    show(rows)
    if arguments.json is not None:
        from d2llm.core.files import write_json

        write_json(arguments.json, figures)


def compare(verb: str, size: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """The figures of a verb at a size, each runner in a process of its own."""
    results: dict[str, dict[str, float]] = {}
    for runner in RUNNERS:
        command = [sys.executable, __file__, "--student", arguments.student, "--teacher", arguments.teacher]
        command += ["--one", verb, runner, str(size)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        results[runner] = json.loads(done.stdout.splitlines()[-1])
    one, two = results["ray-1"]["seconds"], results["ray-2"]["seconds"]
    return {
        "verb": verb,
        "size": size,
        "runners": results,
        "efficiency": round(one / (2 * two), 3),
        "overhead": round(one / results["local"]["seconds"] - 1, 3),
    }


def measure(verb: str, name: str, size: int, student: str, teacher: str) -> dict[str, float]:
    """Seconds and peak memory of a verb in this process."""
    from d2llm.runners.ray_runner import RayRunner
    from d2llm.runners.runner import LocalRunner

    runner = LocalRunner() if name == "local" else RayRunner(num_workers=int(name.removeprefix("ray-")))
    with tempfile.TemporaryDirectory() as folder, watched_memory() as own:
        workspace = Path(folder)
        seconds = (encode_corpus if verb == "encode" else label_pairs)(
            workspace, size, student if verb == "encode" else teacher, runner
        )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    mib = peak / 2**20 if sys.platform == "darwin" else peak / 1024
    figures = {"seconds": round(seconds, 2), "per_second": round(size / seconds, 1), "driver_peak_mib": round(mib)}
    return figures | ({"driver_own_mib": round(max(own))} if own else {})


@contextmanager
def watched_memory() -> Generator[list[float]]:
    """Memory of this process that is not mapped from files, in MiB, ten times a second; empty where that is unknown."""
    seen: list[float] = []
    status, done = Path("/proc/self/status"), threading.Event()

    def watch() -> None:
        while status.is_file() and not done.wait(0.1):
            lines = status.read_text(encoding="ascii").splitlines()
            seen.extend(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon:"))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        done.set()
        thread.join()


def encode_corpus(workspace: Path, size: int, source: str, runner: Any) -> float:
    """Seconds to encode a corpus of random texts of 60 words."""
    from d2llm import Student, encode

    rng, words = random.Random(0), WORDS.split()
    with (workspace / "corpus.jsonl").open("w", encoding="utf-8") as file:
        for number in range(size):
            file.write(json.dumps({"_id": str(number), "text": " ".join(rng.choices(words, k=60))}) + "\n")
    student = Student.load(source, device="cpu", dtype="float32")
    begin = time.perf_counter()
    encode(
        workspace / "corpus.jsonl",
        student,
        workspace / "index",
        student_source=source,
        runner=runner,
        device="cpu",
        dtype="float32",
    )
    return time.perf_counter() - begin


def label_pairs(workspace: Path, size: int, model: str, runner: Any) -> float:
    """Seconds to label pairs of random texts: queries of five words, eight passages of 60 words each."""
    from d2llm.core.types import Passage, Query
    from d2llm.data.beir import Dataset
    from d2llm.data.plan import PlanEntry, TrainingPlan, TrainingSource
    from d2llm.recipe import TeacherConfig
    from d2llm.training.label import label

    rng, words = random.Random(0), WORDS.split()
    passages = {f"p{n}": Passage(f"p{n}", " ".join(rng.choices(words, k=60))) for n in range(size)}
    num_queries = max(1, size // 8)
    queries = {f"q{n}": Query(f"q{n}", " ".join(rng.choices(words, k=5))) for n in range(num_queries)}
    ids = list(passages)
    entries = tuple(
        PlanEntry(query, (ids[8 * n],), tuple(ids[8 * n + 1 : 8 * n + 8]), ()) for n, query in enumerate(queries)
    )
    dataset = Dataset("random", workspace, passages, queries, {})
    source = TrainingSource(dataset, TrainingPlan(entries, {"content_hash": "random"}), "asymmetric")
    begin = time.perf_counter()
    label(
        [source], workspace / "labels", teacher=TeacherConfig(model=model), device="cpu", dtype="float32", runner=runner
    )
    return time.perf_counter() - begin


def show(rows: list[dict[str, Any]]) -> None:
    """Print the figures as a table."""
    print(f"{'':16}{'here':>12}{'1 worker':>12}{'2 workers':>12}{'efficiency':>12}{'overhead':>10}   driver MiB")
    for row in rows:
        rates = [f"{row['runners'][name]['per_second']:,.0f}/s" for name in RUNNERS]
        memory = " / ".join(f"{row['runners'][name]['driver_peak_mib']:,}" for name in RUNNERS)
        title = f"{row['verb']} {row['size']:,}"
        print(
            f"{title:16}{rates[0]:>12}{rates[1]:>12}{rates[2]:>12}{row['efficiency']:>12.0%}{row['overhead']:>10.0%}"
            f"   {memory}"
        )


if __name__ == "__main__":
    main()
