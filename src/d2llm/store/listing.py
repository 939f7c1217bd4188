"""Lists the passages and documents of an index page by page, and the passages of a document."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import nsmallest
from typing import cast

from d2llm.core.errors import InputError
from d2llm.core.types import is_text
from d2llm.store.passage_table import PassageTable, quoted

PAGE_SIZE = 100
"""Default number of ids per page."""


@dataclass(frozen=True, slots=True)
class ListedDocument:
    """A document of an index and its number of passages."""

    id: str
    num_passages: int


def passage_ids(table: PassageTable, cursor: str, limit: int) -> list[str]:
    """The first ``limit`` passage ids after ``cursor``, in code point order.

    Raises:
        InputError: ``cursor`` is not valid text, or ``limit`` is below 1.
    """
    _check(cursor, limit)
    if not len(table):
        return []
    rows = table.columns(["id"], f"id > {quoted(cursor)}" if cursor else None)
    return nsmallest(limit, cast("list[str]", rows["id"].to_pylist()))


def documents(table: PassageTable, cursor: str, limit: int) -> list[ListedDocument]:
    """Like ``passage_ids``, for documents; a passage without a document counts as its own document.

    Raises:
        InputError: ``cursor`` is not valid text, or ``limit`` is below 1.
    """
    _check(cursor, limit)
    if not len(table):
        return []
    where = f"document_id > {quoted(cursor)} OR (document_id = '' AND id > {quoted(cursor)})" if cursor else None
    columns = table.columns(["id", "document_id"], where)
    ids, names = (cast("list[str]", columns[name].to_pylist()) for name in ("id", "document_id"))
    counts = Counter(name or own for own, name in zip(ids, names, strict=True))
    return [ListedDocument(name, counts[name]) for name in nsmallest(limit, counts)]


def passages_of(table: PassageTable, names: Sequence[str]) -> dict[str, list[str]]:
    """Document id -> ids of its passages, ordered by position; missing documents are left out.

    Raises:
        InputError: a document id is not valid text.
    """
    for name in names:
        _check(name, 1)
    requested, places = set(names), dict[str, list[tuple[int, str]]]()
    for passage_id, document_id, position in table.parts(list(dict.fromkeys(names))):
        if (document := document_id or passage_id) in requested:
            places.setdefault(document, []).append((position, passage_id))
    return {name: [passage_id for _, passage_id in sorted(places[name])] for name in names if name in places}


def _check(name: str, limit: int) -> None:
    if not is_text(name):
        raise InputError(f"{name!r} cannot be an id; give a string of valid Unicode")
    if limit < 1:
        raise InputError(f"limit is {limit}, but must be at least 1")
