r"""Whether the body of a request is text: UTF-8, and no half of a surrogate pair in any of its strings.

JSON can write half of a pair as an escape ("\ud83d" alone), and Python reads it as a character that nothing else takes:
no tokenizer, no table, no answer. Every body is checked before any route reads it, so that no field is forgotten.
"""

from __future__ import annotations

import json
import re
from typing import Any, cast

from d2llm.server.errors import Problem

# The escape of a first half that no second follows, of a second that follows no first, or of a first after a backslash,
# which may make plain text of it: then the parsed body decides. Each begins with the same two bytes: quick to scan.
_HALF_ESCAPED = re.compile(
    rb"\\u[dD](?:[89abAB]..(?!\\u[dD][c-fC-F])|(?<=\\\\u[dD])[89abAB]|(?<!\\u[dD][89abAB]..\\u[dD])[c-fC-F])", re.DOTALL
)
_HALF = re.compile("[\ud800-\udfff]")
_SHOWN = 20  # characters before and after the half


def problem_of_text(body: bytes) -> Problem | None:
    """What is wrong with the text of a body; None also where it is not JSON, which its route reports."""
    try:
        body.decode()
    except UnicodeDecodeError:
        return _not_utf_8()
    if b"\0" in body:  # JSON in UTF-8 has none, but in UTF-16 and UTF-32, which Python's reader takes too
        return _not_utf_8()
    if b"\\u" not in body or not _HALF_ESCAPED.search(body):
        return None
    try:
        half = _find_half(json.loads(body), ())
    except ValueError:
        return None
    except RecursionError:
        return Problem(400, "invalid_request", "the body is nested too deeply to be read", reason="json_invalid")
    if half is None:
        return None
    place, text = half
    field = ".".join(place) or None
    message = f"{text!r} has half of a surrogate pair, which is no text; leave it out"
    return Problem(422, "invalid_request", f"{field}: {message}" if field else message, field, reason="string_unicode")


def _find_half(value: Any, place: tuple[str, ...]) -> tuple[tuple[str, ...], str] | None:
    """The first string, a field's name or a value, that has half of a pair: where it stands, and the part around it."""
    if isinstance(value, str):
        half = _HALF.search(value)
        return None if half is None else (place, value[max(0, half.start() - _SHOWN) : half.end() + _SHOWN])
    if isinstance(value, dict):
        for name, part in cast("dict[str, Any]", value).items():
            if (found := _find_half(name, place) or _find_half(part, (*place, name))) is not None:
                return found
    elif isinstance(value, list):
        for number, part in enumerate(cast("list[Any]", value)):
            # Quickly over the numbers of vectors, of which a body may hold millions.
            if isinstance(part, (str, dict, list)) and (found := _find_half(part, (*place, str(number)))) is not None:
                return found
    return None


def _not_utf_8() -> Problem:
    message = "the body is not in UTF-8, as JSON has to be; send it so"
    return Problem(400, "invalid_request", message, reason="json_invalid")
