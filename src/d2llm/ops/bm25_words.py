"""The terms of BM25, and sentences and windows, of which a student's score counts the best."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Sequence
from typing import Any

from d2llm.core.types import Span
from d2llm.ops.words import fold, placed_fold, runs, words_and_pairs

_snowball: Any = importlib.import_module("Stemmer")  # ships no types

# A sentence ends at a line end, after a full stop that is used in one script only, or after a Latin one followed by
# white space and anything but a lower-case letter ("e.g. this" does not end it).
# Closing quotes and brackets belong to the sentence.
_FULL_STOPS = "。！？；．｡।॥۔؟؛።፧։།༎។៕။"
_SENTENCE_END = re.compile(  # one class of characters comes first, which is found several times as fast
    rf"[\n{_FULL_STOPS}.!?;:…](?:(?<=\n)|(?<=[{_FULL_STOPS}])[”’」』）]*|(?<=[.!?;:…])[\"'”’»)\]]*(?=\s+[^\sa-z]))"
)
_LONGEST_SENTENCE = 400  # characters; longer ones are split, so that tables and lists have windows too
WINDOW_SENTENCES = 2
END_OF_SENTENCE = "\n"
_ASCII_WORD = re.compile(f"[a-z0-9]+|{END_OF_SENTENCE}")


def terms(text: str) -> list[str]:
    """Terms of a text: its words by ``ops.words``, English ones stemmed, and pairs in scripts without spaces.

    In order, but for the pairs of a run of such a script, which follow its words. Only ASCII words are stemmed.
    """
    stem = stemmer()
    return [stem(word) for word in words_and_pairs(fold(text))]


def stemmer() -> Callable[[str], str]:
    """What makes terms of words, for one thread; creating it takes less than a microsecond."""
    stem = _snowball.Stemmer("english", 0).stemWord
    return lambda word: stem(word) if word.isascii() else word


def unstemmed(text: str) -> list[str]:
    """What ``terms`` gives for the sentences of a text, before stemming, with a ``END_OF_SENTENCE`` after each."""
    sentence_texts = [text[start:end] for start, end in sentences(text)]
    if text.isascii():
        return _ASCII_WORD.findall("".join([f"{part}{END_OF_SENTENCE}" for part in sentence_texts]).lower())
    return [word for part in sentence_texts for word in (*words_and_pairs(fold(part)), END_OF_SENTENCE)]


def placed_terms(text: str) -> list[tuple[Span, str]]:
    """The terms of a text, and where each is in it; a term that is there several times comes as often."""
    stem = stemmer()
    folded, origins = placed_fold(text)
    spans = [span for run in runs(folded) for span in (*run.words, *run.pairs)]
    return [((origins[start][0], origins[end - 1][1]), stem(folded[start:end])) for start, end in spans]


def tokens_of_terms(text: str, spans: Sequence[Span]) -> dict[str, list[int]]:
    """For each term, which of a model's tokens, at these character spans of the text, overlap its words."""
    by_term: dict[str, list[int]] = {}
    for (first, end), term in placed_terms(text):
        tokens = [at for at, span in enumerate(spans) if max(span[0], first) < min(span[1], end)]
        by_term.setdefault(term, []).extend(tokens)
    return by_term


def sentences(text: str) -> list[Span]:
    """Start and end of each sentence of a text; a text of only white space has none."""
    spans: list[Span] = []
    start = 0
    for match in _SENTENCE_END.finditer(text):
        spans += _without_margins(text, start, match.end())
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
    end = start + len(text[start:end].rstrip())
    pieces: list[Span] = []
    while start < end:
        if text[start].isspace():
            start += 1
            continue
        cut = end
        if end - start > _LONGEST_SENTENCE:
            space = text.rfind(" ", start + _LONGEST_SENTENCE // 2, start + _LONGEST_SENTENCE)
            cut = space if space > 0 else start + _LONGEST_SENTENCE
        pieces.append((start, cut))
        start = cut
    return pieces
