"""Cost of serving: texts per second and latency over HTTP compared with the library's own calls, in one run.

Encoding: the library encodes all texts in one call, and 32, 8 and 1 a call; 32 clients send the same texts, in requests
of 32, 8 and 1, to a server in a separate process, and 8 a request as OpenAI's clients do, for numbers or base64.
Searching: the library searches one by one and in one call; 1, 8 and 32 clients search. All of these are interleaved and
repeated, and the fastest run counts. Latency: searches arrive at random times, at 70 % of the most that 32 clients got
answered; a search's time counts from its arrival, whether or not a connection was free. Overload: 32 clients against a
short queue; accepted requests should take as long as before. With ``--before SRC``, the sources of another version, a
server of that version gets the same requests in turn, and the medians of the runs' ratios are written; beside it,
processor time tells more than times if other programs run.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from d2llm import Index, Passage, Student
from d2llm.core.batches import batched
from d2llm.demo.corpus import build_corpus

RESULTS = Path(__file__).parent / "results" / "serving.json"
CLIENTS = 32
SEARCHING_CLIENTS = (1, 8, CLIENTS)
SIZES = (32, 8, 1)
FEW = 128  # searches, one after the other
LOAD = 0.7  # of the most searches a second, for latencies
EMBEDDED = 8  # texts a request, through OpenAI's interface
LIBRARY = "library, one call"
BEFORE = ", before"
Measure = Callable[[], dict[str, float]]
Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@dataclass(frozen=True)
class Server:
    """A server in another process."""

    address: str
    process: int

    @property
    def cpu_seconds(self) -> float:
        """The processor time of its process, as Linux counts it."""
        fields = Path(f"/proc/{self.process}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def served(index: Path, source: Path | None = None, **settings: Any) -> Iterator[Server]:
    """Run a server in a separate process, of this version or of that with this source."""
    flags = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    command = [sys.executable, "-m", "d2llm", "serve", str(index), "--port", "0", *flags]
    env = os.environ if source is None else os.environ | {"PYTHONPATH": str(source)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env) as process:
        try:
            assert process.stdout is not None
            ready = process.stdout.readline()
            yield Server(next(word for word in ready.split() if word.startswith("http://")).rstrip("/"), process.pid)
        finally:
            process.terminate()


async def load(server: Server, path: str, bodies: Sequence[dict[str, Any]], clients: int) -> dict[str, float]:
    """Send all bodies through this number of clients; requests per second, latencies, and how many were refused.

    The clients send pre-encoded bytes and parse only the status and length of an answer, because they share the
    machine with the server, as real clients would not.
    """
    left, times = iter(_requests(server, path, bodies)), list[float | None]()

    async def client() -> None:
        connection = await asyncio.open_connection(*_host_and_port(server))
        for request in left:
            begin = time.perf_counter()
            is_answered = await _answered(connection, request)
            times.append(time.perf_counter() - begin if is_answered else None)
        connection[1].close()

    async def send_all() -> None:
        await asyncio.gather(*(client() for _ in range(clients)))

    return await _measured(server, send_all(), times)


def sending(server: Server, path: str, bodies: Sequence[dict[str, Any]], clients: int) -> Measure:
    """Measures ``load``."""
    return lambda: asyncio.run(load(server, path, bodies, clients))


async def arrive(server: Server, path: str, bodies: Sequence[dict[str, Any]], rate: float) -> dict[str, float]:
    """Send bodies at random times, this many a second, whether or not earlier ones were answered."""
    requests, times = _requests(server, path, bodies), list[float | None]()
    arrivals = np.cumsum(np.random.default_rng(1).exponential(1 / rate, len(requests)))
    free = [await asyncio.open_connection(*_host_and_port(server)) for _ in range(CLIENTS)]

    async def send(request: bytes, arrival: float) -> None:
        connection = free.pop() if free else await asyncio.open_connection(*_host_and_port(server))
        is_answered = await _answered(connection, request)
        times.append(time.perf_counter() - arrival if is_answered else None)
        free.append(connection)

    async def send_all() -> None:
        begin = time.perf_counter()
        sent: list[asyncio.Task[None]] = []
        for request, arrival in zip(requests, (begin + arrivals).tolist(), strict=True):
            await asyncio.sleep(max(0.0, arrival - time.perf_counter()))
            sent.append(asyncio.create_task(send(request, arrival)))
        await asyncio.gather(*sent)
        for _, writer in free:
            writer.close()

    row = await _measured(server, send_all(), times)
    return row | {"requested_per_second": round(rate, 1), "p99_by_p50": round(row["p99_ms"] / row["p50_ms"], 2)}


async def _measured(server: Server, work: Coroutine[Any, Any, None], times: list[float | None]) -> dict[str, float]:
    """What sending requests takes; ``times`` gets one for each, None if it was refused."""
    begin, own, cpu = time.perf_counter(), time.process_time(), server.cpu_seconds
    await work
    seconds, own = time.perf_counter() - begin, time.process_time() - own
    answered = [one for one in times if one is not None]
    p50, p99 = np.percentile(answered, [50, 99]).tolist()
    return {
        "requests_per_second": round(len(answered) / seconds, 1),
        "p50_ms": round(1e3 * p50, 1),
        "p99_ms": round(1e3 * p99, 1),
        "refused": len(times) - len(answered),
        "cpu_ms_per_request": round(1e3 * (server.cpu_seconds - cpu) / len(times), 2),
        "clients_cpu_ms_per_request": round(1e3 * own / len(times), 2),
        "clients_share_of_cores": round(own / seconds / (os.cpu_count() or 1), 3),
        "seconds": seconds,
    }


async def _answered(connection: Connection, request: bytes) -> bool:
    """Send a request and read its answer; whether it was not refused."""
    reader, writer = connection
    writer.write(request)
    head = await reader.readuntil(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
    assert length is not None, head
    answer = await reader.readexactly(int(length[1]))
    status = int(head[9:12])
    assert status in (200, 429), answer
    return status == 200


def _host_and_port(server: Server) -> tuple[str | None, int | None]:
    address = urlsplit(server.address)
    return address.hostname, address.port


def _requests(server: Server, path: str, bodies: Sequence[dict[str, Any]]) -> list[bytes]:
    host, port = _host_and_port(server)
    return [_request(f"{host}:{port}", path, body) for body in bodies]


def _request(host: str, path: str, body: dict[str, Any]) -> bytes:
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {len(content)}"
    return f"{head}\r\n\r\n".encode() + content


def library(work: Callable[[], object], count: int) -> Measure:
    """Measures a call of the library that does the work of so many requests."""

    def measure() -> dict[str, float]:
        begin, cpu = time.perf_counter(), time.process_time()
        work()
        seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
        return {
            "requests_per_second": round(count / seconds, 1),
            "cpu_ms_per_request": round(1e3 * cpu / count, 2),
            "seconds": seconds,
        }

    return measure


def run_in_turn(measures: Mapping[str, Measure], runs: int) -> dict[str, list[dict[str, float]]]:
    """All runs of each row. Rows are interleaved, so that other work on the machine affects all of them equally."""
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in measures}
    for _ in range(runs):
        for name, measure in measures.items():
            rows[name].append(measure())
    return rows


def quickest(runs: Sequence[dict[str, float]]) -> dict[str, float]:
    """The fastest of a row's runs."""
    return min(runs, key=lambda row: row["seconds"])


def ratios(rows: Mapping[str, Sequence[dict[str, float]]]) -> dict[str, dict[str, float]]:
    """For rows measured before as well: medians of the runs' ratios, after to before."""
    columns = ("requests_per_second", "cpu_ms_per_request", "p50_ms", "p99_ms")
    return {
        name: {
            column: round(
                statistics.median(
                    after[column] / before[column] for after, before in zip(runs, rows[name + BEFORE], strict=True)
                ),
                3,
            )
            for column in columns
        }
        for name, runs in rows.items()
        if name + BEFORE in rows
    }


def encoding(student: Student, texts: Sequence[str], servers: Mapping[str, Server]) -> dict[str, Measure]:
    """Encoding these texts, by the library and by servers, by how many a call or request has."""
    student.encode_passages(texts[:64])
    measures: dict[str, Measure] = {LIBRARY: library(lambda: student.encode_passages(texts), len(texts))}
    bodies: dict[str, tuple[str, list[dict[str, Any]]]] = {}
    for size in SIZES:
        calls = list(batched(texts, size))
        measures[f"library, {size} texts a call"] = library(
            lambda calls=calls: list(map(student.encode_passages, calls)), len(calls)
        )
        bodies[f"{size} texts a request"] = "/v1/encode", [{"texts": some, "kind": "passage"} for some in calls]
    for numbers in ("float", "base64"):
        fields = {"model": "d2llm-minilm", "encoding_format": numbers, "truncate": "END"}
        calls = [{"input": some, **fields} for some in batched(texts, EMBEDDED)]
        bodies[f"{EMBEDDED} texts a request, OpenAI's {numbers}"] = "/v1/embeddings", calls
    for name, (path, requests) in bodies.items():
        for when, server in servers.items():
            measures[f"served, {CLIENTS} clients, {name}{when}"] = sending(server, path, requests, CLIENTS)
    return measures


def searching(
    index: Index, queries: Sequence[str], searches: Sequence[dict[str, Any]], servers: Mapping[str, Server]
) -> dict[str, Measure]:
    """Searching, by the library and by servers with several numbers of clients."""
    few = queries[:FEW]
    measures: dict[str, Measure] = {
        "library, searches one by one": library(lambda: [*map(index.search, few)], len(few)),
        "library, searches in one call": library(lambda: index.search(queries), len(queries)),
    }
    for clients in SEARCHING_CLIENTS:
        some = searches if clients > 1 else searches[:FEW]
        for when, server in servers.items():
            measures[f"served, {clients} clients, searches{when}"] = sending(server, "/v1/search", some, clients)
    return measures


def arriving(
    rows: Mapping[str, Sequence[dict[str, float]]],
    searches: Sequence[dict[str, Any]],
    servers: Mapping[str, Server],
) -> dict[str, Measure]:
    """Searches that arrive at random, at a part of the rate that each server has reached."""
    measures: dict[str, Measure] = {}
    for when, server in servers.items():
        rate = LOAD * quickest(rows[f"served, {CLIENTS} clients, searches{when}"])["requests_per_second"]
        measures[f"served, searches at {LOAD:.0%} load{when}"] = lambda server=server, rate=rate: asyncio.run(
            arrive(server, "/v1/search", searches, rate)
        )
    return measures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--passages", type=int, default=2_000)
    parser.add_argument("--texts", type=int, default=1_024)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--searches", type=int, default=512)
    parser.add_argument("--index", type=Path, help="an index that d2llm-minilm made, instead of a new one")
    parser.add_argument("--before", type=Path, metavar="SRC", help="sources of the version to compare searches with")
    parser.add_argument("--only-searches", action="store_true", help="without encoding, and without a short queue")
    parser.add_argument("--json", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    passages = build_corpus().passages[: arguments.passages]
    texts = [passage.full_text for passage in passages[: arguments.texts]]
    queries = [passage.title or passage.text[:60] for passage in passages[: arguments.texts]]
    student = Student.load("d2llm-minilm", engine="auto")  # as in the server
    searches = [{"query": query} for query in queries[: arguments.searches]]
    with tempfile.TemporaryDirectory() as folder:
        path = arguments.index or Path(folder) / "index"
        if arguments.index is None:
            index = Index.create(path, student, student_source="d2llm-minilm")
            index.upsert([Passage(str(n), p.text, p.title) for n, p in enumerate(passages)])
        else:
            index = Index.open(path, student)
        index.search(queries[:8])
        measures: dict[str, Measure] = {}
        with ExitStack() as running:
            servers = {"": running.enter_context(served(path))}
            if arguments.before is not None:
                servers[BEFORE] = running.enter_context(served(path, arguments.before))
            for server in servers.values():
                asyncio.run(load(server, "/v1/search", searches, CLIENTS))  # loops are compiled, caches filled
            if not arguments.only_searches:
                measures |= encoding(student, texts, servers)
            measures |= searching(index, queries, searches, servers)
            rows = run_in_turn(measures, arguments.runs)
            rows |= run_in_turn(arriving(rows, searches, servers), arguments.runs)
        if not arguments.only_searches:
            with served(path, queue_texts=8) as short:
                name = f"served, {CLIENTS} clients, searches, room for 8"
                rows[name] = [sending(short, "/v1/search", searches, CLIENTS)()]
    best = {name: quickest(runs) for name, runs in rows.items()}
    for name, row in best.items():
        if name == LIBRARY or "texts a" in name:
            row["texts_per_second"] = round(len(texts) / row["seconds"], 1)
            row["share_of_library"] = round(best[LIBRARY]["seconds"] / row["seconds"], 3)
    compared = ratios(rows)
    for name, row in best.items():
        del row["seconds"]
        print(f"{name:<64}" + "  ".join(f"{key} {value}" for key, value in row.items()))
    for name, row in compared.items():
        print(f"after / before: {name:<64}" + "  ".join(f"{key} {value}" for key, value in row.items()))
    result = {"clients": CLIENTS, "cores": os.cpu_count(), "texts": len(texts), "passages": len(index), "rows": best}
    if compared:
        result["after_by_before"] = compared
    arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
