"""The exact top k of a corpus, proved without computing the full score of every passage.

A final score is dot + R_q r_p tanh(g) (method: ``models.interaction``), so it is at most its bound,
dot + R_q r_p. Score features (``models.score_features``) count as a part of the inner product: BM25 scores and MaxSim
are computed for all rows at once, and for BM25 of their best windows an upper bound. Passages are scored in order of
decreasing bound until the k-th best score is above the bounds of all remaining passages. An exact scan for the highest
inner products is usually enough, because no passage outside the scan has a higher inner product than the scan's last.
If that proves nothing, and always with score features, one pass over all vectors computes every bound.

Exact means that the ranking (ties by id) equals that of all passages scored in the same arithmetic, in which
score = float32(dot + float32(bound * change)) and upper = float32(dot + bound), with the inner products of the scan or
of the full pass, and -1 <= change <= 1. Rounding is monotonic, so score <= bound holds in that arithmetic, regardless
of the precision of the change. These scores differ from those of ``Student.score`` by float32 rounding at most, because
a product over a different number of rows may be summed in a different order.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from d2llm.core.errors import InputError
from d2llm.core.inputs import check_count
from d2llm.core.types import Certificate, Task
from d2llm.models.protocols import PairScorer, VectorStudent
from d2llm.models.row_features import RowFeatures, RowScorer
from d2llm.ops.selection import check_scores, from_the_highest, top_rows
from d2llm.retrieval.segments import CachedBounds, CertifiedRows, joint_rows
from d2llm.store.view import PassageView

_PASS_ROWS = 1_024  # of the pass over all vectors, in a block: few enough for the cache
_SCANS = (1_024, 8_192)
"""Sizes of the scans tried before the pass over all vectors, which takes as long as four scans."""
_SCAN_MULTIPLE = 8  # if the corpus is smaller than this multiple of a scan's size, use the full pass instead
_FIRST_SCORED, _MAX_SCORED = 128, 4_096  # passages scored at a time: few at first, as the proof may be found early
_MIN_SCORED = 64  # near the deadline, smaller calls are not worth their overhead
_NO_LIMIT = 1 << 62


def certified_top_k(
    view: PassageView,
    student: VectorStudent,
    query_vector: NDArray[np.float32],
    task: Task,
    top_k: int,
    *,
    allowed: NDArray[np.bool_] | None = None,
    budget_ms: float | None = None,
    cached: CachedBounds | None = None,
    score_features: RowFeatures | None = None,
    floor: float = -math.inf,
    prepared: PairScorer | None = None,
) -> CertifiedRows:
    """The ``top_k`` live and allowed passages with the highest final scores, with a proof; ties by id.

    If the student's score has no bound (head ``paper``, or a ``PlainStudent``), every passage is scored.
    If the interaction has no weight, the index's exact scan is the answer. Memory: a few float32 numbers per row.

    If ``top_k`` exceeds the corpus, every passage is ranked. ``allowed`` [capacity] marks the rows that pass a filter;
    None allows all. ``cached`` caches values for all rows of this view: this search reads and fills it.
    ``score_features`` is the query's, if the student's score has any; ``prepared`` is the student's scorer for the
    query, made now unless it is given.

    ``floor``: passages with lower scores are of no interest, because ``top_k`` others that are not in this view have at
    least this score (``merge_certified``). The search ends as soon as no other passage can reach it; the ranking may
    then be shorter, and ``proved`` counts what is certain without knowing the others.

    ``budget_ms`` limits the time; ``certificate.proved`` tells how many places are certain by then. One scan of the
    vectors and the first ``top_k`` scores are always computed, so the ranking always has min(k, matching) places.

    Raises:
        InputError: ``top_k`` is below 1, or the budget is negative or NaN.
        ModelError: the student returned a score that is NaN.
    """
    begin = time.perf_counter()
    check_count(top_k, "top_k")
    if budget_ms is not None and not budget_ms >= 0:
        raise InputError(f"the budget is {budget_ms} ms, but must be at least 0")
    clock, cached = _Clock(begin, budget_ms, floor), cached or CachedBounds()
    _check_masks(view, allowed)
    row_scorer = RowScorer(view, student, query_vector, task, score_features, prepared)
    scorer = row_scorer.prepared
    if scorer is None or scorer.dot_query is None:
        rows = view.live_rows(allowed)
        uppers = np.broadcast_to(np.float32(np.inf), len(rows))
        in_order = iter([np.arange(len(rows), dtype=np.int64)])
        result = _score_from_the_top(view, rows, uppers, in_order, row_scorer, top_k, clock)
        if student.has_dot:
            dot_query = student.query_vectors(query_vector[None], task)[0]
            return result._replace(dots=view.vectors(result.rows) @ dot_query)
        return result
    mask = view.mask(allowed)
    total = view.capacity if mask is None else int(np.count_nonzero(mask))
    if score_features is None:
        if scorer.bound == 0:
            return _scan(view, scorer.dot_query, total, top_k, allowed)
        early = _by_scans(
            view, student, row_scorer, scorer.bound, scorer.dot_query, total, top_k, allowed, cached.values, clock
        )
        if early is not None:
            return early
    rows = view.live_rows(allowed)
    dots, bound = _pass(view, student, scorer, scorer.dot_query, cached)
    final, products, widths = _finals(row_scorer, dots, bound), dots[rows], bound[rows]
    uppers = products + widths
    if score_features is not None and len(rows):
        others = uppers

        def needed_of(words: NDArray[np.float32]) -> NDArray[np.float32]:
            """What the features of each row must add for it to be among the best ``top_k``, at least."""
            first = top_rows(check_scores(others + words), max(_FIRST_SCORED, top_k), None)
            scores = check_scores(final(np.sort(rows[first])))
            known = np.partition(scores, -top_k)[-top_k] if len(scores) >= top_k else -math.inf
            return np.float32(max(known, clock.floor)) - others

        uppers = products + score_features.bounds(rows, needed_of) + widths
    check_scores(uppers)
    blocks = from_the_highest(uppers, max(_MAX_SCORED, top_k))
    result = _score_from_the_top(view, rows, uppers, blocks, final, top_k, clock)
    return result._replace(dots=dots[result.rows])


def _check_masks(view: PassageView, allowed: NDArray[np.bool_] | None) -> None:
    for mask in (view.live, allowed):
        if mask is not None and mask.shape != (view.capacity,):
            raise InputError(f"a mask of rows has shape {mask.shape}, but the index has {view.capacity} rows")


def _scan(
    view: PassageView, dot_query: NDArray[np.float32], total: int, top_k: int, allowed: NDArray[np.bool_] | None
) -> CertifiedRows:
    """The exact scan, if the score is the inner product alone; one row deeper, for the best score left out."""
    result = view.scan(dot_query, top_k + 1, allowed)
    rows, scores = result.rows[:top_k], result.scores[:top_k]
    next_score = float(result.scores[top_k]) if len(result.scores) > top_k else -math.inf
    kth_score = float(scores[-1]) if len(scores) else -math.inf
    certificate = Certificate(len(rows), total - len(rows), next_score, kth_score, len(rows))
    return CertifiedRows(rows, scores, scores, certificate)


def _by_scans(
    view: PassageView,
    student: VectorStudent,
    row_scorer: RowScorer,
    query_bound: float,
    dot_query: NDArray[np.float32],
    total: int,
    top_k: int,
    allowed: NDArray[np.bool_] | None,
    passage_bounds: NDArray[np.float32] | None,
    clock: _Clock,
) -> CertifiedRows | None:
    """The top ``top_k`` from the passages with the highest inner products; None if these do not prove the ranking."""
    largest = np.float32(query_bound) * np.float32(1 if passage_bounds is None else passage_bounds.max(initial=0))
    for num_scanned in _SCANS:
        if max(num_scanned, top_k) * _SCAN_MULTIPLE > total or not np.isfinite(dot_query).all():
            return None
        scanned = view.scan(dot_query, max(num_scanned, top_k), allowed)
        order = np.argsort(scanned.rows)
        rows, dots = scanned.rows[order], scanned.scores[order]
        bound = student.passage_bound(view.vectors(rows)) if passage_bounds is None else passage_bounds[rows]
        bound = np.float32(query_bound) * bound
        uppers = check_scores(dots + bound)
        blocks = from_the_highest(uppers, max(_MAX_SCORED, top_k))
        final = _finals(row_scorer, dots, bound, rows)
        result = _score_from_the_top(view, rows, uppers, blocks, final, top_k, clock)
        highest_left = max(result.certificate.highest_bound_left, float(dots.min() + largest))
        if max(result.certificate.kth_score, clock.floor) > highest_left or clock.num_fitting() == 0:
            certificate = replace(
                result.certificate,
                num_left=total - result.certificate.num_scored,
                highest_bound_left=highest_left,
                proved=int((result.scores > highest_left).sum()),
            )
            return CertifiedRows(result.rows, result.scores, dots[np.searchsorted(rows, result.rows)], certificate)
    return None


def _finals(
    row_scorer: RowScorer,
    dots: NDArray[np.float32],
    bound: NDArray[np.float32],
    rows: NDArray[np.int64] | None = None,
) -> Callable[[NDArray[np.int64]], NDArray[np.float32]]:
    """A function from rows to final scores; ``dots`` and ``bound`` are for ``rows`` (ascending), or for all rows."""

    def final(chosen: NDArray[np.int64]) -> NDArray[np.float32]:
        positions = chosen if rows is None else np.searchsorted(rows, chosen)
        change = np.clip(row_scorer.change(chosen), -1, 1).astype(np.float32, copy=False)
        base = dots[positions]
        if row_scorer.score_features is not None:
            base = base + row_scorer.score_features(chosen)
        return np.add(base, bound[positions] * change, dtype=np.float32)

    return final


def _pass(
    view: PassageView,
    student: VectorStudent,
    scorer: PairScorer,
    dot_query: NDArray[np.float32],
    cached: CachedBounds,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Inner product and R_q r_p of every row, float32 [capacity]; values of deleted rows are arbitrary."""
    dots = np.empty(view.capacity, np.float32)
    bound = np.empty(view.capacity, np.float32) if cached.values is None else cached.values
    for start in range(0, view.capacity, _PASS_ROWS):
        end = min(start + _PASS_ROWS, view.capacity)
        block = view.block(start, end)
        dots[start:end] = block @ dot_query
        if cached.values is None:
            bound[start:end] = student.passage_bound(block)
    if cached.values is None:
        cached.keep(bound)
    return dots, np.float32(scorer.bound) * bound


def _score_from_the_top(
    view: PassageView,
    rows: NDArray[np.int64],
    uppers: NDArray[np.float32],
    blocks: Iterator[NDArray[np.int64]],
    score: Callable[[NDArray[np.int64]], NDArray[np.float32]],
    top_k: int,
    clock: _Clock,
) -> CertifiedRows:
    """Score passages in the order of ``blocks`` (places in ``rows``, by falling bound) until the top k are certain."""
    scored: list[NDArray[np.int64]] = []
    scores = [np.zeros(0, np.float32)]
    best = scores[0]  # the top_k best scores so far, in any order
    num, size = 0, max(_FIRST_SCORED, top_k)
    for part in blocks:
        start = 0
        while start < len(part):
            highest_left = float(uppers[part[start]])
            # A passage whose bound equals the k-th score may have a smaller id.
            certain = highest_left < clock.floor or (len(best) == top_k and highest_left < best.min())
            fitting = size if num < top_k else min(size, clock.num_fitting())
            if certain or fitting == 0:
                return _ranked(view, scored, scores, top_k, len(rows), highest_left)
            chosen = np.sort(rows[part[start : start + fitting]])  # vectors are read in storage order
            start_time = time.perf_counter()
            new = check_scores(score(chosen))
            clock.seconds_per_passage = (time.perf_counter() - start_time) / len(chosen)
            scored.append(chosen)
            scores.append(new)
            best = np.concatenate((best, new))
            best = np.partition(best, len(best) - top_k)[-top_k:] if len(best) > top_k else best
            start, num, size = start + len(chosen), num + len(chosen), min(3 * size // 2, max(_MAX_SCORED, top_k))
    return _ranked(view, scored, scores, top_k, len(rows), -math.inf)


class _Clock:
    """Says when a search may end: the ``floor``, and how many more passages can be scored before the deadline."""

    def __init__(self, begin: float, budget_ms: float | None, floor: float) -> None:
        self.floor = floor
        self._deadline = math.inf if budget_ms is None else begin + budget_ms / 1000
        self.seconds_per_passage = 0.0

    def num_fitting(self) -> int:
        left = self._deadline - time.perf_counter()
        if left == math.inf:
            return _NO_LIMIT
        fitting = int(max(left, 0) / max(self.seconds_per_passage, 1e-9))
        return fitting if fitting >= _MIN_SCORED else 0


def _ranked(
    view: PassageView,
    scored: list[NDArray[np.int64]],
    scores: list[NDArray[np.float32]],
    top_k: int,
    total: int,
    highest_left: float,
) -> CertifiedRows:
    rows, values = np.concatenate([np.zeros(0, np.int64), *scored]), np.concatenate(scores)
    positions = top_rows(values, top_k, lambda positions: view.ids(rows[positions]))
    best = values[positions]
    certificate = Certificate(
        num_scored=len(rows),
        num_left=total - len(rows),
        highest_bound_left=highest_left,
        kth_score=float(best[-1]) if len(best) else -math.inf,
        proved=int((best > highest_left).sum()) if len(rows) < total else len(best),
    )
    return CertifiedRows(rows[positions], best, None, certificate)


def merge_certified(
    by_segment: Mapping[int, CertifiedRows], top_k: int, ids_of: Callable[[NDArray[np.int64]], Sequence[str]]
) -> CertifiedRows:
    """The top ``top_k`` of several segments from those of each, as joint rows, with the proof that follows from theirs.

    A passage that a segment has left out is not among the best of all if it is not among the best ``top_k`` of its
    segment. If a segment has not proved all of its places (a budget, or a floor), its passages that were not scored
    have scores of at most ``highest_bound_left``, so that what is above all these bounds is certain.

    Args:
        by_segment: what ``certified_top_k`` gave for each segment, with the same ``top_k``, by its place.
        top_k: length of the ranking.
        ids_of: returns the ids of joint rows.
    """
    if list(by_segment) == [0]:
        return by_segment[0]
    rows = np.concatenate(
        [np.zeros(0, np.int64), *(joint_rows(segment, part.rows) for segment, part in by_segment.items())]
    )
    scores = np.concatenate([np.zeros(0, np.float32), *(part.scores for part in by_segment.values())])
    positions = top_rows(scores, top_k, lambda chosen: ids_of(rows[chosen]))
    best = scores[positions]
    dots = [part.dots for part in by_segment.values() if part.dots is not None]
    certificates = [part.certificate for part in by_segment.values()]
    limits = [
        part.certificate.highest_bound_left
        for part in by_segment.values()
        if part.certificate.num_left and not part.certificate.proved == len(part.rows) == top_k
    ]
    certificate = Certificate(
        num_scored=sum(one.num_scored for one in certificates),
        num_left=sum(one.num_left for one in certificates),
        highest_bound_left=max((one.highest_bound_left for one in certificates), default=-math.inf),
        kth_score=float(best[-1]) if len(best) else -math.inf,
        proved=int((best > max(limits)).sum()) if limits else len(best),
    )
    all_dots = np.concatenate(dots)[positions] if len(dots) == len(by_segment) else None
    return CertifiedRows(rows[positions], best, all_dots, certificate)
