"""The length limit of a query and a passage that are read together.

A text that is read alone keeps its first tokens (``models.backbone.Backbone.tokenize``). Of a pair the end of the
passage goes first; a query that alone would leave the passage less than half of the room keeps that half.
"""

from __future__ import annotations


def fit_pair(num_query: int, num_passage: int, room: int) -> tuple[int, int]:
    """How many tokens are kept of a query and of a passage that share ``room`` tokens."""
    kept_query = min(num_query, max(room // 2, room - num_passage))
    return kept_query, min(num_passage, max(0, room - kept_query))
