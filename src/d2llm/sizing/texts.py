"""What sizes and times need to know about texts: how many bytes, words, sentences and distinct words a passage has."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from d2llm.core.errors import InputError
from d2llm.core.types import Passage
from d2llm.ops.bm25_words import sentences, windows
from d2llm.retrieval.upserting import BLOCK_PASSAGES
from d2llm.store.bm25 import WordIndex
from d2llm.store.index_spec import StoredSpec
from d2llm.store.index_store import IndexStore
from d2llm.store.passage_table import NAME
from d2llm.store.word_segment import QueryWords, WordSegment

if TYPE_CHECKING:
    from d2llm.models.student import Student

SAMPLE_PASSAGES = 4_000
"""Maximum number of passages from which ``TextFacts`` are taken."""
_MIN_PASSAGES = 20
_QUERY_WORDS = 10
_BEST_DIVISOR = 40  # a query's candidates by words: the best fortieth of a sample
_LENGTHS = 20
_NO_LIMIT = 1 << 40  # tokens of a passage: what a student would cut is counted too
_Item = TypeVar("_Item")


class TextFacts(BaseModel):
    """Means over some passages.

    Attributes:
        source: which passages.
        tokens: tokens of a passage, as the student counts them.
        text_bytes: UTF-8 bytes of title and text.
        words: words that BM25 counts.
        distinct_words: different ones among them.
        sentences: sentences.
        windows: windows that have a vector of their own: none if a passage has only one.
        token_vectors: fraction of the tokens that get a vector.
        lengths: tokens of a passage in each twentieth of them, from the shortest to the longest, as fractions of the
            mean: a student cuts the long ones, though not one of mean length. Only 1: all are taken as equally long.
        query_postings: how many of a query's different words a passage has: of so many postings a passage, a search
            reads a fraction (``search_time.MaxScoreFacts``).
        candidate_length: how much longer than the mean the passages are that BM25 ranks first: of short and long texts,
            the long ones have more of a query's words.
        vocabulary: different words of all passages in ``vocabulary_words`` words.
        vocabulary_growth: exponent of their growth with the number of words (Heaps' law).
        row_bytes: bytes in the table for a passage without text: id, row number, hash and indices.
        stored_text: bytes of the table for a byte of text.
    """

    model_config = ConfigDict(frozen=True)

    source: str
    tokens: float
    text_bytes: float
    words: float
    distinct_words: float
    sentences: float
    windows: float
    token_vectors: float
    query_postings: float
    candidate_length: float
    vocabulary: float
    vocabulary_words: float
    vocabulary_growth: float
    row_bytes: float
    stored_text: float
    lengths: tuple[float, ...] = (1.0,)

    def read_tokens(self, max_tokens: int) -> float:
        """Mean tokens of a passage that are read, if longer ones are cut after so many."""
        return float(np.minimum(self.tokens * np.array(self.lengths), max_tokens).mean())

    def at(self, tokens: float) -> TextFacts:
        """The same for passages of so many tokens.

        Everything grows in proportion, but distinct words: there, longer passages repeat some (a power law through the
        measured point).
        """
        longer = tokens / self.tokens
        repeats = math.log(max(self.distinct_words, 1)) / math.log(max(self.words, 2))
        new_words = longer**repeats
        return self.model_copy(
            update={
                "tokens": tokens,
                "text_bytes": longer * self.text_bytes,
                "words": longer * self.words,
                "distinct_words": new_words * self.distinct_words,
                "sentences": longer * self.sentences,
                "windows": max(0.0, self.windows + (longer - 1) * self.sentences),
                "query_postings": new_words * self.query_postings,
            }
        )

    def of_candidates(self, *, counts_words: bool) -> TextFacts:
        """The same for the candidates of a search, half of which BM25 proposes if the score counts words."""
        return self.at(self.tokens * (1 + self.candidate_length) / 2) if counts_words else self

    def terms(self, num_words: float) -> float:
        """How many different words so many words are."""
        return self.vocabulary * (num_words / self.vocabulary_words) ** self.vocabulary_growth


def shipped_text_facts() -> TextFacts:
    """Those of the benchmarks' passages (``benchmarks/size.py --ship``), in tokens of d2llm-minilm."""
    return TextFacts.model_validate_json((files("d2llm.sizing") / "texts.json").read_text(encoding="utf-8"))


def read_text_facts(
    passages: Sequence[Passage], student: Student, source: str, *, queries: Sequence[str] | None = None
) -> TextFacts:
    """Take the facts from passages; ``queries`` are typical ones, by default some words in a row of the passages.

    They are written to an index in a temporary folder, to see what its table takes; metadata are not counted. Give at
    least a thousand: a smaller table has more unused bytes.

    Raises:
        InputError: there are fewer than 20 passages, or they have no text.
    """
    sample = [replace(passage, metadata={}) for passage in _spread(passages, SAMPLE_PASSAGES)]
    if len(sample) < _MIN_PASSAGES:
        raise InputError(f"{source}: {len(sample)} passages are too few for a sample; give at least {_MIN_PASSAGES}")
    texts = [passage.full_text for passage in sample]
    segment = WordSegment.from_texts(texts)
    num_words = int(segment.lengths.sum())
    text_bytes = sum(len(text.encode()) for text in texts)
    if not num_words:
        raise InputError(f"{source}: its passages have no words; give texts")
    half = WordSegment.from_texts(texts[::2])
    growth = math.log(len(segment.terms) / len(half.terms)) / math.log(num_words / int(half.lengths.sum()))
    ids = student.backbone.tokenize(texts, "passage", limit=_NO_LIMIT).ids
    projection = student.token_projection
    with_vectors = 0 if projection is None else sum(len(projection.positions(row)) for row in ids)
    num_tokens = sum(map(len, ids))
    groups = np.array_split(np.sort([len(row) for row in ids]), _LENGTHS)
    num_postings, candidate_words = _query_facts(segment, queries or word_queries(texts))
    empty = _row_bytes([replace(passage, title="", text="") for passage in sample])
    return TextFacts(
        source=source,
        tokens=num_tokens / len(sample),
        text_bytes=text_bytes / len(sample),
        words=num_words / len(sample),
        distinct_words=len(segment.rows) / len(sample),
        sentences=sum(len(sentences(text)) for text in texts) / len(sample),
        windows=sum(len(spans) for spans in map(windows, texts) if len(spans) > 1) / len(sample),
        token_vectors=with_vectors / num_tokens,
        query_postings=num_postings / len(segment),
        candidate_length=candidate_words / (num_words / len(sample)),
        vocabulary=len(segment.terms),
        vocabulary_words=num_words,
        vocabulary_growth=min(max(growth, 0.0), 1.0),
        row_bytes=empty,
        stored_text=max(0.0, _row_bytes(sample) - empty) * len(sample) / text_bytes,
        lengths=tuple(float(part.mean()) * len(sample) / num_tokens for part in groups),
    )


def word_queries(texts: Sequence[str], count: int = 100) -> list[str]:
    """Queries made of some words in a row, from the middle of texts."""
    words = [text.split() for text in _spread(texts, count)]
    return [" ".join(row[len(row) // 2 :][:_QUERY_WORDS]) for row in words if row]


def _spread(items: Sequence[_Item], count: int) -> list[_Item]:
    """At most so many of the items, evenly spread."""
    positions = np.linspace(0, len(items) - 1, min(count, len(items))).astype(np.int64)
    return [items[index] for index in positions.tolist()]


def _query_facts(segment: WordSegment, queries: Sequence[str]) -> tuple[float, float]:
    """Means over queries: the postings of their words, and the words of a passage that BM25 ranks first."""
    index = WordIndex([segment])
    num_postings: list[int] = []
    num_words: list[float] = []
    for query in map(index.query, queries):
        num_postings.append(count_postings(segment, query))
        rows, _ = index.best(query, max(1, len(segment) // _BEST_DIVISOR))
        num_words += [float(segment.lengths[rows].mean())] if len(rows) else []
    return sum(num_postings) / len(num_postings), sum(num_words) / max(len(num_words), 1)


def count_postings(segment: WordSegment, query: QueryWords) -> int:
    """The postings of a query's terms in a segment."""
    return sum(part.stop - part.start for part, _ in segment.extents_of(query.terms).slices())


def write_passages(store: IndexStore, passages: Sequence[Passage], vectors: NDArray[np.float32]) -> None:
    """Write new passages with their vectors [n, dim], as many in a commit as an upsert writes."""
    for start in range(0, len(passages), BLOCK_PASSAGES):
        with store.writing():
            changes = store.compare(passages[start : start + BLOCK_PASSAGES])
            store.write(changes, vectors[start : start + len(changes.texts)])


def _row_bytes(passages: Sequence[Passage]) -> float:
    """Bytes of a passage in the table of an index without vectors, after a compaction."""
    with TemporaryDirectory() as folder:
        store = IndexStore.create(Path(folder) / "index", StoredSpec(student="none", dim=1, vector_copies=1))
        write_passages(store, passages, np.zeros((len(passages), 1), np.float32))
        store.compact(timedelta(0))
        return (store.folder / NAME).stat().st_size / len(passages)
