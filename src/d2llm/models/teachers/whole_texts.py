"""Cutting texts for models that are given query and passage in one piece, as their tokenizer joins them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from d2llm.core.errors import InputError
from d2llm.models.teachers.judge import TextPair
from d2llm.ops.truncation import fit_pair

_Row = TypeVar("_Row", bound="Sequence[Any]")


def fit_pairs(
    pairs: Sequence[TextPair], tokenizer: Any, encode: Callable[[Sequence[TextPair]], list[_Row]], *, max_tokens: int
) -> tuple[list[_Row], int]:
    """Inputs of at most ``max_tokens`` tokens, and how many pairs lost text.

    What is over is cut as ``ops.truncation`` says.

    Args:
        pairs: query text and full passage text.
        tokenizer: a fast tokenizer, which tells where in the text each token stands.
        encode: makes the whole inputs of pairs.
        max_tokens: limit of a whole input.

    Raises:
        InputError: what stands around the texts alone fills ``max_tokens``.
    """
    if not pairs:
        return [], 0
    around = len(encode([("", "")])[0])
    if max_tokens - around < 2:
        raise InputError(
            f"max_tokens is {max_tokens}, but {around} tokens stand around query and passage; raise max_tokens"
        )
    rows = encode(pairs)
    too_long = [place for place, row in enumerate(rows) if len(row) > max_tokens]
    for place in too_long:
        query, passage = pairs[place]
        room = max_tokens - around
        # Where the parts meet, tokens may join or split, so that what should fit can be a token too long.
        while len(row := encode([_cut(query, passage, tokenizer, room)])[0]) > max_tokens:
            room -= len(row) - max_tokens
        rows[place] = row
    return rows, len(too_long)


def _cut(query: str, passage: str, tokenizer: Any, room: int) -> TextPair:
    ends = [
        [
            end
            for _, end in tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)[
                "offset_mapping"
            ]
        ]
        for text in (query, passage)
    ]
    for_query, for_passage = fit_pair(len(ends[0]), len(ends[1]), room)
    return _up_to(query, ends[0], for_query), _up_to(passage, ends[1], for_passage)


def _up_to(text: str, ends: Sequence[int], num_tokens: int) -> str:
    return text if num_tokens >= len(ends) else text[: ends[num_tokens - 1] if num_tokens > 0 else 0]
