r"""A check for `make fuzz`: sends half of a surrogate pair wherever a body has text, also as a field's name.

Schemathesis itself sends only what UTF-8 can encode, but JSON can express more: "\ud83d" alone is the escape of half a
surrogate pair. An accepted body is sent again with such a half in each of its places, once per run for each place of an
operation, so that a refusal can only be caused by the half and not by the rest of the random body.

Loaded by Schemathesis (through the variable SCHEMATHESIS_HOOKS), not imported.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import schemathesis

HALF = "a \ud83d"
Position = tuple[tuple[str | int, ...], str]
"""Path to a part of a body (field names and list positions), and the change there: its "value" or its "name" becomes a
half, or a field is "added" to it."""

_tried: set[tuple[str, Position]] = set()


@schemathesis.check
def half_a_character_is_refused(
    ctx: schemathesis.CheckContext, response: schemathesis.Response, case: schemathesis.Case
) -> bool | None:
    """Half a surrogate pair is refused everywhere, also in a field that the route ignores."""
    del ctx
    if response.status_code >= 300 or not isinstance(case.body, dict):
        return None
    fields = _fields(case.operation.schema.raw_schema)
    for way, change in _positions(case.body):
        half = (case.operation.label, (tuple(step if step in fields else "*" for step in way), change))
        if half in _tried:
            continue
        changed = case.operation.Case(body=_with_half(case.body, way, change), media_type=case.media_type)
        status = changed.call().status_code
        assert 400 <= status < 500, f"half a surrogate pair at {half} was answered with {status}, not refused"
        _tried.add(half)
    return None


def _fields(description: Any) -> set[str]:
    """The names of all fields that the API describes; others are ignored, and one of them represents all."""
    if isinstance(description, list):
        return set().union(*map(_fields, description))
    if not isinstance(description, dict):
        return set()
    return set(description.get("properties", ())).union(*map(_fields, description.values()))


def _positions(body: Any, way: tuple[str | int, ...] = ()) -> Iterator[Position]:
    if isinstance(body, str):
        yield way, "value"
    elif isinstance(body, list):
        for number, part in enumerate(body):
            yield from _positions(part, (*way, number))
    elif isinstance(body, dict):
        yield way, "added"
        for name, part in body.items():
            yield (*way, name), "name"
            yield from _positions(part, (*way, name))


def _with_half(body: Any, way: tuple[str | int, ...], change: str) -> Any:
    """A copy of the body, changed in one place."""
    if not way:
        return {**body, HALF: None} if change == "added" else HALF
    first, rest = way[0], way[1:]
    if isinstance(body, list):
        return [_with_half(part, rest, change) if number == first else part for number, part in enumerate(body)]
    if change == "name" and not rest:
        return {HALF if name == first else name: part for name, part in body.items()}
    return {name: _with_half(part, rest, change) if name == first else part for name, part in body.items()}
