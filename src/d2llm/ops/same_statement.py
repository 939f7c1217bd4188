"""Whether a text says nothing beyond another one: what near duplicates of it have to be.

Vectors do not tell: rows of a price list are nearer to each other than two wordings of a sentence. So words decide, by
rules that rather keep a text twice than lose what only one of them says.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property

from d2llm.ops.bm25_words import placed_terms, sentences, terms

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
        own, others = self._content - other._content, other._content - self._content
        if self._codes != other._codes or any(term in own for term in query_terms):
            return False
        if any(self._is_decisive(term) for term in own) or any(other._is_decisive(term) for term in others):
            return False
        num_own, num_words = own.total(), self._content.total()
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
