"""How many tokens of a language model text may be, where no token of a tokenizer says it.

A tokenizer takes what its vocabulary lacks for one unknown token, however long it is (8,000 letters without a space, a
line of emoji), or leaves it out (blank lines, characters without width). A model that has all bytes in its vocabulary
reads many tokens there. The rates are those of SmolLM2, whose vocabulary is small: letters without a space .25 to .6 a
letter, digits 1, bytes of other scripts, marks and emoji .5 to 1, line ends .25, spaces 1/64.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence

from d2llm.core.types import Span

_LONGEST_WORD = 16  # letters that may well be one token
_FREE_SPACE = 16  # white space in a row that costs nothing beside the tokens around it, as indentation
_PER_LETTER, _PER_BYTE, _PER_LINE_END, _PER_SPACE = 0.5, 0.75, 0.25, 1 / 16
_LONG_RUN = re.compile(rf"[A-Za-z]{{{_LONGEST_WORD + 1},}}")


def bounded_ends(text: str, tokens: Sequence[Span], unknown: Sequence[bool]) -> list[int]:
    """Where tokens end in a text, with as many ends for unknown tokens and for what is in none as they may be worth.

    Args:
        text: the text.
        tokens: where each token begins and ends, in order.
        unknown: which of them are in no vocabulary.
    """
    ends: list[int] = []
    at = 0
    for (start, end), is_unknown in zip(tokens, unknown, strict=True):
        if start > at:
            ends += _ends(text, at, start)
        ends += _ends(text, start, end, at_least=1) if is_unknown else [end]
        at = max(at, end)
    return ends + _ends(text, at, len(text))


def costs(text: str, *, long_runs: bool = True) -> Iterator[float]:
    """About how many tokens each character of a text is worth, at most; 0 for white space between words.

    Letters of a word of at most 16 ASCII letters are together one token; without ``long_runs``, those of every word.
    """
    runs = _LONG_RUN.finditer(text) if long_runs else ()
    letter_costs = {at: _PER_LETTER for run in runs for at in range(*run.span())}
    num_space = 0
    for at, character in enumerate(text):
        num_space = num_space + 1 if character.isspace() else 0
        if num_space:
            yield (_PER_SPACE if character in " \t" else _PER_LINE_END) if num_space > _FREE_SPACE else 0.0
        elif character.isascii():
            yield 1.0 if character.isdecimal() else letter_costs.get(at, 1 / _LONGEST_WORD)
        else:
            yield _PER_BYTE * len(character.encode(errors="surrogatepass"))


def _ends(text: str, start: int, end: int, *, at_least: int = 0) -> list[int]:
    """The ends of what a part of a text may be worth, each where its sum of costs reaches the next whole number."""
    part = text[start:end]
    if at_least and part.isascii() and len(part) <= _LONGEST_WORD:
        return [end]
    ends: list[int] = []
    total = 0.0
    for index, cost in enumerate(costs(part), start=start + 1):
        total += cost
        ends += [index] * (math.floor(total + 1e-9) - len(ends))
    missing = max(at_least, math.ceil(total - 1e-9)) - len(ends)
    return ends + [end] * missing
