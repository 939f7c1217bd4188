"""The terms of BM25, and sentences and windows, of which a student's score counts the best."""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from typing import Any

from d2llm.core.types import Span
from d2llm.ops.words import fold, placed_fold, runs, words_and_pairs

_snowball: Any = importlib.import_module("Stemmer")  # ships no types

# A sentence ends at a line end, after a full stop that is used in one script only, or after a Latin one followed by
# white space and anything but a lower-case letter ("e.g. this" does not end it).
# Closing quotes and brackets belong to the sentence.
_FULL_STOPS = "。！？；．｡।॥۔؟؛።፧։།༎។៕။"
_SENTENCE_END = re.compile(rf"()\n+|(?<=[{_FULL_STOPS}])([”’」』）]*)|(?<=[.!?;:…])([\"'”’»)\]]*)\s+(?=[^\sa-z])")
_LONGEST_SENTENCE = 400  # characters; longer ones are split, so that tables and lists have windows too
WINDOW_SENTENCES = 2


def terms(text: str) -> list[str]:
    """Terms of a text: its words by ``ops.words``, English ones stemmed, and pairs in scripts without spaces.

    In order, but for the pairs of a run of such a script, which follow its words. Only ASCII words are stemmed.
    """
    # A stemmer is not thread-safe, and creating one takes less than a microsecond.
    stemmer = _snowball.Stemmer("english", 0)
    words = words_and_pairs(fold(text))
    if text.isascii():
        return stemmer.stemWords(words)
    stem = stemmer.stemWord
    return [stem(word) if word.isascii() else word for word in words]


def placed_terms(text: str) -> list[tuple[Span, str]]:
    """The terms of a text, and where each is in it; a term that is there several times comes as often."""
    stem = _snowball.Stemmer("english", 0).stemWord
    folded, places = placed_fold(text)
    spans = [span for run in runs(folded) for span in (*run.words, *run.pairs)]
    found = [folded[start:end] for start, end in spans]
    terms = [stem(word) if word.isascii() else word for word in found]
    return [((places[start][0], places[end - 1][1]), term) for (start, end), term in zip(spans, terms, strict=True)]


def tokens_of_terms(text: str, spans: Sequence[Span]) -> dict[str, list[int]]:
    """For each term, which of a model's tokens, at these character spans of the text, overlap its words."""
    places: dict[str, list[int]] = {}
    for (first, end), term in placed_terms(text):
        tokens = [at for at, span in enumerate(spans) if max(span[0], first) < min(span[1], end)]
        places.setdefault(term, []).extend(tokens)
    return places


def sentences(text: str) -> list[Span]:
    """Start and end of each sentence of a text; a text of only white space has none."""
    spans: list[Span] = []
    start = 0
    for match in _SENTENCE_END.finditer(text):
        spans += _without_margins(text, start, match.end(match.lastindex or 0))
        start = match.end()
    return spans + _without_margins(text, start, len(text))


def windows(text: str) -> list[Span]:
    """Parts of a text that may answer a query alone: every two neighbouring sentences; a shorter text is one window.

    An empty text has one empty window, so that every passage has at least one.
    """
    spans = sentences(text)
    if len(spans) <= WINDOW_SENTENCES:
        return [(spans[0][0], spans[-1][1])] if spans else [(0, 0)]
    last = WINDOW_SENTENCES - 1
    return [(spans[first][0], spans[first + last][1]) for first in range(len(spans) - last)]


def _without_margins(text: str, start: int, end: int) -> list[Span]:
    """A sentence without surrounding white space, split if it is too long; empty if nothing is left."""
    pieces: list[Span] = []
    while True:
        while start < end and text[start].isspace():
            start += 1
        while end > start and text[end - 1].isspace():
            end -= 1
        if start >= end:
            return pieces
        cut = end
        if end - start > _LONGEST_SENTENCE:
            space = text.rfind(" ", start + _LONGEST_SENTENCE // 2, start + _LONGEST_SENTENCE)
            cut = space if space > 0 else start + _LONGEST_SENTENCE
        pieces.append((start, cut))
        start = cut
