"""The length limit of a query and a passage that are read together.

A text that is read alone keeps its first tokens (``models.backbone.Backbone.tokenize``). In a pair, the end of the
passage is cut first; a query that would take more than half of the room is cut only down to that half.
"""

from __future__ import annotations


def fit_pair(num_query: int, num_passage: int, room: int) -> tuple[int, int]:
    """How many tokens of a query and of a passage are kept if they share ``room`` tokens."""
    kept_query = min(num_query, max(room // 2, room - num_passage))
    return kept_query, min(num_passage, max(0, room - kept_query))
