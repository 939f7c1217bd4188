"""The ``ann`` verb: build an approximate index beside the vectors and tune it to a requested recall."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# (faiss ships no types)

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from d2llm.core.errors import InputError
from d2llm.core.progress import progress_bar
from d2llm.core.types import DEFAULT_NUM_CANDIDATES
from d2llm.data.python_records import QueryLike, queries_of
from d2llm.retrieval.protocols import SearchStudent
from d2llm.store.ann import AnnBase, AnnIndex, AnnRecord, AnnSearch, Recall, write_ann
from d2llm.store.index_store import IndexStore
from d2llm.store.load_faiss import load_faiss
from d2llm.store.storage import storage_errors
from d2llm.store.view import PassageView

_log = logging.getLogger(__name__)
MIN_PASSAGES = 20_000
"""With fewer passages, the exact scan is faster."""
NUM_QUERIES = 400
"""Maximum number of queries used to measure recall."""
_LISTS = 4.0  # lists = 4 sqrt(n), FAISS's rule; twice as many probe 15 % fewer rows but train five times as long
_SAMPLES_PER_LIST = 40  # FAISS warns below 39
_SAMPLE_BYTES = 256 << 20
ITERATIONS = 8
"""Of the clustering that makes the lists; each compares all samples with all lists."""
_BLOCK_ROWS = 16_384
_DEEPER = 8  # with a filter that keeps 1/8 of the rows, a top-k search reaches as deep as an unfiltered top-8k search
_REPORTED = (10, 100)  # depths reported in addition to the requested one
_ONE_SIDED_95 = 1.645
_MORE_PROBES = 1.15


@dataclass(frozen=True, slots=True)
class AnnReport:
    """What was built: a file of ``num_bytes`` for ``num_passages`` in ``num_lists`` lists.

    ``recalls`` holds, for several depths, the fraction of the exact top ``depth`` that a search of that depth finds:
    the mean over ``num_queries`` queries and its lower bound at 95 % confidence. ``first_ten`` is the fraction of the
    exact top ten among the candidates of a search at the report's ``depth``, which is what a final ranking needs.
    ``queries`` is "given" or "passages". ``ms`` and ``exact_ms`` are the times of a search at ``depth`` and of the
    exact scan.
    """

    folder: str
    version: int
    num_passages: int
    num_lists: int
    target: float
    depth: int
    recalls: list[Recall]
    first_ten: float
    queries: str
    num_queries: int
    ms: float
    exact_ms: float
    num_bytes: int
    bytes_per_passage: float
    seconds: float


@dataclass(frozen=True, slots=True)
class _TuningQueries:
    """``dot_queries`` [q, dim]; ``own`` [q], the row each was made from, excluded from its results."""

    dot_queries: NDArray[np.float32]
    own: NDArray[np.int64] | None


def default_num_lists(num_passages: int) -> int:
    """The number of lists of an approximate index, unless another is given."""
    return round(_LISTS * num_passages**0.5)


def num_samples(num_passages: int, num_lists: int, dim: int) -> int:
    """The number of vectors that are clustered to make the lists."""
    return min(num_passages, num_lists * _SAMPLES_PER_LIST, _SAMPLE_BYTES // (4 * dim))


def build_ann(
    store: IndexStore,
    student: SearchStudent,
    *,
    recall: float = 0.95,
    depth: int = DEFAULT_NUM_CANDIDATES,
    queries: Iterable[QueryLike] | QueryLike | None = None,
    num_lists: int | None = None,
    seed: int = 0,
) -> AnnReport:
    """Build an approximate index of the latest version and choose how many lists a search probes.

    Other processes may write meanwhile: the write lock is held only while the file is moved into place. Passages they
    add are scanned exactly until the approximate index is built again.

    Args:
        store: the index.
        student: the student that made its vectors.
        recall: the fraction of the exact top ``depth`` to find, above 0 and at most 1, with 95 % confidence.
            Misses are mostly at the end: at 0.95 of 1,000, 0.997 of the first ten were found (101,583 real texts).
        depth: the number of candidates of a search.
        queries: queries similar to those expected, not used for anything else. By default, passages of the index serve
            as queries, each to find other passages; real queries are distributed differently and may find less.
        num_lists: number of lists; by default 4 sqrt(passages).
        seed: seed of the sample.

    Raises:
        InputError: there are too few passages, the head has no inner product, or the target cannot be reached.
        IndexLockedError: another process is writing when the file is moved into place.
        StorageError: the file cannot be written.
        IndexMismatchError: another student made the index.
    """
    begin = time.perf_counter()
    texts = None if queries is None else [query.text for query in queries_of(queries)]
    view = PassageView(store)
    base = _checked(view, student, recall, depth)
    random = np.random.default_rng(seed)
    live = view.live_rows()
    tuning = _tuning_queries(view, student, texts, live, random)
    num_lists = num_lists or default_num_lists(len(live))
    with progress_bar("building", len(live) + len(tuning.dot_queries)) as advance:
        index = _trained(view, live, num_lists, random)
        for start in range(0, len(live), _BLOCK_ROWS):
            rows = live[start : start + _BLOCK_ROWS]
            index.add_with_ids(view.vectors(rows), rows)
            advance(len(rows))
        record = AnnRecord(
            base.student,
            base.format.kind,
            base.version,
            base.since,
            int(live[-1]) + 1,
            len(live),
            num_lists,
            [[1, 1]],
            recall,
            "passages" if tuning.own is not None else "given",
            len(tuning.dot_queries),
            [],
        )
        deepest = min(depth * _DEEPER, len(live) - 1)
        begin_exact = time.perf_counter()
        exact: list[NDArray[np.int64]] = []
        for place in range(len(tuning.dot_queries)):
            exact.append(_others(tuning, place, view.scan(tuning.dot_queries[place], deepest + 1).rows)[:deepest])
            advance(1)
        _log.info("exact scans at depth %d: %.1f s", deepest, time.perf_counter() - begin_exact)
    ann = _tuned(view, AnnIndex(base, index, record), tuning, exact, depth)
    with store.writing(), storage_errors(store.folder):
        if store.vectors.generation(store.table()) != base.generation:
            raise InputError(f"{store.folder}: the index was compacted or restored during the build; build again")
        record = write_ann(ann)
    ms, exact_ms = _times(view, ann, tuning, depth)
    return AnnReport(
        folder=str(store.folder),
        version=base.version,
        num_passages=len(live),
        num_lists=num_lists,
        target=recall,
        depth=depth,
        recalls=[Recall(**values) for values in record.recalls],  # pyright: ignore[reportArgumentType]
        first_ten=_first_ten(view, ann, tuning, exact, depth),
        queries=record.queries,
        num_queries=record.num_queries,
        ms=ms,
        exact_ms=exact_ms,
        num_bytes=record.num_bytes,
        bytes_per_passage=round(record.num_bytes / len(live), 1),
        seconds=time.perf_counter() - begin,
    )


def _checked(view: PassageView, student: SearchStudent, recall: float, depth: int) -> AnnBase:
    view.check_student(student.fingerprint)
    if not 0 < recall <= 1 or depth < 1:
        raise InputError(f"recall is {recall} and depth is {depth}; recall must be in (0, 1] and depth at least 1")
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
        own = np.sort(random.choice(live, min(NUM_QUERIES, len(live)), replace=False))
        return _TuningQueries(student.query_vectors(view.vectors(own), view.task), own)
    if not texts:
        raise InputError("the list of queries is empty; give some, or omit it to use passages as queries")
    chosen = random.choice(len(texts), min(NUM_QUERIES, len(texts)), replace=False)
    vectors = student.encode_queries([texts[int(place)] for place in chosen]).vectors
    return _TuningQueries(student.query_vectors(vectors, view.task), None)


def _trained(view: PassageView, live: NDArray[np.int64], num_lists: int, random: np.random.Generator) -> Any:
    """A trained FAISS index without rows. Centroids have length 1, since all vectors have about the same length."""
    faiss = load_faiss()
    sample_size = num_samples(len(live), num_lists, view.dim)
    sample = view.vectors(np.sort(random.choice(live, sample_size, replace=False)))
    kind, metric = faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT
    index = faiss.IndexIVFScalarQuantizer(faiss.IndexFlatIP(view.dim), view.dim, num_lists, kind, metric)
    index.cp.niter, index.cp.spherical, index.cp.min_points_per_centroid = ITERATIONS, True, 1
    index.train(sample)
    return index


def _others(tuning: _TuningQueries, place: int, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Rows found for a query, without the passage it was made from."""
    return rows if tuning.own is None else rows[rows != tuning.own[place]]


def _tuned(
    view: PassageView, ann: AnnIndex, tuning: _TuningQueries, exact: Sequence[NDArray[np.int64]], depth: int
) -> AnnIndex:
    """The index with as many probes at each depth as the target needs, confirmed by searches."""
    target, num_lists = ann.record.target, ann.record.num_lists
    deepest = min(len(rows) for rows in exact)
    reported = sorted({*(shallow for shallow in _REPORTED if shallow < depth), depth})
    depths = sorted({*reported, *(min(depth * 2**double, deepest) for double in range(1, _DEEPER.bit_length()))})
    probes = np.maximum.accumulate(_probes_needed(ann, tuning, exact, depths))
    while True:
        ladder = [[at, int(count)] for at, count in zip(depths, probes, strict=True)]
        ann = AnnIndex(ann.base, ann.faiss_index, replace(ann.record, probes=ladder))
        recalls = [_measured(view, ann, tuning, exact, at) for at in reported]
        if recalls[-1] is None:
            fraction = float(ann.probes_for(np.array([depth], np.float64))[0]) / num_lists
            raise InputError(
                f"{view.store.folder}: finding {target:.4g} of the first {depth:,} would read {fraction:.0%} of the "
                "vectors, and the exact scan is faster; lower the recall or the depth, or search exactly"
            )
        measured = [recall for recall in recalls if recall is not None]
        if all(recall.at_least >= target for recall in measured):
            return AnnIndex(ann.base, ann.faiss_index, replace(ann.record, recalls=[asdict(one) for one in measured]))
        probes = np.minimum(np.ceil(probes * _MORE_PROBES), num_lists)  # 8-bit codes lose some recall


def _probes_needed(
    ann: AnnIndex, tuning: _TuningQueries, exact: Sequence[NDArray[np.int64]], depths: Sequence[int]
) -> NDArray[np.float64]:
    """The smallest number of probes at each depth whose lists hold the target's fraction of the exact results.

    No search is needed: a row is found if its list is probed, so the rank of its list gives the number of probes.
    """
    num_lists = ann.record.num_lists
    recalls = np.zeros((len(depths), len(exact), num_lists), np.float32)
    for query, rows in enumerate(exact):
        place = np.empty(num_lists, np.int64)
        place[np.argsort(-(ann.centroids @ tuning.dot_queries[query]), kind="stable")] = np.arange(num_lists)
        places = place[ann.list_of[rows]]
        for number, depth in enumerate(depths):
            recalls[number, query] = np.cumsum(np.bincount(places[:depth], minlength=num_lists)) / min(depth, len(rows))
    needed = [
        np.argmax(_at_least(recalls_at_depth.astype(np.float64)) >= ann.record.target) + 1
        for recalls_at_depth in recalls
    ]
    return np.array(needed, np.float64)


def _at_least(recalls: NDArray[np.float64]) -> NDArray[np.float64]:
    """[q, ...] -> lower bound of the mean over queries at 95 % confidence (normal approximation)."""
    spread = recalls.std(axis=0, ddof=1) if len(recalls) > 1 else np.zeros(recalls.shape[1:])
    return recalls.mean(axis=0) - _ONE_SIDED_95 * spread / len(recalls) ** 0.5


def _measured(
    view: PassageView, ann: AnnIndex, tuning: _TuningQueries, exact: Sequence[NDArray[np.int64]], depth: int
) -> Recall | None:
    """Measured recall at ``depth``; None if probing that many lists takes as long as the exact scan."""
    search = AnnSearch(ann, view.live, view.ids)
    num_probes = search.num_probes(tuning.dot_queries[0], depth)
    if num_probes is None:
        return None
    recalls = np.zeros(len(exact))
    for place, rows in enumerate(exact):
        result = search.search(tuning.dot_queries[place], depth if tuning.own is None else depth + 1)
        # If the lists hold too few rows, the exact scan answers.
        recalls[place] = 1.0 if result is None else np.isin(rows[:depth], _others(tuning, place, result[0])).mean()
    return Recall(depth, num_probes, float(recalls.mean()), float(_at_least(recalls)))


def _first_ten(
    view: PassageView, ann: AnnIndex, tuning: _TuningQueries, exact: Sequence[NDArray[np.int64]], depth: int
) -> float:
    """Mean fraction of the exact top ten that a search at ``depth`` finds."""
    search = AnnSearch(ann, view.live, view.ids)
    fractions: list[float] = []
    for dot_query, rows in zip(tuning.dot_queries, exact, strict=True):
        result = search.search(dot_query, depth)
        fractions.append(1.0 if result is None else float(np.isin(rows[: min(10, depth)], result[0]).mean()))
    return sum(fractions) / len(fractions)


def _times(view: PassageView, ann: AnnIndex, tuning: _TuningQueries, depth: int) -> tuple[float, float]:
    """Median milliseconds of a search and of the exact scan."""
    search = AnnSearch(ann, view.live, view.ids)
    times: list[tuple[float, float]] = []
    for dot_query in tuning.dot_queries[:50]:
        begin = time.perf_counter()
        search.search(dot_query, depth)
        between = time.perf_counter()
        view.scan(dot_query, depth)
        times.append((1e3 * (between - begin), 1e3 * (time.perf_counter() - between)))
    ms, exact_ms = np.median(np.array(times), axis=0).tolist()
    return ms, exact_ms
