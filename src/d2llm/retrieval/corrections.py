"""Typing errors in queries: a word that no passage has gives way to one that is a typing error away from it.

A word is left alone if it is in the table of English words (``store.background_words``): then the corpus lacks it, but
it is no error. Of several words of the corpus, that of the most passages is taken, and of the forms of one word one
with the same ending.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from d2llm.core.types import Query
from d2llm.ops.bm25_words import stemmer
from d2llm.ops.typing_errors import correctable_words, corrected, variants
from d2llm.store.background_words import background_for
from d2llm.store.word_segment import hash_terms, vocabulary_indices

CountWords = Callable[[NDArray[np.uint64]], NDArray[np.int64]]
"""Number of passages of a corpus that contain each term [n], by its hash."""


def find_corrections(texts: Sequence[str], count_words: CountWords) -> list[dict[str, str]]:
    """For each text, its misspelt words, each with the word of the corpus that is taken instead."""
    words = [correctable_words(text) for text in texts]
    distinct = list(dict.fromkeys(word for by_place in words for word in by_place))
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
    return [{word: corrections[word] for word in by_place if word in corrections} for by_place in words]


def corrected_query(query: Query, corrections: Mapping[str, str]) -> Query:
    """The query with its misspelt words replaced."""
    return replace(query, text=corrected(query.text, corrections)) if corrections else query
