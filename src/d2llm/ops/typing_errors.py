"""Words at a distance of one typing error: a letter too many, too few or wrong, or two neighbours exchanged.

Source: Damerau, "A technique for computer detection and correction of spelling errors", CACM 7(3), 1964: 80 % of all
misspelt words have one of these four errors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from string import ascii_lowercase

from d2llm.core.types import Span
from d2llm.ops.words import placed_fold

MIN_LETTERS = 5
"""A shorter word has too many others near it."""
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
