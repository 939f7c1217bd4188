"""Lists of at most so many items from an iterator."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TypeVar

_Item = TypeVar("_Item")


def batched(items: Iterable[_Item], size: int) -> Iterator[list[_Item]]:
    """The items in lists of ``size``, the last one shorter (``itertools.batched`` of Python 3.12, with lists)."""
    remaining = iter(items)
    while batch := list(islice(remaining, size)):
        yield batch
