"""Tail latency of a search over many shards, simulated from measured times of one: hedging and choice of replica.

    python benchmarks/tail_latency.py                             up to 100 shards
    python benchmarks/tail_latency.py --recorded --shards 1 1000 --json benchmarks/results/tail-latency.json

An index of `--passages` passages is built as `size.py` does it and searched by words, windows and vectors of tokens;
the times of these searches, without encoding the query, are those of one shard. With `--recorded`, nothing is measured:
the times are those of a log-normal distribution with the p50 and p95 of `score_features.py` (100,000 passages, by
words, also of windows, on an idle machine). Larger shards take longer, but in a simulation all times scale with the
median.

Each shard has replicas with one core each; a query needs the answers of all shards; queries arrive at random (a Poisson
process) and each takes, on each shard, a time that is drawn from the measured ones. A replica answers in order of
arrival. The replicas of all shards are busy `--loads` of the time without hedging.

one        a random replica of each shard
shortest   of two random replicas of each shard, the one with fewer requests (Mitzenmacher, IEEE TPDS 2001)
hedged     a random replica; if it has not answered after the p95 of a shard without hedging, another one too, and the
           first answer counts (Dean and Barroso, "The Tail at Scale", CACM 2013). A second request that would be
           started after the first answer is not; nothing else is cancelled, so both replicas do the work
both       the replica with fewer requests, and hedged

Times that do not come from the shards (encoding the query, the network, merging) are left out. Drawn times of different
shards are independent; on real machines a slow moment of one machine affects all its shards.
"""

from __future__ import annotations

import argparse
import heapq
import json
import os
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import NormalDist
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy and FAISS are imported

import numpy as np
import torch
from numpy.typing import NDArray
from scaling.corpus import FRACTIONS, Corpus, KnownVectors, read_real, write_json
from scaling.data_sets import DATA, require
from scaling.stores import build
from size import KINDS, STUDENT

from d2llm import Index, Student
from d2llm.core.types import Query
from d2llm.retrieval.search import Searcher, SearchSettings

POLICIES = {"one": (False, False), "shortest": (True, False), "hedged": (False, True), "both": (True, True)}
SCORE_FEATURES = Path(__file__).parent / "results" / "score-features.json"
HEDGED_AFTER = 95  # percentile of the time until a shard has answered


def measured_times(passages: int, num_queries: int, rounds: int) -> NDArray[np.float64]:
    """Milliseconds by the clock of searches of one shard, each query several times."""
    student = Student.load(STUDENT)
    real, vectors, queries, _ = read_real(student, DATA, 1_000, num_queries, None)
    known = KnownVectors(student, list(queries.values()))
    texts = queries["asymmetric"].texts
    with tempfile.TemporaryDirectory() as work_folder:
        folder = Path(work_folder) / "index"
        build(folder, Corpus(real, vectors, passages, longer=2), known, "bfloat16", token_vectors="int4")
        weights = KINDS["words and vectors of tokens"]
        searcher = Searcher(Index.open(folder).view, known, SearchSettings(score_features=weights))
        searcher.rank([Query("0", texts[0])])  # one-time work is not counted
        kept: list[float] = []
        for text in texts * rounds:
            begin = time.perf_counter()
            searcher.rank([Query("0", text)])
            kept.append(1e3 * (time.perf_counter() - begin))
    return np.array(kept)


def recorded_times(number: int = 1_000) -> NDArray[np.float64]:
    """Evenly spread quantiles of the distribution of the recorded times."""
    recorded = json.loads(SCORE_FEATURES.read_text(encoding="utf-8"))["ms"]["small: words of windows"]
    normal = NormalDist()
    spread = np.log(recorded["p95"] / recorded["p50"]) / normal.inv_cdf(0.95)
    percentiles = (np.arange(number) + 0.5) / number
    return recorded["p50"] * np.exp(
        spread * np.array([normal.inv_cdf(percentile) for percentile in percentiles.tolist()])
    )


@dataclass
class Replica:
    """One core: when it is free, and when each of its requests ends."""

    free_at: float = 0.0
    ends: list[float] = field(default_factory=list)

    def num_requests(self, now: float) -> int:
        while self.ends and self.ends[0] <= now:
            heapq.heappop(self.ends)
        return len(self.ends)

    def start(self, now: float) -> float:
        """When a request that arrives now would be started."""
        return max(now, self.free_at)

    def add(self, now: float, work: float) -> float:
        """Take a request; returns when it ends."""
        self.free_at = self.start(now) + work
        heapq.heappush(self.ends, self.free_at)
        return self.free_at


def shard_latencies(
    arrivals: NDArray[np.float64],
    times: NDArray[np.float64],
    replicas: int,
    random: np.random.Generator,
    *,
    shortest: bool,
    hedge_after: float | None,
) -> tuple[NDArray[np.float64], float]:
    """Milliseconds in which one shard answers each query, and the work it did, as a multiple of the queries' own.

    Args:
        arrivals: [queries] times of arrival in milliseconds, ascending.
        times: measured milliseconds, from which those of each request are drawn.
        replicas: number of replicas.
        random: of the draws.
        shortest: choose the less busy one of two replicas.
        hedge_after: milliseconds after which another replica is asked too; None asks one only.
    """
    cores = [Replica() for _ in range(replicas)]
    own, hedged = random.choice(times, len(arrivals)), random.choice(times, len(arrivals))
    drawn = random.integers(replicas, size=len(arrivals))
    others = (drawn + 1 + random.integers(max(replicas - 1, 1), size=len(arrivals))) % replicas
    later: list[tuple[float, int, int, float]] = []  # hedges to come: when, query, replica asked first, its end
    ends, work = np.empty(len(arrivals)), 0.0

    def hedge_until(now: float) -> None:
        nonlocal work
        while later and later[0][0] <= now:
            at, query, first, end = heapq.heappop(later)
            other = cores[others[query] if first != others[query] else drawn[query]]
            if other.start(at) < end:  # else the first has answered before this one starts, and it is cancelled
                ends[query] = min(end, other.add(at, hedged[query]))
                work += hedged[query]

    for query, now in enumerate(arrivals.tolist()):
        hedge_until(now)
        first, second = int(drawn[query]), int(others[query])
        if shortest and cores[second].num_requests(now) < cores[first].num_requests(now):
            first = second
        end = cores[first].add(now, own[query])
        ends[query] = end
        work += own[query]
        if hedge_after is not None and replicas > 1 and end - now > hedge_after:
            heapq.heappush(later, (now + hedge_after, query, first, end))
    hedge_until(np.inf)
    return ends - arrivals, work / float(own.sum())


def simulate(
    times: NDArray[np.float64], *, shards: int, replicas: int, load: float, queries: int, seed: int = 0
) -> dict[str, dict[str, float]]:
    """Percentiles of the time until the slowest shard has answered, for each policy, and its work."""
    random = np.random.default_rng(seed)
    gap = float(times.mean()) / (load * replicas)  # between queries, so that each replica has this load
    arrivals = np.cumsum(random.exponential(gap, queries))
    counted = slice(queries // 10, None)  # the first find empty queues
    rows: dict[str, dict[str, float]] = {}
    for name, (shortest, hedges) in POLICIES.items():
        own = np.random.default_rng([seed, shards])  # of another shard, without hedging
        alone, _ = shard_latencies(arrivals, times, replicas, own, shortest=shortest, hedge_after=None)
        hedge_after = float(np.percentile(alone[counted], HEDGED_AFTER)) if hedges else None
        slowest, work = np.zeros(queries), 0.0
        for shard in range(shards):
            own = np.random.default_rng([seed, shard])
            latencies, done = shard_latencies(
                arrivals, times, replicas, own, shortest=shortest, hedge_after=hedge_after
            )
            slowest = np.maximum(slowest, latencies)
            work += done / shards
        percentiles = {
            f"p{percentile:g}": float(np.percentile(slowest[counted], percentile)) for percentile in (50, 99)
        }
        rows[name] = percentiles | {"work": work}
    return rows


def main() -> None:
    """Measure one shard, simulate, print and optionally write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passages", type=int, default=10_000, help="of one shard")
    parser.add_argument("--recorded", action="store_true", help="times of benchmarks/results instead of measured ones")
    parser.add_argument("--measured-queries", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=10, help="how often each query is measured")
    parser.add_argument("--shards", type=int, nargs="+", default=[1, 10, 100])
    parser.add_argument("--replicas", type=int, default=3)
    parser.add_argument("--loads", type=float, nargs="+", default=[0.3, 0.6])
    parser.add_argument("--queries", type=int, default=2_000)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    if args.recorded:
        times, of_shard = recorded_times(), "recorded in score-features.json"
    else:
        require(*(DATA / name for name in FRACTIONS))
        torch.set_num_threads(1)
        times = measured_times(args.passages, args.measured_queries, args.rounds)
        of_shard = f"{args.passages:,} passages"
    one = {f"p{percentile:g}": float(np.percentile(times, percentile)) for percentile in (50, 95, 99)} | {
        "mean": float(times.mean())
    }
    print(f"one shard, {of_shard}: " + ", ".join(f"{name} {ms:.1f} ms" for name, ms in one.items()))
    results: list[dict[str, Any]] = []
    for load in args.loads:
        for shards in args.shards:
            rows = simulate(times, shards=shards, replicas=args.replicas, load=load, queries=args.queries)
            results.append({"shards": shards, "load": load, "policies": rows})
            for name, row in rows.items():
                print(
                    f"{shards:6,} shards, {args.replicas} replicas {load:.0%} busy, {name:<9}"
                    f"p50 {row['p50']:8.1f} ms   p99 {row['p99']:8.1f} ms   work {row['work']:.2f}"
                )
    if args.json:
        setting = {"times": of_shard, "replicas": args.replicas, "queries": args.queries}
        write_json(args.json, {"setting": setting, "one shard, ms": one, "results": results})


if __name__ == "__main__":
    main()
