"""A sharded index beside the one index that it was made from: the same rankings, and the time of a search.

    python benchmarks/sharding.py                                 20,000 passages in 4 shards
    python benchmarks/sharding.py --passages 1000000 --json benchmarks/results/sharding.json

The index is built from real texts and variations of them (`scaling.corpus`), and copied into shards (`d2llm shard`).
Vectors of passages and tokens are real ones and variations. All shards are on one disk and are searched by threads of
one process, so on one core (`taskset -c 0`) the ratio of the times is what sharding costs, without what more cores or
machines save. Processor times are those of all threads, which other work on the machine changes little. Searches of
both are interleaved, query by query. Encoding the query, which happens once for all shards, is not counted.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy and FAISS are imported
os.environ.setdefault("LANCE_CPU_THREADS", "1")

import numpy as np
import torch
from scaling.corpus import SHARES, Corpus, KnownVectors, read_real, write_json
from scaling.data_sets import DATA, require
from scaling.stores import build

from d2llm import Student
from d2llm.core.types import EvidenceTerm, Query
from d2llm.retrieval.search import Searcher, SearchSettings
from d2llm.retrieval.shard import shard
from d2llm.store.sharded_store import open_storage
from d2llm.store.sharded_view import open_view

STUDENT = "d2llm-minilm"
GOAL = 1.5
WINDOW_WORDS: dict[EvidenceTerm, float] = {"window_words": 0.08, "window_words_share": 17.0}  # as shipped
TOKENS: dict[EvidenceTerm, float] = {"token_vectors": 38.3}
KINDS: dict[str, dict[str, Any]] = {
    "vectors alone": {"evidence": {}},
    "words of windows": {"evidence": WINDOW_WORDS},
    "words of windows, tokens": {"evidence": WINDOW_WORDS | TOKENS},
    "the same, proved exact": {"evidence": WINDOW_WORDS | TOKENS, "exact": True},
}


def measure(
    student: Student, passages: int, num_shards: int, num_real: int, num_queries: int, cache: Path | None, work: Path
) -> dict[str, Any]:
    """Seconds to shard, and for each kind of search whether the rankings are the same and what it takes."""
    real, vectors, queries, _ = read_real(student, DATA, num_real, num_queries, cache)
    task_queries = queries["asymmetric"]
    known = KnownVectors(student, list(queries.values()), real)
    one, several = work / "one", work / "several"
    build(one, Corpus(real, vectors, passages, longer=2), known, "bfloat16", token_vectors="int4")
    begin, processor = time.perf_counter(), time.process_time()
    report = shard(one, several, num_shards)
    seconds, processor = time.perf_counter() - begin, time.process_time() - processor
    views = [open_view(open_storage(folder)) for folder in (one, several)]
    searchers = {
        name: [Searcher(view, known, SearchSettings(task="asymmetric", **kind)) for view in views]
        for name, kind in KINDS.items()
    }
    for pair in searchers.values():
        for searcher in pair:
            searcher.rank([Query("0", task_queries.texts[0])])  # one-time work is not counted
    times: dict[str, list[list[float]]] = {name: [[], []] for name in KINDS}
    processor_times: dict[str, list[list[float]]] = {name: [[], []] for name in KINDS}
    same = dict.fromkeys(KINDS, 0)
    scored: list[list[int]] = [[], []]
    for number, text in enumerate(task_queries.texts):
        read = student.encode_with_tokens([text], "query")
        assert read.tokens is not None
        tokens = read.tokens.split()
        for name, pair in searchers.items():
            rankings: list[list[tuple[str, float]]] = []
            for place in (number % 2, 1 - number % 2):  # each is the first equally often
                begin, processor_begin = time.perf_counter(), time.process_time()
                (ranking,) = pair[place].rank([Query(str(number), text)], vectors=read.vectors, tokens=tokens)
                times[name][place].append(1e3 * (time.perf_counter() - begin))
                processor_times[name][place].append(1e3 * (time.process_time() - processor_begin))
                rankings.append([(one.passage.id, round(one.score, 3)) for one in ranking.passages])
                if ranking.certificate is not None:
                    scored[place].append(ranking.certificate.num_scored)
            same[name] += rankings[0] == rankings[1]
    row: dict[str, Any] = {
        "passages": passages,
        "shards": num_shards,
        "cores": len(os.sched_getaffinity(0)),
        "queries": len(task_queries.texts),
        "passages of the smallest and largest shard": [report.fewest, report.most],
        "seconds to shard": {"wall": round(seconds, 1), "processor": round(processor, 1)},
        "passages sharded in a second of the processor": round(passages / processor),
        "bytes of the shards to those of the index": round(
            report.num_bytes / sum(p.stat().st_size for p in one.rglob("*") if p.is_file()), 3
        ),
        "passages scored for a proof, median": [int(np.median(one)) for one in scored],
        "searches": {},
    }
    for name, (single, sharded) in times.items():
        medians = [float(np.median(values)) for values in (single, sharded)]
        work = [float(np.median(values)) for values in processor_times[name]]
        row["searches"][name] = {
            "same rankings": f"{same[name]} of {len(task_queries.texts)}",
            "p50 ms, one index": round(medians[0], 2),
            "p50 ms, sharded": round(medians[1], 2),
            "p50 ratio": round(medians[1] / medians[0], 3),
            "processor ms, one index": round(work[0], 2),
            "processor ms, sharded": round(work[1], 2),
            "processor ratio": round(work[1] / work[0], 3),
            "p95 ratio": round(float(np.percentile(sharded, 95) / np.percentile(single, 95)), 3),
        }
    return row


def main() -> None:
    """Measure, print and optionally write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passages", type=int, default=20_000)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--real", type=int, default=1_000, help="real passages among them; the rest are variations")
    parser.add_argument("--queries", type=int, default=40)
    parser.add_argument("--cache", type=Path, help="folder in which to cache the real passages' vectors")
    parser.add_argument("--work", type=Path, help="folder for the indexes; by default a temporary folder")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    require(*(DATA / name for name in SHARES))
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=args.work) as place:
        row = measure(
            Student.load(STUDENT), args.passages, args.shards, args.real, args.queries, args.cache, Path(place)
        )
    for name, value in row.items():
        if name != "searches":
            print(f"{name:<50} {value}")
    for name, facts in row["searches"].items():
        print(
            f"{name:<30} p50 {facts['p50 ms, one index']:8.1f} ms, sharded {facts['p50 ms, sharded']:8.1f} ms: "
            f"{facts['p50 ratio']:.2f} times (goal {GOAL:g}), {facts['processor ratio']:.2f} in processor time; "
            f"same rankings: {facts['same rankings']}"
        )
    if args.json:
        write_json(args.json, row)


if __name__ == "__main__":
    main()
