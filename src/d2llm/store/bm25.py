"""Exact, incremental BM25: one implementation for mining, reports, search and the student's score.

    score(q, p) = sum over the terms t of q of  idf(t) tf / (tf + k1 (1 - b + b |p| / mean length))
    idf(t)      = ln(1 + (N - n_t + 0.5) / (n_t + 0.5))

k1 1.2, b 0.75; a repeated query term counts each time. Source: Kamphuis et al., "Which BM25 do you mean?", ECIR 2020,
the accurate Lucene variant. The best window of a passage (``ops.bm25_words.windows``) is scored by the same formula,
with its own length, the mean length of all windows, and the idf of passages.

A passage may have added words, which its text lacks (``models.document_expansion``). They count in its tf, which need
not be a whole number then, and in its length; idf and windows are those of the texts. It may also have learned terms
(``LearnedWords`` there), with a weight in the passage, at most ``MAX_IMPACT``, and one in the query, whose product is
added to the score. Their share of a query term's bound is weight / MAX_IMPACT, where that of words is tf / (tf + ...).

The words of consecutive rows form a segment, which never changes and depends only on the texts and the added words of
its rows. It stores the words of texts twice: by term, to find the best of all passages, and by row, to score given
passages and their windows. Corpus statistics (N, n_t, mean lengths) are summed over the live rows of the segments when
needed, so passages can be added and deleted, and every score is the same as if the index had been built from the
remaining ones.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from d2llm.core.progress import progress_bar
from d2llm.core.types import Candidate, Passage, Query
from d2llm.ops.bm25_bounds import TermBounds, bounds_of
from d2llm.ops.kernels import BM25
from d2llm.ops.selection import ids_at, nth_highest, ranges, top_rows
from d2llm.store.word_segment import (
    LEARNED,
    MAX_COUNT,
    NO_WORDS,
    OTHER,
    SENTENCE_END,
    CountedTerms,
    Postings,
    QueryWords,
    Rows,
    Windows,
    WordSegment,
    WordStatistics,
    extents,
)

K1 = 1.2
B = 0.75

_Scores = NDArray[np.float32]
_MAX_COUNTS = 1 << 22  # counts of terms in sentences in memory at once, unless there are more sentences than this


_MAX_INDEX = np.iinfo(np.uint16).max  # of a norm in the compiled search
_BINS = 4_096  # of the histogram of scores; few enough to stay in the cache


class _Norms(NamedTuple):
    """k1 (1 - b + b |p| / mean length): the distinct ones [d], and the index of each row's [rows].

    An index takes half the bytes of a norm, and reading them is much of the time of a search.
    """

    distinct: _Scores
    norm_of: NDArray[np.unsignedinteger[Any]]

    @property
    def are_small(self) -> bool:
        """Whether the compiled search can read them; only added words make so many lengths that it cannot."""
        return self.norm_of.dtype == np.uint16

    def of(self, rows: Rows) -> _Scores:
        return self.distinct[self.norm_of[rows]]


class WordIndex:
    """BM25 over the live rows of some segments, whose rows are numbered consecutively.

    nDCG@10 on dev splits with English stems (``english``; Snowball's ``porter``; no stems): squad-sent, 472 queries,
    .653; .654; .640; banking77, 741 queries, .397; .403; .366. ``porter`` stems words of one and two letters too ("s"
    to nothing, "is" to "i"); without that it reaches .654 and .396. Stop words are kept: titles consist of them.
    Chinese (characters and bigrams; bigrams alone; characters alone): cmrc2018, 383 queries, .986; .982; .952; drcd,
    391 queries, .965; .955; .930.
    """

    def __init__(
        self,
        segments: Sequence[WordSegment],
        *,
        live: NDArray[np.bool_] | None = None,
        corpus: WordStatistics | None = None,
    ) -> None:
        """Index the rows of some segments.

        Args:
            segments: the words of all rows.
            live: [rows], true for rows that count; by default all.
            corpus: the statistics by which rows are scored, if these rows are only a part of a corpus.
        """
        self._segments = list(segments)
        self._corpus = corpus
        self._firsts = np.concatenate([[0], np.cumsum([len(segment) for segment in segments])]).astype(np.int64)
        self._live = None if live is None or live.all() else live
        # A search needs the scores of one query twice: for its candidates, and as score features.
        self._last_scores: tuple[QueryWords | None, _Scores] = (None, np.zeros(0, np.float32))

    @classmethod
    def from_texts(cls, texts: Iterable[str], *, advance: Callable[[int], object] | None = None) -> WordIndex:
        """An index in memory; rows are numbered as the texts. ``advance`` is called with 1 after each text."""
        return cls([WordSegment.from_texts(texts, advance=advance)])

    def __len__(self) -> int:
        """Number of rows, including dead ones."""
        return int(self._firsts[-1])

    def only(self, live: NDArray[np.bool_]) -> WordIndex:
        """The same words with only the ``live`` rows; if ``live`` is shorter, the rows beyond it do not count."""
        mask = np.zeros(len(self), np.bool_)
        mask[: len(live)] = live
        return WordIndex(self._segments, live=mask, corpus=self._corpus)

    def within(self, corpus: WordStatistics) -> WordIndex:
        """The same rows as a part of a larger corpus, whose statistics their scores depend on.

        Queries must then be weighted by the whole corpus too (``CountedTerms.weighted``).
        """
        return WordIndex(self._segments, live=self._live, corpus=corpus)

    def take(self, rows: Rows) -> WordSegment:
        """A segment with the words of the given rows, in the same order."""
        owner = np.searchsorted(self._firsts, rows, side="right") - 1
        order = np.argsort(owner, kind="stable")
        taken = [
            self._segments[at].take(rows[order[owner[order] == at]] - self._firsts[at])
            for at in np.unique(owner).tolist()
        ]
        joined = WordSegment.join(taken)
        return joined if (np.diff(order) > 0).all() else joined.take(np.argsort(order))

    @property
    def num_bytes(self) -> int:
        """Size of the segments in bytes."""
        return sum(segment.num_bytes for segment in self._segments)

    # The corpus as a whole -----------------------------------------------------------------------------------------

    @cached_property
    def _num_words(self) -> int:
        return sum(len(segment.tokens) for segment in self._segments)

    @cached_property
    def _num_live(self) -> int:
        return len(self) if self._live is None else int(self._live.sum())

    @property
    def statistics(self) -> WordStatistics:
        """The statistics of the live rows."""
        return self._statistics

    @cached_property
    def _statistics(self) -> WordStatistics:
        added = sum(
            int(segment.added.lengths(len(segment))[self._live_of(at)].sum())
            for at, segment in enumerate(self._segments)
            if segment.added is not None
        )
        return WordStatistics(
            self._num_live, self._total("lengths"), self._total("num_windows"), self._total("window_lengths"), added
        )

    @property
    def _scored_by(self) -> WordStatistics:
        return self.statistics if self._corpus is None else self._corpus

    def _total(self, name: str) -> int:
        return sum(
            int(getattr(segment, name)[self._live_of(at)].sum(dtype=np.int64))
            for at, segment in enumerate(self._segments)
        )

    def _live_of(self, at: int) -> slice | NDArray[np.bool_]:
        return slice(None) if self._live is None else self._live[self._firsts[at] : self._firsts[at + 1]]

    @cached_property
    def _norms(self) -> _Norms:
        lengths = np.concatenate([np.zeros(0, np.uint32), *(segment.all_lengths for segment in self._segments)])
        longest, mean = lengths.max(initial=0), max(self._scored_by.mean_length, 1e-9)
        if lengths.dtype == np.uint32 and longest <= _MAX_INDEX:
            return _Norms(_norm(np.arange(longest + 1), mean), lengths.astype(np.uint16))
        distinct, norm_of = np.unique(lengths, return_inverse=True)
        return _Norms(_norm(distinct, mean), norm_of.astype(np.uint16 if len(distinct) <= _MAX_INDEX else np.uint32))

    @cached_property
    def _norms_of_rows(self) -> _Scores:
        """The norm of each row, for scores of all passages alone."""
        return self._norms.distinct[self._norms.norm_of]

    @cached_property
    def _bounds(self) -> list[TermBounds]:
        """Bounds of the terms of each segment, for the compiled search alone."""
        return [bounds_of_segment(segment) for segment in self._segments]

    @cached_property
    def _dead_counts(self) -> list[NDArray[np.int64] | None]:
        """For each segment, how many dead rows contain each of its terms."""
        counts: list[NDArray[np.int64] | None] = []
        for at, segment in enumerate(self._segments):
            live = self._live_of(at)
            dead = np.zeros(0, np.int64) if isinstance(live, slice) else np.flatnonzero(~live)
            if not len(dead):
                counts.append(None)
                continue
            starts, sizes = extents(segment, dead)
            num_tokens = len(segment.terms) + 1
            owners = np.repeat(np.arange(len(dead)), sizes)
            pairs = np.unique(owners * num_tokens + segment.tokens[ranges(starts, sizes)])
            counts.append(np.bincount(pairs % num_tokens, minlength=num_tokens))
        return counts

    # Queries -------------------------------------------------------------------------------------------------------

    def query(self, text: str, term_factors: Mapping[str, float] | None = None) -> QueryWords:
        """The words of a query and their weights in this index; arguments as for ``CountedTerms.from_text``."""
        counted = CountedTerms.from_text(text, term_factors)
        return counted.weighted(self.rows_with(counted.hashes), self._num_live)

    def rows_with(self, hashes: NDArray[np.uint64]) -> NDArray[np.int64]:
        """The number of live rows that contain each of these distinct terms [n]."""
        rows_with = np.zeros(len(hashes), np.int64)
        for segment, dead in zip(self._segments, self._dead_counts, strict=True):
            positions = segment.positions(hashes)
            known = positions >= 0
            rows_with[known] += segment.starts[positions[known] + 1] - segment.starts[positions[known]]
            if dead is not None:
                rows_with[known] -= dead[positions[known]]
        return rows_with

    def scores(self, query: QueryWords) -> _Scores:
        """BM25 of every row, including dead ones; 0 if no term is shared. The array is read-only."""
        last_query, scores = self._last_scores
        if last_query is not query:
            scores = np.zeros(len(self), np.float32)
            for postings in chain(self._postings(query), self._added_postings(query)):
                norms = self._norms_of_rows[postings.segment].take(postings.rows)
                _add_at(scores[postings.segment], postings.rows, _gains(postings, postings.counts, norms))
            scores.flags.writeable = False
            self._last_scores = query, scores
        return scores

    def window_limits(self, query: QueryWords) -> _Scores:
        """Upper bound of the score of each row's best window: the sum of the weights of the terms in the row."""
        limits = np.zeros(len(self), np.float32)
        for rows, _, weight, segment, _ in self._postings(query):
            _add_at(limits[segment], rows, weight)
        return limits

    def _postings(self, query: QueryWords) -> Iterator[Postings]:
        """The postings of the query's terms in all segments, in the order of the terms in each.

        One list after the other stays in the processor's cache; all of a query's at once take two to four times as long
        from some 300,000 rows on.
        """
        for segment, first in zip(self._segments, self._firsts.tolist(), strict=False):
            for part, term in segment.extents_of(query.terms).slices():
                rows = segment.rows[part].astype(np.intp)
                yield Postings(rows, segment.counts[part], query.weights[term], slice(first, first + len(segment)))

    def _added_postings(self, query: QueryWords) -> Iterator[Postings]:
        """The postings of the query's terms among the added words of all segments, in the order of the terms in each.

        They come after those of the texts, here and in ``score``, so that both add the same numbers in the same order.
        """
        for segment, first in zip(self._segments, self._firsts.tolist(), strict=False):
            if segment.added is None:
                continue
            for part, term in segment.added.extents_of(query.terms).slices():
                is_learned = bool(query.terms[term] < LEARNED)
                rows = segment.added.rows[part].astype(np.intp)
                counts = np.divide(segment.added.hundredths[part], MAX_COUNT if is_learned else 100, dtype=np.float32)
                yield Postings(rows, counts, query.weights[term], slice(first, first + len(segment)), is_learned)

    def best(self, query: QueryWords, num: int, *, allowed: NDArray[np.bool_] | None = None) -> tuple[Rows, _Scores]:
        """The live rows with the ``num`` highest scores above 0, plus those tied with the last, in no order.

        ``allowed`` [rows] is true for rows that may be returned; by default all are. The scores are bit-identical to
        those of ``scores``.
        """
        kernels = BM25.get(self._num_words)
        if kernels is not None and self._norms.are_small:
            return self.best_compiled(kernels, query, num, allowed)[:2]
        scores = usable = self.scores(query)
        for mask in (self._live, allowed):
            if mask is not None:
                usable = np.where(mask, usable, np.float32(0))
        floor = nth_highest(usable, num) if num < len(usable) else 0
        rows = np.flatnonzero(usable >= floor if floor > 0 else usable > 0)
        return rows, scores[rows]

    def best_compiled(
        self, kernels: Any, query: QueryWords, num: int, allowed: NDArray[np.bool_] | None = None
    ) -> tuple[Rows, _Scores, int]:
        """``best`` without the postings that cannot matter, and how many were read; ``kernels`` are ``BM25.load()``."""
        masks = [mask for mask in (self._live, allowed) if mask is not None]
        usable = np.logical_and.reduce(masks) if masks else np.zeros(0, np.bool_)
        bins, num_read = np.zeros(_BINS, np.int64), 0
        rows, scores = [np.zeros(0, np.int64)], [np.zeros(0, np.float32)]
        mean = max(self._scored_by.mean_length, 1e-9)
        for segment, bounds, first in zip(self._segments, self._bounds, self._firsts.tolist(), strict=False):
            here = slice(first, first + len(segment))
            added = segment.added or NO_WORDS
            texts, others = segment.extents_of(query.terms), added.extents_of(query.terms)
            starts, ends, terms, positions = (np.concatenate(both) for both in zip(texts, others, strict=True))
            positions[len(texts.terms) :] = -1  # added words have no bounds
            units = np.where(query.terms[terms] < LEARNED, MAX_COUNT, 100)
            units[: len(texts.terms)] = 1
            found = kernels.best_rows(
                *(segment.rows, segment.counts, added.rows, added.hundredths),
                *(starts, ends, query.weights[terms], units),
                *(bounds.shares, bounds.starts_of(positions, len(segment)), bounds.mean_length / mean),
                *(self._norms.distinct, self._norms.norm_of[here], usable[here], first, bins, num, query.limit),
            )
            rows.append(found[0])
            scores.append(found[1])
            num_read += found[2]
        all_rows, all_scores = np.concatenate(rows), np.concatenate(scores)
        if len(all_rows) <= num:
            return all_rows, all_scores, num_read
        kept = all_scores >= nth_highest(all_scores, num)
        return all_rows[kept], all_scores[kept], num_read

    def score(self, query: QueryWords, rows: Rows) -> tuple[_Scores, _Scores]:
        """BM25 of some rows [n], bit-identical to ``scores``, and of the best window of each [n]."""
        num_known = int(np.count_nonzero(query.weights))  # the others come last and add nothing
        owner = np.searchsorted(self._firsts, rows, side="right") - 1
        passages, windows = np.zeros(len(rows), np.float32), np.zeros(len(rows), np.float32)
        kernels = BM25.get(self._num_words)
        score = self._score_segment if kernels is None else partial(self._score_compiled, kernels)
        for at in np.unique(owner).tolist():
            positions = np.flatnonzero(owner == at)
            passages[positions], windows[positions] = score(
                at, query.terms[:num_known], query.weights[:num_known], rows[positions]
            )
        for postings in self._added_postings(query):
            wanted = rows - postings.segment.start
            positions = np.minimum(np.searchsorted(postings.rows, wanted), len(postings.rows) - 1)
            found = np.flatnonzero(postings.rows[positions] == wanted)
            counts = postings.counts[positions[found]]
            _add_at(passages, found, _gains(postings, counts, self._norms.of(rows[found])))
        return passages, windows

    def _score_compiled(
        self, kernels: Any, at: int, terms: NDArray[np.uint64], weights: _Scores, rows: Rows
    ) -> tuple[_Scores, _Scores]:
        """``_score_segment``, without arrays of counts."""
        segment = self._segments[at]
        passages, windows = np.zeros((2, len(rows)), np.float32)
        kernels.score_rows(
            *(segment.tokens, segment.offsets, rows - self._firsts[at], segment.positions(terms), weights),
            *(len(segment.terms), self._norms.of(rows), self._mean_window, K1, B, passages, windows),
        )
        return passages, windows

    @property
    def _mean_window(self) -> float:
        return max(self._scored_by.mean_window_length, 1e-9)

    def _score_segment(
        self, at: int, terms: NDArray[np.uint64], weights: _Scores, rows: Rows
    ) -> tuple[_Scores, _Scores]:
        """Scores of rows [n] of a segment and of their best windows [n], for a query's terms with these ``weights``.

        Terms are counted in parts, so that a long query needs little memory.
        """
        segment = self._segments[at]
        code_of = np.full(len(segment.terms) + 1, OTHER, np.int32)
        positions = segment.positions(terms)
        known = np.flatnonzero(positions >= 0)
        code_of[positions[known]] = known
        code_of[-1] = SENTENCE_END
        starts, sizes = extents(segment, rows - self._firsts[at])
        codes = code_of[segment.tokens[ranges(starts, sizes)]]
        norms = self._norms.of(rows)
        passages, best_windows = np.zeros(len(sizes), np.float32), np.zeros(len(sizes), np.float32)
        ends = np.flatnonzero(codes == SENTENCE_END)
        hits = np.flatnonzero(codes >= 0)
        sentence, term = np.searchsorted(ends, hits), codes[hits]
        occurring = np.flatnonzero(np.bincount(term, minlength=len(weights)))
        if not len(occurring):
            return passages, best_windows
        row = np.searchsorted(np.cumsum(sizes), ends, side="right")  # of each sentence
        firsts = np.flatnonzero(np.diff(row, prepend=-1))  # sentences that begin a row
        filled = row[firsts]  # rows with a sentence
        windows = Windows.of_sentences(row)
        lengths = windows.sums(np.diff(ends, prepend=-1) - 1)
        window_norms = _norm(lengths, self._mean_window)
        whole_scores, window_scores = np.zeros(len(filled), np.float32), np.zeros(len(ends), np.float32)
        column = (np.cumsum(np.bincount(occurring)) - 1)[term]
        width = max(1, _MAX_COUNTS // len(ends))
        is_short = len(occurring) <= width
        for start in range(0, len(occurring), width):
            part = weights[occurring[start : start + width]]
            chosen = slice(None) if is_short else (column >= start) & (column < start + len(part))
            cells = (column[chosen] - start) * len(ends) + sentence[chosen]
            counts = np.bincount(cells, minlength=len(part) * len(ends)).astype(np.float32)
            counts = counts.reshape(len(part), len(ends))
            whole = np.minimum(np.add.reduceat(counts, firsts, axis=1), MAX_COUNT)
            _add_gains(whole_scores, part, whole, norms[filled])
            _add_gains(window_scores, part, windows.sums(counts), window_norms)
        passages[filled] = whole_scores
        best_windows[filled] = np.maximum.reduceat(np.where(windows.exist, window_scores, 0), firsts)
        return passages, best_windows


def bounds_of_segment(segment: WordSegment) -> TermBounds:
    """What the frequent terms can give to a score in each range of rows: as stored, or computed."""
    if segment.bounds is not None:
        return segment.bounds
    lengths = segment.all_lengths
    mean = max(float(lengths.mean()), 1e-9) if len(lengths) else 1.0
    return bounds_of(segment.starts, segment.rows, segment.counts, _norm(lengths, mean), mean)


def rank_passages(index: WordIndex, ids: Sequence[str], texts: Iterable[str], top_k: int) -> Iterator[list[Candidate]]:
    """For each query, the best passages of an index in memory, best first, ties by id, without those that score 0.

    ``ids`` are those of the passages, in row order; ``top_k`` is at least 1.
    """
    for text in texts:
        rows, scores = index.best(index.query(text), top_k)
        names = ids_at(ids, rows)
        best = top_rows(scores, top_k, partial(ids_at, names))
        yield [Candidate(names[int(position)], float(scores[position])) for position in best]


def bm25_lists(
    passages: Mapping[str, Passage],
    ids: Sequence[str],
    queries: Sequence[Query],
    top_k: int,
    *,
    left_out: Mapping[str, Collection[str]] | None = None,
    title: str = "BM25",
) -> list[list[str]]:
    """Ids of the top ``top_k`` passages of BM25 for each query, without passages that share no term with the query.

    ``left_out`` has passages that are left out of a query's list. ``title`` is the title of the progress bar, which
    counts passages and queries.
    """
    unwanted = left_out or {}
    depth = top_k + max((len(unwanted.get(query.id, ())) for query in queries), default=0)
    lists: list[list[str]] = []
    with progress_bar(title, len(ids) + len(queries)) as advance:
        texts = (passages[passage_id].full_text for passage_id in ids)
        index = WordIndex.from_texts(texts, advance=advance)
        rankings = rank_passages(index, ids, (query.text for query in queries), depth)
        for query, candidates in zip(queries, rankings, strict=True):
            excluded = unwanted.get(query.id, ())
            lists.append(
                [candidate.passage_id for candidate in candidates if candidate.passage_id not in excluded][:top_k]
            )
            advance(1)
    return lists


def _norm(lengths: NDArray[np.number[Any]], mean: float) -> _Scores:
    return (K1 * (1 - B + B * lengths.astype(np.float64) / mean)).astype(np.float32)


def _shares(counts: NDArray[np.integer] | NDArray[np.float32], norms: _Scores) -> _Scores:
    """The share of a term's weight that a text gets: tf / (tf + norm)."""
    frequencies: _Scores = counts.astype(np.float32, copy=False)
    return np.divide(frequencies, frequencies + norms, dtype=np.float32)


def _gains(postings: Postings, counts: NDArray[np.uint16] | NDArray[np.float32], norms: _Scores) -> _Scores:
    """What some of a term's postings add to their rows; of learned terms, the counts are the shares."""
    return postings.weight * (counts.astype(np.float32) if postings.is_learned else _shares(counts, norms))


def _add_at(sums: _Scores, rows: NDArray[np.intp], values: _Scores | np.float32) -> None:
    """Add values [n] to the sums of some rows [n], each of which is named once."""
    sums[rows] = sums.take(rows) + values


def _add_gains(scores: _Scores, weights: NDArray[np.float32], counts: NDArray[np.float32], norms: _Scores) -> None:
    """Add the gains of terms, from counts [terms, n], to scores [n], in the same order as the postings."""
    for weight, term_counts in zip(weights, counts, strict=True):
        scores += weight * _shares(term_counts, norms)
