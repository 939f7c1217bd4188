"""Checks and repairs an index with the help of its student, which encodes again what was lost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import cache

import numpy as np
from numpy.typing import NDArray

from d2llm.core.progress import Advance, progress_bar
from d2llm.core.types import PartKind, Passage
from d2llm.models.protocols import SearchStudent
from d2llm.retrieval.reading import read_tokens, read_windows
from d2llm.retrieval.upserting import check_projection
from d2llm.store.inspection import VerifyReport, verify_all
from d2llm.store.part_vectors import EncodedParts
from d2llm.store.shards import Storage


def verify_index(
    storage: Storage, student: Callable[[], SearchStudent], *, repair: bool, drop_lost: bool
) -> VerifyReport:
    """``store.inspection.verify_all``; the student is loaded when something has to be encoded."""
    with ExitStack() as stack:

        @cache
        def bar(title: str) -> Advance:  # made when there is something to encode
            return stack.enter_context(progress_bar(title, None))

        def encode(passages: Sequence[Passage]) -> NDArray[np.float32]:
            advance = bar("encoding again")
            encoded = student().encode_passages([passage.full_text for passage in passages])
            advance(len(passages))
            return encoded.vectors

        def encode_parts(kind: PartKind, texts: Sequence[str]) -> EncodedParts:
            if kind == "token":
                check_projection(storage, student())
            advance = bar(f"reading {kind}s again")
            encoded = (read_windows if kind == "window" else read_tokens)(student(), texts)
            advance(len(texts))
            return encoded

        return verify_all(storage, repair=repair, drop_lost=drop_lost, encode=encode, encode_parts=encode_parts)
