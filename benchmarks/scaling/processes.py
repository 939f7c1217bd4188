"""Cost of a store for a process: opening, the first query, and resident memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from scaling.corpus import Queries

_MB = 1024  # kB, the unit in /proc


def memory() -> dict[str, float]:
    """MB of this process: private memory (RssAnon), and pages of files, which the system may drop (RssFile)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    sizes = dict(line.split(":", 1) for line in lines if line.startswith("Rss"))
    return {name: int(sizes[name].split()[0]) / _MB for name in ("RssAnon", "RssFile")}


def forget(folder: Path) -> None:
    """Ask the system to drop a folder's files from its cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure_fresh(folder: Path, student: str, queries: Queries, *, cold: bool = False) -> dict[str, Any]:
    """``main`` in a separate process; ``cold``: with the index dropped from the system's cache."""
    if cold:
        forget(folder)
    request = json.dumps({"folder": str(folder), "student": student, "queries": queries.texts[:101]})
    begin = time.perf_counter()
    paths = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    code = "import sys; from scaling.processes import main; main(sys.stdin.read())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=request,
        text=True,
        capture_output=True,
        check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
    )
    if done.returncode:
        raise RuntimeError(f"the fresh process failed: {done.stderr[-2000:]}")
    return {"process_s": time.perf_counter() - begin, **json.loads(done.stdout)}


def main(request: str) -> None:
    """Measure and print JSON."""
    content = json.loads(request)
    times, begin = {}, time.perf_counter()

    def lap(name: str) -> None:
        nonlocal begin
        times[name] = time.perf_counter() - begin
        begin = time.perf_counter()

    import torch

    from d2llm.retrieval.index import Index

    torch.set_num_threads(1)
    lap("import_s")
    before = memory()
    index = Index.open(content["folder"], content["student"])
    num_passages = len(index)
    lap("open_s")
    opened = memory()
    student = index.student
    student.encode_queries(["warm"])
    lap("student_s")
    loaded = memory()
    first, *rest = content["queries"]
    index.search(first)
    lap("first_query_s")
    one = memory()
    for query in rest:
        index.search(query)
    lap("hundred_queries_s")
    print(
        json.dumps(
            {
                **times,
                "passages": num_passages,
                "memory_mb": {"imports": before, "opened": opened, "student": loaded, "one": one, "hundred": memory()},
            }
        )
    )
