"""The words of consecutive rows, and of a query: what BM25 counts (``store.bm25``)."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

import numpy as np
import xxhash
from numpy.typing import NDArray

from d2llm.ops.bm25_bounds import TermBounds
from d2llm.ops.bm25_words import END_OF_SENTENCE, WINDOW_SENTENCES, stemmer, terms, unstemmed
from d2llm.ops.selection import ranges
from d2llm.ops.words import needs_dictionary

Rows = NDArray[np.int64]
_Number = TypeVar("_Number", np.int64, np.float32)
MAX_COUNT = np.iinfo(np.uint16).max
OTHER, SENTENCE_END = -1, -2  # tokens of a passage that are not query terms
_KNOWN_WORDS = 1 << 20  # kept in memory while texts are read


LEARNED = np.uint64(1 << 32)
"""The hashes of learned terms are the numbers of tokens below this, which no word has by any but a rare chance."""
MAX_IMPACT = 12.0
"""No weight of a learned term in a passage is above this, log(1 + the largest number of half precision)."""
_LEARNED_MARK = "\x01"  # no word has it


def learned_term(token_id: int) -> str:
    """The term of a token of a vocabulary, of which a model says how much it counts (``models.document_expansion``)."""
    return f"{_LEARNED_MARK}{token_id}"


def _hash(term: str) -> int:
    if term.startswith(_LEARNED_MARK):
        return int(term[1:])
    return xxhash.xxh3_64_intdigest(term.encode(errors="surrogatepass"))


def hash_terms(terms: Iterable[str]) -> NDArray[np.uint64]:
    """The hashes of some terms [n], as segments store them."""
    return np.array([_hash(term) for term in terms], np.uint64)


class Postings(NamedTuple):
    """The rows of a segment that have a term [p], how often they have it, its weight in a query, and the segment.

    Of a learned term, ``counts`` are the shares of the weight that rows get.

    ``rows`` are of numpy's own type for indices, to which it would convert any other for every use, and numbered from 0
    in the slice ``segment`` of the rows of all segments.
    """

    rows: NDArray[np.intp]
    counts: NDArray[np.uint16] | NDArray[np.float32]
    weight: np.float32
    segment: slice
    is_learned: bool = False


class Extents(NamedTuple):
    """The query terms that a segment has [t]: start and end of their postings, their indices in the query and here."""

    starts: NDArray[np.int64]
    ends: NDArray[np.int64]
    terms: NDArray[np.int64]
    positions: NDArray[np.int64]

    def slices(self) -> Iterator[tuple[slice, int]]:
        """Of each term: where its postings are, and its index."""
        for start, end, term in zip(self.starts.tolist(), self.ends.tolist(), self.terms.tolist(), strict=True):
            yield slice(start, end), term


@dataclass(frozen=True, slots=True)
class AddedWords:
    """Words that some rows of a segment have beside those of their texts, which lack them.

    Attributes:
        terms: [v] hashes of the terms, ascending.
        starts: [v + 1] start of each term's postings.
        rows: [p] the rows with a term, ascending for each term.
        hundredths: [p] how often the term counts in the row, in hundredths, so that their sums are exact; of learned
            terms, their weight in the row in 65,535ths of ``MAX_IMPACT``.
    """

    terms: NDArray[np.uint64]
    starts: NDArray[np.int64]
    rows: NDArray[np.uint32]
    hundredths: NDArray[np.uint16]

    @classmethod
    def of_rows(cls, words: Sequence[Mapping[str, float]]) -> AddedWords:
        """The words of each row, with their counts; terms are as ``terms`` writes them."""
        hashes = hash_terms(term for row_words in words for term in row_words)
        rows = np.repeat(np.arange(len(words)), [len(row_words) for row_words in words])
        counts = np.array([count for row_words in words for count in row_words.values()], np.float64)
        units = np.where(hashes < LEARNED, MAX_COUNT / MAX_IMPACT, 100)
        return cls._of_postings(hashes, rows, np.clip(np.rint(units * counts), 1, MAX_COUNT).astype(np.uint16))

    @classmethod
    def join(cls, segments: Mapping[int, AddedWords]) -> AddedWords:
        """The words of several segments, by where the first row of each is in the new one."""
        hashes = np.concatenate([part.hashes for part in segments.values()])
        rows = np.concatenate([part.rows.astype(np.int64) + first for first, part in segments.items()])
        return cls._of_postings(hashes, rows, np.concatenate([part.hundredths for part in segments.values()]))

    @classmethod
    def _of_postings(cls, hashes: NDArray[np.uint64], rows: Rows, hundredths: NDArray[np.uint16]) -> AddedWords:
        order = np.lexsort((rows, hashes))
        vocabulary, firsts = np.unique(hashes[order], return_index=True)
        return cls(vocabulary, np.append(firsts, len(order)), rows[order].astype(np.uint32), hundredths[order])

    @property
    def hashes(self) -> NDArray[np.uint64]:
        """The term of each posting [p]."""
        return np.repeat(self.terms, np.diff(self.starts))

    def take(self, rows: Rows, num_rows: int) -> AddedWords:
        """The words of the given rows out of ``num_rows``, numbered in the same order."""
        renumbered = np.full(num_rows, -1, np.int64)
        renumbered[rows] = np.arange(len(rows))
        new_rows = renumbered[self.rows]
        kept = new_rows >= 0
        return self._of_postings(self.hashes[kept], new_rows[kept], self.hundredths[kept])

    def lengths(self, num_rows: int) -> NDArray[np.int64]:
        """The hundredths of all words of each of ``num_rows`` rows, but for learned terms."""
        first = self.starts[np.searchsorted(self.terms, LEARNED)]
        return np.bincount(self.rows[first:], self.hundredths[first:], num_rows).astype(np.int64)

    def extents_of(self, query_terms: NDArray[np.uint64]) -> Extents:
        """Where the postings of the query terms that a row has are."""
        return _extents_of(self.terms, self.starts, query_terms)


NO_WORDS = AddedWords.of_rows([])
"""No added words."""


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
        bounds: what the frequent terms can give to a score; None before it is written.
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
    bounds: TermBounds | None = None

    @classmethod
    def from_texts(cls, texts: Iterable[str], *, advance: Callable[[int], object] | None = None) -> WordSegment:
        """The words of some texts; ``advance`` is called with 1 after each."""
        numbers, offsets = array("I"), array("q", [0])
        known = _NumberedWords()
        by_dictionary = False
        for text in texts:
            by_dictionary = by_dictionary or needs_dictionary(text)
            numbers.extend(map(known.__getitem__, unstemmed(text)))
            offsets.append(len(numbers))
            if advance is not None:
                advance(1)
        vocabulary, positions = np.unique(np.array(known.hashes, np.uint64), return_inverse=True)
        renumbered = np.append(len(vocabulary), positions).astype(np.uint32)
        tokens = renumbered[np.frombuffer(numbers, np.uint32)]
        segment = cls._from_tokens(vocabulary, tokens, np.array(offsets, np.int64))
        return replace(segment, by_dictionary=by_dictionary)

    def with_added(self, words: Sequence[Mapping[str, float]]) -> WordSegment:
        """The same segment with these words, by count, added to each of its rows; the rows must lack them."""
        return replace(self, added=AddedWords.of_rows(words) if any(words) else None, bounds=None)

    @classmethod
    def join(cls, segments: Sequence[WordSegment]) -> WordSegment:
        """The segment of the rows of all segments, in order."""
        vocabulary = np.unique(np.concatenate([segment.terms for segment in segments]))
        tokens: list[NDArray[np.uint32]] = []
        offsets, num_tokens = [np.zeros(1, np.int64)], 0
        for segment in segments:
            positions = np.append(np.searchsorted(vocabulary, segment.terms), len(vocabulary)).astype(np.uint32)
            offsets.append(segment.offsets[1:] + num_tokens)
            tokens.append(positions[segment.tokens])
            num_tokens += len(segment.tokens)
        firsts = np.cumsum([0, *map(len, segments)]).tolist()
        added = {first: part.added for first, part in zip(firsts, segments, strict=False) if part.added is not None}
        joined = AddedWords.join(added) if added else None
        segment = cls._from_tokens(vocabulary, np.concatenate(tokens), np.concatenate(offsets), joined)
        return replace(segment, by_dictionary=any(part.by_dictionary for part in segments))

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
            counts=np.minimum(counts, MAX_COUNT).astype(np.uint16),
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
        arrays = [getattr(self, name) for name in self.__slots__ if name not in ("added", "by_dictionary", "bounds")]
        if self.added is not None:
            arrays += [getattr(self.added, name) for name in AddedWords.__slots__]
        if self.bounds is not None:
            arrays += [self.bounds.terms, self.bounds.shares]
        return sum(array.nbytes for array in arrays)

    @property
    def all_lengths(self) -> NDArray[np.uint32] | NDArray[np.float64]:
        """Number of words of each row [n], including added words."""
        return self.lengths if self.added is None else self.lengths + self.added.lengths(len(self)) / 100

    def take(self, rows: Rows) -> WordSegment:
        """A segment of the given rows, in the same order."""
        starts, sizes = extents(self, rows)
        tokens = self.tokens[ranges(starts, sizes)]
        used = np.unique(tokens)
        used = used[used != len(self.terms)]
        renumbered = np.full(len(self.terms) + 1, len(used), np.uint32)
        renumbered[used] = np.arange(len(used), dtype=np.uint32)
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])
        added = None if self.added is None else self.added.take(rows, len(self))
        taken = self._from_tokens(self.terms[used], renumbered[tokens], offsets, added)
        return replace(taken, by_dictionary=self.by_dictionary)

    def positions(self, hashes: NDArray[np.uint64]) -> NDArray[np.int64]:
        """Index of each hash in ``terms``; -1 if it is missing."""
        return vocabulary_indices(self.terms, hashes)

    def extents_of(self, query_terms: NDArray[np.uint64]) -> Extents:
        """Where the postings of the query terms that a text has are."""
        return _extents_of(self.terms, self.starts, query_terms)


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
        """Sum of the statistics of two corpora."""
        return WordStatistics(
            self.num_passages + other.num_passages,
            self.num_words + other.num_words,
            self.num_windows + other.num_windows,
            self.num_window_words + other.num_window_words,
            self.num_added_hundredths + other.num_added_hundredths,
        )

    @property
    def mean_length(self) -> float:
        """Mean number of words of a passage, including added words."""
        return (self.num_words + self.num_added_hundredths / 100) / max(self.num_passages, 1)

    @property
    def mean_window_length(self) -> float:
        """Mean number of words of a window."""
        return self.num_window_words / max(self.num_windows, 1)


class CountedTerms(NamedTuple):
    """The distinct terms of a text: their hashes [n], ascending, and how often each occurs in it [n].

    ``factors`` [n], at least 0, multiply their weights (``models.fitted_part``); None for 1. Those of learned terms
    are their weights.
    """

    hashes: NDArray[np.uint64]
    times: NDArray[np.int64]
    factors: NDArray[np.float64] | None = None

    @classmethod
    def from_text(cls, text: str, term_factors: Mapping[str, float] | None = None) -> CountedTerms:
        """The terms of a text; ``term_factors`` has a factor for each, None for 1, and the weights of learned terms."""
        words = [*terms(text), *(term for term in term_factors or () if term.startswith(_LEARNED_MARK))]
        hashes, first, times = np.unique(hash_terms(words), return_index=True, return_counts=True)
        if term_factors is None:
            return cls(hashes, times)
        return cls(hashes, times, np.array([term_factors[words[index]] for index in first.tolist()], np.float64))

    def weighted(self, rows_with: NDArray[np.int64], num_passages: int) -> QueryWords:
        """The terms of a query with their weights in a corpus, in which ``rows_with`` [n] passages have each term."""
        idf = np.log1p((num_passages - rows_with + 0.5) / (rows_with + 0.5))
        idf = idf if self.factors is None else idf * self.factors
        weights = np.where(rows_with > 0, self.times * idf, 0.0)
        learned = self.hashes < LEARNED
        if self.factors is not None:
            weights = np.where(learned, MAX_IMPACT * self.factors, weights)
        weights = weights.astype(np.float32)
        order = np.lexsort((self.hashes, -weights))
        num_unknown = int(self.times[(rows_with == 0) & ~learned].sum())
        return QueryWords(self.hashes[order], weights[order], int(self.times[~learned].sum()), num_unknown)


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
        """Statistics [4] of a query's words, for use in a score (``models.score_features.WordsFactor``).

        log(1 + number of words), log(1 + ``limit``), the largest weight as a share of ``limit``, and the share of words
        that no passage has.
        """
        limit = self.limit
        largest = float(self.weights[0]) / limit if limit else 0.0
        unknown = self.num_unknown / self.num_terms if self.num_terms else 1.0
        return np.array([np.log1p(self.num_terms), np.log1p(limit), largest, unknown], np.float32)


class _NumberedWords(dict[str, int]):
    """Numbers of words, from 1 on in the order of the hashes of their terms; 0 is the end of a sentence."""

    def __init__(self) -> None:
        super().__init__({END_OF_SENTENCE: 0})
        self.hashes: list[int] = []
        self._stem = stemmer()

    def __missing__(self, word: str) -> int:
        if len(self) > _KNOWN_WORDS:
            self.clear()
            self[END_OF_SENTENCE] = 0
        self.hashes.append(_hash(self._stem(word)))
        self[word] = term_number = len(self.hashes)
        return term_number


def vocabulary_indices(vocabulary: NDArray[np.uint64], hashes: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Index of each hash in an ascending vocabulary; -1 if it is missing."""
    if not len(vocabulary):
        return np.full(len(hashes), -1, np.int64)
    positions = np.minimum(np.searchsorted(vocabulary, hashes), len(vocabulary) - 1)
    return np.where(vocabulary[positions] == hashes, positions, -1)


_NOWHERE = Extents(*np.zeros((4, 0), np.int64))


def _extents_of(vocabulary: NDArray[np.uint64], starts: NDArray[np.int64], query_terms: NDArray[np.uint64]) -> Extents:
    if not len(vocabulary):
        return _NOWHERE
    positions = vocabulary_indices(vocabulary, query_terms)
    known = np.flatnonzero(positions >= 0)
    return Extents(starts[positions[known]], starts[positions[known] + 1], known, positions[known])


def extents(segment: WordSegment, rows: Rows) -> tuple[Rows, Rows]:
    """Start and number of the tokens of some rows."""
    starts = segment.offsets[rows]
    return starts, segment.offsets[rows + 1] - starts


class Windows(NamedTuple):
    """The windows that begin with each of some sentences [n]: it and the next of its row, or the only one of its row.

    Attributes:
        exist: [n], false for the last of several sentences of a row, with which no window begins.
        continue_: [n - 1], true where the next sentence belongs to the same row.
    """

    exist: NDArray[np.bool_]
    continue_: NDArray[np.bool_]

    @classmethod
    def of_sentences(cls, of_row: Rows) -> Windows:
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
    windows = Windows.of_sentences(of_row)
    num_windows = np.bincount(of_row[windows.exist], minlength=num)
    together = np.bincount(of_row, weights=windows.exist * windows.sums(in_sentence), minlength=num)
    return lengths.astype(np.uint32), num_windows.astype(np.uint32), together.astype(np.uint32)
