r"""Check that a request's body is valid text: UTF-8, without lone surrogates in any of its strings.

JSON can escape half of a surrogate pair ("\ud83d" alone), and Python accepts it as a character, but it cannot be
tokenized, stored or returned. Every body is checked before any route reads it, so that no field is missed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any, cast

from d2llm.server.errors import Problem, shortened

# Matches the escape of a high surrogate without a following low one, of a low one without a preceding high one, or of a
# high one after a backslash, which may escape it: then the parsed body decides. All start alike, which is fast to scan.
_HALF_ESCAPED = re.compile(
    rb"\\u[dD](?:[89abAB]..(?!\\u[dD][c-fC-F])|(?<=\\\\u[dD])[89abAB]|(?<!\\u[dD][89abAB]..\\u[dD])[c-fC-F])", re.DOTALL
)
_HALF = re.compile("[\ud800-\udfff]")
_SHOWN = 20  # characters shown before and after a lone surrogate


def problem_of_text(body: bytes, parse: Callable[[bytes], Any] = json.loads) -> Problem | None:
    """What is wrong with the text of a body, or None. A body that is not JSON is left to its route to report."""
    try:
        body.decode()
    except UnicodeDecodeError:
        return _not_utf_8()
    if b"\0" in body:  # never in UTF-8 JSON, but in UTF-16 and UTF-32, which Python's parser also accepts
        return _not_utf_8()
    if b"\\u" not in body or not _HALF_ESCAPED.search(body):
        return None
    try:
        half = _find_half(parse(body), ())
    except ValueError:
        return None
    except RecursionError:
        return Problem(400, "invalid_request", "the body is nested too deeply to be read", reason="json_invalid")
    if half is None:
        return None
    place, text = half
    field = ".".join(map(shortened, place)) or None
    message = f"{text!r} has half of a surrogate pair, which is not valid text; remove it"
    return Problem(422, "invalid_request", f"{field}: {message}" if field else message, field, reason="string_unicode")


def _find_half(value: Any, place: tuple[str, ...]) -> tuple[tuple[str, ...], str] | None:
    """The first string, a field name or value, with a lone surrogate: its place, and the text around it."""
    if isinstance(value, str):
        half = _HALF.search(value)
        return None if half is None else (place, value[max(0, half.start() - _SHOWN) : half.end() + _SHOWN])
    if isinstance(value, dict):
        for name, part in cast("dict[str, Any]", value).items():
            if (result := _find_half(name, place) or _find_half(part, (*place, name))) is not None:
                return result
    elif isinstance(value, list):
        for number, part in enumerate(cast("list[Any]", value)):
            # Skip numbers quickly: vectors in a body may hold millions of them.
            if isinstance(part, (str, dict, list)) and (result := _find_half(part, (*place, str(number)))) is not None:
                return result
    return None


def _not_utf_8() -> Problem:
    message = "the body is not UTF-8; send JSON in UTF-8"
    return Problem(400, "invalid_request", message, reason="json_invalid")
