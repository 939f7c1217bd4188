"""The length limit of a query and a passage that are read together.

A text that is read alone keeps its first tokens (``models.backbone.Backbone.tokenize``). In a pair, the end of the
passage is cut first; a query that would take more than half of the room is cut only down to that half.
"""

from __future__ import annotations

from collections.abc import Sequence


def fit_pair(num_query: int, num_passage: int, room: int) -> tuple[int, int]:
    """How many tokens of a query and of a passage are kept if they share ``room`` tokens."""
    kept_query = min(num_query, max(room // 2, room - num_passage))
    return kept_query, min(num_passage, max(0, room - kept_query))


def cut_pair(pair: tuple[str, str], ends: tuple[Sequence[int], Sequence[int]], room: int) -> tuple[str, str]:
    """Query and passage cut to ``room`` tokens together; ``ends`` say where in each text its tokens end.

    A text that is not cut keeps what follows its last token, such as white space.
    """
    counts = fit_pair(len(ends[0]), len(ends[1]), room)
    query, passage = (
        text if count >= len(text_ends) else text[: text_ends[count - 1]] if count else ""
        for text, text_ends, count in zip(pair, ends, counts, strict=True)
    )
    return query, passage
