"""Counts of things in messages, and suggestions for misspelt names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches

NAMES_ELSEWHERE: Mapping[str, str] = {
    "aggs": "facets",
    "fetch_k": "select_from",
    "filters": "filter",
    "k": "top_k",
    "lambda_mult": "mmr",
    "limit": "top_k",
    "n": "top_k",
    "n_results": "top_k",
    "num_results": "top_k",
    "order_by": "sort",
    "q": "query",
    "similarity_top_k": "top_k",
    "text": "query",
    "top_n": "top_k",
    "where": "filter",
}
"""Names that other libraries use for search settings."""
_LONGEST = 200  # characters of a name that may be misspelt: comparing takes time that grows with the length


def counted(count: int, one: str, many: str = "") -> str:
    """``1 query`` or ``2,000 queries``: a count with its noun, and ``many`` where that is more than an ending."""
    return f"{count:,} {one if count == 1 else many or re.sub('y$', 'ie', one) + 's'}"


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name most similar to this one, in whatever case; None if none is similar enough."""
    if len(name) > _LONGEST:
        return None
    names = {one.lower(): one for one in known}
    return next((names[one] for one in get_close_matches(name.lower(), names, n=1, cutoff=0.65)), None)


def suggestion(name: str, known: Iterable[str], listing: str) -> str:
    """``did you mean 'top_k'?`` for an unknown name; if no known name is similar enough, a list of all."""
    names = list(known)
    similar = nearest(name, names)
    return f"{listing}: {', '.join(names) or 'none'}" if similar is None else f"did you mean '{similar}'?"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``; did you mean 'top_k'?`` for an unknown name; empty if no known name is similar enough."""
    names = list(known)
    similar = NAMES_ELSEWHERE.get(name.lower())
    if similar not in names:
        similar = nearest(name, names)
    return "" if similar is None else f"; did you mean '{similar}'?"
