"""Cost of serving: texts per second and latency over HTTP compared with the library's own calls, in one run.

Encoding: the library encodes all texts in one call; 32 clients send the same texts, in requests of 32, 8 and 1, to a
server in a separate process. Searching: the library searches one by one and in one call; the clients search. All of
these are interleaved and repeated, and the fastest run counts. Overload: 32 clients against a short queue; accepted
requests should take as long as before. With ``--before SRC``, the sources of another version, a server of that version
gets the same searches in turn; beside it, processor time tells more than times if other programs run.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from d2llm import Index, Passage, Student
from d2llm.demo.corpus import build_corpus

RESULTS = Path(__file__).parent / "results" / "serving.json"
CLIENTS = 32
SIZES = (32, 8, 1)
LIBRARY = "library, one call"


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
    host, port = urlsplit(server.address).hostname, urlsplit(server.address).port
    left, times, refused = iter([_request(f"{host}:{port}", path, body) for body in bodies]), [], 0

    async def client() -> None:
        nonlocal refused
        reader, writer = await asyncio.open_connection(host, port)
        for request in left:
            begin = time.perf_counter()
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
            assert length is not None, head
            answer = await reader.readexactly(int(length[1]))
            status = int(head[9:12])
            if status == 429:
                refused += 1
            else:
                assert status == 200, answer
                times.append(time.perf_counter() - begin)
        writer.close()

    begin, own, cpu = time.perf_counter(), time.process_time(), server.cpu_seconds
    await asyncio.gather(*(client() for _ in range(clients)))
    seconds, own = time.perf_counter() - begin, time.process_time() - own
    p50, p99 = np.percentile(times, [50, 99])
    return {
        "requests_per_second": round(len(times) / seconds, 1),
        "p50_ms": round(1e3 * p50, 1),
        "p99_ms": round(1e3 * p99, 1),
        "refused": refused,
        "cpu_ms_per_request": round(1e3 * (server.cpu_seconds - cpu) / len(bodies), 2),
        "clients_share_of_cores": round(own / seconds / (os.cpu_count() or 1), 3),
        "seconds": seconds,
    }


def _request(host: str, path: str, body: dict[str, Any]) -> bytes:
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {len(content)}"
    return f"{head}\r\n\r\n".encode() + content


def seconds_of(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def quickest(measures: Mapping[str, Callable[[], dict[str, float]]], runs: int) -> dict[str, dict[str, float]]:
    """Each row's fastest run. Rows are interleaved, so that other work on the machine affects all of them equally."""
    rows: dict[str, dict[str, float]] = {}
    for _ in range(runs):
        for name, measure in measures.items():
            result = measure()
            if name not in rows or result["seconds"] < rows[name]["seconds"]:
                rows[name] = result
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--passages", type=int, default=2_000)
    parser.add_argument("--texts", type=int, default=1_024)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--searches", type=int, default=512)
    parser.add_argument("--before", type=Path, metavar="SRC", help="sources of the version to compare searches with")
    parser.add_argument("--only-searches", action="store_true", help="without encoding, and without a short queue")
    parser.add_argument("--json", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    passages = build_corpus().passages[: arguments.passages]
    texts = [passage.full_text for passage in passages[: arguments.texts]]
    queries = [passage.title or passage.text[:60] for passage in passages[: arguments.texts]]
    student = Student.load("d2llm-minilm", engine="auto")  # as in the server
    few = queries[:128]
    with tempfile.TemporaryDirectory() as folder:
        index = Index.create(Path(folder) / "index", student, student_source="d2llm-minilm")
        index.upsert([Passage(str(n), p.text, p.title) for n, p in enumerate(passages)])
        index.search(few[:8])
        measures: dict[str, Callable[[], dict[str, float]]] = {}
        if not arguments.only_searches:
            student.encode_passages(texts[:64])
            measures[LIBRARY] = lambda: {"seconds": seconds_of(lambda: student.encode_passages(texts))}
        measures |= {
            "library, searches one by one": lambda: {"seconds": seconds_of(lambda: [*map(index.search, few)])},
            "library, searches in one call": lambda: {"seconds": seconds_of(lambda: index.search(few))},
        }
        with ExitStack() as running:
            server = running.enter_context(served(Path(folder) / "index"))

            def ask(
                path: str, bodies: list[dict[str, Any]], clients: int = CLIENTS, to: Server = server
            ) -> Callable[[], dict[str, float]]:
                return lambda: asyncio.run(load(to, path, bodies, clients))

            for size in SIZES if not arguments.only_searches else ():
                bodies = [{"texts": texts[at : at + size], "kind": "passage"} for at in range(0, len(texts), size)]
                measures[f"served, {CLIENTS} clients, {size} texts a request"] = ask("/v1/encode", bodies)
            measures["served, 1 clients, searches"] = ask("/v1/search", [{"query": query} for query in few], 1)
            searches = [{"query": query} for query in queries[: arguments.searches]]
            measures[f"served, {CLIENTS} clients, searches"] = ask("/v1/search", searches)
            if arguments.before is not None:
                before = running.enter_context(served(Path(folder) / "index", arguments.before))
                measures[f"served, {CLIENTS} clients, searches, before"] = ask("/v1/search", searches, to=before)
            rows = quickest(measures, arguments.runs)
        if not arguments.only_searches:
            with served(Path(folder) / "index", queue_texts=8) as short:
                rows[f"served, {CLIENTS} clients, searches, room for 8"] = ask("/v1/search", searches, to=short)()
    for name, row in rows.items():
        if "searches" in name and name.startswith("library"):
            row["requests_per_second"] = round(len(few) / row["seconds"], 1)
        if name == LIBRARY or "texts a request" in name:
            row["texts_per_second"] = round(len(texts) / row["seconds"], 1)
            row["share_of_library"] = round(rows[LIBRARY]["seconds"] / row["seconds"], 3)
    for name, row in rows.items():
        del row["seconds"]
        print(f"{name:<48}" + "  ".join(f"{key} {value}" for key, value in row.items()))
    result = {"clients": CLIENTS, "cores": os.cpu_count(), "texts": len(texts), "rows": rows}
    arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
