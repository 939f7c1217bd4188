"""What a word is: the one rule by which BM25, mining, reports, explanations and comparisons make words of a text.

``fold`` gives a text the form in which spellings of a word are equal: Unicode's NFKC_Casefold (The Unicode Standard,
section 3.13.3), which settles normal forms, compatibility characters, case, and characters without width. Beyond it,

- decimal digits of all scripts become ASCII digits;
- accents of Latin and Greek letters and stress marks of Cyrillic ones are left out, because writers leave them out, in
  capitals and where a keyboard lacks them; the dotless i of Turkish becomes i;
- vowel points of Hebrew, Arabic and Syriac and the tatweel are left out, and forms of Arabic letters that writers and
  keyboards mix become one (as in Lucene's ArabicNormalizer and PersianNormalizer);
- letters of Malayalam and Bengali that older texts write with a joiner become what is left of those.

All other marks stay: the vowel signs of Hindi belong to its words.

``runs`` cuts a folded text into words. Of Han, Kana and Hangul, each character is a word. Words of Thai, Lao, Khmer and
Burmese, which have no spaces between them, are found by ICU in its dictionaries. Of other scripts of South-East Asia
without spaces, for which ICU has no dictionary, each syllable is a word. In all of these, each pair of neighbouring
characters or syllables counts too: a dictionary may take a word for a part of another one.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Iterable, Iterator
from itertools import chain, pairwise
from operator import add
from typing import NamedTuple

from d2llm.core.types import Span

WORD_RULE = 1
"""The number of this rule. Raise it with every change of the words of any text: words by two rules are never mixed."""

# Blocks of Unicode, by how they separate words.
_HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003fffd]")
_LETTER = re.compile(r"[^\W\d_]")
_CHARACTERS = (  # Han, Kana without the middle dot, Hangul
    "\u1100-\u11ff\u3005-\u3007\u3040-\u309f\u30a1-\u30fa\u30fc-\u30ff\u3130-\u318f\u31f0-\u31ff\u3400-\u4dbf"
    "\u4e00-\u9fff\ua960-\ua97f\uac00-\ud7ff\uf900-\ufaff\uff66-\uff9f\U0001aff0-\U0001b16f\U00020000-\U0003fffd"
)
_DICTIONARY = (  # Thai and Lao, Burmese, Khmer
    *(range(0x0E00, 0x0F00), range(0x1000, 0x10A0), range(0x1780, 0x1800)),
    *(range(0xA9E0, 0xAA00), range(0xAA60, 0xAA80)),
)
_SYLLABLES = (  # Tai Le and New Tai Lue, Buginese and Tai Tham, Balinese, Javanese, Cham, Tai Viet, Ahom
    *(range(0x1950, 0x19E0), range(0x1A00, 0x1AB0), range(0x1B00, 0x1B80), range(0xA980, 0xA9E0)),
    *(range(0xAA00, 0xAA60), range(0xAA80, 0xAAE0), range(0x11700, 0x11750)),
)
_NO_LETTERS = "\u0e2f\u0e46\u0eaf\u0ec6\u17d7"  # signs of abbreviation and repetition, which Unicode counts as letters
# Default_Ignorable_Code_Point of Unicode, but for the zero width space, which separates words.
_IGNORABLE = (
    "\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200c-\u200f\u202a-\u202e\u2060-\u206f\u3164\ufe00-\ufe0f"
    "\ufeff\uffa0\ufff0-\ufff8\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff"
)
_IGNORED = re.compile(f"[{_IGNORABLE}]+")
# Signs that stand beside a word, but become letters of it in NFKC: "Acme\u2122" would be one word, acmetm.
_SIGNS = re.compile("[\u2116\u2120\u2122]")
_LAST_MARK = 0x20000
_ASCII_WORD = re.compile(r"[^\W_]+")
_VOCALISED = (range(0x0591, 0x0780), range(0x0890, 0x0900))  # Hebrew, Arabic, Syriac
_ACCENTED = (range(0xC0, 0x250), range(0x370, 0x400), range(0x1E00, 0x2000))  # Latin, Greek
_SAME_LETTERS = {
    **dict.fromkeys("\u0622\u0623\u0625\u0671", "\u0627"),  # alef with madda, hamza, wasla
    **dict.fromkeys("\u0649\u06cc", "\u064a"),  # alef maksura, Farsi yeh
    **dict.fromkeys("\u0629\u06c0\u06c1\u06c2\u06c3", "\u0647"),  # teh marbuta, heh with yeh, heh goal
    "\u06a9": "\u0643",  # keheh
    **dict.fromkeys("\u0640\u07fa", None),  # tatweel, lajanyalan
    **dict(zip("\u05f0\u05f1\u05f2", ("\u05d5\u05d5", "\u05d5\u05d9", "\u05d9\u05d9"), strict=True)),  # of Yiddish
    **dict(zip("\u0131\u00f8\u0111\u0142\u0127", "iodlh", strict=True)),  # dotless i, letters with a stroke
    **dict(zip("\u00e6\u0153", ("ae", "oe"), strict=True)),
    **dict(zip("\u0451\u0450\u045d", "\u0435\u0435\u0438", strict=True)),  # Cyrillic io, ie and i with grave
    **dict.fromkeys("\u02bb\u02bc\u02bd", "'"),  # apostrophes that Unicode counts as letters
    "\u09ce": "\u09a4\u09cd",  # Bengali khanda ta
    **dict(zip("\u0d7a\u0d7b\u0d7c\u0d7d\u0d7e\u0d7f", [f"{c}\u0d4d" for c in "ണനരലളക"], strict=True)),  # chillus
}
# Accents that have no letter of their own with what they stand on; of Cyrillic, only grave and acute.
_ACCENTS = re.compile("(?<![\u0400-\u052f])[\u0300-\u036f]+|[\u0300\u0301]+")
# NFKC splits the vowels am of Thai and Lao, which dictionaries have in one piece.
_AM = re.compile("\u0e4d([\u0e48-\u0e4b]?)\u0e32|\u0ecd([\u0ec8-\u0ecb]?)\u0eb2")
# What can change, or belong to, the character before it.
_FOLLOWING = f"{_IGNORABLE}\u1160-\u11ff\u3130-\u318f\uffa0-\uffdc\ud7b0-\ud7ff\uff9e\uff9f\u0e32\u0e33\u0eb2\u0eb3"


class Run(NamedTuple):
    """Neighbouring words of a folded text with nothing between them: of a script with spaces, one.

    ``pairs``: where two neighbouring characters or syllables are, of scripts without spaces; none is one of ``words``.
    """

    words: list[Span]
    pairs: list[Span]
    is_spaced: bool


def fold(text: str) -> str:
    """The text in the form in which all spellings of a word are equal; folding it again changes nothing."""
    if text.isascii():
        return text.lower()
    text = _SIGNS.sub(lambda sign: " no " if sign[0] == "\u2116" else " ", _IGNORED.sub("", text))
    # Folding the case of some characters gives others that have a compatibility form.
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    variants = _variants()
    if variants.signs.search(folded) is None:
        return folded
    folded = _ACCENTS.sub("", folded.translate(variants.letters))
    return unicodedata.normalize("NFC", _AM.sub(_joined_am, folded))


def placed_fold(text: str) -> tuple[str, list[Span]]:
    """The folded text, and for each of its characters the part of the text that it is made from."""
    if text.isascii():
        return text.lower(), [(at, at + 1) for at in range(len(text))]
    folded: list[str] = []
    origins: list[Span] = []
    for match in _scripts().cluster.finditer(text):
        folded.append(fold(match[0]))
        origins += [match.span()] * len(folded[-1])
    return "".join(folded), origins


def runs(folded: str) -> Iterator[Run]:
    """The words of a folded text, in order."""
    for match in _run_pattern(folded).finditer(folded):
        start, end = match.span()
        kind = match.lastgroup
        if kind is None:
            yield Run([(start, end)], [], is_spaced=True)
        elif kind == "characters":
            singles = [(at, at + 1) for at in range(start, end)]
            yield Run(singles, [(at, at + 2) for at in range(start, end - 1)], is_spaced=False)
        else:
            syllables = [syllable.span() for syllable in _scripts().syllable.finditer(folded, start, end)]
            found = syllables
            if kind == "dictionary":
                found = [(start + first, start + last) for first, last in _dictionary_words(match[0])]
            known = {*found}
            pairs = [(one[0], other[1]) for one, other in pairwise(syllables)]
            yield Run(found, [pair for pair in pairs if pair not in known], is_spaced=False)


def words_and_pairs(folded: str) -> list[str]:
    """The words of the runs of a folded text, in order, each run's pairs after its words."""
    pattern = _run_pattern(folded)
    if pattern is _ASCII_WORD:
        return pattern.findall(folded)
    spellings: list[str] = []
    for match in pattern.finditer(folded):  # as ``runs``, which takes several times as long
        kind, run = match.lastgroup, match[0]
        if kind is None:
            spellings.append(run)
        elif kind == "characters":
            spellings += run
            spellings += map(add, run, run[1:])
        else:
            for found in runs(run):
                spellings += (run[start:end] for start, end in (*found.words, *found.pairs))
    return spellings


def runs_of_letters(text: str) -> list[str]:
    """The folded text without what is between its words; words of scripts without spaces stay together."""
    folded = fold(text)
    return [match[0] for match in _run_pattern(folded).finditer(folded)]


def _run_pattern(folded: str) -> re.Pattern[str]:
    return _ASCII_WORD if folded.isascii() else _scripts().run


def words(text: str) -> list[Span]:
    """Where the words of a text are in it, as it is written."""
    folded, origins = placed_fold(text)
    found = ((origins[start][0], origins[end - 1][1]) for run in runs(folded) for start, end in run.words)
    return [*dict.fromkeys(found)]  # several may be made from one character


def needs_dictionary(text: str) -> bool:
    """Whether a dictionary decides which words a text has."""
    return not text.isascii() and _scripts().dictionary.search(text) is not None


def is_mostly_han(text: str) -> bool:
    """Whether more than half of a text's letters are Chinese characters."""
    return 2 * len(_HAN.findall(text)) > len(_LETTER.findall(text))


def rule_of_words(*, by_dictionary: bool) -> str:
    """What words depend on beside their text: this rule and, if a dictionary decided on some, the version of ICU."""
    if not by_dictionary:
        return str(WORD_RULE)
    from icu4py import icu_version

    return f"{WORD_RULE}, ICU {icu_version}"


def _dictionary_words(run: str) -> Iterable[Span]:
    from icu4py.breakers import WordBreaker

    return WordBreaker(run, "en").segments()


def _joined_am(match: re.Match[str]) -> str:
    return f"{match[1]}\u0e33" if match[2] is None else f"{match[2]}\u0eb3"


class _Variants(NamedTuple):
    """What ``fold`` makes of characters beyond NFKC_Casefold, and a pattern of characters that it changes."""

    letters: dict[int, str | None]
    signs: re.Pattern[str]


@functools.cache
def _variants() -> _Variants:
    letters: dict[int, str | None] = {ord(letter): other for letter, other in _SAME_LETTERS.items()}
    letters |= {code: str(unicodedata.digit(chr(code))) for code in _codes("Nd") if code >= 0x80}
    letters |= dict.fromkeys(_codes("Me"), None)
    vocalised = (code for code in _codes("Mn") if any(code in block for block in _VOCALISED))
    letters |= dict.fromkeys(vocalised, None)
    for code in chain.from_iterable(_ACCENTED):
        base, *marks = unicodedata.normalize("NFD", chr(code))
        if marks:
            letters[code] = letters.get(ord(base), base)
    # One range for the rest: a class of many is searched many times as slowly.
    changed = _as_class(code for code in {*letters, *range(0x300, 0x370), 0x0E4D, 0x0ECD} if code < 0x10000)
    return _Variants(letters, re.compile(f"[{changed}\U00010000-\U0010ffff]"))


class _Scripts(NamedTuple):
    """Patterns of runs of words, of the syllables of one, of characters with what follows them, and of scripts."""

    run: re.Pattern[str]
    syllable: re.Pattern[str]
    cluster: re.Pattern[str]
    dictionary: re.Pattern[str]


@functools.cache
def _scripts() -> _Scripts:
    all_marks = {*_codes("Mn"), *_codes("Mc"), *_codes("Me")}
    by_dictionary, by_syllable = _letters(_DICTIONARY), _letters(_SYLLABLES)
    dictionary, syllables = _as_class(by_dictionary), _as_class(by_syllable)
    marks, spaced_marks = _as_class(all_marks), _as_class(all_marks - by_dictionary - by_syllable)
    spaced_letter = rf"[^\W_{_CHARACTERS}{dictionary}{syllables}{_NO_LETTERS}]"
    return _Scripts(
        run=re.compile(
            f"{spaced_letter}+(?:[{spaced_marks}]+{spaced_letter}*)*|(?P<characters>[{_CHARACTERS}]+)"
            f"|(?P<dictionary>[{dictionary}]+)|(?P<syllables>[{syllables}]+)"
        ),
        syllable=re.compile(f".[{marks}]*", re.DOTALL),
        cluster=re.compile(f".[{marks}{_FOLLOWING}]*", re.DOTALL),
        dictionary=re.compile(f"[{dictionary}]"),
    )


def _letters(blocks: Iterable[range]) -> set[int]:
    """The letters and marks of some blocks."""
    categories = ((code, unicodedata.category(chr(code))) for block in blocks for code in block)
    return {code for code, category in categories if category[0] in "LM" and chr(code) not in _NO_LETTERS}


@functools.cache
def _by_category() -> dict[str, list[int]]:
    codes: dict[str, list[int]] = {}
    for code in range(_LAST_MARK):
        codes.setdefault(unicodedata.category(chr(code)), []).append(code)
    return codes


def _codes(category: str) -> list[int]:
    """The characters of a category of Unicode; those beyond are ideographs, or without width."""
    return _by_category()[category]


def _as_class(codes: Iterable[int]) -> str:
    """Characters as the ranges of a class of a regular expression."""
    ranges: list[list[int]] = []
    for code in sorted({*codes}):
        if ranges and code == ranges[-1][1] + 1:
            ranges[-1][1] = code
        else:
            ranges.append([code, code])
    return "".join(re.escape(chr(first)) + (f"-{chr(last)}" if last > first else "") for first, last in ranges)
