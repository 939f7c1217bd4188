"""Many queries in one call beside the same queries one by one: one run, the same index, processor time of one thread.

    python benchmarks/batches.py --work FOLDER --json benchmarks/results/batches.json
    python benchmarks/batches.py --threads 2      wall-clock time, on an idle machine: one call uses all threads

Both ways are measured with the queries encoded before, and with their texts, which the student then encodes. Each is
repeated, the two ways in turn, and the fastest run counts. The rankings of both must be the same, bit for bit.
Passages are real ones and variations (``scaling.corpus``).
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy and FAISS are imported

import faiss
import torch
from scaling.corpus import FRACTIONS, Corpus, KnownVectors, read_real, write_json
from scaling.data_sets import DATA, require
from scaling.stores import build

from d2llm import Student
from d2llm.core.manifest import package_versions
from d2llm.core.types import Query, Ranking
from d2llm.ops.kernels import ALL
from d2llm.retrieval.build_ann import build_ann
from d2llm.retrieval.local_segment import open_view
from d2llm.retrieval.search import Searcher
from d2llm.retrieval.settings import SearchSettings
from d2llm.sizing.speeds import processor_name
from d2llm.store.index_store import IndexStore
from d2llm.store.shards import Storage

STUDENT = "d2llm-minilm"
TASK = "asymmetric"
REAL = 5_000
SEARCHES: dict[str, dict[str, Any]] = {
    "full score": {},
    "full score, all vectors scanned": {"sources": ("vectors", "bm25")},
    "vectors alone, all scanned": {"sources": ("vectors",), "score_features": {}},
}

Run = Callable[[], list[Ranking]]


def shown(rankings: list[Ranking]) -> list[list[tuple[str, float]]]:
    """Ids and scores."""
    return [[(each.passage.id, each.score) for each in ranking.passages] for ranking in rankings]


def quickest(single: Run, together: Run, runs: int, clock: Callable[[], float]) -> dict[str, float]:
    """Queries a second of both ways, and their ratio."""
    times: dict[str, list[float]] = {"one by one": [], "together": []}
    results: list[list[list[tuple[str, float]]]] = []
    for _ in range(runs):
        for name, run in (("one by one", single), ("together", together)):
            begin = clock()
            rankings = run()
            times[name].append(clock() - begin)
            results.append(shown(rankings))
    if any(result != results[0] for result in results):
        raise SystemExit("the rankings of both ways differ")
    rates = {name: len(results[0]) / min(values) for name, values in times.items()}
    return {name: round(rate, 1) for name, rate in rates.items()} | {
        "ratio": round(rates["together"] / rates["one by one"], 2)
    }


def measure(passages: int, args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Both ways of every search of an index of so many passages."""
    clock = time.process_time if args.threads == 1 else time.perf_counter
    student = Student.load(STUDENT)
    real, vectors, of_task, _ = read_real(student, DATA, REAL, args.queries, work)
    known = KnownVectors(student, list(of_task.values()))
    folder = work / f"batches-{passages}"
    if not folder.exists():
        encoder = KnownVectors(student, [], real)
        build(folder, Corpus(real, vectors, passages, longer=2), encoder, "bfloat16", token_vectors="int4")
        build_ann(IndexStore.open(folder), student)
    texts = list(dict.fromkeys(text for of_one in of_task.values() for text in of_one.texts))[: args.queries]
    queries = [Query(str(number), text) for number, text in enumerate(texts)]
    encoded = known.encode_with_tokens(texts, "query")
    assert encoded.tokens is not None
    query_vectors, tokens = encoded.vectors, encoded.tokens.split()
    view = open_view(Storage.single(IndexStore.open(folder)))
    weights = student.feature_weights(TASK, stored=view.part_kinds).terms
    for loops in ALL:
        loops.load()
    rows: dict[str, Any] = {}
    for name, settings in SEARCHES.items():
        chosen: dict[str, Any] = {"task": TASK, "score_features": weights} | settings
        searcher = Searcher(view, known, SearchSettings(**chosen))
        searcher.rank(queries[:40])

        def single(searcher: Searcher = searcher) -> list[Ranking]:
            return [
                searcher.rank([query], vectors=query_vectors[at : at + 1], tokens=tokens[at : at + 1])[0]
                for at, query in enumerate(queries)
            ]

        def together(searcher: Searcher = searcher) -> list[Ranking]:
            return searcher.rank(queries, vectors=query_vectors, tokens=tokens)

        rows[name] = {"without encoding": quickest(single, together, args.runs, clock)}
        if name == "full score":  # vectors of texts encoded alone and together differ in the last bits
            begin = clock()
            [known.encode_with_tokens([text], "query") for text in texts]
            alone = clock() - begin
            begin = clock()
            known.encode_with_tokens(texts, "query")
            at_once = clock() - begin
            cost = {way: len(texts) / rows[name]["without encoding"][way] for way in ("one by one", "together")}
            rows[name]["with encoding"] = {
                "one by one": round(len(texts) / (cost["one by one"] + alone), 1),
                "together": round(len(texts) / (cost["together"] + at_once), 1),
                "ratio": round((cost["one by one"] + alone) / (cost["together"] + at_once), 2),
            }
    return rows


def main() -> None:
    """Measure, print and optionally write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passages", type=int, nargs="+", default=[20_000, 100_000])
    parser.add_argument("--queries", type=int, default=1_000)
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, help="folder of the indexes and of the real passages' vectors, used again")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    require(*(DATA / name for name in FRACTIONS))
    torch.set_num_threads(args.threads)
    faiss.omp_set_num_threads(1)
    result: dict[str, Any] = {
        "queries": args.queries,
        "threads": args.threads,
        "machine": processor_name(),
        "packages": package_versions(),
        "passages": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        for passages in args.passages:
            rows = measure(passages, args, args.work or Path(folder))
            result["passages"][str(passages)] = rows
            for name, kinds in rows.items():
                for kind, row in kinds.items():
                    print(f"{passages:>8} {name:32} {kind:17}", "  ".join(f"{key} {row[key]}" for key in row))
    if args.json:
        write_json(args.json, result)


if __name__ == "__main__":
    main()
