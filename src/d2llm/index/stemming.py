"""Porter's stemmer for English (M. F. Porter, "An algorithm for suffix stripping", Program 14(3), 1980).

A word is read as ``[C](VC)^m[V]``, where C is a run of consonants, V one of vowels and m the word's measure. Each step
finds the longest of its suffixes and changes it if what stands before (the stem) meets the rule's condition.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache

_STEP_2 = {
    "ational": "ate",
    "tional": "tion",
    "enci": "ence",
    "anci": "ance",
    "izer": "ize",
    "abli": "able",
    "alli": "al",
    "entli": "ent",
    "eli": "e",
    "ousli": "ous",
    "ization": "ize",
    "ation": "ate",
    "ator": "ate",
    "alism": "al",
    "iveness": "ive",
    "fulness": "ful",
    "ousness": "ous",
    "aliti": "al",
    "iviti": "ive",
    "biliti": "ble",
}
_STEP_3 = {"icate": "ic", "ative": "", "alize": "al", "iciti": "ic", "ical": "ic", "ful": "", "ness": ""}
_STEP_4 = {
    **dict.fromkeys(("al", "ance", "ence", "er", "ic", "able", "ible", "ant", "ement", "ment", "ent"), ""),
    **dict.fromkeys(("ou", "ism", "ate", "iti", "ous", "ive", "ize"), ""),
    # The paper's "(*S or *T) ION" as two suffixes that leave their first letter; it counts for the measure (_replace).
    "sion": "s",
    "tion": "t",
}


@lru_cache(maxsize=200_000)
def porter_stem(word: str) -> str:
    """Stem of a lower-case English word; words of one or two letters stay as they are."""
    if len(word) <= 2:
        return word
    word = _past(_plural(word))
    if word.endswith("y") and "v" in _shape(word[:-1]):
        word = word[:-1] + "i"
    word = _replace(word, _STEP_2, min_measure=1)
    word = _replace(word, _STEP_3, min_measure=1)
    word = _replace(word, _STEP_4, min_measure=2)
    return _final(word)


def _shape(stem: str) -> str:
    """The letters as c (consonant) or v (vowel); y is a vowel after a consonant."""
    shape = ""
    for letter in stem:
        shape += "v" if letter in "aeiou" or (letter == "y" and shape.endswith("c")) else "c"
    return shape


def _measure(stem: str) -> int:
    return len(re.findall("v+c+", _shape(stem)))


def _ends_short(stem: str) -> bool:
    """Condition *o of the paper: ends consonant, vowel, consonant, the last not w, x or y."""
    return _shape(stem).endswith("cvc") and stem[-1] not in "wxy"


def _ends_double(stem: str) -> bool:
    return len(stem) > 1 and stem[-1] == stem[-2] and _shape(stem).endswith("c")


def _plural(word: str) -> str:
    """Step 1a."""
    for suffix, replacement in (("sses", "ss"), ("ies", "i"), ("ss", "ss"), ("s", "")):
        if word.endswith(suffix):
            return word[: -len(suffix)] + replacement
    return word


def _past(word: str) -> str:
    """Step 1b."""
    if word.endswith("eed"):
        return word[:-1] if _measure(word[:-3]) > 0 else word
    for suffix in ("ed", "ing"):
        stem = word[: -len(suffix)]
        if word.endswith(suffix) and "v" in _shape(stem):
            if stem.endswith(("at", "bl", "iz")):
                return stem + "e"
            if _ends_double(stem) and stem[-1] not in "lsz":
                return stem[:-1]
            return stem + "e" if _measure(stem) == 1 and _ends_short(stem) else stem
    return word


def _replace(word: str, rules: Mapping[str, str], *, min_measure: int) -> str:
    """Steps 2, 3 and 4: only the longest suffix that fits is tried."""
    suffix = max((suffix for suffix in rules if word.endswith(suffix)), key=len, default="")
    replacement = rules.get(suffix, "")
    stem = word[: len(word) - len(suffix)]
    measured = stem + replacement if suffix in ("sion", "tion") else stem
    return stem + replacement if suffix and _measure(measured) >= min_measure else word


def _final(word: str) -> str:
    """Step 5: a last e, and one of two last l."""
    if word.endswith("e"):
        stem = word[:-1]
        measure = _measure(stem)
        if measure > 1 or (measure == 1 and not _ends_short(stem)):
            word = stem
    return word[:-1] if word.endswith("ll") and _measure(word) > 1 else word
