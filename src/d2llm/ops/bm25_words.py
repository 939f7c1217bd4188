"""Splitting texts into terms, sentences and windows, as used by BM25, by a student's passage windows and by mining."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Sequence
from typing import Any

from d2llm.core.types import Span

_snowball: Any = importlib.import_module("Stemmer")  # ships no types

# Scripts written without spaces between words (Han, Kana) or with many word endings (Hangul), as ranges of characters
# for a regular expression.
UNSPACED = (
    "\u1100-\u11ff\u3005-\u3007\u3040-\u30ff\u3130-\u318f\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff"
    "\uac00-\ud7af\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003fffd"
)
_TOKEN = re.compile(rf"([{UNSPACED}]+)|([^\W_{UNSPACED}]+)")
# A sentence ends at a line end, after a full stop of an unspaced script, or after a Latin one followed by white space
# and anything but a lower-case letter ("e.g. this" does not end it).
# Closing quotes and brackets belong to the sentence.
_SENTENCE_END = re.compile(r"()\n+|(?<=[。！？；｡])([”’」』）]*)|(?<=[.!?;:…؟۔।॥։።፧។။])([\"'”’»)\]]*)\s+(?=[^\sa-z])")
_LONGEST_SENTENCE = 400  # characters; longer ones are split, so that tables and lists have windows too
WINDOW_SENTENCES = 2


def terms(text: str) -> list[str]:
    """Terms of a text in order: lower-cased words, English ones stemmed; Han, Kana and Hangul characters and bigrams.

    A run of those scripts gives each of its characters, then each pair of neighbours. Only ASCII words are stemmed.
    """
    # A stemmer is not thread-safe, and creating one takes less than a microsecond.
    stem: Callable[[str], str] = _snowball.Stemmer("english", 0).stemWord
    tokens: list[str] = []
    for match in _TOKEN.finditer(text.lower()):
        run, word = match.groups()
        if word is not None:
            tokens.append(stem(word) if word.isascii() else word)
        else:
            tokens.extend(run)
            tokens.extend(run[start : start + 2] for start in range(len(run) - 1))
    return tokens


def placed_terms(text: str) -> list[tuple[Span, list[str]]]:
    """The terms of each word, or run of unspaced characters, and where it is in the text.

    Empty for the rare texts whose length changes when they are lower-cased, because places would be off.
    """
    lowered = text.lower()
    if len(lowered) != len(text):
        return []
    return [(match.span(), terms(match.group())) for match in _TOKEN.finditer(lowered)]


def tokens_of_terms(text: str, spans: Sequence[Span]) -> dict[str, list[int]]:
    """For each term, which of a model's tokens, at these character spans of the text, overlap its words."""
    places: dict[str, list[int]] = {}
    for (first, end), word_terms in placed_terms(text):
        tokens = [at for at, span in enumerate(spans) if max(span[0], first) < min(span[1], end)]
        for term in word_terms:
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
