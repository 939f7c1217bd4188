"""A large index that changes: 1,000 passages added, 10,000 deleted, compaction beside a reader, memory of a search.

    python benchmarks/growing.py                                    20,000 passages, less than a minute
    python benchmarks/growing.py --passages 4000000 --work FOLDER --json benchmarks/results/growing.json

Passages are real ones and variations of them (see `scaling.corpus`), and vectors are given: encoding is not counted.
Times are by the clock, with one thread. A reader in a process of its own searches all the time: before compaction and
during it. Compaction is the dense one, which rewrites every row.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy is imported

import numpy as np
import torch
from scaling.corpus import Corpus, KnownVectors, read_real, write_json
from scaling.data_sets import DATA
from scaling.processes import measure_fresh
from scaling.stores import build

from d2llm import Student
from d2llm.core.files import folder_bytes
from d2llm.retrieval.index import Index

STUDENT = "d2llm-minilm"
ADDED, DELETED, ROUNDS = 1_000, 10_000, 3
READ_SECONDS = 10.0
_READER = """
import json, sys, time
import torch
from d2llm.retrieval.index import Index
torch.set_num_threads(1)
index, queries = Index.open(sys.argv[1], sys.argv[2]), json.loads(sys.argv[3])
number = 0
while True:
    begin = time.perf_counter()
    found = len(index.search(queries[number % len(queries)]).passages)
    print(json.dumps([time.time(), time.perf_counter() - begin, found]), flush=True)
    number += 1
"""


def changes(index: Index, known: KnownVectors, corpus: Corpus, size: int) -> dict[str, Any]:
    """Seconds of each upsert of new passages, and of each deletion of random ones."""
    new = list(known.passages_of(corpus.after(size)))
    upserts, deletions = [], []
    for start in range(0, ADDED * ROUNDS, ADDED):
        begin = time.perf_counter()
        index.upsert(new[start : start + ADDED])
        upserts.append(time.perf_counter() - begin)
    rows = np.random.default_rng(0).permutation(size)[: DELETED * ROUNDS]
    for deleted in np.array_split(rows[: size // 2], ROUNDS):
        begin = time.perf_counter()
        assert index.delete([f"passage-{row:07}" for row in deleted.tolist()]) == len(deleted)
        deletions.append(time.perf_counter() - begin)
    return {"upsert_1000_s": upserts, "delete_10000_s": deletions}


def compaction(folder: Path, index: Index, queries: list[str]) -> dict[str, Any]:
    """Seconds of a dense compaction, and a reader's searches before and during it."""
    with tempfile.TemporaryFile("w+") as output:
        reader = subprocess.Popen([sys.executable, "-c", _READER, folder, STUDENT, json.dumps(queries)], stdout=output)
        try:
            while not output.tell() and reader.poll() is None:  # it shares our file's place
                time.sleep(0.1)
            time.sleep(READ_SECONDS)
            before, begin = folder_bytes(folder), time.time()
            index.compact(dense=True)  # keeps the version that the reader has open
            end = time.time()
            time.sleep(1)
        finally:
            reader.kill()
            reader.wait()
        output.seek(0)
        searches = [json.loads(line) for line in output if line.endswith("\n")]
    assert all(found for _, _, found in searches)
    assert searches[-1][0] > end, "the reader failed"
    index.compact(timedelta(0))
    return {
        "seconds": end - begin,
        "bytes_before": before,
        "bytes_after": folder_bytes(folder),
        "reader_before": _latencies([seconds for at, seconds, _ in searches[5:] if at < begin]),
        "reader_during": _latencies([seconds for at, seconds, _ in searches if begin <= at < end]),
    }


def _latencies(seconds: list[float]) -> dict[str, float]:
    ms = 1e3 * np.array(seconds)
    return {"searches": len(ms), "p50_ms": float(np.median(ms)), "p99_ms": float(np.quantile(ms, 0.99))}


def main() -> None:
    """Measure, print and optionally write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passages", type=int, default=20_000)
    parser.add_argument("--real", type=int, help="real passages among them; the rest are variations")
    parser.add_argument("--cache", type=Path, help="folder in which to cache the real passages' vectors")
    parser.add_argument("--work", type=Path, help="folder for the index; by default a temporary folder")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    size, real = options.passages, options.real or (28_000 if options.passages >= 100_000 else 1_000)
    student = Student.load(STUDENT)
    passages, vectors, queries, _ = read_real(student, DATA, real, 200, options.cache)
    known = KnownVectors(student, list(queries.values()))
    corpus = Corpus(passages, vectors, size + ADDED * ROUNDS)
    with tempfile.TemporaryDirectory(dir=options.work) as work:
        folder = Path(work) / "index"
        result: dict[str, Any] = {"passages": size, "build": build(folder, corpus.first(size), known, "bfloat16")}
        print(f"built {size:,} passages in {result['build']['seconds']:.0f} s")
        result["fresh"] = {
            name: measure_fresh(folder, STUDENT, queries["asymmetric"], cold=name == "cold")
            for name in ("cold", "warm")
        }
        for name, fresh in result["fresh"].items():
            own, mapped = (fresh["memory_mb"]["hundred"][kind] for kind in ("RssAnon", "RssFile"))
            print(
                f"{name}: opened in {fresh['open_s']:.2f} s, first query {fresh['first_query_s']:.2f} s, then "
                f"{10 * fresh['hundred_queries_s']:.1f} ms each; MB of its own {own:.0f}, of files {mapped:.0f}"
            )
        index = Index.open(folder, known)
        result |= changes(index, known, corpus, size)
        for name in ("upsert_1000_s", "delete_10000_s"):
            print(f"{name}: {', '.join(f'{seconds:.2f}' for seconds in result[name])}")
        result["compaction"] = compaction(folder, index, queries["asymmetric"].texts)
        print(json.dumps(result["compaction"], indent=1))
    if options.json:
        write_json(options.json, result)


if __name__ == "__main__":
    main()
