"""A sharded index beside the one index that it was made from: the same rankings, and the time of a search.

    python benchmarks/sharding.py                                 20,000 passages in 4 shards
    python benchmarks/sharding.py --passages 1000000 --written 65536 --proofs 5 --json benchmarks/results/sharding.json

The index is built from real texts and variations of them (`scaling.corpus`), and copied into shards (`d2llm shard`).
With `--written`, only so many passages are written as a user writes them. The others are copies of them: other ids and
vectors, but the same texts, so that more passages tie by words.
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

import numpy as np
import torch
from scaling.corpus import FRACTIONS, Corpus, KnownVectors, read_real, write_json
from scaling.data_sets import DATA, require
from scaling.stores import build

from d2llm import Student
from d2llm.core.files import folder_bytes
from d2llm.core.types import Query, ScoreFeature
from d2llm.models.tokens import EncodedTexts
from d2llm.retrieval.local_segment import open_view
from d2llm.retrieval.search import Searcher, SearchSettings
from d2llm.retrieval.segments import IndexView
from d2llm.retrieval.shard import shard
from d2llm.store.shards import Storage

STUDENT = "d2llm-minilm"
GOAL = 1.5
WINDOW_WORDS: dict[ScoreFeature, float] = {"window_bm25": 0.08, "window_bm25_fraction": 17.0}  # as shipped
TOKENS: dict[ScoreFeature, float] = {"maxsim": 38.3}
KINDS: dict[str, dict[str, Any]] = {
    "vectors alone": {"score_features": {}},
    "words of windows": {"score_features": WINDOW_WORDS},
    "words of windows, tokens": {"score_features": WINDOW_WORDS | TOKENS},
    "the same, proved exact": {"score_features": WINDOW_WORDS | TOKENS, "exact": True},
}


class Pair:
    """A kind of search in one index and in its shards: their times and results, query by query."""

    def __init__(self, views: list[IndexView], student: KnownVectors, num_queries: int, **kind: Any) -> None:
        self.num_queries = num_queries
        self._searchers = [Searcher(view, student, SearchSettings(task="asymmetric", **kind)) for view in views]
        self._ms: list[list[float]] = [[], []]
        self._processor_ms: list[list[float]] = [[], []]
        self.scored: list[list[int]] = [[], []]
        self._num_same = 0

    def warm_up(self, text: str) -> None:
        """One-time work, which is not counted."""
        for searcher in self._searchers:
            searcher.rank([Query("0", text)])

    def search(self, number: int, text: str, read: EncodedTexts) -> None:
        """Search both for an encoded query, if it is one of those of this kind."""
        if number >= self.num_queries:
            return
        assert read.tokens is not None
        rankings: list[list[tuple[str, float]]] = []
        for index in (number % 2, 1 - number % 2):  # each is the first equally often
            begin, processor_begin = time.perf_counter(), time.process_time()
            (ranking,) = self._searchers[index].rank(
                [Query(str(number), text)], vectors=read.vectors, tokens=read.tokens.split()
            )
            self._ms[index].append(1e3 * (time.perf_counter() - begin))
            self._processor_ms[index].append(1e3 * (time.process_time() - processor_begin))
            rankings.append([(one.passage.id, round(one.score, 3)) for one in ranking.passages])
            if ranking.certificate is not None:
                self.scored[index].append(ranking.certificate.num_scored)
        self._num_same += rankings[0] == rankings[1]

    def facts(self) -> dict[str, Any]:
        """The figures of this kind of search."""
        medians = [float(np.median(values)) for values in self._ms]
        work = [float(np.median(values)) for values in self._processor_ms]
        return {
            "same rankings": f"{self._num_same} of {self.num_queries}",
            "p50 ms, one index": round(medians[0], 2),
            "p50 ms, sharded": round(medians[1], 2),
            "p50 ratio": round(medians[1] / medians[0], 3),
            "processor ms, one index": round(work[0], 2),
            "processor ms, sharded": round(work[1], 2),
            "processor ratio": round(work[1] / work[0], 3),
            "p95 ratio": round(float(np.percentile(self._ms[1], 95) / np.percentile(self._ms[0], 95)), 3),
        }


def measure(student: Student, args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Seconds to shard, and for each kind of search whether the rankings are the same and what it takes."""
    real, vectors, queries, _ = read_real(student, DATA, args.real, args.queries, args.cache)
    texts = queries["asymmetric"].texts
    known = KnownVectors(student, list(queries.values()), real)
    one, several = work / "one", work / "several"
    corpus = Corpus(real, vectors, args.passages, longer=2)
    build(one, corpus, known, "bfloat16", token_vectors="int4", num_written=args.written)
    begin, processor = time.perf_counter(), time.process_time()
    report = shard(one, several, args.shards)
    seconds, processor = time.perf_counter() - begin, time.process_time() - processor
    views: list[IndexView] = [open_view(Storage.open(folder)) for folder in (one, several)]
    pairs: dict[str, Pair] = {}
    for name, kind in KINDS.items():
        number = min(args.proofs or len(texts), len(texts)) if kind.get("exact") else len(texts)
        pairs[name] = Pair(views, known, number, **kind)
        pairs[name].warm_up(texts[0])
    for number, text in enumerate(texts):
        read = student.encode_with_tokens([text], "query")
        for pair in pairs.values():
            pair.search(number, text, read)
    scored = [pair.scored for pair in pairs.values() if pair.scored[0]]
    return {
        "passages": args.passages,
        "written as a user does": args.written or args.passages,
        "shards": args.shards,
        "cores": len(os.sched_getaffinity(0)),
        "queries": len(texts),
        "passages of the smallest and largest shard": [report.fewest, report.most],
        "seconds to shard": {"wall": round(seconds, 1), "processor": round(processor, 1)},
        "passages sharded in a second of the processor": round(args.passages / processor),
        "bytes of the shards to those of the index": round(report.num_bytes / folder_bytes(one), 3),
        "passages scored for a proof, median": [int(np.median(each)) for each in scored[0]],
        "searches": {name: pair.facts() for name, pair in pairs.items()},
    }


def main() -> None:
    """Measure, print and optionally write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passages", type=int, default=20_000)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--real", type=int, default=1_000, help="real passages among them; the rest are variations")
    parser.add_argument("--queries", type=int, default=40)
    parser.add_argument(
        "--written", type=int, help="passages written as a user does; the rest are copies; default: all"
    )
    parser.add_argument("--proofs", type=int, help="queries that are also searched exactly; default: all")
    parser.add_argument("--cache", type=Path, help="folder in which to cache the real passages' vectors")
    parser.add_argument("--work", type=Path, help="folder for the indexes; by default a temporary folder")
    parser.add_argument("--keep", type=Path, help="empty folder in which the indexes stay, instead")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    require(*(DATA / name for name in FRACTIONS))
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        row = measure(Student.load(STUDENT), args, args.keep or Path(folder))
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
