"""Exact, incremental BM25: one implementation for mining, reports, search and the student's score.

    score(q, p) = sum over the terms t of q of  idf(t) tf / (tf + k1 (1 - b + b |p| / mean length))
    idf(t)      = ln(1 + (N - n_t + 0.5) / (n_t + 0.5))

k1 1.2, b 0.75; a repeated query term counts each time. Source: Kamphuis et al., "Which BM25 do you mean?", ECIR 2020,
the accurate Lucene variant. The best window of a passage (``ops.bm25_words.windows``) is scored by the same formula,
with its own length, the mean length of all windows, and the idf of passages.

A passage may have added words, which its text lacks (``models.document_expansion``). They count in its tf, which need
not be a whole number then, and in its length; idf and windows are those of the texts.

The words of consecutive rows form a segment, which never changes and depends only on the texts and the added words of
its rows. It stores the words of texts twice: by term, to find the best of all passages, and by row, to score given
passages and their windows. Corpus statistics (N, n_t, mean lengths) are summed over the live rows of the segments when
needed, so passages can be added and deleted, and every score is the same as if the index had been built from the
remaining ones.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import chain
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
import xxhash
from numpy.typing import NDArray

from d2llm.core.progress import progress_bar
from d2llm.core.types import Candidate, Passage, Query
from d2llm.ops.bm25_words import WINDOW_SENTENCES, sentences, terms
from d2llm.ops.selection import ids_at, nth_highest, ranges, top_rows
from d2llm.ops.words import needs_dictionary

K1 = 1.2
B = 0.75

_Rows = NDArray[np.int64]
_Number = TypeVar("_Number", np.int64, np.float32)
_Scores = NDArray[np.float32]
_MAX_COUNT = np.iinfo(np.uint16).max
_OTHER, _SENTENCE_END = -1, -2  # tokens of a passage that are not query terms
_MAX_COUNTS = 1 << 22  # counts of terms in sentences in memory at once, unless there are more sentences than this
_KNOWN_TERMS = 1 << 20  # hashes kept in memory while texts are read


class _Postings(NamedTuple):
    """The rows of a segment that have a term [p], how often they have it, its weight in a query, and the segment.

    ``rows`` are of numpy's own type for indices, to which it would convert any other for every use, and numbered from 0
    in the slice ``segment`` of the rows of all segments.
    """

    rows: NDArray[np.intp]
    counts: NDArray[np.uint16] | NDArray[np.float32]
    weight: np.float32
    segment: slice


@dataclass(frozen=True, slots=True)
class AddedWords:
    """Words that some rows of a segment have beside those of their texts, which lack them.

    Attributes:
        terms: [v] hashes of the terms, ascending.
        starts: [v + 1] start of each term's postings.
        rows: [p] the rows with a term, ascending for each term.
        hundredths: [p] how often the term counts in the row, in hundredths, so that their sums are exact.
    """

    terms: NDArray[np.uint64]
    starts: NDArray[np.int64]
    rows: NDArray[np.uint32]
    hundredths: NDArray[np.uint16]

    @classmethod
    def of_rows(cls, words: Sequence[Mapping[str, float]]) -> AddedWords:
        """The words of each row, with their counts; terms are as ``terms`` writes them."""
        hashes = np.array([_hash(term) for own in words for term in own], np.uint64)
        rows = np.repeat(np.arange(len(words)), [len(own) for own in words])
        counts = np.array([count for own in words for count in own.values()], np.float64)
        return cls._of_postings(hashes, rows, np.clip(np.rint(100 * counts), 1, _MAX_COUNT).astype(np.uint16))

    @classmethod
    def join(cls, parts: Mapping[int, AddedWords]) -> AddedWords:
        """The words of several segments, by where the first row of each is in the new one."""
        hashes = np.concatenate([part.hashes for part in parts.values()])
        rows = np.concatenate([part.rows.astype(np.int64) + first for first, part in parts.items()])
        return cls._of_postings(hashes, rows, np.concatenate([part.hundredths for part in parts.values()]))

    @classmethod
    def _of_postings(cls, hashes: NDArray[np.uint64], rows: _Rows, hundredths: NDArray[np.uint16]) -> AddedWords:
        order = np.lexsort((rows, hashes))
        vocabulary, firsts = np.unique(hashes[order], return_index=True)
        return cls(vocabulary, np.append(firsts, len(order)), rows[order].astype(np.uint32), hundredths[order])

    @property
    def hashes(self) -> NDArray[np.uint64]:
        """The term of each posting [p]."""
        return np.repeat(self.terms, np.diff(self.starts))

    def take(self, rows: _Rows, num_rows: int) -> AddedWords:
        """The words of some of ``num_rows`` rows, numbered in their order."""
        place_of = np.full(num_rows, -1, np.int64)
        place_of[rows] = np.arange(len(rows))
        places = place_of[self.rows]
        kept = places >= 0
        return self._of_postings(self.hashes[kept], places[kept], self.hundredths[kept])

    def lengths(self, num_rows: int) -> NDArray[np.int64]:
        """The hundredths of all words of each of ``num_rows`` rows."""
        return np.bincount(self.rows, self.hundredths, num_rows).astype(np.int64)

    def postings(self, query_terms: NDArray[np.uint64]) -> Iterator[tuple[int, slice]]:
        """Of each query term that a row has: its index, and where ``rows`` and ``hundredths`` have its postings."""
        for number, place in enumerate(_places(self.terms, query_terms).tolist()):
            if place >= 0:
                yield number, slice(int(self.starts[place]), int(self.starts[place + 1]))


@dataclass(frozen=True, slots=True)
class WordSegment:
    """The words of consecutive rows, numbered from 0.

    Attributes:
        terms: [v] hashes of the terms, ascending.
        starts: [v + 1] start of each term's postings.
        rows: [p] the rows that contain a term, ascending for each term.
        counts: [p] occurrences of the term in the row, at most 65,535.
        tokens: [t] the words of all rows in order, as indices into ``terms``; v marks the end of a sentence.
        offsets: [n + 1] start of each row's tokens.
        lengths: [n] number of words of each row.
        num_windows: [n] number of windows of each row.
        window_lengths: [n] total words of the windows of each row; most sentences are in two windows.
        added: words that rows have beside those of their texts; None if none has any.
        by_dictionary: whether a dictionary decided which words some text has (``ops.words.needs_dictionary``).
    """

    terms: NDArray[np.uint64]
    starts: NDArray[np.int64]
    rows: NDArray[np.uint32]
    counts: NDArray[np.uint16]
    tokens: NDArray[np.uint32]
    offsets: NDArray[np.int64]
    lengths: NDArray[np.uint32]
    num_windows: NDArray[np.uint32]
    window_lengths: NDArray[np.uint32]
    added: AddedWords | None = None
    by_dictionary: bool = False

    @classmethod
    def from_texts(cls, texts: Iterable[str], *, advance: Callable[[int], object] | None = None) -> WordSegment:
        """The words of some texts; ``advance`` is called with 1 after each."""
        hashes: list[int] = []
        ends: list[int] = []  # sentence ends, as indices into ``hashes``
        offsets = [0]
        known: dict[str, int] = {}
        by_dictionary = False
        for text in texts:
            by_dictionary = by_dictionary or needs_dictionary(text)
            spans = sentences(text)
            for start, end in spans:
                for term in terms(text[start:end]):
                    number = known.get(term)
                    if number is None:
                        if len(known) >= _KNOWN_TERMS:
                            known.clear()
                        number = known[term] = _hash(term)
                    hashes.append(number)
                ends.append(len(hashes))
            offsets.append(len(hashes) + len(ends))
            if advance is not None:
                advance(1)
        vocabulary, places = np.unique(np.array(hashes, np.uint64), return_inverse=True)
        tokens = np.insert(places.astype(np.uint32), np.array(ends, np.int64), np.uint32(len(vocabulary)))
        segment = cls._from_tokens(vocabulary, tokens, np.array(offsets, np.int64))
        return replace(segment, by_dictionary=by_dictionary)

    def with_added(self, words: Sequence[Mapping[str, float]]) -> WordSegment:
        """The same segment with these words, by count, added to each of its rows; the rows must lack them."""
        return replace(self, added=AddedWords.of_rows(words) if any(words) else None)

    @classmethod
    def join(cls, segments: Sequence[WordSegment]) -> WordSegment:
        """The segment of the rows of all segments, in order."""
        vocabulary = np.unique(np.concatenate([segment.terms for segment in segments]))
        tokens: list[NDArray[np.uint32]] = []
        offsets, num_tokens = [np.zeros(1, np.int64)], 0
        for segment in segments:
            places = np.append(np.searchsorted(vocabulary, segment.terms), len(vocabulary)).astype(np.uint32)
            offsets.append(segment.offsets[1:] + num_tokens)
            tokens.append(places[segment.tokens])
            num_tokens += len(segment.tokens)
        firsts = np.cumsum([0, *map(len, segments)]).tolist()
        added = {first: each.added for first, each in zip(firsts, segments, strict=False) if each.added is not None}
        joined = AddedWords.join(added) if added else None
        segment = cls._from_tokens(vocabulary, np.concatenate(tokens), np.concatenate(offsets), joined)
        return replace(segment, by_dictionary=any(each.by_dictionary for each in segments))

    @classmethod
    def _from_tokens(
        cls,
        vocabulary: NDArray[np.uint64],
        tokens: NDArray[np.uint32],
        offsets: NDArray[np.int64],
        added: AddedWords | None = None,
    ) -> WordSegment:
        num = len(offsets) - 1
        rows = np.repeat(np.arange(num, dtype=np.uint64), np.diff(offsets))
        is_word = tokens != len(vocabulary)
        keys = tokens[is_word].astype(np.uint64) * np.uint64(num) + rows[is_word]
        keys, counts = np.unique(keys, return_counts=True)
        starts = np.searchsorted(keys, np.arange(len(vocabulary) + 1, dtype=np.uint64) * np.uint64(num))
        lengths, num_windows, window_lengths = _lengths(tokens, offsets, len(vocabulary))
        return cls(
            terms=vocabulary,
            starts=starts.astype(np.int64),
            rows=(keys % np.uint64(max(num, 1))).astype(np.uint32),
            counts=np.minimum(counts, _MAX_COUNT).astype(np.uint16),
            tokens=tokens,
            offsets=offsets,
            lengths=lengths,
            num_windows=num_windows,
            window_lengths=window_lengths,
            added=added,
        )

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def num_bytes(self) -> int:
        """Size of all arrays in bytes."""
        own = sum(getattr(self, name).nbytes for name in self.__slots__ if name not in ("added", "by_dictionary"))
        return (
            own if self.added is None else own + sum(getattr(self.added, name).nbytes for name in AddedWords.__slots__)
        )

    @property
    def all_lengths(self) -> NDArray[np.uint32] | NDArray[np.float64]:
        """Number of words of each row [n], with those that were added."""
        return self.lengths if self.added is None else self.lengths + self.added.lengths(len(self)) / 100

    def take(self, rows: _Rows) -> WordSegment:
        """The segment of some of the rows, in their order."""
        starts, sizes = _extents(self, rows)
        tokens = self.tokens[ranges(starts, sizes)]
        used = np.unique(tokens)
        used = used[used != len(self.terms)]
        place_of = np.full(len(self.terms) + 1, len(used), np.uint32)
        place_of[used] = np.arange(len(used), dtype=np.uint32)
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])
        added = None if self.added is None else self.added.take(rows, len(self))
        taken = self._from_tokens(self.terms[used], place_of[tokens], offsets, added)
        return replace(taken, by_dictionary=self.by_dictionary)

    def places(self, hashes: NDArray[np.uint64]) -> NDArray[np.int64]:
        """The indices of term hashes in ``terms``; -1 for terms that no text has."""
        return _places(self.terms, hashes)

    def postings(self, places: NDArray[np.int64]) -> list[slice]:
        """Where ``rows`` and ``counts`` have the postings of some terms; none for the place -1."""
        known = places[places >= 0]
        return [slice(*ends) for ends in zip(self.starts[known].tolist(), self.starts[known + 1].tolist(), strict=True)]


@dataclass(frozen=True, slots=True)
class WordStatistics:
    """What BM25 knows about a corpus as a whole. The statistics of a corpus are the sums of those of its shards.

    Attributes:
        num_passages: number of passages.
        num_words: number of their words.
        num_windows: number of their windows.
        num_window_words: number of the windows' words; most sentences are in two windows.
        num_added_hundredths: number of the added words, in hundredths.
    """

    num_passages: int = 0
    num_words: int = 0
    num_windows: int = 0
    num_window_words: int = 0
    num_added_hundredths: int = 0

    def __add__(self, other: WordStatistics) -> WordStatistics:
        """The statistics of two corpora together."""
        return WordStatistics(
            self.num_passages + other.num_passages,
            self.num_words + other.num_words,
            self.num_windows + other.num_windows,
            self.num_window_words + other.num_window_words,
            self.num_added_hundredths + other.num_added_hundredths,
        )

    @property
    def mean_length(self) -> float:
        """Words of a passage, with those that were added."""
        return (self.num_words + self.num_added_hundredths / 100) / max(self.num_passages, 1)

    @property
    def mean_window_length(self) -> float:
        """Words of a window."""
        return self.num_window_words / max(self.num_windows, 1)


class CountedTerms(NamedTuple):
    """The distinct terms of a text: their hashes [n], ascending, and how often each occurs in it [n].

    ``factors`` [n], at least 0, multiply their weights (``models.term_weights``); None for 1.
    """

    hashes: NDArray[np.uint64]
    times: NDArray[np.int64]
    factors: NDArray[np.float64] | None = None

    @classmethod
    def from_text(cls, text: str, term_factors: Mapping[str, float] | None = None) -> CountedTerms:
        """The terms of a text; ``term_factors`` has a factor for each of them, None for 1."""
        words = terms(text)
        hashes, first, times = np.unique(
            np.array([_hash(term) for term in words], np.uint64), return_index=True, return_counts=True
        )
        if term_factors is None:
            return cls(hashes, times)
        return cls(hashes, times, np.array([term_factors[words[place]] for place in first.tolist()], np.float64))

    def weighted(self, rows_with: NDArray[np.int64], num_passages: int) -> QueryWords:
        """The terms of a query with their weights in a corpus, in which ``rows_with`` [n] passages have each term."""
        idf = np.log1p((num_passages - rows_with + 0.5) / (rows_with + 0.5))
        idf = idf if self.factors is None else idf * self.factors
        weights = np.where(rows_with > 0, self.times * idf, 0.0).astype(np.float32)
        order = np.lexsort((self.hashes, -weights))
        num_unknown = int(self.times[rows_with == 0].sum())
        return QueryWords(self.hashes[order], weights[order], int(self.times.sum()), num_unknown)


@dataclass(frozen=True, slots=True)
class QueryWords:
    """The words of a query, weighted by the statistics of an index.

    ``terms`` are the hashes of its distinct terms by descending weight, ``weights`` their idf times their count in the
    query; terms that no passage has get weight 0 and come last.
    """

    terms: NDArray[np.uint64]
    weights: NDArray[np.float32]
    num_terms: int
    num_unknown: int

    @property
    def limit(self) -> float:
        """The sum of the weights, an upper bound of every score of this query."""
        return float(self.weights.sum())

    @property
    def statistics(self) -> NDArray[np.float32]:
        """Statistics [4] of a query's words, for use in a score (``models.evidence.WordsFactor``).

        log(1 + number of words), log(1 + ``limit``), the largest weight as a share of ``limit``, and the share of words
        that no passage has.
        """
        limit = self.limit
        largest = float(self.weights[0]) / limit if limit else 0.0
        unknown = self.num_unknown / self.num_terms if self.num_terms else 1.0
        return np.array([np.log1p(self.num_terms), np.log1p(limit), largest, unknown], np.float32)


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
        # A search needs the scores of one query twice: for its candidates, and as evidence.
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

    def take(self, rows: _Rows) -> WordSegment:
        """The words of some rows, in their order, as a segment."""
        owner = np.searchsorted(self._firsts, rows, side="right") - 1
        order = np.argsort(owner, kind="stable")
        parts = [
            self._segments[at].take(rows[order[owner[order] == at]] - self._firsts[at])
            for at in np.unique(owner).tolist()
        ]
        joined = WordSegment.join(parts)
        return joined if (np.diff(order) > 0).all() else joined.take(np.argsort(order))

    @property
    def num_bytes(self) -> int:
        """Size of the segments in bytes."""
        return sum(segment.num_bytes for segment in self._segments)

    # The corpus as a whole -----------------------------------------------------------------------------------------

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
    def _norms(self) -> _Scores:
        """k1 (1 - b + b |p| / mean length) of each row."""
        mean = max(self._scored_by.mean_length, 1e-9)
        return np.concatenate(
            [np.zeros(0, np.float32), *(_norm(segment.all_lengths, mean) for segment in self._segments)]
        )

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
            starts, sizes = _extents(segment, dead)
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
            places = segment.places(hashes)
            known = places >= 0
            rows_with[known] += segment.starts[places[known] + 1] - segment.starts[places[known]]
            if dead is not None:
                rows_with[known] -= dead[places[known]]
        return rows_with

    def scores(self, query: QueryWords) -> _Scores:
        """BM25 of every row, including dead ones; 0 if no term is shared. The array is read-only."""
        last_query, scores = self._last_scores
        if last_query is not query:
            scores = np.zeros(len(self), np.float32)
            for rows, counts, weight, segment in chain(self._postings(query), self._added_postings(query)):
                _add_at(scores[segment], rows, weight * _shares(counts, self._norms[segment].take(rows)))
            scores.flags.writeable = False
            self._last_scores = query, scores
        return scores

    def window_limits(self, query: QueryWords) -> _Scores:
        """Upper bound of the score of each row's best window: the sum of the weights of the terms in the row."""
        limits = np.zeros(len(self), np.float32)
        for rows, _, weight, segment in self._postings(query):
            _add_at(limits[segment], rows, weight)
        return limits

    def _postings(self, query: QueryWords) -> Iterator[_Postings]:
        """The postings of the query's terms in all segments, in the order of the terms in each.

        One list after the other stays in the processor's cache; all of a query's at once take two to four times as long
        from some 300,000 rows on.
        """
        for segment, first in zip(self._segments, self._firsts.tolist(), strict=False):
            places = segment.places(query.terms)
            for part, weight in zip(segment.postings(places), query.weights[places >= 0], strict=True):
                rows = segment.rows[part].astype(np.intp)
                yield _Postings(rows, segment.counts[part], weight, slice(first, first + len(segment)))

    def _added_postings(self, query: QueryWords) -> Iterator[_Postings]:
        """The postings of the query's terms among the added words of all segments, in the order of the terms in each.

        They come after those of the texts, here and in ``score``, so that both add the same numbers in the same order.
        """
        for segment, first in zip(self._segments, self._firsts.tolist(), strict=False):
            if segment.added is None:
                continue
            for number, part in segment.added.postings(query.terms):
                rows = segment.added.rows[part].astype(np.intp)
                counts = np.divide(segment.added.hundredths[part], 100, dtype=np.float32)
                yield _Postings(rows, counts, query.weights[number], slice(first, first + len(segment)))

    def best(self, query: QueryWords, num: int, *, allowed: NDArray[np.bool_] | None = None) -> tuple[_Rows, _Scores]:
        """The live rows with the ``num`` highest scores above 0, plus those tied with the last, in no order.

        ``allowed`` [rows] is true for rows that may be returned; by default all are. The scores are bit-identical to
        those of ``scores``.
        """
        scores = usable = self.scores(query)
        for mask in (self._live, allowed):
            if mask is not None:
                usable = np.where(mask, usable, np.float32(0))
        floor = nth_highest(usable, num) if num < len(usable) else 0
        rows = np.flatnonzero(usable >= floor if floor > 0 else usable > 0)
        return rows, scores[rows]

    def score(self, query: QueryWords, rows: _Rows) -> tuple[_Scores, _Scores]:
        """BM25 of some rows [n], bit-identical to ``scores``, and of the best window of each [n]."""
        num_known = int(np.count_nonzero(query.weights))  # the others come last and add nothing
        owner = np.searchsorted(self._firsts, rows, side="right") - 1
        order = np.argsort(owner, kind="stable")  # groups the rows by segment
        parts = [
            self._codes(at, query.terms[:num_known], rows[order[owner[order] == at]])
            for at in np.unique(owner).tolist()
        ]
        passages, windows = np.zeros(len(rows), np.float32), np.zeros(len(rows), np.float32)
        if parts:
            sizes, codes, norms = (np.concatenate(part) for part in zip(*parts, strict=True))
            passages[order], windows[order] = self._score_codes(query.weights[:num_known], sizes, codes, norms)
        for holding, counts, weight, segment in self._added_postings(query):
            places = np.minimum(np.searchsorted(holding, rows - segment.start), len(holding) - 1)
            found = np.flatnonzero(holding[places] == rows - segment.start)
            _add_at(passages, found, weight * _shares(counts[places[found]], self._norms[rows[found]]))
        return passages, windows

    def _codes(self, at: int, query_terms: NDArray[np.uint64], rows: _Rows) -> tuple[_Rows, NDArray[np.int32], _Scores]:
        """For rows of a segment: their numbers of tokens, the tokens as indices of query terms, and the norms."""
        segment = self._segments[at]
        code_of = np.full(len(segment.terms) + 1, _OTHER, np.int32)
        places = segment.places(query_terms)
        known = np.flatnonzero(places >= 0)
        code_of[places[known]] = known
        code_of[-1] = _SENTENCE_END
        here = rows - self._firsts[at]
        starts, sizes = _extents(segment, here)
        return sizes, code_of[segment.tokens[ranges(starts, sizes)]], self._norms[rows]

    def _score_codes(
        self, weights: NDArray[np.float32], sizes: _Rows, codes: NDArray[np.int32], norms: _Scores
    ) -> tuple[_Scores, _Scores]:
        """Scores of rows [n] and of their best windows [n], for a query's terms with these ``weights``.

        ``sizes`` [n] are the rows' numbers of tokens; ``codes`` are the tokens of all rows: index of the query term,
        ``_OTHER``, or ``_SENTENCE_END``. Terms are counted in parts, so that a long query needs little memory.
        """
        passages, best_windows = np.zeros(len(sizes), np.float32), np.zeros(len(sizes), np.float32)
        ends = np.flatnonzero(codes == _SENTENCE_END)
        hits = np.flatnonzero(codes >= 0)
        sentence, term = np.searchsorted(ends, hits), codes[hits]
        occurring = np.flatnonzero(np.bincount(term, minlength=len(weights)))
        if not len(occurring):
            return passages, best_windows
        row = np.searchsorted(np.cumsum(sizes), ends, side="right")  # of each sentence
        firsts = np.flatnonzero(np.diff(row, prepend=-1))  # sentences that begin a row
        filled = row[firsts]  # rows with a sentence
        windows = _Windows.of_sentences(row)
        lengths = windows.sums(np.diff(ends, prepend=-1) - 1)
        window_norms = _norm(lengths, max(self._scored_by.mean_window_length, 1e-9))
        whole_scores, window_scores = np.zeros(len(filled), np.float32), np.zeros(len(ends), np.float32)
        column = (np.cumsum(np.bincount(occurring)) - 1)[term]
        width = max(1, _MAX_COUNTS // len(ends))
        is_short = len(occurring) <= width
        for start in range(0, len(occurring), width):
            part = weights[occurring[start : start + width]]
            chosen = slice(None) if is_short else (column >= start) & (column < start + len(part))
            places = (column[chosen] - start) * len(ends) + sentence[chosen]
            counts = np.bincount(places, minlength=len(part) * len(ends)).astype(np.float32)
            counts = counts.reshape(len(part), len(ends))
            whole = np.minimum(np.add.reduceat(counts, firsts, axis=1), _MAX_COUNT)
            _add_gains(whole_scores, part, whole, norms[filled])
            _add_gains(window_scores, part, windows.sums(counts), window_norms)
        passages[filled] = whole_scores
        best_windows[filled] = np.maximum.reduceat(np.where(windows.exist, window_scores, 0), firsts)
        return passages, best_windows


class ShardWords(Protocol):
    """The words of a part of a corpus: a ``WordIndex``, or one in another process."""

    @property
    def statistics(self) -> WordStatistics:
        """Their statistics."""
        ...

    def rows_with(self, hashes: NDArray[np.uint64]) -> NDArray[np.int64]:
        """The number of passages that have each of these terms [n]."""
        ...


def query_words_of(indexes: Sequence[ShardWords], text: str) -> QueryWords:
    """The words of a query and their weights in a corpus that consists of the rows of several indexes."""
    counted = CountedTerms.from_text(text)
    rows_with = sum((index.rows_with(counted.hashes) for index in indexes), np.zeros(len(counted.hashes), np.int64))
    return counted.weighted(rows_with, sum(index.statistics.num_passages for index in indexes))


def rank_passages(index: WordIndex, ids: Sequence[str], texts: Iterable[str], top_k: int) -> Iterator[list[Candidate]]:
    """For each query, the best passages of an index in memory, best first, ties by id, without those that score 0.

    ``ids`` are those of the passages, in row order; ``top_k`` is at least 1.
    """
    for text in texts:
        rows, scores = index.best(index.query(text), top_k)
        names = ids_at(ids, rows)
        best = top_rows(scores, top_k, partial(ids_at, names))
        yield [Candidate(names[int(place)], float(scores[place])) for place in best]


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
            own = unwanted.get(query.id, ())
            lists.append([each.passage_id for each in candidates if each.passage_id not in own][:top_k])
            advance(1)
    return lists


def _hash(term: str) -> int:
    return xxhash.xxh3_64_intdigest(term.encode(errors="surrogatepass"))


def _places(vocabulary: NDArray[np.uint64], hashes: NDArray[np.uint64]) -> NDArray[np.int64]:
    """The indices of term hashes in an ascending vocabulary; -1 for those that it lacks."""
    if not len(vocabulary):
        return np.full(len(hashes), -1, np.int64)
    places = np.minimum(np.searchsorted(vocabulary, hashes), len(vocabulary) - 1)
    return np.where(vocabulary[places] == hashes, places, -1)


def _norm(lengths: NDArray[np.integer] | NDArray[np.float64], mean: float) -> _Scores:
    return (K1 * (1 - B + B * lengths.astype(np.float64) / mean)).astype(np.float32)


def _shares(counts: NDArray[np.integer] | NDArray[np.float32], norms: _Scores) -> _Scores:
    """The share of a term's weight that a text gets: tf / (tf + norm)."""
    number: _Scores = counts.astype(np.float32, copy=False)
    return np.divide(number, number + norms, dtype=np.float32)


def _add_at(sums: _Scores, rows: NDArray[np.intp], values: _Scores | np.float32) -> None:
    """Add values [n] to the sums of some rows [n], each of which is named once."""
    sums[rows] = sums.take(rows) + values


def _add_gains(scores: _Scores, weights: NDArray[np.float32], counts: NDArray[np.float32], norms: _Scores) -> None:
    """Add the gains of terms, from counts [terms, n], to scores [n], in the same order as the postings."""
    for weight, own in zip(weights, counts, strict=True):
        scores += weight * _shares(own, norms)


def _extents(segment: WordSegment, rows: _Rows) -> tuple[_Rows, _Rows]:
    """Start and number of the tokens of some rows."""
    starts = segment.offsets[rows]
    return starts, segment.offsets[rows + 1] - starts


class _Windows(NamedTuple):
    """The windows that begin with each of some sentences [n]: it and the next of its row, or the only one of its row.

    Attributes:
        exist: [n], false for the last of several sentences of a row, with which no window begins.
        continue_: [n - 1], true where the next sentence belongs to the same row.
    """

    exist: NDArray[np.bool_]
    continue_: NDArray[np.bool_]

    @classmethod
    def of_sentences(cls, of_row: _Rows) -> _Windows:
        """The windows of sentences that belong to these rows [n], ascending."""
        assert WINDOW_SENTENCES == 2
        continue_ = of_row[1:] == of_row[:-1]
        exist = np.ones(len(of_row), np.bool_)
        exist[1:] = ~continue_
        exist[:-1] |= continue_
        return cls(exist, continue_)

    def sums(self, values: NDArray[_Number]) -> NDArray[_Number]:
        """Sums over the sentences of each window, from values of the sentences [..., n]."""
        sums = values.copy()
        sums[..., :-1] += values[..., 1:] * self.continue_
        return sums


def _lengths(
    tokens: NDArray[np.uint32], offsets: NDArray[np.int64], sentence_end: int
) -> tuple[NDArray[np.uint32], NDArray[np.uint32], NDArray[np.uint32]]:
    """For each row: its number of words, its number of windows, and the total words of its windows."""
    num = len(offsets) - 1
    ends = np.flatnonzero(tokens == sentence_end)
    of_row = np.searchsorted(offsets, ends, side="right") - 1
    in_sentence = np.diff(ends, prepend=-1) - 1
    num_sentences = np.bincount(of_row, minlength=num)
    lengths = np.diff(offsets) - num_sentences
    windows = _Windows.of_sentences(of_row)
    num_windows = np.bincount(of_row[windows.exist], minlength=num)
    together = np.bincount(of_row, weights=windows.exist * windows.sums(in_sentence), minlength=num)
    return lengths.astype(np.uint32), num_windows.astype(np.uint32), together.astype(np.uint32)
