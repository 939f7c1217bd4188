"""Counts with their nouns, and suggestions for misspelt names."""

from __future__ import annotations

import pytest

from d2llm.core.names import counted, nearest


@pytest.mark.parametrize(
    ("count", "nouns", "text"),
    [
        (1, ("query",), "1 query"),
        (0, ("passage",), "0 passages"),
        (2_000, ("dev query",), "2,000 dev queries"),
        (1, ("class", "classes"), "1 class"),
        (2, ("passage is", "passages are"), "2 passages are"),
    ],
)
def test_a_noun_agrees_with_its_count(count, nouns, text):
    assert counted(count, *nouns) == text


@pytest.mark.parametrize(("name", "near"), [("topk", "top_k"), ("lists", None), ("metadata", None)])
def test_only_similar_names_are_suggested(name, near):
    assert nearest(name, ["top_k", "losses", "method"]) == near
