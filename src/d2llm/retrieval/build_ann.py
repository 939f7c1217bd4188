"""The ``ann`` verb: build an approximate index beside the vectors and tune it to a requested recall."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# (faiss ships no types)

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from d2llm.core.errors import IndexLockedError, InputError
from d2llm.core.progress import Advance, progress_bar
from d2llm.core.settings import shows
from d2llm.core.types import Query
from d2llm.data.python_records import QueryLike, queries_of
from d2llm.models.protocols import SearchStudent
from d2llm.retrieval.local_segment import LocalSegment
from d2llm.retrieval.search import Searcher
from d2llm.retrieval.segments import IndexView
from d2llm.retrieval.settings import AnnSettings, SearchSettings
from d2llm.store.ann import MAX_EFFORT, NEIGHBOURS, AnnBase, AnnIndex, AnnRecord, AnnSearch, Recall, write_ann
from d2llm.store.index_store import IndexStore
from d2llm.store.scan import load_faiss
from d2llm.store.shards import Storage
from d2llm.store.storage import storage_errors
from d2llm.store.view import PassageView

_log = logging.getLogger(__name__)
MIN_PASSAGES = 20_000
"""With fewer passages, the exact scan is faster."""
NUM_QUERIES = 400
"""Maximum number of queries used to measure recall."""
CONSTRUCTION_EFFORT = 100
"""Rows in view while the neighbours of a new one are chosen; 60 find fewer, 200 take twice as long for little."""
NUM_RANKED = 40
"""Maximum number of queries whose final ranking is compared with that of an exact search."""
_FIRST = 10
_QUERY_WORDS = 12
_SAMPLE_ROWS = 65_536  # by which the range of 8-bit numbers is chosen
_BLOCK_ROWS = 16_384
_DEEPER = 8  # with a filter that keeps 1/8 of the rows, a top-k search reaches as deep as an unfiltered top-8k search
_REPORTED = (10, 100)  # depths reported in addition to the requested one
_MORE_EFFORT = 1.4
_FARTHER = 3  # factor for the effort if passages were the queries: questions are farther from passages
_DUE, _COVERED = 0.05, 0.8
_ONE_SIDED_95 = 1.645


@dataclass(frozen=True, slots=True)
class AnnReport:
    """What was built: a file of ``num_bytes`` for ``num_passages``.

    ``recalls`` holds, for several depths, the fraction of the exact top ``depth`` that a search of that depth finds:
    the mean over ``num_queries`` queries and its lower bound at 95 % confidence. ``first_ten`` is the fraction of the
    first ten passages of an exact search, by the full score, that a search with default settings ranks there: the
    mean over ``num_ranked`` queries. ``queries`` is "given" or "passages". ``ms`` and ``exact_ms`` are the times of a
    search at ``depth`` and of the exact scan; such a search visits ``num_visited`` rows, whose
    neighbours it compares with the query.
    """

    folder: str
    version: int
    num_passages: int
    target: float
    depth: int
    recalls: list[Recall]
    first_ten: float
    num_ranked: int
    queries: str
    num_queries: int
    ms: float
    exact_ms: float
    num_visited: float
    num_bytes: int
    bytes_per_passage: float
    seconds: float


@dataclass(frozen=True, slots=True)
class _TuningQueries:
    """``dot_queries`` [q, dim]; ``source_rows`` [q], the row each was made from, excluded from its results."""

    dot_queries: NDArray[np.float32]
    source_rows: NDArray[np.int64] | None


@shows(AnnSettings)
def build_ann(
    store: IndexStore,
    student: SearchStudent,
    settings: AnnSettings | None = None,
    *,
    queries: Iterable[QueryLike] | QueryLike | None = None,
    seed: int = 0,
    **changes: Any,
) -> AnnReport:
    """Build an approximate index of the latest version and choose how far a search of it goes.

    Other processes may write meanwhile: the write lock is held only while the file is moved into place. Passages they
    add are scanned exactly until the approximate index is built again. The graph is built by all threads that FAISS
    may use, so two builds differ a little.

    Args:
        store: the index.
        student: the student that made its vectors.
        settings: how much it is to find.
        queries: queries similar to those expected, not used for anything else. By default, passages of the index serve
            as queries, each to find other passages; real queries are distributed differently and may find less.
        seed: seed of the sample.
        changes: single fields of the settings, as in ``build_ann(store, student, recall=0.9)``.

    Raises:
        InputError: there are too few passages, the head has no inner product, or the target cannot be reached.
        IndexLockedError: another process is writing when the file is moved into place.
        StorageError: the file cannot be written.
        IndexMismatchError: another student made the index.
    """
    begin, settings = time.perf_counter(), AnnSettings.of(settings, **changes)
    recall, depth = settings.recall, settings.depth
    texts = None if queries is None else [query.text for query in queries_of(queries)]
    view = LocalSegment(store)
    base = _checked(view, student, depth)
    random = np.random.default_rng(seed)
    live = view.live_rows()
    tuning = _tuning_queries(view, student, texts, live, random)
    with progress_bar("building", view.capacity + len(tuning.dot_queries)) as advance:
        graph = empty_graph(_sample(view, live, random))
        for start in range(0, view.capacity, _BLOCK_ROWS):
            end = min(start + _BLOCK_ROWS, view.capacity)
            graph.add(_directions(view.block(start, end)))
            advance(end - start)
        record = _record(base, tuning, len(live), view.capacity, recall)
        deepest = min(depth * _DEEPER, len(live) - 1)
        exact = _exact(base, tuning, deepest, advance)
    ann = _tuned(view, AnnIndex(base, graph, record), tuning, exact, depth)
    ranked = _ranked_queries(view, texts, random)
    first_ten = _first_ten(view.with_ann(ann), student, ranked)
    ann = AnnIndex(base, graph, replace(ann.record, first_ten=first_ten))
    with store.writing(), storage_errors(store.folder):
        if store.vectors.generation(store.table()) != base.generation:
            raise InputError(f"{store.folder}: the index was compacted or restored during the build; build again")
        record = write_ann(ann)
    ms, exact_ms, num_visited = _times(view, ann, tuning, depth)
    return AnnReport(
        folder=str(store.folder),
        version=base.version,
        num_passages=len(live),
        target=recall,
        depth=depth,
        recalls=[Recall(**values) for values in record.recalls],  # pyright: ignore[reportArgumentType]
        first_ten=first_ten,
        num_ranked=len(ranked),
        queries=record.queries,
        num_queries=record.num_queries,
        ms=ms,
        exact_ms=exact_ms,
        num_visited=num_visited,
        num_bytes=record.num_bytes,
        bytes_per_passage=round(record.num_bytes / len(live), 1),
        seconds=time.perf_counter() - begin,
    )


def renew_ann(store: IndexStore, student: SearchStudent, num_encoded: int) -> None:
    """Build the approximate index of a store after so many of its passages were encoded, if that is worth it.

    It must be wanted (``IndexShape.approximate``), cover less than four fifths of the rows, and be due: who encoded a
    twentieth of the passages waited longer for that than for this. Where it cannot be built, the exact scan is used.
    """
    if not store.manifest["approximate"] or not student.has_dot or num_encoded < MIN_PASSAGES * _DUE:
        return
    num_passages = len(store.table())
    if num_passages < MIN_PASSAGES or num_encoded < _DUE * num_passages:
        return
    view = PassageView(store)
    covered = 0 if view.ann is None else view.ann.record.covered
    if covered >= _COVERED * view.capacity:
        return
    try:
        build_ann(store, student)
    except (InputError, IndexLockedError) as error:
        _log.info("no approximate index: %s", error)


def _checked(view: PassageView, student: SearchStudent, depth: int) -> AnnBase:
    view.check_student(student.fingerprint)
    if not student.has_dot:
        raise InputError("this student's head has no inner product that an index could use; it is searched exactly")
    folder = view.store.folder
    if len(view) < MIN_PASSAGES:
        raise InputError(
            f"{folder}: holds {len(view):,} passages; below {MIN_PASSAGES:,} the exact scan is faster, so use that"
        )
    if depth * 4 > len(view):
        raise InputError(f"{folder}: depth {depth:,} is more than a quarter of its {len(view):,} passages; lower it")
    if view.ann_base is None:
        raise InputError(f"{folder}: its vectors could not be written beside the table; see the log and fix that first")
    return view.ann_base


def _tuning_queries(
    view: PassageView,
    student: SearchStudent,
    texts: Sequence[str] | None,
    live: NDArray[np.int64],
    random: np.random.Generator,
) -> _TuningQueries:
    if texts is None:
        source_rows = np.sort(random.choice(live, min(NUM_QUERIES, len(live)), replace=False))
        return _TuningQueries(student.query_vectors(view.vectors(source_rows), view.task), source_rows)
    if not texts:
        raise InputError("the list of queries is empty; give some, or omit it to use passages as queries")
    chosen = random.choice(len(texts), min(NUM_QUERIES, len(texts)), replace=False)
    vectors = student.encode_queries([texts[int(index)] for index in chosen]).vectors
    return _TuningQueries(student.query_vectors(vectors, view.task), None)


def empty_graph(sample: NDArray[np.float32]) -> Any:
    """FAISS' index without rows, for vectors like those of a sample [n, dim].

    While it is built, it has a copy of the vectors in 8 bits a dimension.
    """
    faiss = load_faiss()
    graph = faiss.IndexHNSWSQ(sample.shape[1], faiss.ScalarQuantizer.QT_8bit, NEIGHBOURS, faiss.METRIC_INNER_PRODUCT)
    graph.hnsw.efConstruction = CONSTRUCTION_EFFORT
    graph.train(sample)
    return graph


def _record(base: AnnBase, tuning: _TuningQueries, num_rows: int, covered: int, recall: float) -> AnnRecord:
    """What is known before the search of the graph is tuned."""
    return AnnRecord(
        base.student,
        base.format.kind,
        base.version,
        base.since,
        covered,
        num_rows,
        [[1, 1]],
        recall,
        "passages" if tuning.source_rows is not None else "given",
        len(tuning.dot_queries),
        [],
    )


def _sample(view: PassageView, live: NDArray[np.int64], random: np.random.Generator) -> NDArray[np.float32]:
    rows = np.sort(random.choice(live, min(_SAMPLE_ROWS, len(live)), replace=False))
    return _directions(view.vectors(rows))


def _directions(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """The vectors with length 1: among inner products, long vectors would be the neighbours of all others.

    Rows are linked by direction and searched by inner product. Of the fake student's vectors of wikiqa, whose norms are
    4 to 85, that finds all of the first 100 where links by inner product find .83.
    """
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def _others(tuning: _TuningQueries, query_index: int, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Rows found for a query, excluding its source passage."""
    return rows if tuning.source_rows is None else rows[rows != tuning.source_rows[query_index]]


def _exact(base: AnnBase, tuning: _TuningQueries, depth: int, advance: Advance) -> list[NDArray[np.int64]]:
    """The nearest rows of each query: among all rows, as the graph has dead ones too, and a search goes past them."""
    begin = time.perf_counter()
    exact: list[NDArray[np.int64]] = []
    for index, dot_query in enumerate(tuning.dot_queries):
        rows, _ = base.scan.search(dot_query, depth + 1, ids_of=lambda rows: rows.astype(str).tolist())
        exact.append(_others(tuning, index, rows)[:depth])
        advance(1)
    _log.info("exact scans at depth %d: %.1f s", depth, time.perf_counter() - begin)
    return exact


def _tuned(
    view: PassageView, ann: AnnIndex, tuning: _TuningQueries, exact: Sequence[NDArray[np.int64]], depth: int
) -> AnnIndex:
    """The index with as much effort at each depth as the target needs."""
    deepest = min(len(rows) for rows in exact)
    reported = sorted({*(shallow for shallow in _REPORTED if shallow < depth), depth})
    depths = sorted({*reported, *(min(depth * 2**double, deepest) for double in range(1, _DEEPER.bit_length()))})
    efforts: list[list[int]] = []
    recalls: list[Recall] = []
    for at in depths:
        effort = max(at, efforts[-1][1] if efforts else 1)
        while (found := _measured(ann, tuning, exact, at, effort)) is None:
            effort = math.ceil(effort * _MORE_EFFORT)
            if effort > MAX_EFFORT * view.capacity:
                break
        if found is None:
            if at <= depth:
                raise InputError(
                    f"{view.store.folder}: finding {ann.record.target:.4g} of the first {at:,} would take as long as "
                    "the exact scan; lower the recall or the depth, or search exactly"
                )
            break
        efforts.append([at, effort])
        recalls += [found] if at in reported else []
    if tuning.source_rows is not None:
        efforts = [[at, _FARTHER * effort] for at, effort in efforts]
    tuned = replace(ann.record, efforts=efforts, recalls=[asdict(recall) for recall in recalls])
    return AnnIndex(ann.base, ann.graph, tuned)


def _at_least(recalls: NDArray[np.float64]) -> NDArray[np.float64]:
    """[q, ...] -> lower bound of the mean over queries at 95 % confidence (normal approximation)."""
    spread = recalls.std(axis=0, ddof=1) if len(recalls) > 1 else np.zeros(recalls.shape[1:])
    return recalls.mean(axis=0) - _ONE_SIDED_95 * spread / len(recalls) ** 0.5


def _measured(
    ann: AnnIndex, tuning: _TuningQueries, exact: Sequence[NDArray[np.int64]], depth: int, effort: int
) -> Recall | None:
    """Recall at ``depth`` with this effort; None if it is below the target, which a part of the queries may show."""
    target = ann.record.target
    allowed = (1 - target) * len(exact) + 1e-9  # more than this cannot be lost, however the other queries do
    recalls = np.zeros(len(exact))
    for index, rows in enumerate(exact):
        wanted = rows[:depth]
        found = ann.nearest(tuning.dot_queries[index], depth + int(tuning.source_rows is not None), effort)
        recalls[index] = np.isin(wanted, _others(tuning, index, found)).sum() / max(len(wanted), 1)
        allowed -= 1 - recalls[index]
        if allowed < 0:
            return None
    at_least = float(_at_least(recalls))
    return Recall(depth, effort, float(recalls.mean()), at_least) if at_least >= target else None


def _ranked_queries(
    view: PassageView, texts: Sequence[str] | None, random: np.random.Generator
) -> list[tuple[Query, str]]:
    """A sample of the queries, or the beginnings of passages; each with the id of its passage, if any."""
    if texts is not None:
        chosen = random.choice(len(texts), min(NUM_RANKED, len(texts)), replace=False)
        return [(Query(str(index), texts[int(index)]), "") for index in chosen]
    live = view.live_rows()
    passages = view.passages(np.sort(random.choice(live, min(NUM_RANKED, len(live)), replace=False)))
    return [(Query(p.id, " ".join(p.full_text.split()[:_QUERY_WORDS])), p.id) for p in passages]


def _first_ten(view: LocalSegment, student: SearchStudent, queries: Sequence[tuple[Query, str]]) -> float:
    """Mean fraction of the first ten of an exact search that a search by default ranks there, without the sources."""
    index = IndexView(Storage.single(view.store), [view])
    rankings = [
        Searcher(index, student, SearchSettings(top_k=_FIRST + 1, exact=is_exact)).rank([query for query, _ in queries])
        for is_exact in (True, False)
    ]
    fractions: list[float] = []
    for (_, source), *both in zip(queries, *rankings, strict=True):
        ids = [[one.passage.id for one in ranking.passages if one.passage.id != source][:_FIRST] for ranking in both]
        fractions.append(len({*ids[0]} & {*ids[1]}) / max(len(ids[0]), 1))
    return fmean(fractions)


def _times(view: PassageView, ann: AnnIndex, tuning: _TuningQueries, depth: int) -> tuple[float, float, float]:
    """Median milliseconds of a search and of the exact scan, and the mean number of rows that a search visits."""
    search, counts = AnnSearch(ann, view.live, view.ids), load_faiss().cvar.hnsw_stats
    times: list[tuple[float, float, float]] = []
    for dot_query in tuning.dot_queries[:50]:
        counts.reset()
        begin = time.perf_counter()
        search.search(dot_query, depth)
        between = time.perf_counter()
        view.scan(dot_query, depth)
        times.append((1e3 * (between - begin), 1e3 * (time.perf_counter() - between), counts.nhops))
    ms, exact_ms, _ = np.median(np.array(times), axis=0).tolist()
    return ms, exact_ms, float(np.mean([visited for _, _, visited in times]))
