"""Typing errors in queries: a word that no passage has gives way to one that is a typing error away from it.

A word is left alone if it is in the table of English words (``store.background_words``): then the corpus lacks it, but
it is no error. Of several words of the corpus, that of the most passages is taken, and of the forms of one word one
with the same ending.

Words at a distance of one typing error have a letter too many, too few or wrong, or two neighbours exchanged. Source:
Damerau, "A technique for computer detection and correction of spelling errors", CACM 7(3), 1964: 80 % of all misspelt
words have one of these four errors.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from string import ascii_lowercase

import numpy as np
from numpy.typing import NDArray

from d2llm.core.types import Query, Span
from d2llm.ops.bm25_words import stemmer
from d2llm.ops.words import placed_fold
from d2llm.store.background_words import background_for
from d2llm.store.word_segment import hash_terms, vocabulary_indices

CountWords = Callable[[NDArray[np.uint64]], NDArray[np.int64]]
"""Number of passages of a corpus that contain each term [n], by its hash."""


def find_corrections(texts: Sequence[str], count_words: CountWords) -> list[dict[str, str]]:
    """For each text, its misspelt words, each with the word of the corpus that is taken instead."""
    words = [list(islice(correctable_words(text), MAX_WORDS)) for text in texts]
    distinct = list(dict.fromkeys(word for of_text in words for word in of_text))
    if not distinct:
        return [{} for _ in texts]
    stem = stemmer()
    hashes = hash_terms(map(stem, distinct))
    missing = np.flatnonzero(count_words(hashes) == 0)
    if len(missing):
        known = vocabulary_indices(background_for("").terms, hashes[missing]) >= 0
        missing = missing[~known]
    candidates = {distinct[index]: variants(distinct[index]) for index in missing.tolist()}
    if not candidates:
        return [{} for _ in texts]
    counts = count_words(hash_terms(stem(one) for others in candidates.values() for one in others))
    corrections: dict[str, str] = {}
    ends = np.cumsum([len(others) for others in candidates.values()])
    for (word, others), counts_of_word in zip(candidates.items(), np.split(counts, ends[:-1]), strict=True):
        ends_alike = [other[-1] == word[-1] for other in others]
        count, _, _, likeliest = max(zip(counts_of_word.tolist(), ends_alike, map(len, others), others, strict=True))
        if count:
            corrections[word] = likeliest
    return [{word: corrections[word] for word in of_text if word in corrections} for of_text in words]


def corrected_query(query: Query, corrections: Mapping[str, str]) -> Query:
    """The query with its misspelt words replaced."""
    return replace(query, text=corrected(query.text, corrections)) if corrections else query


MIN_LETTERS = 5
"""A shorter word has too many others near it."""
MAX_WORDS = 64
"""Words of a text, from its start, in which typing errors are looked for: each unknown one has some 500 variants."""
_WORD = re.compile(rf"(?<![^\W_])[a-z]{{{MIN_LETTERS},30}}(?![^\W_])")


def correctable_words(text: str) -> dict[str, list[Span]]:
    """The words of a text in which typing errors are looked for, and where they are: five letters of a to z or more."""
    folded, origins = placed_fold(text)
    spans: dict[str, list[Span]] = {}
    for match in _WORD.finditer(folded):
        spans.setdefault(match[0], []).append((origins[match.start()][0], origins[match.end() - 1][1]))
    return spans


def variants(word: str) -> list[str]:
    """All words of the letters a to z that differ from a word by one typing error, without it."""
    splits = [(word[:at], word[at:]) for at in range(len(word) + 1)]
    others = {left + right[1:] for left, right in splits if right}
    others |= {left + right[1] + right[0] + right[2:] for left, right in splits if len(right) > 1}
    others |= {left + letter + right[1:] for left, right in splits if right for letter in ascii_lowercase}
    others |= {left + letter + right for left, right in splits for letter in ascii_lowercase}
    return sorted(others - {word})


def corrected(text: str, corrections: Mapping[str, str]) -> str:
    """A text with some of its ``correctable_words`` replaced."""
    spans = correctable_words(text)
    replaced = sorted(((span, corrections[word]) for word in corrections for span in spans[word]), reverse=True)
    for (start, end), word in replaced:
        text = text[:start] + word + text[end:]
    return text
