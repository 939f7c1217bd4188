"""BM25 of an index at a million passages: reading speed, bytes, top passages, and scores of candidates and windows.

    python benchmarks/bm25.py                                     100,000 passages, one minute
    python benchmarks/bm25.py --passages 1000000 --json benchmarks/results/bm25.json
    python benchmarks/bm25.py --peer                              also measure bm25s (pip install bm25s)

The first passages are real; the others combine the beginning of one real passage with the end of another, so words and
lengths are realistic. Queries are questions of the dev split of squad-sent. One thread; percentiles are of processor
time, one query at a time. Goals at a million: the top 1,000 within 30 ms, 1,000 candidates within 5 ms.
Licences of the texts: squad-sent CC BY-SA 4.0, medquad CC BY 4.0, quora for research only; they are only measured on,
nothing is trained.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from scaling.corpus import FRACTIONS, write_json
from scaling.data_sets import DATA, require

from d2llm.data.beir import read_beir
from d2llm.ops.bm25_words import terms
from d2llm.ops.kernels import BM25
from d2llm.sizing.texts import count_postings
from d2llm.store.bm25 import WordIndex
from d2llm.store.word_segment import WordSegment

SEGMENT = 1 << 17  # rows: the size to which an index merges its segments
TOP = 1_000
DEPTHS = (10, 100, 1_000, 10_000)


def texts(data: Path, number: int) -> Iterator[str]:
    """Texts of real passages, then mixtures of them; deterministic."""
    real: list[str] = []
    ends: list[int] = []
    for name, fraction in FRACTIONS.items():
        part_texts = [passage.full_text for passage in read_beir(data / name, splits=["dev"]).passages.values()]
        real += part_texts[: max(1, round(fraction * number))]
        ends.append(len(real))
    random = np.random.default_rng(0)
    firsts = [0, *ends]
    for row in range(number):
        one = real[row % len(real)]
        if row < len(real):
            yield one
            continue
        part = int(np.searchsorted(ends, row % len(real), side="right"))
        words, ending = one.split(), real[int(random.integers(firsts[part], ends[part]))].split()
        fraction = random.uniform(0, 0.5)
        yield " ".join([*words[int(fraction * len(words)) :], *ending[len(ending) - int(fraction * len(ending)) :]])


def percentiles(work: Callable[[Any], object], inputs: list[Any]) -> dict[str, float]:
    """Median and 95th percentile of the processor time per call, in milliseconds."""
    work(inputs[0])
    times: list[float] = []
    for each in inputs:
        begin = time.process_time()
        work(each)
        times.append(1_000 * (time.process_time() - begin))
    return {"p50": round(float(np.percentile(times, 50)), 2), "p95": round(float(np.percentile(times, 95)), 2)}


def measure(data: Path, number: int, num_queries: int, *, peer: bool) -> dict[str, Any]:
    """All figures of one corpus size."""
    dev = read_beir(data / "squad-sent", splits=["dev"])
    questions = [dev.queries[query_id].text for query_id in list(dev.qrels["dev"])[:num_queries]]
    stream = texts(data, number)
    segments: list[WordSegment] = []
    seconds, num_characters = 0.0, 0
    for start in range(0, number, SEGMENT):
        block = [next(stream) for _ in range(min(SEGMENT, number - start))]
        num_characters += sum(map(len, block))
        begin = time.process_time()
        segments.append(WordSegment.from_texts(block))
        seconds += time.process_time() - begin
    index = WordIndex(segments)
    queries = [index.query(question) for question in questions]
    random = np.random.default_rng(1)
    candidates = [
        np.concatenate([index.best(query, TOP // 2)[0][: TOP // 2], random.integers(number, size=TOP)])[:TOP]
        for query in queries
    ]
    kernels = BM25.load()
    read = {
        depth: float(np.mean([index.best_compiled(kernels, query, depth)[2] for query in queries])) for depth in DEPTHS
    }
    every = float(np.mean([sum(count_postings(segment, query) for segment in segments) for query in queries]))
    row: dict[str, Any] = {
        "passages": number,
        "queries": len(queries),
        "characters a passage": round(num_characters / number, 1),
        "passages read a second": round(number / seconds),
        "bytes a passage": round(index.num_bytes / number, 1),
        "weighing the words of a query, ms": percentiles(index.query, questions),
        "postings of a query's words": round(every),
        "of which are read": {str(depth): round(number / every, 4) for depth, number in read.items()},
        **{
            f"best {depth:,} of all, ms": percentiles(lambda query, depth=depth: index.best(query, depth), queries)
            for depth in DEPTHS
        },
        f"{TOP:,} candidates and their windows, ms": percentiles(
            lambda pair: index.score(*pair), list(zip(queries, candidates, strict=True))
        ),
        "every passage, ms": percentiles(index.scores, queries),
    }
    if peer:
        bm25s: Any = import_module("bm25s")
        retriever = bm25s.BM25(method="lucene", k1=1.2, b=0.75)
        retriever.index([terms(text) for text in texts(data, number)], show_progress=False)
        tokenized = [[terms(question)] for question in questions]
        row[f"bm25s: best {TOP:,} of all, ms"] = percentiles(
            lambda one: retriever.retrieve(one, k=TOP, show_progress=False, n_threads=0), tokenized
        )
    return row


def main() -> None:
    """Measure, print and optionally write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passages", type=int, default=100_000)
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--peer", action="store_true", help="also measure bm25s")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    require(*(args.data / name for name in FRACTIONS))
    row = measure(args.data, args.passages, args.queries, peer=args.peer)
    for name, value in row.items():
        print(f"{name:<40} {value}")
    if args.json:
        write_json(args.json, row)


if __name__ == "__main__":
    main()
