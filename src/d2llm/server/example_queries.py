"""Queries to try on an index: headings and first sentences of its passages, as they are written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from d2llm.core.types import Passage
from d2llm.ops.bm25_words import sentences
from d2llm.ops.words import words
from d2llm.retrieval.chunking import HEADING_SEPARATOR
from d2llm.retrieval.segments import IndexView

_NUM_EXAMPLES = 3
_NUM_READ = 60  # passages
_WORDS = range(2, 25)  # of an example
_TYPICAL_WORDS = 6
_MAX_CHARS = 150


def example_queries(view: IndexView) -> list[str]:
    """At most three different queries, from passages spread evenly over an index; the same for the same contents."""
    rows = view.live_rows()
    chosen = np.unique(np.linspace(0, len(rows) - 1, min(_NUM_READ, len(rows))).astype(np.int64))
    return _queries_of(view.passages(rows[chosen]))


def _queries_of(passages: Sequence[Passage]) -> list[str]:
    """One query from each third of the passages: a heading that no other has if there is one, else a sentence."""
    headings = [passage.title.rsplit(HEADING_SEPARATOR, 1)[-1] for passage in passages]
    sentences_of = [_first_sentence(passage.text) for passage in passages]
    counts = Counter(text.casefold() for text in headings)
    queries: list[str] = []
    for third in np.array_split(np.arange(len(passages)), _NUM_EXAMPLES):
        unique = [headings[row] for row in third if counts[headings[row].casefold()] == 1]
        for texts in (unique, [sentences_of[row] for row in third]):
            usable = [text for text in texts if _is_query(text) and text not in queries]
            if usable:
                queries.append(min(usable, key=_unusual))
                break
    return queries


def _first_sentence(text: str) -> str:
    start, end = next(iter(sentences(text)), (0, 0))
    return text[start:end]


def _is_query(text: str) -> bool:
    """Whether a text reads like something that one would ask: some words, and hardly any signs."""
    letters = sum(sign.isalpha() or sign.isspace() for sign in text)
    return len(text) <= _MAX_CHARS and len(words(text)) in _WORDS and letters > 0.85 * len(text)


def _unusual(text: str) -> int:
    """How far the length of a query is from the usual one."""
    return abs(len(words(text)) - _TYPICAL_WORDS)
