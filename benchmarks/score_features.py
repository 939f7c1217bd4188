"""Cost of score features: bytes and time of a search by vectors alone, with words, and with the vectors of windows or
tokens.

    python benchmarks/score_features.py
    python benchmarks/score_features.py --passages 100000 --json benchmarks/results/score-features.json

The index is built as a user would build it, from real texts and variations of them (`scaling.corpus`), doubled in
length so that most have several windows. Vectors of passages and tokens are real ones and variations, those of windows
are random: only the time counts. One thread, one query at a time; the kinds of search are interleaved for each query.
"encode" is the time to encode the query, with its tokens, which every search needs in addition.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy and FAISS are imported

import numpy as np
import torch
from scaling.corpus import FRACTIONS, Corpus, KnownVectors, read_real, write_json
from scaling.data_sets import DATA, require
from scaling.stores import build

from d2llm import Index, Student
from d2llm.core.types import Query, ScoreFeature
from d2llm.retrieval.search import Searcher, SearchSettings

STUDENT = "d2llm-minilm"
WORDS: dict[ScoreFeature, float] = {"bm25": 0.1, "bm25_fraction": 2.0}  # as on squad-sent; only the time counts
WINDOW_WORDS: dict[ScoreFeature, float] = {"window_bm25": 0.08, "window_bm25_fraction": 17.0}  # as shipped
TOKENS: dict[ScoreFeature, float] = {"maxsim": 38.3}
KINDS: dict[str, dict[str, Any]] = {
    "vectors alone": {"score_features": {}},
    "small: words": {"score_features": WORDS},
    "small: words of windows": {"score_features": WINDOW_WORDS},
    "full: words of windows, tokens": {"score_features": WINDOW_WORDS | TOKENS},
    "full, proved exact": {"score_features": WINDOW_WORDS | TOKENS, "exact": True},
    "words and vectors of windows": {"score_features": WINDOW_WORDS | {"window_vectors": 0.5}},
}


def measure(student: Student, passages: int, num_real: int, num_queries: int, cache: Path | None) -> dict[str, Any]:
    """Bytes per passage, and percentiles of the time of each kind of search."""
    real, vectors, queries, _ = read_real(student, DATA, num_real, num_queries, cache)
    task_queries = queries["asymmetric"]
    known = KnownVectors(student, list(queries.values()), real)
    with tempfile.TemporaryDirectory() as work_folder:
        folder = Path(work_folder) / "index"
        facts = build(
            folder,
            Corpus(real, vectors, passages, longer=2),
            known,
            "bfloat16",
            window_vectors="int3",
            token_vectors="int4",
        )
        index = Index.open(folder)
        view = index.unsharded_view
        assert view.windows is not None
        assert view.tokens is not None
        windows = int(view.windows.counts(view.live_rows()).sum()) / passages
        tokens = int(view.tokens.counts(view.live_rows()).sum()) / passages
        searchers = {
            name: Searcher(index.view, known, SearchSettings(task="asymmetric", **kind)) for name, kind in KINDS.items()
        }
        for searcher in searchers.values():
            searcher.rank([Query("0", task_queries.texts[0])])  # one-time work is not counted
        times: dict[str, list[float]] = {name: [] for name in ("encode", *KINDS)}
        scored: list[float] = []
        for number, text in enumerate(task_queries.texts):
            begin = time.perf_counter()
            read = student.encode_with_tokens([text], "query")
            times["encode"].append(1e3 * (time.perf_counter() - begin))
            assert read.tokens is not None
            token_vectors = read.tokens.split()
            for name, searcher in searchers.items():
                begin = time.perf_counter()
                (ranking,) = searcher.rank([Query(str(number), text)], vectors=read.vectors, tokens=token_vectors)
                times[name].append(1e3 * (time.perf_counter() - begin))
                if ranking.certificate is not None:
                    scored.append(ranking.certificate.num_scored / passages)
    return {
        "passages": passages,
        "queries": len(task_queries.texts),
        "characters a passage": round(facts["text_bytes"]),
        "windows a passage": round(windows, 2),
        "tokens a passage": round(tokens, 1),
        "bytes a passage": {
            "in all": round(facts["bytes"]),
            "vector": facts["vector_bytes"],
            "words": round(facts["word_bytes"]),
            "windows": round(facts["window_bytes"]),
            "tokens": round(facts["token_bytes"]),
        },
        "share of passages that the exact search scores": round(float(np.median(scored)), 3),
        "ms": {
            name: {f"p{percentile}": round(float(np.percentile(values, percentile)), 1) for percentile in (50, 95)}
            for name, values in times.items()
        },
    }


def main() -> None:
    """Measure, print and optionally write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passages", type=int, default=20_000)
    parser.add_argument("--real", type=int, default=1_000, help="real passages among them; the rest are variations")
    parser.add_argument("--queries", type=int, default=40)
    parser.add_argument("--cache", type=Path, help="folder in which to cache the real passages' vectors")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    require(*(DATA / name for name in FRACTIONS))
    torch.set_num_threads(1)
    row = measure(Student.load(STUDENT), args.passages, args.real, args.queries, args.cache)
    alone, encode = row["ms"]["vectors alone"]["p50"], row["ms"]["encode"]["p50"]
    for name, value in row.items():
        if name != "ms":
            print(f"{name:<40} {value}")
    for name, times in row["ms"].items():
        ratio = "" if name == "encode" else f"   {(times['p50'] + encode) / (alone + encode):.2f} times, with encoding"
        print(f"{name:<40} p50 {times['p50']:7.1f} ms, p95 {times['p95']:7.1f} ms{ratio}")
    if args.json:
        write_json(args.json, row)


if __name__ == "__main__":
    main()
