"""MaxSim alone: the compiled loop beside NumPy, on stored token embeddings, in one thread.

Random tokens of 64 dimensions, 57 a passage, and 16 of a query; each format as an index stores it. Processor time of
the sums of 200 passages (the candidates of a search) and of 20,000 (a proof without a limit). int3 and float32 have no
compiled loop. The limit is one matrix product of the same shape in float32, of tokens that were decoded before.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy is imported

import numpy as np

from d2llm.core.manifest import package_versions
from d2llm.ops.kernels import MAXSIM
from d2llm.sizing.speeds import processor_name
from d2llm.store.part_vectors import PartVectors
from d2llm.store.vector_formats import make_format

FORMATS = ("int4", "int8", "int3", "float32")
DIM, TOKENS, QUERY_TOKENS, PASSAGES = 64, 57, 16, 20_000
REPEATS = 15
RESULT = Path(__file__).parent / "results" / "maxsim.json"


def milliseconds(work: Callable[[], object]) -> float:
    """Least processor time of several calls after one that is not counted."""
    work()
    times: list[float] = []
    for _ in range(REPEATS):
        begin = time.process_time()
        work()
        times.append(1e3 * (time.process_time() - begin))
    return min(times)


def measure(rng: np.random.Generator, name: str) -> dict[str, Any]:
    """Milliseconds by number of passages, of the compiled loop and of NumPy, and of the bare product."""
    vectors = rng.standard_normal((PASSAGES * TOKENS, DIM), dtype=np.float32)
    vectors *= DIM**0.5 / np.linalg.norm(vectors, axis=1, keepdims=True)
    parts = PartVectors.of_texts(vectors, np.full(PASSAGES, TOKENS), make_format(name, DIM))
    queries = rng.standard_normal((QUERY_TOKENS, DIM), dtype=np.float32)
    result: dict[str, Any] = {}
    for number in (200, PASSAGES):
        rows = rng.permutation(PASSAGES)[:number]
        decoded = vectors[: number * TOKENS]
        row = {"compiled": milliseconds(lambda rows=rows: parts.sum_of_best(queries, rows))}
        with patch.object(type(MAXSIM), "get", return_value=None):
            row["NumPy"] = milliseconds(lambda rows=rows: parts.sum_of_best(queries, rows))
        row["bare product"] = milliseconds(lambda decoded=decoded: decoded @ queries.T)
        result[f"{number:,} passages"] = row
    return result


def main() -> None:
    """Measure, print, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=RESULT)
    given = parser.parse_args()
    MAXSIM.load()
    rows = {name: measure(np.random.default_rng(0), name) for name in FORMATS}
    for name, row in rows.items():
        print(name, {kind: {what: round(ms, 2) for what, ms in times.items()} for kind, times in row.items()})
    content = {"machine": processor_name(), "packages": package_versions(), "ms": rows}
    given.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
