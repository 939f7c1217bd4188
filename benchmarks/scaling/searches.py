"""Searches to compare, one query at a time, on one thread."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import faiss
import numpy as np
from numpy.typing import NDArray

from d2llm import Student
from d2llm.core.types import Query, ScoreFeature, Task
from d2llm.ops.selection import top_rows
from d2llm.retrieval.exact_search import certified_top_k
from d2llm.retrieval.local_segment import LocalSegment
from d2llm.retrieval.search import Searcher, SearchSettings
from d2llm.retrieval.segments import CachedBounds, IndexView
from d2llm.store.ann import AnnSearch
from d2llm.store.scan import RowScan
from d2llm.store.shards import Storage
from d2llm.store.vector_formats import make_format
from scaling.array_view import ArrayView, passage_bounds
from scaling.corpus import BLOCK, KnownVectors, Queries

TOP_K = 10
DEPTHS = (1000, 200)
PROBES = (8, 32, 128)

_WORDS: dict[ScoreFeature, float] = {
    "bm25": 0.1,
    "bm25_fraction": 2.0,
}  # as on squad-sent; only the time counts
_WINDOWS: dict[ScoreFeature, float] = {"window_bm25": 0.05, "window_bm25_fraction": 1.0}
_WINDOW_VECTORS: dict[ScoreFeature, float] = {"window_vectors": 0.5}

Search = Callable[[int], Sequence[int]]
"""The number of a query -> the rows of its first ten, best first."""


class Truth(NamedTuple):
    """The top ten of all passages by the full score, for each query, and the fraction of passages scored for it."""

    rows: list[list[int]]
    fraction: float


def true_rankings(
    student: Student, vectors: NDArray[np.float32], task_queries: Queries, task: Task, num_checked: int
) -> Truth:
    """Rankings of the certified search on float32 vectors; the first queries are checked against scoring every passage.

    Raises:
        AssertionError: the two differ.
    """
    view: Any = ArrayView(vectors)  # what is read of a PassageView
    cached = CachedBounds(passage_bounds(view, student))
    rows: list[list[int]] = []
    fractions: list[float] = []
    for number, query in enumerate(task_queries.vectors):
        found = certified_top_k(view, student, query, task, TOP_K, cached=cached)
        rows.append(found.rows.tolist())
        fractions.append(found.certificate.num_scored / len(vectors))
        if number < num_checked:
            blocks = (student.score(query, vectors[at : at + 65_536], task) for at in range(0, len(vectors), 65_536))
            best = np.sort(np.concatenate(list(blocks)))[::-1][:TOP_K]
            assert np.allclose(best, found.scores, atol=1e-3), f"certified {found.scores}, all {best}"
    return Truth(rows, float(np.mean(fractions)))


def our_searches(
    view: LocalSegment, student: Student, known: KnownVectors, task_queries: Queries, task: Task
) -> dict[str, Search]:
    """The searches of a store. "whole" includes everything that a user waits for except encoding, also the texts.

    Searches that count words rank differently from the truth they are compared with: only their time is meaningful.
    """
    index = IndexView(Storage.single(view.store), [view])
    dot_queries = student.query_vectors(task_queries.vectors, task)
    cached = CachedBounds(passage_bounds(view, student))
    queries = [Query(str(number), text) for number, text in enumerate(task_queries.texts)]
    approximate = None if view.ann is None else AnnSearch(view.ann, view.live, view.ids)

    def rescored(number: int, rows: NDArray[np.int64]) -> Sequence[int]:
        ordered = np.sort(rows)
        scores = student.score(task_queries.vectors[number], view.vectors(ordered), task)
        return ordered[top_rows(scores, TOP_K, lambda positions: view.ids(ordered[positions]))].tolist()

    def near(number: int, depth: int) -> NDArray[np.int64]:
        hits = None if approximate is None else approximate.search(dot_queries[number], depth)
        return view.scan(dot_queries[number], depth).rows if hits is None else hits[0]

    def certified(number: int) -> Sequence[int]:
        return certified_top_k(view, student, task_queries.vectors[number], task, TOP_K, cached=cached).rows.tolist()

    def whole(**settings: Any) -> Search:
        searcher = Searcher(index, known, SearchSettings(task=task, top_k=TOP_K, **settings), cached=cached)
        return lambda number: [_row(result.passage.id) for result in searcher.rank([queries[number]])[0].passages]

    searches: dict[str, Search] = {
        "d2llm, inner products alone": lambda number: view.scan(dot_queries[number], TOP_K).rows.tolist()
    }
    for depth in DEPTHS:
        searches[f"d2llm, scan {depth} + IEM"] = lambda number, depth=depth: rescored(
            number, view.scan(dot_queries[number], depth).rows
        )
    searches["d2llm, certified"] = certified
    searches["d2llm, scan 1000 + IEM, whole"] = whole()
    searches["d2llm, certified, whole"] = whole(exact=True)
    searches["d2llm, words too, whole"] = whole(score_features=_WORDS)
    searches["d2llm, words and windows too, whole"] = whole(score_features=_WORDS | _WINDOWS)
    searches["d2llm, words and windows too, certified, whole"] = whole(score_features=_WORDS | _WINDOWS, exact=True)
    if view.windows is not None:
        weights = _WORDS | _WINDOWS | _WINDOW_VECTORS
        searches["d2llm, words and windows' vectors too, whole"] = whole(score_features=weights)
        searches["d2llm, words and windows' vectors too, certified, whole"] = whole(score_features=weights, exact=True)
    searches["d2llm, BM25 alone"] = lambda number: view.match(task_queries.texts[number], TOP_K).rows.tolist()
    if approximate is not None:
        for depth in DEPTHS:
            searches[f"d2llm, ann {depth} + IEM"] = lambda number, depth=depth: rescored(number, near(number, depth))
        searches["d2llm, ann 1000 + IEM, whole"] = whole(sources=("ann",))
    return searches


def format_searches(
    vectors: NDArray[np.float32], names: Sequence[str], student: Student, task_queries: Queries, task: Task
) -> dict[str, Search]:
    """Searches on the vectors in other formats, in memory: the results of a store in that format."""
    dot_queries = student.query_vectors(task_queries.vectors, task)
    searches: dict[str, Search] = {}
    for name in names:
        stored = make_format(name, vectors.shape[1])
        codes = np.empty((len(vectors), stored.code_size), np.uint8)
        for start in range(0, len(vectors), BLOCK):
            codes[start : start + BLOCK] = stored.encode(vectors[start : start + BLOCK], [""] * BLOCK)
        scan = RowScan(codes, stored)

        def search(number: int, scan: RowScan = scan, codes: NDArray[np.uint8] = codes, stored: Any = stored) -> Any:
            rows = np.sort(
                scan.search(dot_queries[number], DEPTHS[0], ids_of=lambda rows: rows.astype(str).tolist())[0]
            )
            scores = student.score(task_queries.vectors[number], stored.decode(codes[rows]), task)
            return rows[np.argsort(-scores, kind="stable")[:TOP_K]].tolist()

        searches[f"d2llm, {name}, scan 1000 + IEM"] = search
    return searches


def faiss_searches(
    flat: Any, inverted: Any, student: Student, task_queries: Queries, task: Task, dim: int
) -> dict[str, Search]:
    """FAISS on the same vectors in float32, searched with the inner product, alone or followed by the IEM."""
    dot_queries = student.query_vectors(task_queries.vectors, task)
    vectors = faiss.rev_swig_ptr(flat.get_xb(), flat.ntotal * dim).reshape(-1, dim)

    def first(index: Any, number: int, depth: int, **options: Any) -> NDArray[np.int64]:
        rows = index.search(dot_queries[number][None], depth, **options)[1][0]
        return rows[rows >= 0]

    def rescored(index: Any, number: int, **options: Any) -> Sequence[int]:
        rows = np.sort(first(index, number, DEPTHS[0], **options))
        scores = student.score(task_queries.vectors[number], vectors[rows], task)
        return rows[np.argsort(-scores, kind="stable")[:TOP_K]].tolist()

    searches: dict[str, Search] = {
        "FAISS flat": lambda number: first(flat, number, TOP_K).tolist(),
        "FAISS flat 1000 + IEM": lambda number: rescored(flat, number),
    }
    for probes in PROBES if inverted is not None else ():
        parameters = faiss.SearchParametersIVF()
        parameters.nprobe = probes
        options = {"params": parameters}
        searches[f"FAISS IVF, {probes} probes"] = lambda number, options=options: first(
            inverted, number, TOP_K, **options
        ).tolist()
        searches[f"FAISS IVF, {probes} probes, 1000 + IEM"] = lambda number, options=options: rescored(
            inverted, number, **options
        )
    return searches


def measure(
    searches: Mapping[str, Search], truth: Sequence[Sequence[int]], elsewhere: Collection[str] = ()
) -> dict[str, dict[str, float | None]]:
    """Recall and times of each search; for those ``elsewhere``, in another process, only wall times.

    The searches are interleaved for each query, so that other work on the machine affects all of them equally.
    """
    kept: dict[str, list[tuple[float, float, float]]] = {name: [] for name in searches}
    for search in searches.values():
        search(0)  # one-time work is not counted
    for number, right in enumerate(truth):
        for name, search in searches.items():
            wall, processor = time.perf_counter(), time.process_time()
            rows_found = search(number)
            processor, wall = time.process_time() - processor, time.perf_counter() - wall
            kept[name].append((1e3 * wall, 1e3 * processor, len({*rows_found} & {*right}) / len(right)))
    rows: dict[str, dict[str, float | None]] = {}
    for name, values in kept.items():
        walls, processors, recalls = np.array(values).T
        rows[name] = {
            "recall": float(recalls.mean()),
            "qps": None if name in elsewhere else 1e3 / float(processors.mean()),
            "cpu_ms": None if name in elsewhere else float(processors.mean()),
            "p50_ms": float(np.percentile(walls, 50)),
            "p99_ms": float(np.percentile(walls, 99)),
        }
    return rows


def _row(passage_id: str) -> int:
    return int(passage_id.removeprefix("passage-"))
