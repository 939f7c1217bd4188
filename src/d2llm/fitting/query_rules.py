"""What is wrong with a written query, by rules that need no model: copies, fragments, queries about the text itself.

A query stands for what a user would type who has not seen the passage. A copy of its words is found by any search and
teaches nothing; "What does the author say?" is found by none.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from difflib import SequenceMatcher
from typing import Literal

from d2llm.ops.words import fold, runs

QueryFault = Literal["empty", "too short", "too long", "copied", "about the text", "other script"]
"""Why a query is not used: it has no words, too few or too many, repeats the passage word for word, asks about "the
passage" instead of its subject, or is in a script that the passage does not have."""

MIN_UNITS, MAX_UNITS = 2, 60
"""Minimum and maximum number of words of a query; in scripts without spaces, of characters (at most twice as many)."""
COPIED_UNITS, COPIED_FRACTION = 6, 0.8
"""A query is a copy if a run of so many words, and of at least this fraction of its words, is in the passage."""

_ABOUT_THE_TEXT = re.compile(
    r"\b(this|the|given|above|following|provided) (passage|text|article|document|paragraph|authors?|excerpt)\b"
    r"|\b(this|the above|the following|the given) (section|snippet|context|study|paper)\b"
    r"|\b(dieser|diesem|der|im) (text|artikel|abschnitt|autor)\b|\b(ce|cet|le|l') ?(texte|article|passage|auteur)\b"
    r"|\b(este|el) (texto|artículo|pasaje|autor)\b|本文|文中|这段|這段|上文|文章|作者|この文章|이 글|본문",
    re.IGNORECASE,
)


def query_fault(query: str, passage: str) -> QueryFault | None:
    """The first rule that a query written for a passage breaks, or None."""
    units, is_unspaced = _units(query)
    passage_units, passage_is_unspaced = _units(passage)
    if not units:
        return "empty"
    if len(units) < MIN_UNITS:
        return "too short"
    if len(units) > MAX_UNITS * (2 if is_unspaced else 1):
        return "too long"
    if _ABOUT_THE_TEXT.search(query) and not _ABOUT_THE_TEXT.search(passage):
        return "about the text"
    if is_unspaced and not passage_is_unspaced:
        return "other script"
    longest = _longest_shared_run(units, passage_units)
    if longest >= COPIED_UNITS and longest >= COPIED_FRACTION * len(units):
        return "copied"
    return None


def _units(text: str) -> tuple[list[str], bool]:
    """The words of a text, of some scripts its characters (``ops.words``), and whether it is in one without spaces."""
    folded = fold(text)
    found = list(runs(folded))
    return [folded[start:end] for run in found for start, end in run.words], any(not run.is_spaced for run in found)


def _longest_shared_run(query: list[str], passage: list[str]) -> int:
    """The length of the longest run of units that both have."""
    matcher: Callable[..., SequenceMatcher[str]] = SequenceMatcher
    return matcher(None, passage, query, autojunk=False).find_longest_match().size
