"""Selecting diverse results from a ranking: near duplicates left out, then maximal marginal relevance (MMR).

Vectors do not tell: rows of a price list are nearer to each other than two wordings of a sentence. So words decide, by
rules that rather keep a text twice than lose what only one of them says.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from d2llm.ops.bm25_words import placed_terms, sentences, terms

_SAME = 1e-6  # rounding of the cosine of a vector with itself


SaysTheSame = Callable[[int, int], bool]
"""Whether a result (its index) says nothing that a better one does not; asked if their vectors are alike."""


class DiverseResults(NamedTuple):
    """Indices int64 [k] of the selected results in the ranking, in their new order, and how many were near duplicates.

    ``num_near_duplicates`` counts those that would have been considered otherwise: the results before the last one
    that was selected or, with MMR, all of them.
    """

    indices: NDArray[np.int64]
    num_near_duplicates: int


def select_diverse(
    scores: NDArray[np.floating[Any]],
    vectors: NDArray[np.floating[Any]],
    top_k: int,
    *,
    mmr: float | None = None,
    near_duplicates: float | None = None,
    says_the_same: SaysTheSame | None = None,
) -> DiverseResults:
    """Select ``top_k`` results of a ranking: near duplicates of better ones are left out, then MMR chooses and orders.

    Args:
        scores: [n] finite scores of the ranking, best first.
        vectors: [n, dim] vectors of the results; their lengths do not matter.
        top_k: how many results to select, at least 0; fewer are selected if fewer are left.
        mmr: weight of the score in MMR, 0 to 1; None keeps the order of the ranking.
        near_duplicates: a result is left out if the cosine of its vector with that of a better result that is kept is
            at least this; None leaves out none.
        says_the_same: also required of a near duplicate and that better result; None: vectors alone decide.
    """
    directions = _unit(vectors)
    indices = np.arange(len(scores), dtype=np.int64)
    num_left_out = 0
    if near_duplicates is not None:
        limit = top_k if mmr is None else len(scores)
        indices, num_left_out = _distinct(directions, near_duplicates, limit, says_the_same)
    if mmr is not None:
        indices = indices[maximal_marginal_relevance(scores[indices], directions[indices], mmr, top_k)]
    return DiverseResults(indices[:top_k], num_left_out)


def maximal_marginal_relevance(
    scores: NDArray[np.floating[Any]], directions: NDArray[np.floating[Any]], weight: float, top_k: int
) -> NDArray[np.int64]:
    """The indices [min(top_k, n)] of the results that MMR chooses, in the order of its choice; ties by index.

    The next result is always the one with the highest weight * s - (1 - weight) * c. s is its score, scaled so that the
    best of all scores is 1 and the lowest 0. c is its highest cosine with a result that is already chosen, 0 for the
    first.

    With weight 1, this is the order of the scores; the best result is always the first.

    Source: Carbonell and Goldstein, "The Use of MMR, Diversity-Based Reranking for Reordering Documents and Producing
    Summaries", SIGIR 1998. The scaling is ours: the score of a student has no natural range, unlike the paper's cosine.

    Args:
        scores: [n] finite scores, best first.
        directions: [n, dim] vectors of length 1 (or 0).
        weight: 0 to 1.
        top_k: how many results to choose, at least 0.
    """
    values = scores.astype(np.float64)
    spread = np.ptp(values) if len(values) else 0.0
    relevance = (values - values.min()) / spread if spread > 0 else np.zeros(len(values))
    nearest = np.zeros(len(values))
    is_left = np.ones(len(values), np.bool_)
    chosen: list[int] = []
    while len(chosen) < min(top_k, len(values)):
        index = int(np.argmax(np.where(is_left, weight * relevance - (1 - weight) * nearest, -np.inf)))
        cosines = directions @ directions[index]
        nearest = np.maximum(nearest, cosines) if chosen else cosines
        is_left[index] = False
        chosen.append(index)
    return np.array(chosen, np.int64)


def _distinct(
    directions: NDArray[np.float64], threshold: float, limit: int, says_the_same: SaysTheSame | None
) -> tuple[NDArray[np.int64], int]:
    """The indices of the first ``limit`` results that are like none kept before, and how many were passed over."""
    kept = np.zeros((min(limit, len(directions)), directions.shape[1]))
    indices: list[int] = []
    num_left_out = 0
    for index, direction in enumerate(directions):
        if len(indices) == len(kept):
            break
        near = np.flatnonzero(kept[: len(indices)] @ direction >= threshold - _SAME).tolist()
        if any(says_the_same is None or says_the_same(index, indices[position]) for position in near):
            num_left_out += 1
            continue
        kept[len(indices)] = direction
        indices.append(index)
    return np.array(indices, np.int64), num_left_out


def _unit(vectors: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """Vectors of length one; a zero vector stays zero, so it is like nothing else."""
    wide = vectors.astype(np.float64)
    lengths = np.linalg.norm(wide, axis=1, keepdims=True)
    return np.divide(wide, np.where(lengths > 0, lengths, 1.0))


# Words whose absence changes nothing, and words that matter by themselves: negations, numbers, and opposites that stand
# in the same sentences.
_FILLERS = frozenset(terms("a an the of is are was were be been it this that these those there which who as also"))
_DECISIVE = frozenset(
    terms(
        "not no nor never none without cannot don't neither nobody nothing unless except excluding only but nicht "
        "kein keine keinen keinem keiner ohne nie pas ne sans jamais aucun sin nunca non senza mai não sem ikke "
        "inte utan niet geen zonder не нет без ни bez değil yok zero one two three four five six seven eight nine "
        "ten eleven twelve hundred thousand million half double first second third last before after above below "
        "over under up down left right on off in out open close start stop min max minimum maximum more less least "
        "most true false yes enable disable allow forbid permit prohibit forbidden require option include inside "
        "outside increase decrease buy sell day night hot cold high low must may might should can shall will always "
        "sometimes and or if until since from to with week month year hour minute"
    )
)
_SHORTEST = 12  # content words; in a shorter text each word matters
_OTHER_WORDS = 0.25  # fraction of a longer text's content words that may be other words for the same
# Signs that say as much as words: of money, mathematics, per cent, degrees; a minus.
_SIGN = re.compile(r"[%‰°±×÷=<>+€$£¥₹₽₩#@&§²³/]|(?<!\w)[-\u2212\u2013](?=[\d.,])")


@dataclass(frozen=True)
class Statement:
    """A text, to be compared with others."""

    text: str

    def adds_nothing_to(self, other: Statement, query_terms: Collection[str] = ()) -> bool:
        """Whether this text says nothing that the other one does not, apart from its wording.

        Each of its sentences is in the other; or each of its words is, or it has at least 12 words, of which a quarter
        may be other words. Then what differs is no number, code, name, sign, negation or the like, in neither of them,
        and no term of the query (``query_terms``, stems as of BM25). Names are known by capital letters, so in scripts
        without these, no word of one text may be missing in the other.
        """
        if self._sentences <= other._sentences:
            return True
        added, others = self._content - other._content, other._content - self._content
        if self._codes != other._codes or any(term in added for term in query_terms):
            return False
        if any(self._is_decisive(term) for term in added) or any(other._is_decisive(term) for term in others):
            return False
        num_own, num_words = added.total(), self._content.total()
        return not num_own or (num_words >= _SHORTEST and num_own <= _OTHER_WORDS * num_words)

    @cached_property
    def _sentences(self) -> frozenset[str]:
        text = unicodedata.normalize("NFKC", self.text)
        return frozenset(" ".join(text[start:end].rstrip(".").split()) for start, end in sentences(text))

    @cached_property
    def _terms(self) -> list[tuple[str, str]]:
        """Each term with the word as it is written."""
        return [(term, self.text[start:end]) for (start, end), term in placed_terms(self.text)]

    @cached_property
    def _content(self) -> Counter[str]:
        return Counter(term for term, _ in self._terms if term not in _FILLERS)

    @cached_property
    def _codes(self) -> list[str]:
        """Numbers, codes and signs in the order of the text."""
        text = unicodedata.normalize("NFKC", self.text)
        words = ((start, text[start:end]) for (start, end), _ in placed_terms(text))
        codes = {(start, word) for start, word in words if _is_code(word)}
        signs = {(match.start(), match[0]) for match in _SIGN.finditer(text)}
        return [code for _, code in sorted(codes | signs)]

    @cached_property
    def _named(self) -> frozenset[str]:
        """Terms that are written with a capital letter, or in a script that has none."""
        return frozenset(term for term, word in self._terms if word != word.lower() or word.lower() == word.upper())

    def _is_decisive(self, term: str) -> bool:
        return term in _DECISIVE or term in self._named


def _is_code(word: str) -> bool:
    """Whether a word has a digit, or a capital letter beyond the first letter."""
    return any(letter.isdecimal() for letter in word) or word[1:] != word[1:].lower()
