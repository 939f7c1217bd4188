"""BM25 over passages of any language: candidates for mining, and the baseline of every report."""

from __future__ import annotations

import importlib
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from d2llm.core.types import Candidate, Passage
from d2llm.ops.selection import ids_at, top_rows

K1 = 1.2
B = 0.75

_snowball: Any = importlib.import_module("Stemmer")  # ships no types

# Scripts written without spaces between words (Han, Kana) or with many endings on a word (Hangul).
_UNSPACED = (
    "\u1100-\u11ff\u3005-\u3007\u3040-\u30ff\u3130-\u318f\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff"
    "\uac00-\ud7af\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003fffd"
)
_TOKEN = re.compile(rf"([{_UNSPACED}]+)|([^\W_{_UNSPACED}]+)")


def tokenize(text: str) -> list[str]:
    """Terms of a text in order: lower-cased words, English ones stemmed; Han, Kana and Hangul characters and bigrams.

    A run of those scripts gives each of its characters, then each pair of neighbours. Only words of the letters a-z are
    stemmed.
    """
    # A stemmer must not be called from two threads at once, and a new one costs less than a microsecond.
    stem: Callable[[str], str] = _snowball.Stemmer("english", 0).stemWord
    terms: list[str] = []
    for match in _TOKEN.finditer(text.lower()):
        run, word = match.groups()
        if word is not None:
            terms.append(stem(word) if word.isascii() else word)
        else:
            terms.extend(run)
            terms.extend(run[start : start + 2] for start in range(len(run) - 1))
    return terms


class LexicalIndex:
    """BM25 in Lucene's form (``bm25s``), k1 1.2, b 0.75, English stems (Snowball's), no stop words.

    score(q, p) = sum over the terms of q of  idf(t) tf / (tf + k1 (1 - b + b |p| / mean length)),
    idf(t) = ln(1 + (N - n_t + 0.5) / (n_t + 0.5)); a term that the query repeats counts each time.
    Source: Kamphuis et al., "Which BM25 do you mean?", ECIR 2020, the accurate Lucene variant.

    nDCG@10 on dev splits (``english``; Snowball's ``porter``; no stems): squad-sent, 472 queries, .653; .654; .640;
    banking77, 741 queries, .397; .403; .366. ``porter`` stems words of one and two letters too ("s" to nothing, "is"
    to "i"); without that it has .654 and .396.
    Chinese (characters and bigrams; bigrams alone; characters alone): cmrc2018, 383 queries, .986; .982; .952; drcd,
    391 queries, .965; .955; .930.
    """

    def __init__(self, passages: Sequence[Passage], *, advance: Callable[[int], None] | None = None) -> None:
        """Index passages; ``advance`` is called with the number of those finished since the last call."""
        self._ids = [passage.id for passage in passages]
        self._terms: dict[str, int] = {}
        term_ids: list[list[int]] = []
        for passage in passages:
            terms = tokenize(passage.full_text)
            term_ids.append([self._terms.setdefault(term, len(self._terms)) for term in terms])
            if advance is not None:
                advance(1)
        self._bm25: Any = _fit(term_ids, self._terms) if self._terms else None

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def num_bytes(self) -> int:
        """Size of the postings (the vocabulary's strings not counted)."""
        if self._bm25 is None:
            return 0
        return sum(array.nbytes for array in self._bm25.scores.values() if isinstance(array, np.ndarray))

    def search(self, texts: Sequence[str], top_k: int) -> list[list[Candidate]]:
        """Best passages of each text, best first, ties by passage id; passages that share no term are left out.

        Raises:
            ValueError: ``top_k`` below 1.
        """
        return list(self.iterate(texts, top_k))

    def iterate(self, texts: Sequence[str], top_k: int) -> Iterator[list[Candidate]]:
        """Like ``search``, one text after the other."""
        if top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {top_k}")
        return (self._search_one(text, top_k) for text in texts)

    def scores(self, text: str) -> NDArray[np.float32]:
        """The score of every passage, in their order; 0 where no term is shared."""
        query = [self._terms[term] for term in tokenize(text) if term in self._terms]
        return self._bm25.get_scores_from_ids(query) if query else np.zeros(len(self), np.float32)

    def _search_one(self, text: str, top_k: int) -> list[Candidate]:
        scores = self.scores(text)
        matching = np.flatnonzero(scores > 0)
        places = top_rows(scores[matching], top_k, lambda places: ids_at(self._ids, matching[places]))
        best = matching[places]
        return [Candidate(self._ids[row], float(scores[row])) for row in best.tolist()]


def _fit(term_ids: list[list[int]], terms: dict[str, int]) -> Any:
    bm25s: Any = importlib.import_module("bm25s")  # ships no types
    # It sets its logger to DEBUG when imported, which would reach the handlers of whoever uses us.
    logging.getLogger("bm25s").setLevel(logging.WARNING)
    bm25 = bm25s.BM25(k1=K1, b=B, method="lucene", backend="numpy", csc_backend="numpy")
    bm25.index((term_ids, terms), create_empty_token=False, show_progress=False)
    return bm25
