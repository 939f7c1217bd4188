"""What it costs that threads spin while they wait for work, on idle cores and beside another program.

For each setting of the environment (the libraries' defaults, those of d2llm, one thread), a new process encodes
passages, encodes queries and searches for them one at a time, and does forward and backward passes of training; then
again while a program of one thread keeps one of the cores busy. Results are written to
benchmarks/results/waiting_threads.json.

    python benchmarks/waiting_threads.py DATA_FOLDER
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from d2llm.core.files import write_json

RESULTS = Path(__file__).parent / "results" / "waiting_threads.json"
SETTINGS = {
    "the libraries' defaults": {},
    "d2llm": {},
    "OMP_WAIT_POLICY=passive": {"OMP_WAIT_POLICY": "passive"},
    "OMP_NUM_THREADS=1": {"OMP_NUM_THREADS": "1"},
}
_LIBRARIES_FIRST = """\
import sys, runpy, numpy, torch, faiss
del sys.argv[0]
runpy.run_path(sys.argv[0], None, "__main__")
"""
_NUM_PASSAGES, _NUM_QUERIES, _NUM_PASSES, _BATCH = 1_000, 40, 6, 32
_BUSY = "import os; os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})\nwhile True: pass"


def measure(data: Path, index: Path) -> dict[str, float]:
    """Seconds for the passages and for a pass of training; milliseconds for a query and for a search."""
    from d2llm.data.beir import read_beir
    from d2llm.models.student import Student
    from d2llm.retrieval.index import Index

    dataset = read_beir(data, splits=["dev"])
    texts = [passage.full_text for passage in dataset.passages.values()]
    queries = [dataset.queries[query_id].text for query_id in dataset.qrels["dev"]][:_NUM_QUERIES]
    student = Student.load("d2llm-minilm")
    if not index.exists():
        Index.create(index, student).upsert(dataset.passages.values())
    opened = Index.open(index, student)
    opened.search(queries[:2])
    student.encode_passages(texts[:64])
    seconds: dict[str, float] = {}
    started = time.perf_counter()
    student.encode_passages(texts[:_NUM_PASSAGES])
    seconds[f"{_NUM_PASSAGES} passages, s"] = time.perf_counter() - started
    started = time.perf_counter()
    for query in queries:
        student.encode_queries([query])
    seconds["a query, ms"] = 1000 * (time.perf_counter() - started) / len(queries)
    started = time.perf_counter()
    for query in queries:
        opened.search([query])
    seconds["a search, ms"] = 1000 * (time.perf_counter() - started) / len(queries)
    student.prepare_training(seed=0)
    student.train()
    ids = student.tokenize(texts[: _NUM_PASSES * _BATCH], "passage").ids
    started = time.perf_counter()
    for first in range(0, len(ids), _BATCH):
        vectors = student(*student.backbone.pad(ids[first : first + _BATCH]))
        vectors.float().square().sum().backward()
    seconds[f"a pass of training on {_BATCH} passages, s"] = (time.perf_counter() - started) / _NUM_PASSES
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder that contains squad")
    parser.add_argument("--index", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    data = options.data / "squad"
    if options.index is not None:  # in a process of its own
        print(json.dumps(measure(data, options.index)))
        return
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as temporary:
        command = [__file__, str(options.data), "--index", f"{temporary}/index"]
        own = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "OPENBLAS_"))}
        subprocess.run([sys.executable, *command], env=own, check=True, capture_output=True)  # makes the index
        for load in ("idle", "busy"):
            busy = subprocess.Popen([sys.executable, "-c", _BUSY]) if load == "busy" else None
            try:
                for name, setting in SETTINGS.items():
                    # What d2llm sets has no effect on libraries that are loaded before it.
                    before = ["-c", _LIBRARIES_FIRST] if name == "the libraries' defaults" else []
                    result = subprocess.run(
                        [sys.executable, *before, *command], env=own | setting, check=True, stdout=subprocess.PIPE
                    )
                    values = json.loads(result.stdout.splitlines()[-1])
                    rounded = {key: round(value, 3) for key, value in values.items()}
                    rows.append({"cores": load, "threads": name, **rounded})
                    print(rows[-1], flush=True)
            finally:
                if busy is not None:
                    busy.kill()
    write_json(RESULTS, {"cores": os.cpu_count(), "rows": rows})


if __name__ == "__main__":
    main()
