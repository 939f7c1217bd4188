"""`d2llm serve` with shards on Ray beside the same in one process, and a load test in which parts of it are killed.

    python benchmarks/serving_cluster.py                          5,000 passages of SQuAD in 4 shards
    python benchmarks/serving_cluster.py --json benchmarks/results/serving-cluster.json

Both servers are real processes that real clients ask for real questions. Then a shard is killed (SIGKILL) while clients
ask, and later a replica of the student. Every answer is compared with that of the healthy server: an answer that names
no missing shard must be the same, and one that does may only lack passages. All of it runs on this machine, which the
clients share; on a cluster the shards have cores of their own.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import signal
import subprocess
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
from scaling.corpus import write_json
from scaling.data_sets import DATA, require
from serving import served

from d2llm import Passage, Student, encode

STUDENT, TOP_K = "d2llm-minilm", 20
LOAD_SECONDS, CLIENTS = 20.0, 4


def ask(client: httpx2.Client, url: str, query: str) -> dict[str, Any]:
    """One answer, with its seconds, its status and when it came."""
    begin = time.perf_counter()
    response = client.post(f"{url}/v1/search", json={"query": query, "top_k": TOP_K})
    now = time.perf_counter()
    answer = response.json() if response.status_code == 200 else {"passages": [], "missing_shards": []}
    return {
        "query": query,
        "begin": begin,
        "end": now,
        "status": response.status_code,
        "missing": answer["missing_shards"],
        "ids": [result["id"] for result in answer["passages"]],
    }


def load(url: str, queries: list[str], seconds: float, during: Any = None) -> list[dict[str, Any]]:
    """The answers to clients that ask one query after the other; ``during()`` runs meanwhile, in this thread."""
    done = threading.Event()

    def client(number: int) -> list[dict[str, Any]]:
        answers: list[dict[str, Any]] = []
        with httpx2.Client(timeout=60) as http:
            while not done.is_set():
                answers.append(ask(http, url, queries[(len(answers) * CLIENTS + number) % len(queries)]))
        return answers

    with ThreadPoolExecutor(CLIENTS) as threads:
        asking = [threads.submit(client, number) for number in range(CLIENTS)]
        end = time.perf_counter() + seconds
        if during is not None:
            during()
        time.sleep(max(0.0, end - time.perf_counter()))
        done.set()
        return sorted((one for each in asking for one in each.result()), key=lambda one: one["end"])


def times(answers: list[dict[str, Any]]) -> dict[str, float]:
    """Percentiles in milliseconds, and answers per second."""
    seconds = answers[-1]["end"] - answers[0]["begin"]
    took = 1e3 * np.array([one["end"] - one["begin"] for one in answers])
    return {
        "p50_ms": round(float(np.percentile(took, 50)), 1),
        "p99_ms": round(float(np.percentile(took, 99)), 1),
        "max_ms": round(float(took.max()), 1),
        "per_second": round(len(answers) / seconds, 1),
    }


def kill(title: str) -> float:
    """Kill one of the processes with this title; returns when."""
    pids = subprocess.run(["pgrep", "-f", title], capture_output=True, text=True, check=True).stdout.split()
    os.kill(int(pids[0]), signal.SIGKILL)
    return time.perf_counter()


def judge(answers: list[dict[str, Any]], whole: dict[str, list[str]], killed: float) -> dict[str, Any]:
    """What a loss has done to the answers."""
    wrong = [
        one
        for one in answers
        if one["status"] == 200
        and (not set(one["ids"]) & set(whole[one["query"]]) if one["missing"] else one["ids"] != whole[one["query"]])
    ]
    partial = [one for one in answers if one["missing"]]
    return {
        "answers": len(answers),
        "errors": sum(one["status"] != 200 for one in answers),
        "wrong": len(wrong),
        "partial": len(partial),
        "first_partial_after_s": round(partial[0]["end"] - killed, 2) if partial else None,
        "last_partial_after_s": round(partial[-1]["end"] - killed, 2) if partial else None,
    } | times(answers)


def first_lines(path: Path, number: int) -> list[dict[str, Any]]:
    """The first records of a file of JSON lines."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in islice(file, number)]


def main() -> None:
    """Run it, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passages", type=int, default=5_000)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--work", type=Path, help="a folder to keep the index in")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    source = DATA / "squad"
    require(source)
    passages = [
        Passage(one["_id"], one["text"], title=one.get("title", ""))
        for one in first_lines(source / "corpus.jsonl.gz", options.passages)
    ]
    queries = [one["text"] for one in first_lines(source / "queries.jsonl.gz", options.queries)]
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        folder = work / f"squad-{len(passages)}-{options.shards}.index"
        if not folder.is_dir():
            student = Student.load(STUDENT, device="cpu")
            encode(passages, student, folder, student_source=STUDENT, num_shards=options.shards)
        result: dict[str, Any] = {
            "passages": len(passages),
            "shards": options.shards,
            "clients": CLIENTS,
            "cores": os.cpu_count(),
        }
        with served(folder, device="cpu") as server, httpx2.Client(timeout=60) as http:
            url = server.address
            whole = {query: ask(http, url, query)["ids"] for query in queries}
            result["one process, one client"] = times([ask(http, url, query) for query in queries])
            result["one process"] = times(load(url, queries, LOAD_SECONDS))
        small: dict[str, Any] = {"shard_cpus": 1 / (2 * options.shards), "student_cpus": 0.25}
        with served(folder, device="cpu", runner="ray", **small) as server, httpx2.Client(timeout=60) as http:
            url = server.address
            ours = {query: ask(http, url, query)["ids"] for query in queries}
            result["same rankings"] = sum(ours[query] == whole[query] for query in queries)
            result["on Ray, one client"] = times([ask(http, url, query) for query in queries])
            result["on Ray"] = times(load(url, queries, LOAD_SECONDS))
            for name, title in (("a shard killed", "ray::ShardActor"), ("a replica killed", "ray::ServeReplica")):
                killed: list[float] = []

                def during(title: str = title, killed: list[float] = killed) -> None:
                    time.sleep(3)
                    killed.append(kill(title))

                answers = load(url, queries, 2 * LOAD_SECONDS, during)
                result[name] = judge(answers, ours, killed[0])
    print(json.dumps(result, indent=2))
    if options.json is not None:
        write_json(options.json, result)


if __name__ == "__main__":
    main()
