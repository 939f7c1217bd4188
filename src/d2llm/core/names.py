"""A misspelt name, and the one that was probably meant."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches

RENAMED: Mapping[str, str] = {
    "candidates": "num_candidates",
    "fuse": "hybrid",
    "k": "top_k",
    "lexical_weight": "hybrid",
    "limit": "top_k",
    "n": "top_k",
    "q": "query",
    "source": "sources",
    "text": "query",
    "top_n": "top_k",
}
"""Names that were used earlier, or are used elsewhere, for settings of a search."""


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that is most like this one; None where none is near."""
    return next(iter(get_close_matches(name, list(known), n=1, cutoff=0.5)), None)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``; did you mean 'top_k'?`` for a name that is not known; empty where none is near."""
    names = list(known)
    suggestion = RENAMED.get(name.lower())
    if suggestion not in names:
        suggestion = nearest(name.lower(), names)
    return "" if suggestion is None else f"; did you mean '{suggestion}'?"
