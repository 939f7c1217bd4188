"""The engine beside the parts that anyone can put together: one run, the same passages and queries, one thread.

    pip install usearch tantivy lancedb
    python benchmarks/engine.py                                   20,000 passages, a few minutes
    python benchmarks/engine.py --passages 100000 --work INDICES --json benchmarks/results/engine.json
    python scripts/quality_tables.py                              README's table of costs, from that file
    python benchmarks/engine.py --judged stackfaq nfcorpus       nDCG@10 of the same searches, on judged dev queries

Each query goes to all searches, in random order because each leaves caches to the next that hold its own data. Nothing
is read again: the query's vector and those of its tokens are known. How long reading takes is measured apart, and so is
a cross-encoder of the student's size, which reads the query with the first 20 passages. Times are those of the
processor, so other work matters little. "By hand" is an approximate index of usearch (HNSW, 16-bit numbers), an
inverted index of tantivy (English stems), and MaxSim in NumPy over both lists, 16-bit tokens; its scores are added with
the weights of the student. Recall is that of the first ten against the full score of every passage; that of "by hand"
is lower also because its BM25 is another one. LanceDB and FAISS rank by other scores. PyLate's index (fast-plaid 1.7)
is built for older versions of torch, and crashes with 2.13. Passages are real ones and variations (`scaling.corpus`),
which nobody judged: how good the rankings are is measured with --judged, on whole data sets. (`engine_quality.py` is
about another thing, the programs that run the student.)
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import random
import shutil
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy and FAISS are imported

import faiss
import numpy as np
import pyarrow as pa
import torch
from candidate_depth import indexed
from scaling.corpus import FRACTIONS, Corpus, KnownVectors, read_real, write_json
from scaling.data_sets import DATA, require
from scaling.stores import build

from d2llm import Student
from d2llm.core.manifest import package_versions
from d2llm.core.types import Query, ScoreFeature
from d2llm.data.beir import read_beir
from d2llm.models.protocols import SearchStudent
from d2llm.models.row_features import mean_of_cosines
from d2llm.models.teachers.pair_teacher import score_passages
from d2llm.ops.kernels import BM25, MAXSIM
from d2llm.ops.measures import per_query_measures
from d2llm.recipe import ClassifierTeacherConfig
from d2llm.retrieval.build_ann import build_ann
from d2llm.retrieval.local_segment import open_view
from d2llm.retrieval.search import Searcher
from d2llm.retrieval.segments import IndexView
from d2llm.retrieval.settings import SearchSettings
from d2llm.sizing.speeds import processor_name
from d2llm.store.index_store import IndexStore
from d2llm.store.shards import Storage
from d2llm.store.view import PassageView

STUDENT = "d2llm-minilm"
TASK = "asymmetric"
TOP_K = 10
SHOWN = 20  # passages that the cross-encoder reads with a query
EACH = 100  # candidates of each of the parts put together by hand
EXPANSION = 300  # of usearch: with it, it finds as much of the first hundred as our approximate index

Encoded = tuple[str, np.ndarray, list[np.ndarray]]
"""A query's text, its vector [1, dim], and the vectors of its tokens."""


class ByHand:
    """usearch, tantivy and NumPy, as anybody would put them together."""

    def __init__(self, view: PassageView, student: Student, texts: Sequence[str], folder: Path) -> None:
        import tantivy  # pyright: ignore[reportMissingImports]
        from usearch.index import Index as Graph  # pyright: ignore[reportMissingImports]

        self.student = student
        self.weights = student.feature_weights(TASK)
        self.vectors = np.concatenate([view.block(at, min(at + 8_192, len(view))) for at in range(0, len(view), 8_192)])
        self.graph = Graph(
            ndim=view.dim, metric="ip", dtype="f16", connectivity=16, expansion_add=100, expansion_search=EXPANSION
        )
        self.graph.add(np.arange(len(self.vectors)), self.vectors / np.linalg.norm(self.vectors[0]), threads=1)
        schema = tantivy.SchemaBuilder()
        schema.add_integer_field("row", stored=True)
        schema.add_text_field("text", stored=False, tokenizer_name="en_stem")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        self.words = tantivy.Index(schema.build(), path=str(folder))
        writer = self.words.writer(num_threads=1)
        for row, text in enumerate(texts):
            writer.add_document(tantivy.Document(row=row, text=text))
        writer.commit()
        writer.wait_merging_threads()
        self.words.reload()
        assert view.tokens is not None
        codes, counts = view.tokens.take(np.arange(len(view)))
        decode = view.store.part_formats["token"].decode
        self.tokens = np.concatenate(
            [decode(codes[at : at + 65_536]).astype(np.float16) for at in range(0, len(codes), 65_536)]
        )
        self.ends = np.cumsum(counts)
        self.starts = self.ends - counts

    def rank(self, query: Encoded) -> list[int]:
        """Rows of the first ten."""
        text, vector, tokens = query
        dot = self.student.query_vectors(vector, TASK)[0]
        near = self.graph.search(dot, EACH, threads=1).keys.astype(np.int64)
        searcher = self.words.searcher()
        hits = searcher.search(self.words.parse_query(plain_words(text), ["text"]), EACH).hits
        bm25 = {int(searcher.doc(address)["row"][0]): score for score, address in hits}
        rows = np.union1d(near, np.array(list(bm25), np.int64))
        scores = self.vectors[rows] @ dot
        counts = self.ends[rows] - self.starts[rows]
        positions = np.repeat(self.starts[rows] - (np.cumsum(counts) - counts), counts) + np.arange(counts.sum())
        products = self.tokens[positions].astype(np.float32) @ mean_of_cosines(tokens[0]).T
        best = np.maximum.reduceat(products, np.cumsum(counts) - counts, axis=0).sum(axis=1)
        weight = self.weights.terms.get("window_bm25", 0.0)
        scores += self.weights.terms["maxsim"] * best + weight * np.array([bm25.get(row, 0.0) for row in rows.tolist()])
        return rows[np.argsort(-scores)[:TOP_K]].tolist()


class FaissFlat:
    """The vectors alone, as floats of 32 bits, all compared."""

    def __init__(self, vectors: np.ndarray, student: Student) -> None:
        self.student = student
        self.index: Any = faiss.IndexFlatIP(vectors.shape[1])
        self.index.add(vectors)

    def rank(self, query: Encoded) -> list[int]:
        """Rows of the first ten."""
        return self.index.search(self.student.query_vectors(query[1], TASK), TOP_K)[1][0].tolist()


class LanceHybrid:
    """LanceDB's hybrid search: a graph of the vectors, an inverted index of the words, reciprocal rank fusion."""

    def __init__(self, vectors: np.ndarray, student: Student, texts: Sequence[str], folder: Path) -> None:
        import lancedb

        self.student = student
        shutil.rmtree(folder, ignore_errors=True)
        column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])
        rows = pa.table({"row": np.arange(len(vectors)), "vector": column, "text": list(texts)})
        self.table: Any = lancedb.connect(folder).create_table("passages", rows)
        self.table.create_index(metric="dot", index_type="IVF_HNSW_SQ", vector_column_name="vector")
        self.table.create_fts_index("text", language="English", stem=True)

    def rank(self, query: Encoded) -> list[int]:
        """Rows of the first ten."""
        vector = self.student.query_vectors(query[1], TASK)[0]
        search = self.table.search(query_type="hybrid").vector(vector).text(plain_words(query[0])).distance_type("dot")
        return search.limit(TOP_K).select(["row"]).to_arrow()["row"].to_pylist()


def plain_words(text: str) -> str:
    """A query without what the query languages of others read as operators."""
    return "".join(letter if letter.isalnum() else " " for letter in text).lower()


def made_row(passage_id: str) -> int:
    """The row of a passage of ``Corpus``."""
    return int(passage_id.rsplit("-", 1)[1])


def not_installed() -> str:
    """Which of the peers' packages are missing; empty: none."""
    missing = [name for name in ("usearch", "tantivy", "lancedb") if importlib.util.find_spec(name) is None]
    return f"not installed: pip install {' '.join(missing)}" if missing else ""


def ours(
    view: IndexView, student: SearchStudent, row_of: Callable[[str], int] = made_row, **settings: Any
) -> Callable[[Encoded], list[int]]:
    """A search of d2llm; rows of the first ten."""
    searcher = Searcher(view, student, SearchSettings(task=TASK, top_k=TOP_K, **settings))

    def rank(query: Encoded) -> list[int]:
        [ranking] = searcher.rank([Query("1", query[0])], vectors=query[1], tokens=query[2])
        return [row_of(each.passage.id) for each in ranking.passages]

    return rank


def of_d2llm(
    view: IndexView, student: SearchStudent, weights: dict[ScoreFeature, float], row_of: Callable[[str], int] = made_row
) -> dict[str, Callable[[Encoded], list[int]]]:
    """The searches of d2llm, by name."""
    rank = partial(ours, view, student, row_of)
    of_words = {name: weight for name, weight in weights.items() if name != "maxsim"}
    return {
        "full score": rank(score_features=weights),
        "full score, all vectors scanned": rank(score_features=weights, sources=("vectors", "bm25")),
        "vectors and words": rank(score_features=of_words),
        "vectors alone": rank(score_features={}),
        "vectors alone, all scanned": rank(score_features={}, sources=("vectors",)),
        "words alone": lambda query: view.segments[0].match(query[0], TOP_K).rows.tolist(),
    }


def of_peers(
    view: PassageView, student: Student, texts: Sequence[str], work: Path
) -> dict[str, Callable[[Encoded], list[int]]]:
    """The searches of others, by name."""
    by_hand = ByHand(view, student, texts, work / "words")
    return {
        "by hand: usearch, tantivy, MaxSim": by_hand.rank,
        "FAISS, vectors alone, all compared": FaissFlat(by_hand.vectors, student).rank,
        "LanceDB, hybrid": LanceHybrid(by_hand.vectors, student, texts, work / "lance").rank,
    }


def read_queries(student: Student, texts: Sequence[str]) -> list[Encoded]:
    """Their vectors, and those of their tokens."""
    queries: list[Encoded] = []
    for text in texts:
        read = student.encode_with_tokens([text], "query")
        assert read.tokens is not None
        queries.append((text, read.vectors, read.tokens.split()))
    return queries


def judged(name: str, args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """nDCG@10 of every search among all passages of a data set, for its first dev queries."""
    student = Student.load(STUDENT)
    dataset = read_beir(DATA / name, splits=["dev"])
    qrels = dict(islice(((query, of_query) for query, of_query in dataset.qrels["dev"].items()), args.queries))
    index = indexed(student, dataset, TASK, work / f"judged-{name}")
    stored = PassageView(index.store)
    ids = stored.ids(np.arange(len(stored)))
    view = open_view(Storage.single(index.store))
    weights = student.feature_weights(TASK, stored=view.part_kinds).terms
    searches = of_d2llm(view, student, weights, {passage: row for row, passage in enumerate(ids)}.__getitem__)
    if not args.no_peers and not not_installed():
        searches |= of_peers(stored, student, [dataset.passages[each].full_text for each in ids], work)
    queries = read_queries(student, [dataset.queries[query].text for query in qrels])
    values: dict[str, float] = {}
    for search, rank in searches.items():
        rankings = {query: [ids[row] for row in rank(read)] for query, read in zip(qrels, queries, strict=True)}
        values[search] = fmean(per_query_measures(rankings, qrels)["nDCG@10"].values())
        print(f"{name:14} {search:40} nDCG@10 {values[search]:.4f}", flush=True)
    return {"passages": len(ids), "queries": len(queries), "nDCG@10": values}


def reading(texts: Sequence[str], shown: Sequence[Sequence[str]]) -> dict[str, dict[str, float]]:
    """Times of what models read: queries by the student, and by a cross-encoder, each with the passages shown."""
    student = Student.load(STUDENT, engine="auto")
    # Its head is new: the scores mean nothing, but take as long as any.
    cross_encoder = ClassifierTeacherConfig(model="minilm", new_head=True, max_tokens=256).load(device="cpu")
    works: dict[str, Callable[[int], object]] = {
        "vector of a query": lambda index: student.encode_queries([texts[index]]),
        "vector and tokens of a query": lambda index: student.encode_with_tokens([texts[index]], "query"),
        f"cross-encoder, {SHOWN} passages": lambda index: score_passages(
            cross_encoder, texts[index], shown[index], TASK
        ),
    }
    times: dict[str, dict[str, float]] = {}
    for name, work in works.items():
        values: list[float] = []
        for index in (0, *range(len(texts))):
            begin = time.process_time()
            work(index)
            values.append(1e3 * (time.process_time() - begin))
        times[name] = percentiles(values[1:])
    return times


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """The median and the 90th percentile."""
    return {f"p{each}": float(np.percentile(values, each)) for each in (50, 90)}


def measure(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Times, recall and bytes."""
    student = Student.load(STUDENT)
    real, vectors, of_task, _ = read_real(student, DATA, args.real, args.queries, args.work)
    known = KnownVectors(student, list(of_task.values()), real)
    corpus, folder = Corpus(real, vectors, args.passages, longer=2), work / f"engine-{args.passages}"
    if not folder.exists():
        build(folder, corpus, known, "bfloat16", token_vectors="int4")
    queries = read_queries(student, of_task[TASK].texts)
    store = IndexStore.open(folder)
    begin = time.process_time()
    report = build_ann(store, student)
    graph = asdict(report) | {"folder": "", "cpu_seconds": time.process_time() - begin}
    view = open_view(Storage.single(store))
    assert BM25.load() is not None
    assert MAXSIM.load() is not None
    weights = student.feature_weights(TASK, stored=view.part_kinds).terms
    searches = of_d2llm(view, known, weights)
    skipped = not_installed() if not args.no_peers else "not asked for"
    if not skipped:
        texts = [passage.full_text for passages, _ in corpus.blocks() for passage in passages]
        searches |= of_peers(PassageView(store), student, texts, work)
    everything = ours(
        view, known, score_features=weights, num_candidates=2 * args.passages, sources=("vectors", "bm25")
    )
    truth = [everything(query) for query in queries]
    times: dict[str, list[float]] = defaultdict(list)
    found: dict[str, list[float]] = defaultdict(list)
    proved = {"full score, proved": ours(view, known, score_features=weights, exact=True)}
    random.seed(0)
    for group in (searches, proved):  # apart, because a proof reads all tokens, which then fill the processor's caches
        for rank in group.values():
            rank(queries[0])
        for query, best in zip(queries, truth, strict=True):
            for name, rank in random.sample([*group.items()], len(group)):
                begin = time.process_time()
                rows = rank(query)
                times[name].append(1e3 * (time.process_time() - begin))
                found[name].append(len(set(rows) & set(best)) / len(best))
    searcher = Searcher(view, known, SearchSettings(task=TASK, top_k=SHOWN))
    shown: list[list[str]] = []
    for text, vectors_of_query, tokens in queries:
        [ranking] = searcher.rank([Query("1", text)], vectors=vectors_of_query, tokens=tokens)
        shown.append([result.passage.full_text for result in ranking.passages])
    return {
        "passages": args.passages,
        "characters a passage": round(fmean(len(p.full_text) for passages, _ in corpus.blocks() for p in passages), 1),
        "queries": len(queries),
        "machine": processor_name(),
        "packages": package_versions(),
        "graph": graph,
        "reading": reading([query[0] for query in queries], shown),
        "searches": {
            name: {
                "ms": percentiles(values),
                "recall": float(np.mean(found[name])),
            }
            for name, values in times.items()
        },
    } | ({"by hand": skipped} if skipped else {})


def main() -> None:
    """Measure, print and optionally write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passages", type=int, default=20_000)
    parser.add_argument("--real", type=int, default=5_000, help="real passages among them; the rest are variations")
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--work", type=Path, help="folder of the index and of the real passages' vectors, used again")
    parser.add_argument("--judged", nargs="+", metavar="SET", help="measure nDCG@10 on these data sets, and no times")
    parser.add_argument("--no-peers", action="store_true", help="measure d2llm alone")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    require(*(DATA / name for name in FRACTIONS))
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        work = args.work or Path(folder)
        if args.judged:
            if not args.no_peers and (missing := not_installed()):
                parser.error(missing)
            result = {name: judged(name, args, work) for name in args.judged}
            if args.json:
                write_json(args.json, result)
            return
        result = measure(args, work)
    for name, row in result["searches"].items():
        print(f"{name:40} p50 {row['ms']['p50']:7.2f} ms, p90 {row['ms']['p90']:7.2f} ms, recall {row['recall']:.3f}")
    for name, row in result["reading"].items():
        print(f"{name:40} p50 {row['p50']:7.2f} ms, p90 {row['p90']:7.2f} ms")
    if "by hand" in result:
        print(f"{'by hand':40} {result['by hand']}")
    if args.json:
        write_json(args.json, result)


if __name__ == "__main__":
    main()
