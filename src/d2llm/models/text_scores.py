"""Scores of texts that are in no index, by the code that scores the passages of one (``models.row_features``).

Texts become rows in memory: their vectors and those of their windows and tokens, in the formats of an index, and their
words. What a text alone does not have comes from a ``ScoringCorpus``, an index or the background: which terms the score
counts, how rare words are, and how long texts usually are.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from d2llm.core.errors import InputError
from d2llm.core.inputs import check_choice, shown
from d2llm.core.progress import Advance, progress_bar
from d2llm.core.types import TASKS, PartKind, Task, default_task
from d2llm.models.protocols import SearchStudent
from d2llm.models.row_features import RowFeatures, RowScorer, dot_query
from d2llm.models.score_features import FeatureWeights
from d2llm.models.tokens import EncodedTexts, TextKind, TokenVectors
from d2llm.ops.bm25_words import windows
from d2llm.store.background_words import background_for
from d2llm.store.bm25 import K1, B, WordIndex
from d2llm.store.part_vectors import PartVectors, best_windows
from d2llm.store.scan import RowScan
from d2llm.store.vector_formats import make_format
from d2llm.store.word_segment import (
    LEARNED,
    MAX_COUNT,
    AddedWords,
    CountedTerms,
    QueryWords,
    WordSegment,
    WordStatistics,
)


@dataclass(frozen=True, slots=True)
class RowFormats:
    """How vectors are stored (``store.vector_formats``), by index or in memory."""

    vectors: str = "float32"
    windows: str = "float32"
    tokens: str = "float32"


class TextQuery(NamedTuple):
    """A query that was read.

    Attributes:
        text: its text.
        vector: [dim].
        tokens: [tokens, token_dim], the vectors of its tokens, if they count.
        factors: how much each of its terms counts; None if all count alike.
    """

    text: str
    vector: NDArray[np.float32]
    tokens: NDArray[np.float32] | None = None
    factors: Mapping[str, float] | None = None


@runtime_checkable
class ScoringCorpus(Protocol):
    """What the score of a text takes from a corpus.

    Attributes:
        name: of the corpus, for people.
        task: the task of the scores.
        weights: those of the score features.
        formats: of the vectors.
    """

    name: str
    task: Task
    weights: FeatureWeights
    formats: RowFormats

    def words(self, query: TextQuery) -> tuple[QueryWords, WordStatistics]:
        """The words of a query, weighted by the corpus, and the statistics by which texts are scored."""
        ...

    def nearest(self, query: TextQuery, dot: NDArray[np.float32], vectors: NDArray[np.float32]) -> float:
        """The highest inner product of a query with a passage of the corpus.

        ``dot`` [dim] is the query's vector for inner products; ``vectors`` [n, dim] are those of the texts.
        """
        ...


@runtime_checkable
class ScoringIndex(Protocol):
    """An index by whose words texts can be scored (``retrieval.index.Index``)."""

    def scoring_corpus(self, student: SearchStudent, task: Task | None = None) -> ScoringCorpus:
        """The index as a corpus; by default for the task that it was made for."""
        ...


class Background:
    """The corpus of texts that belong to no index: words by tables that ship, and vectors as the student makes them.

    The nearest passage is the nearest of the texts that are scored together.
    """

    name = "background"
    formats = RowFormats()

    def __init__(self, student: SearchStudent, task: Task | None = None) -> None:
        self.task: Task = task or default_task(student.trained_tasks)
        kinds: tuple[PartKind, ...] = ("window", "token") if student.token_dim else ("window",)
        self.weights = student.feature_weights(self.task, stored=kinds)

    def words(self, query: TextQuery) -> tuple[QueryWords, WordStatistics]:
        """Weighted by the table of the query's script."""
        table, counted = background_for(query.text), CountedTerms.from_text(query.text, query.factors)
        return counted.weighted(table.count_words(counted.hashes), table.statistics.num_passages), table.statistics

    def nearest(self, query: TextQuery, dot: NDArray[np.float32], vectors: NDArray[np.float32]) -> float:
        """The highest inner product with one of the texts."""
        del query
        return float((vectors @ dot).max(initial=0.0 if not len(vectors) else -np.inf))


class TextRows:
    """Texts as rows in memory, in the order in which they were given.

    Attributes:
        encoded: what was read of the texts.
    """

    def __init__(
        self,
        texts: Sequence[str],
        encoded: EncodedTexts,
        formats: RowFormats,
        *,
        windows: TokenVectors | None = None,
        added: Sequence[Mapping[str, float]] | None = None,
    ) -> None:
        """``windows`` are the vectors of the windows of each text, ``added`` the words that each lacks, if they count.

        The vectors of the tokens count if ``encoded`` has them.
        """
        self._texts, self.encoded, self._added = texts, encoded, added
        dim = encoded.vectors.shape[1]
        self._format = make_format(formats.vectors, dim)
        self._codes = self._format.encode(encoded.vectors, [*map(str, range(len(texts)))])
        self._windows = self._scan = None
        if windows is not None:
            self._scan = RowScan(self._codes, self._format)
            self._windows = PartVectors.of_texts(*windows, make_format(formats.windows, dim))
        self._tokens = None
        if encoded.tokens is not None:
            tokens = encoded.tokens
            self._tokens = PartVectors.of_texts(*tokens, make_format(formats.tokens, tokens.vectors.shape[1]))

    def __len__(self) -> int:
        return len(self._texts)

    @cached_property
    def words(self) -> WordIndex:
        """Their words, as a corpus of their own."""
        segment = WordSegment.from_texts(self._texts)
        return WordIndex([segment if self._added is None else segment.with_added(self._added)])

    def within(self, corpus: WordStatistics) -> TextRows:
        """The same rows as a part of a corpus, whose statistics the scores of their words depend on."""
        words = self.words.within(corpus)
        rows = copy.copy(self)
        rows.__dict__["words"] = words
        return rows

    def vectors(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Vectors of the given rows [n, dim]."""
        return self._format.decode(self._codes[rows])

    def best_windows(self, query: NDArray[np.float32], rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """The highest inner product of a query [dim] with a window of each row [n]."""
        assert self._windows is not None, "the windows of these texts were not read"
        assert self._scan is not None
        return best_windows(self._windows, self._scan, query, rows)

    def best_tokens(
        self, queries: NDArray[np.float32], rows: NDArray[np.int64], needed: NDArray[np.float64] | None = None
    ) -> NDArray[np.float32]:
        """The sum of the highest products of a query's tokens [m, dim] with tokens of each row [n]."""
        assert self._tokens is not None, "the tokens of these texts were not read"
        return self._tokens.sum_of_best(queries, rows, needed)


class TextScorer:
    """Scores texts for queries as an index scores its passages.

    ``corpus`` says which terms count, and how rare words are; by default the background for ``task``.
    """

    def __init__(
        self, student: SearchStudent, corpus: ScoringCorpus | None = None, *, task: Task | None = None
    ) -> None:
        self.student = student
        self.corpus = corpus or Background(student, task)
        self.with_tokens = "token" in self.corpus.weights.part_kinds
        self.with_windows = "window" in self.corpus.weights.part_kinds

    @classmethod
    def of(cls, student: SearchStudent, index: ScoringIndex | None, task: Task | None) -> TextScorer:
        """With an index as corpus, or the background.

        Raises:
            InputError: there is no such task, or this is no index.
            IndexMismatchError: another student made the index.
        """
        if task is not None:
            check_choice(task, "task", TASKS)
        if index is not None and not hasattr(index, "scoring_corpus"):
            raise InputError(f"index is {shown(index)}, but must be an Index; open it with Index.open")
        return cls(student, None if index is None else index.scoring_corpus(student, task), task=task)

    def read_queries(
        self, texts: Sequence[str], *, instruction: str | None = None, advance: Advance | None = None
    ) -> tuple[list[TextQuery], EncodedTexts]:
        """Read queries; also what ``Student.encode_queries`` returns.

        Raises:
            InputError: the instruction leaves no room for a query.
        """
        if self.with_tokens:
            read = self.student.encode_with_tokens(texts, "query", instruction=instruction, advance=advance)
        else:
            read = self.student.encode_queries(texts, instruction=instruction, advance=advance)
        tokens = [None] * len(texts) if read.tokens is None else read.tokens.split()
        factors = self.factors(texts) or [None] * len(texts)
        return [TextQuery(*values) for values in zip(texts, read.vectors, tokens, factors, strict=True)], read

    def factors(self, queries: Sequence[str]) -> Sequence[Mapping[str, float]] | None:
        """How much the terms of queries count, by the student, if the score counts words."""
        return self.student.term_factors(queries) if self.corpus.weights.counts_words else None

    def read_texts(self, texts: Sequence[str], advance: Advance | None = None) -> TextRows:
        """Read texts: vectors and token embeddings from one pass of the backbone, windows from another."""
        if self.with_tokens:
            read = self.student.encode_with_tokens(texts, "passage", advance=advance)
        else:
            read = self.student.encode_passages(texts, advance=advance)
        vectors = None
        if self.with_windows:
            some, counts = window_texts(texts)
            vectors = TokenVectors(self.student.encode_passages(some).vectors, counts)
        return self.rows_of(texts, read, vectors)

    def rows_of(self, texts: Sequence[str], encoded: EncodedTexts, windows: TokenVectors | None = None) -> TextRows:
        """Texts that were read elsewhere; ``windows`` are the vectors of those of ``window_texts``, if they count."""
        expansion, added = self.student.document_expansion, None
        if expansion is not None and self.corpus.weights.counts_words:
            added = expansion.words(encoded.vectors, texts)
        return TextRows(texts, encoded, self.corpus.formats, windows=windows, added=added)

    def score(
        self,
        query: TextQuery,
        texts: TextRows,
        rows: NDArray[np.int64] | None = None,
        *,
        with_features: bool = True,
    ) -> NDArray[np.float32]:
        """The scores of texts for a query: of the given rows [n], by default of all.

        Without the features, they are of the vectors alone (``Student.score``).
        """
        student, corpus = self.student, self.corpus
        rows = np.arange(len(texts)) if rows is None else rows
        scorer = student.prepare(query.vector, corpus.task)
        if not corpus.weights or not with_features:
            return RowScorer(texts, student, query.vector, corpus.task, prepared=scorer)(rows)
        dot, nearest = dot_query(student, query.vector, corpus.task, scorer), None
        words, statistics = corpus.words(query)
        if corpus.weights.needs_nearest:
            assert dot is not None, "without inner products, no passage is the nearest"
            nearest = corpus.nearest(query, dot, texts.vectors(rows))
        within = texts.within(statistics)
        features = RowFeatures(within, query.text, corpus.weights, dot, query.tokens, words, nearest)
        return RowScorer(texts, student, query.vector, corpus.task, features, scorer)(rows)

    def read_pairs(self, pairs: Sequence[tuple[str, str]], description: str = "encoding texts") -> ReadPairs:
        """Read (query, text) pairs, each distinct text once; the progress bar has a ``description``."""
        query_rows: dict[str, list[int]] = {}
        text_rows: dict[str, int] = {}
        for index, (query, text) in enumerate(pairs):
            query_rows.setdefault(query, []).append(index)
            text_rows.setdefault(text, len(text_rows))
        with progress_bar(description, len(query_rows) + len(text_rows)) as advance:
            queries, read = self.read_queries([*query_rows], advance=advance)
            texts = self.read_texts([*text_rows], advance=advance)
        rows = np.array([text_rows[text] for _, text in pairs], np.int64)
        return ReadPairs(self, [*zip(queries, query_rows.values(), strict=True)], texts, rows, read.num_truncated)


class ReadPairs(NamedTuple):
    """Pairs [n] that were read, by query.

    Attributes:
        scorer: scores them.
        queries: each with the positions of its pairs.
        texts: their texts.
        rows: [n] the row of each pair's text.
        num_truncated_queries: how many queries were truncated.
    """

    scorer: TextScorer
    queries: Sequence[tuple[TextQuery, list[int]]]
    texts: TextRows
    rows: NDArray[np.int64]
    num_truncated_queries: int

    @property
    def num_truncated(self) -> int:
        """How many queries and texts were truncated."""
        return self.num_truncated_queries + self.texts.encoded.num_truncated

    def scores(self, *, with_features: bool = True) -> NDArray[np.float32]:
        """The scores [n], as of ``TextScorer.score``."""
        scores = np.zeros(len(self.rows), np.float32)
        for query, positions in self.queries:
            rows = self.rows[positions]
            scores[positions] = self.scorer.score(query, self.texts, rows, with_features=with_features)
        return scores


def word_weights(
    corpus: ScoringCorpus, text: TextQuery, kind: TextKind, added: Mapping[str, float]
) -> tuple[NDArray[np.uint64], NDArray[np.float32]]:
    """The hashes [n] of a text's terms and their weights [n] above 0.

    The product of a query's with a passage's is the passage's BM25 in the corpus. ``added`` are the words, by count,
    that the passage lacks (``models.document_expansion``).
    """
    words, statistics = corpus.words(text)
    if kind == "query":
        known = words.weights > 0
        return words.terms[known], words.weights[known]
    counted, more = CountedTerms.from_text(text.text), AddedWords.of_rows([added])
    hashes = np.concatenate([counted.hashes, more.hashes])
    learned, values = hashes < LEARNED, np.concatenate([counted.times, more.hundredths])
    counts = values / np.where(np.arange(len(hashes)) < len(counted.hashes), 1, 100)
    length = float(counts[~learned].sum()) / (statistics.mean_length or 1.0)
    weights = np.where(learned, values / MAX_COUNT, counts / (counts + K1 * (1 - B + B * length)))
    return hashes, weights.astype(np.float32)


def window_texts(full_texts: Sequence[str]) -> tuple[list[str], NDArray[np.int64]]:
    """The windows of texts as an index stores them, and how many each has: a text with a single one has none."""
    texts: list[str] = []
    counts: list[int] = []
    for text in full_texts:
        spans = windows(text)
        stored = spans if len(spans) > 1 else []
        texts += [text[start:end] for start, end in stored]
        counts.append(len(stored))
    return texts, np.array(counts, np.int64)
