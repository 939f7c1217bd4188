"""The loops of BM25 (``store.bm25``): the best rows of a segment, and given rows with their best windows.

``best_rows`` finds the best rows by MaxScore (Turtle and Flood, Query evaluation: strategies and optimizations, 1995)
over ranges of rows: once enough rows are known, a range is skipped if what its terms can give together is too small
(``ops.bm25_bounds``), and the most frequent terms are only looked up for the rows that the rarer ones left in question,
if these are few. The score that a row must reach is known from a histogram, whose upkeep does not depend on ``top_k``.
The terms of a query come by descending weight, so what is looked up is always the end of the list, and every score is
summed in its order: bit for bit the score that reading all postings gives.

Files may be damaged in ways that no sample shows, so no number that was read is used as an index unchecked.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownParameterType=false
# pyright: reportUnknownArgumentType=false, reportMissingTypeStubs=false, reportArgumentType=false

from __future__ import annotations

import numpy as np
from numba import types
from numpy.typing import NDArray

from d2llm.ops import bm25_bounds
from d2llm.ops.bm25_bounds import RANGE
from d2llm.ops.kernels.compiler import compiled, inlined, read_only, written

_READ_ALL = 8  # up to so many postings for a row that is looked up, all are read: that is faster
_LOOK_UP = 16  # so many postings are added to sums while a row is looked up
_BELOW = 1.0 - 1e-6  # a score in a bin is at least the bin's start times this, whatever was rounded
_GROUP = 64  # rows whose sums are looked at only if one of them has a term
_TINY = 1e-38  # sums that are not 0 are above it
_ROUNDING = 1.0 + 1e-5  # no sum in float32 is above the same sum of float64 bounds, times this
_LEARNED = 65_535  # the unit of the shares of learned terms
_FILTER = 1 << 10  # of a row's words, most are seen not to be in the query by this many bits

_u32, _u16, _u8, _f32, _i64 = map(read_only, (types.uint32, types.uint16, types.uint8, types.float32, types.int64))
_largest_share = inlined(bm25_bounds.largest_share)
_count_ranges = inlined(bm25_bounds.count_ranges)


@inlined
def _check(
    starts: NDArray[np.int64],
    ends: NDArray[np.int64],
    shares_at: NDArray[np.int64],
    units: NDArray[np.int64],
    lengths: tuple[int, int, int],
    num_ranges: int,
) -> None:
    """Postings and shares must be among as many as there are: of texts, of added words, of shares."""
    for term in range(len(starts)):
        if starts[term] < 0 or ends[term] < starts[term] or ends[term] > lengths[0 if units[term] == 1 else 1]:
            raise ValueError("the postings of a term are not where they should be")
        if shares_at[term] >= 0 and shares_at[term] + num_ranges > lengths[2]:
            raise ValueError("the bounds of a term are not where they should be")


@inlined
def _first_at_least(rows: NDArray[np.uint32], start: int, end: int, row: int) -> int:
    """The first place from ``start`` on whose row is at least ``row``, by doubling steps; ``end`` if there is none."""
    step, low = 1, start
    while low + step < end and rows[low + step] < row:
        low += step
        step *= 2
    high = min(low + step, end)
    while low < high:
        middle = (low + high) // 2
        if rows[middle] < row:
            low = middle + 1
        else:
            high = middle
    return low


@inlined
def _lowest_of(bins: NDArray[np.int64], lowest_bin: int, num_above: int, top_k: int) -> tuple[int, int]:
    """The lowest bin that may have one of the ``top_k`` best, and how many scores are in it and above."""
    while num_above - bins[lowest_bin] >= top_k:
        num_above -= bins[lowest_bin]
        lowest_bin += 1
    return lowest_bin, num_above


@inlined
def _keep_best(
    chosen: NDArray[np.int64],
    scores: NDArray[np.float32],
    num_chosen: int,
    bins: NDArray[np.int64],
    bins_per_score: float,
    lowest: tuple[int, int],
    top_k: int,
) -> tuple[int, tuple[int, int]]:
    """Count the scores of the chosen rows in ``bins``, and drop rows of which ``top_k`` others are known to be better.

    ``lowest`` is as ``_lowest_of`` returns it.
    """
    kept = 0
    lowest_bin, num_above = lowest
    for at in range(num_chosen):
        bin_ = min(np.int64(scores[at] * bins_per_score), len(bins) - 1)
        if bin_ < lowest_bin:
            continue
        bins[bin_] += 1
        num_above += 1
        chosen[kept], scores[kept] = chosen[at], scores[at]
        kept += 1
        lowest_bin, num_above = _lowest_of(bins, lowest_bin, num_above, top_k)
    return kept, (lowest_bin, num_above)


@inlined
def _gain(weight: np.float32, times: np.uint16, unit: int, norm: np.float32) -> np.float32:
    """What a term adds to a row that has it so often; words are counted, of learned terms this is the share."""
    count = np.float32(times) if unit == 1 else np.float32(times / np.float64(unit))
    return weight * (count if unit == _LEARNED else count / (count + norm))


@inlined
def _add(
    sums: NDArray[np.float32],
    touched: NDArray[np.bool_],
    rows: NDArray[np.uint32],
    counts: NDArray[np.uint16],
    unit: int,
    extent: tuple[int, int],
    range_: tuple[int, int],
    weight: np.float32,
    norms: NDArray[np.float32],
    norm_of: NDArray[np.uint16],
) -> None:
    """Add the gains of a term to the sums of the rows of a range, and mark the groups of these rows."""
    for index in range(extent[0], extent[1]):
        row = np.int64(rows[index])
        if row < range_[0] or row >= range_[1]:
            raise ValueError("the rows of a term are not ascending")
        sums[row - range_[0]] += _gain(weight, counts[index], unit, norms[norm_of[row]])
        touched[(row - range_[0]) // _GROUP] = True


@inlined
def _add_up(
    weights: NDArray[np.float32],
    starts: NDArray[np.int64],
    ends: NDArray[np.int64],
    shares: NDArray[np.uint8],
    shares_at: NDArray[np.int64],
    range_: int,
    factor: float,
    rests: NDArray[np.float64],
) -> None:
    """Write to ``rests`` the most that the terms from each on can give to a row of a range."""
    for term in range(len(weights) - 1, -1, -1):
        most = np.float64(weights[term]) if ends[term] > starts[term] else 0.0
        if shares_at[term] >= 0:
            most *= _largest_share(shares[shares_at[term] + range_], factor)
        rests[term] = rests[term + 1] + most


@inlined
def _num_summed(rests: NDArray[np.float64], floor: float) -> int:
    """How many terms must be read: a row that has only the others is below the floor."""
    num_terms = len(rests) - 1
    while num_terms > 1 and rests[num_terms - 1] * _ROUNDING < floor:
        num_terms -= 1
    return num_terms


@inlined
def _are_few(sums: NDArray[np.float32], least: float, extent: tuple[int, int]) -> bool:
    """Whether to look up a term for the rows with sums of at least ``least`` is faster than to add all its postings."""
    num_high, threshold = 0, np.float32(max(least, _TINY))
    for index in range(len(sums)):  # without a branch: 16 rows at once
        num_high += sums[index] >= threshold
    return _LOOK_UP * num_high < extent[1] - extent[0]


@inlined
def _choose(
    sums: NDArray[np.float32],
    touched: NDArray[np.bool_],
    range_: tuple[int, int],
    usable: NDArray[np.bool_],
    least: float,
    chosen: NDArray[np.int64],
    scores: NDArray[np.float32],
) -> int:
    """Write the usable rows of a range with a sum that is above 0 and at least ``least``; clears all sums."""
    num_chosen, size = 0, range_[1] - range_[0]
    threshold = np.float32(max(least, _TINY))  # rounded by far less than ``least`` is below what matters
    for group in range((size + _GROUP - 1) // _GROUP):
        if not touched[group]:
            continue
        touched[group] = False
        start = group * _GROUP
        part = sums[start : min(start + _GROUP, size)]
        is_high = False
        for at in range(len(part)):  # without a branch: 16 rows at once
            is_high |= part[at] >= threshold
        if is_high:
            for at in range(len(part)):  # without a branch, because none could be foreseen
                row = range_[0] + start + at
                chosen[num_chosen], scores[num_chosen] = row, part[at]
                num_chosen += part[at] >= threshold and (len(usable) == 0 or usable[row])
        part[:] = 0
    return num_chosen


@inlined
def _look_up(
    chosen: NDArray[np.int64],
    scores: NDArray[np.float32],
    num_chosen: int,
    least: float,
    rows: NDArray[np.uint32],
    counts: NDArray[np.uint16],
    unit: int,
    extent: tuple[int, int],
    range_: tuple[int, int],
    weight: np.float32,
    norms: NDArray[np.float32],
    norm_of: NDArray[np.uint16],
    slots: NDArray[np.int64],
) -> int:
    """Add the gains of a term to the scores of the chosen rows that have at least ``least``; the others are dropped."""
    kept = 0
    for at in range(num_chosen):
        if scores[at] >= least:
            chosen[kept], scores[kept] = chosen[at], scores[at]
            kept += 1
    if extent[1] - extent[0] > _READ_ALL * kept:
        index = extent[0]
        for at in range(kept):
            index = _first_at_least(rows, index, extent[1], chosen[at])
            if index < extent[1] and rows[index] == chosen[at]:
                scores[at] += _gain(weight, counts[index], unit, norms[norm_of[chosen[at]]])
        return kept
    for at in range(kept):
        slots[chosen[at] - range_[0]] = at + 1
    for index in range(extent[0], extent[1]):
        row = np.int64(rows[index])
        if row < range_[0] or row >= range_[1]:
            raise ValueError("the rows of a term are not ascending")
        slot = slots[row - range_[0]]
        if slot > 0:
            scores[slot - 1] += _gain(weight, counts[index], unit, norms[norm_of[row]])
    for at in range(kept):
        slots[chosen[at] - range_[0]] = 0
    return kept


@inlined
def _make_room(
    rows: NDArray[np.int64], scores: NDArray[np.float32], size: int, num_more: int, floor: float
) -> tuple[NDArray[np.int64], NDArray[np.float32], int]:
    """Drop the rows of a list that are below the floor, if more do not fit; a longer list if half of it stays."""
    if size + num_more <= len(rows):
        return rows, scores, size
    kept = 0
    for at in range(size):
        if scores[at] >= floor:
            rows[kept], scores[kept] = rows[at], scores[at]
            kept += 1
    if 2 * kept > len(rows):
        rows = np.concatenate((rows, np.empty(len(rows), np.int64)))
        scores = np.concatenate((scores, np.empty(len(scores), np.float32)))
    return rows, scores, kept


@compiled(
    types.Tuple((written(types.int64), written(types.float32), types.int64))(
        *(_u32, _u16, _u32, _u16, _i64, _i64, _f32, _i64, _u8, _i64, types.float64),
        *(_f32, _u16, read_only(types.boolean), types.int64, written(types.int64), types.int64, types.float64),
    )
)
def best_rows(
    rows: NDArray[np.uint32],
    counts: NDArray[np.uint16],
    added_rows: NDArray[np.uint32],
    hundredths: NDArray[np.uint16],
    starts: NDArray[np.int64],
    ends: NDArray[np.int64],
    weights: NDArray[np.float32],
    units: NDArray[np.int64],
    shares: NDArray[np.uint8],
    shares_at: NDArray[np.int64],
    factor: float,
    norms: NDArray[np.float32],
    norm_of: NDArray[np.uint16],
    usable: NDArray[np.bool_],
    first: int,
    bins: NDArray[np.int64],
    top_k: int,
    limit: float,
) -> tuple[NDArray[np.int64], NDArray[np.float32], int]:
    """The rows of a segment whose scores are above 0 and among the ``top_k`` best, with some that are not.

    Args:
        rows: the rows that contain a term, ascending for each term.
        counts: how often the row has it.
        added_rows: like ``rows``, of added words.
        hundredths: their counts, and the shares of learned terms.
        starts: [t] where each term's postings start, by descending weight: those of texts, then those of added words.
        ends: [t] where they end.
        weights: [t] the terms' weights.
        units: [t] of what their counts are: 1 for those of texts, 100 for added words, 65,535 for learned terms.
        shares: the largest shares of terms in ranges (``ops.bm25_bounds``).
        shares_at: [t] where those of a term start; -1 if it has none.
        factor: the mean length by which the shares were computed, divided by today's.
        norms: the distinct norms.
        norm_of: [n] the index of each row's norm.
        usable: [n] whether a row may be returned; empty if all may.
        first: number that the segment's first row has in the result.
        bins: how many scores of earlier segments are in each of equal parts of the range from 0 to ``limit``; changed.
        top_k: how many rows are wanted, at least 1.
        limit: what no score exceeds.

    Returns:
        Rows, scores, and how many postings were read.
    """
    num, num_terms, lengths = len(norm_of), len(starts), (len(rows), len(added_rows), len(shares))
    _check(starts, ends, shares_at, units, lengths, _count_ranges(num))
    begins, stops, rests = starts.copy(), np.empty(num_terms, np.int64), np.zeros(num_terms + 1, np.float64)
    sums, touched = np.zeros(RANGE, np.float32), np.zeros(RANGE // _GROUP, np.bool_)
    chosen, slots, scores = np.empty(RANGE, np.int64), np.zeros(RANGE, np.int64), np.empty(RANGE, np.float32)
    found_rows, found_scores, found = np.empty(2 * RANGE, np.int64), np.empty(2 * RANGE, np.float32), 0
    num_read, bins_per_score = 0, (len(bins) - 1) / max(limit, _TINY)
    lowest = _lowest_of(bins, 0, bins.sum(), top_k)
    for begin in range(0, num, RANGE):
        range_, floor = (begin, min(begin + RANGE, num)), _BELOW * lowest[0] / bins_per_score
        for term in range(num_terms):
            stops[term] = _first_at_least(rows if units[term] == 1 else added_rows, begins[term], ends[term], range_[1])
        _add_up(weights, begins, stops, shares, shares_at, begin // RANGE, factor, rests)
        if rests[0] == 0.0 or rests[0] * _ROUNDING < floor:
            begins[:] = stops
            continue
        num_summed = _num_summed(rests, floor)
        for term in range(num_terms):
            unit, extent, weight = units[term], (begins[term], stops[term]), weights[term]
            if term >= num_summed and _are_few(sums[: range_[1] - begin], floor / _ROUNDING - rests[term], extent):
                break
            postings, times = (rows, counts) if unit == 1 else (added_rows, hundredths)
            num_read, num_summed = num_read + extent[1] - extent[0], max(num_summed, term + 1)
            _add(sums, touched, postings, times, unit, extent, range_, weight, norms, norm_of)
        num_chosen = _choose(sums, touched, range_, usable, floor / _ROUNDING - rests[num_summed], chosen, scores)
        for term in range(num_summed, num_terms):
            unit, extent, weight = units[term], (begins[term], stops[term]), weights[term]
            postings, times = (rows, counts) if unit == 1 else (added_rows, hundredths)
            num_read, least = num_read + min(num_chosen, extent[1] - extent[0]), floor / _ROUNDING - rests[term]
            num_chosen = _look_up(
                chosen, scores, num_chosen, least, postings, times, unit, extent, range_, weight, norms, norm_of, slots
            )
        kept, lowest = _keep_best(chosen, scores, num_chosen, bins, bins_per_score, lowest, top_k)
        found_rows, found_scores, found = _make_room(found_rows, found_scores, found, kept, floor)
        found_rows[found : found + kept], found_scores[found : found + kept] = first + chosen[:kept], scores[:kept]
        found += kept
        begins[:] = stops
    if (begins != ends).any():
        raise ValueError("the rows of a term are not ascending")
    return found_rows[:found].copy(), found_scores[:found].copy(), num_read


@inlined
def _sum_of_gains(
    weights: NDArray[np.float32], one: NDArray[np.int64], other: NDArray[np.int64], norm: np.float32, most: int
) -> np.float32:
    """The score of a text in which each term occurs ``one`` + ``other`` times."""
    score = np.float32(0)
    for term in range(len(weights)):
        times = min(one[term] + other[term], most)
        if times > 0:
            count = np.float32(times)
            score += weights[term] * (count / (count + norm))
    return score


@inlined
def _term_of(token: int, terms: NDArray[np.int64], order: NDArray[np.int64]) -> int:
    """The index of a token in ``terms``, which ``order`` sorts; -1 if it is not among them."""
    low, high = 0, len(terms)
    while low < high:
        middle = (low + high) // 2
        if terms[order[middle]] < token:
            low = middle + 1
        else:
            high = middle
    return order[low] if low < len(terms) and terms[order[low]] == token else -1


@compiled(
    types.void(
        *(_u32, _i64, _i64, _i64, _f32, types.uint32, _f32, types.float64, types.float64, types.float64),
        *(written(types.float32), written(types.float32)),
    )
)
def score_rows(
    tokens: NDArray[np.uint32],
    offsets: NDArray[np.int64],
    rows: NDArray[np.int64],
    terms: NDArray[np.int64],
    weights: NDArray[np.float32],
    sentence_end: int,
    norms: NDArray[np.float32],
    mean_window: float,
    k1: float,
    b: float,
    passages: NDArray[np.float32],
    windows: NDArray[np.float32],
) -> None:
    """Scores of some rows of a segment, and of the best window of each: two neighbouring sentences, or the only one.

    Args:
        tokens: the words of all rows, as numbers of terms.
        offsets: where each row's words start, and the end.
        rows: [n] which rows.
        terms: [t] the query's terms by descending weight; -1 for terms that the segment lacks.
        weights: [t] their weights.
        sentence_end: the token that ends a sentence.
        norms: [n] the norm of each of these rows.
        mean_window: the mean number of words of a window.
        k1: as in the formula.
        b: as in the formula.
        passages: [n] gets the scores of the rows.
        windows: [n] gets those of their best windows.
    """
    num_terms = len(terms)
    order = np.argsort(terms)
    maybe = np.zeros(_FILTER, np.bool_)
    for term in terms:
        if term >= 0:
            maybe[term % _FILTER] = True
    whole = np.empty(num_terms, np.int64)
    last, this = np.zeros(num_terms, np.int64), np.zeros(num_terms, np.int64)  # counts in two neighbouring sentences
    for at in range(len(rows)):
        begin, end = offsets[rows[at]], offsets[rows[at] + 1]
        if begin < 0 or end < begin or end > len(tokens):
            raise ValueError("the words of a row are not where they should be")
        whole[:] = 0
        last[:] = 0
        this[:] = 0
        num_sentences, last_length, length, last_hits, hits = 0, 0, 0, 0, 0
        best = np.float32(0)
        for index in range(begin, end):
            token = tokens[index]
            if token != sentence_end:
                length += 1
                term = _term_of(token, terms, order) if maybe[token % _FILTER] else -1
                if term >= 0:
                    this[term] += 1
                    hits += 1
                continue
            if num_sentences > 0 and last_hits + hits > 0:
                norm = np.float32(k1 * (1 - b + b * np.float64(last_length + length) / mean_window))
                best = max(best, _sum_of_gains(weights, last, this, norm, 1 << 62))
            if hits > 0:
                whole += this
            if last_hits > 0:
                last[:] = 0
            last, this = this, last
            num_sentences, last_length, length, last_hits, hits = num_sentences + 1, length, 0, hits, 0
        if num_sentences == 1 and last_hits > 0:
            norm = np.float32(k1 * (1 - b + b * np.float64(last_length) / mean_window))
            best = _sum_of_gains(weights, last, this, norm, 1 << 62)
        this[:] = 0
        passages[at] = _sum_of_gains(weights, whole, this, norms[at], 65_535)
        windows[at] = best
