r"""Large bodies: their values are counted, parsed and validated in another thread, so that other requests go on.

Python's parser of JSON in C keeps all threads waiting until it ends, so bodies with many values are parsed by the one
in Python, which takes longer but lets others work. One thread does this for all requests: large bodies wait for each
other, and small ones wait for none.

JSON can escape half of a surrogate pair ("\ud83d" alone), and Python accepts it as a character, but it cannot be
tokenized, stored or returned. Every body is checked before any route reads it, so that no field is missed.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from json.scanner import py_make_scanner  # pyright: ignore[reportUnknownVariableType, reportAttributeAccessIssue]
from typing import Any, TypeVar, cast

import numpy as np
from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.responses import Response

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
    path, text = half
    field = ".".join(map(shortened, path)) or None
    message = f"{text!r} has half of a surrogate pair, which is not valid text; remove it"
    return Problem(422, "invalid_request", f"{field}: {message}" if field else message, field, reason="string_unicode")


def _find_half(value: Any, path: tuple[str, ...]) -> tuple[tuple[str, ...], str] | None:
    """The first string, a field name or value, with a lone surrogate: its place, and the text around it."""
    if isinstance(value, str):
        half = _HALF.search(value)
        return None if half is None else (path, value[max(0, half.start() - _SHOWN) : half.end() + _SHOWN])
    if isinstance(value, dict):
        for name, part in cast("dict[str, Any]", value).items():
            if (result := _find_half(name, path) or _find_half(part, (*path, name))) is not None:
                return result
    elif isinstance(value, list):
        for index, part in enumerate(cast("list[Any]", value)):
            # Skip numbers quickly: vectors in a body may hold millions of them.
            if isinstance(part, (str, dict, list)) and (result := _find_half(part, (*path, str(index)))) is not None:
                return result
    return None


def _not_utf_8() -> Problem:
    message = "the body is not UTF-8; send JSON in UTF-8"
    return Problem(400, "invalid_request", message, reason="json_invalid")


_Value = TypeVar("_Value")

LARGE_BYTES = 64 << 10
"""A body of more bytes is large."""
_MANY_VALUES = 20_000  # Python's parser in C reads fewer within milliseconds
_BYTES_A_VALUE = 8  # of the largest body: what a number of a vector takes at least, as clients write them
_COMMA, _BRACKET, _BRACE, _QUOTE = b',[{"'
_thread = ThreadPoolExecutor(1, thread_name_prefix="body")


async def in_body_thread(work: Callable[[], _Value]) -> _Value:
    """Run work on a large body."""
    return await asyncio.get_running_loop().run_in_executor(_thread, work)


def most_values(max_body_bytes: int) -> int:
    """How many values a body may have on a server with this limit."""
    return max(_MANY_VALUES, max_body_bytes // _BYTES_A_VALUE)


def problem_of_body(body: bytes, max_body_bytes: int, *, of_agent: bool = False) -> Problem | None:
    """What is wrong with a body before it is read as a request: too many values, or what ``problem_of_text`` says.

    A body ``of_agent`` is parsed where all requests wait for it (by the protocol's library), so it may have fewer.
    """
    most = _MANY_VALUES if of_agent else most_values(max_body_bytes)
    if num_values(body) > most:
        limit = "the limit for agents" if of_agent else f"this server's limit with max_body_bytes = {max_body_bytes:,}"
        message = f"the body has more than {most:,} values (lists, objects, and what is in them), {limit}"
        return Problem(413, "too_large", f"{message}; send fewer at a time")
    return problem_of_text(body, read_json)


def num_values(body: bytes) -> int:
    """How many values a JSON text has, or a few more: one for each comma, "[" and "{" outside of its strings."""
    at_most = 1 + body.count(b",") + body.count(b"[") + body.count(b"{")
    if at_most <= _MANY_VALUES:
        return at_most
    plain = body.replace(b"\\\\", b"").replace(b'\\"', b"")  # every quote that is left begins or ends a string
    characters = np.frombuffer(plain, np.uint8)
    is_outside = ~np.logical_xor.accumulate(characters == _QUOTE)
    counted = (characters == _COMMA) | (characters == _BRACKET) | (characters == _BRACE)
    return 1 + int(np.count_nonzero(counted & is_outside))


class _PatientDecoder(json.JSONDecoder):
    """The standard library's parser without its part in C."""

    def __init__(self) -> None:
        super().__init__()
        self.scan_once = cast("Callable[[str, int], tuple[Any, int]]", py_make_scanner(self))


def read_json(body: bytes) -> Any:
    """Parse JSON, as ``json.loads``; a body with many values so that other threads can work meanwhile."""
    if num_values(body) <= _MANY_VALUES:
        return json.loads(body)
    return _PatientDecoder().decode(body.decode())


class _ReadRequest(Request):
    """A request whose body has been read and validated."""

    def __init__(self, request: Request, value: Any) -> None:
        super().__init__(request.scope, request.receive)
        self._value = value

    async def body(self) -> bytes:
        """Not the body, which nobody needs any more, but not empty, which would mean that there is none."""
        return b"{}"

    async def json(self) -> Any:
        """The validated value."""
        return self._value


class BodyRoute(APIRoute):
    """A route whose large JSON bodies are parsed and validated in another thread."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's handler, after the body has been read."""
        handle, field = super().get_route_handler(), self.body_field

        async def read_and_handle(request: Request) -> Response:
            body = b"" if field is None else await request.body()
            if field is None or len(body) <= LARGE_BYTES:
                return await handle(request)
            validate = partial(field.validate, loc=("body",))
            value, errors = await in_body_thread(lambda: validate(_parsed(body)))
            if errors:
                raise RequestValidationError(errors)
            return await handle(_ReadRequest(request, value))

        return read_and_handle


def _parsed(body: bytes) -> Any:
    """The body's value.

    Raises:
        RequestValidationError: it is not JSON.
    """
    try:
        return read_json(body)
    except RecursionError:
        reason = "it is nested too deeply"
    except ValueError as error:  # such as a number with too many digits
        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
    raise RequestValidationError([{"type": "json_invalid", "loc": ("body",), "msg": "", "ctx": {"error": reason}}])
