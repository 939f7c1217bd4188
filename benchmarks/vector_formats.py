"""Cost of each format of stored vectors in quality, bytes and time.

One run, the same vectors, on the dev splits of four data sets with the student `d2llm-minilm`: nDCG@10 by the inner
product alone and by the full score on 1,000 candidates, both from the stored values, and the loss relative to float32.
It also reports the bytes of a vector and the time of an exact scan for the best 1,000 of 100,000 rows on one thread,
with FAISS' flat float32 index on the same rows as the peer.

Queries are the first 300 of each dev split, in the order of the file. Licences: squad-sent and qnli CC BY-SA 4.0,
banking77 CC BY 4.0, checkthat2020 for research only; they are only measured on, nothing is trained.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import faiss
import numpy as np
import torch
from scaling.data_sets import DATA, require

from d2llm import Student
from d2llm.core.types import Task
from d2llm.data.beir import read_beir
from d2llm.ops.measures import per_query_measures
from d2llm.store.scan import RowScan
from d2llm.store.vector_formats import FORMATS, make_format

SETS: dict[str, Task] = {
    "squad-sent": "asymmetric",
    "banking77": "symmetric",
    "qnli": "asymmetric",
    "checkthat2020": "symmetric",
}
MAX_QUERIES = 300
CANDIDATES = 1_000
SCAN_ROWS = 100_000
REPEATS = 9
RESULT = Path(__file__).parent / "results" / "vector-formats.json"


class Encoded(NamedTuple):
    """A data set as vectors: of passages and queries, and of queries for inner products."""

    ids: list[str]
    passages: np.ndarray
    query_ids: list[str]
    queries: np.ndarray
    dot_queries: np.ndarray
    qrels: dict[str, dict[str, int]]
    task: Task


def encode(student: Student, name: str) -> Encoded:
    """The passages and the first dev queries of a data set."""
    data = read_beir(DATA / name, splits=["dev"])
    ids = list(data.passages)
    query_ids = list(data.qrels["dev"])[:MAX_QUERIES]
    passages = student.encode_passages([data.passages[i].full_text for i in ids]).vectors
    queries = student.encode_queries([data.queries[i].text for i in query_ids]).vectors
    dot_queries = student.query_vectors(queries, SETS[name])
    qrels = {i: data.qrels["dev"][i] for i in query_ids}
    return Encoded(ids, passages, query_ids, queries, dot_queries, qrels, SETS[name])


def quality(student: Student, data: Encoded, name: str) -> dict[str, float]:
    """nDCG@10 by the inner product and by the full score, on the vectors as decoded from the format."""
    vector_format = make_format(name, data.passages.shape[1])
    codes = vector_format.encode(data.passages, data.ids)
    scan = RowScan(codes, vector_format)
    rankings: dict[str, dict[str, list[str]]] = {"dot": {}, "full": {}}
    for query_id, query, dot_query in zip(data.query_ids, data.queries, data.dot_queries, strict=True):
        rows, _ = scan.search(dot_query, CANDIDATES, ids_of=lambda rows: [data.ids[row] for row in rows])
        scores = student.score(query, vector_format.decode(codes[rows]), data.task)
        best = rows[np.argsort(-scores, kind="stable")[:10]]
        rankings["dot"][query_id] = [data.ids[row] for row in rows[:10]]
        rankings["full"][query_id] = [data.ids[row] for row in best]
    return {
        kind: float(np.mean(list(per_query_measures(ranking, data.qrels)["nDCG@10"].values())))
        for kind, ranking in rankings.items()
    }


def milliseconds(work: Callable[[], object]) -> float:
    """Minimum time of several calls after one that is not counted."""
    work()
    times: list[float] = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        work()
        times.append(1e3 * (time.perf_counter() - start))
    return min(times)


def scan_times(dim: int) -> dict[str, float]:
    """Milliseconds for the exact scan by format, and for FAISS' flat index, on random vectors of norm sqrt(dim)."""
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((SCAN_ROWS, dim), dtype=np.float32)
    vectors *= np.sqrt(dim) / np.linalg.norm(vectors, axis=1, keepdims=True)
    query = rng.standard_normal(dim, dtype=np.float32)
    ids = [""] * SCAN_ROWS
    peer = faiss.IndexFlatIP(dim)
    peer.add(vectors)
    times = {"FAISS flat": milliseconds(lambda: peer.search(query[None], CANDIDATES))}
    del peer
    for name in FORMATS:
        vector_format = make_format(name, dim)
        scan = RowScan(vector_format.encode(vectors, ids), vector_format)
        times[name] = milliseconds(
            lambda scan=scan: scan.search(query, CANDIDATES, ids_of=lambda rows: rows.astype(str).tolist())
        )
    return times


def main() -> None:
    """Measure, print a table, write the JSON."""
    require(*(DATA / name for name in SETS))
    faiss.omp_set_num_threads(1)
    torch.set_num_threads(1)
    student = Student.load("d2llm-minilm")
    dim = student.vector_dim
    values: dict[str, dict[str, dict[str, float]]] = {name: {} for name in FORMATS}
    sizes: dict[str, dict[str, int]] = {}
    for set_name in SETS:
        data = encode(student, set_name)
        sizes[set_name] = {"passages": len(data.ids), "queries": len(data.query_ids)}
        for name in FORMATS:
            values[name][set_name] = quality(student, data, name)
    times = scan_times(dim)
    rows: dict[str, object] = {}
    for name in FORMATS:
        lost = {
            f"{set_name} {kind}": 100 * (1 - values[name][set_name][kind] / values["float32"][set_name][kind])
            for set_name in SETS
            for kind in ("dot", "full")
        }
        rows[name] = {
            "bytes_per_vector": make_format(name, dim).code_size,
            "ndcg_at_10": values[name],
            "percent_lost": lost,
            "most_percent_lost": max(lost.values()),
            "scan_ms": times[name],
            "scan_ratio_to_faiss_flat": times[name] / times["FAISS flat"],
        }
        losses = "  ".join(f"{value:+6.2f}" for value in lost.values())
        print(f"{name:9} {make_format(name, dim).code_size:5} B  {times[name]:6.2f} ms   lost % {losses}")
    print(f"FAISS flat float32: {times['FAISS flat']:.2f} ms   columns: {', '.join(SETS)} (dot, full)")
    setting = {"student": "d2llm-minilm", "split": "dev", "sets": sizes, "candidates": CANDIDATES, "dim": dim}
    scan = {"rows": SCAN_ROWS, "top_k": CANDIDATES, "threads": 1, "faiss_flat_ms": times["FAISS flat"]}
    RESULT.write_text(json.dumps({"setting": setting, "scan": scan, "formats": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
