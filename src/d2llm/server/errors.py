"""Errors of requests: one ``Problem`` class, and a response shape for each family of paths."""

from __future__ import annotations

import errno
import logging
import math
import re
from collections.abc import Callable, Generator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from d2llm.core.errors import (
    D2LLMError,
    DamagedFileError,
    DataFormatError,
    DuplicateIdError,
    IndexLockedError,
    InputError,
    MissingExtraError,
    ShardAwayError,
    StorageError,
)
from d2llm.core.files import TOO_LITTLE
from d2llm.core.memory import causes, out_of_memory
from d2llm.core.problems import requirement
from d2llm.server.logs import current_facts
from d2llm.store.index_manifest import require_index

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

_log = logging.getLogger(__name__)

ProblemKind = Literal[
    "invalid_request",
    "unauthorized",
    "forbidden",
    "not_found",
    "method_not_allowed",
    "timeout",
    "conflict",
    "too_large",
    "unsupported_media_type",
    "rate_limited",
    "overloaded",
    "not_ready",
    "internal",
]

_QUOTED = 200  # characters of a client's text in a message
MAX_PROBLEMS = 100
"""Of a body with more unknown fields than this, the others are not counted."""
MAX_SHOWN = 4_000
"""Characters of a message: clients may quote long texts in what they send."""

_JSON_RPC_INVALID, _JSON_RPC_INTERNAL = -32600, -32603

_NO_MEMORY = (
    "the server ran out of memory; try again later, with fewer or shorter texts, or give the server more memory or a "
    "smaller batch_tokens"
)
_PAUSE = 5.0
_KINDS: dict[int, ProblemKind] = {
    401: "unauthorized",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    408: "timeout",
    409: "conflict",
    413: "too_large",
    415: "unsupported_media_type",
    429: "rate_limited",
    503: "not_ready",
}


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a request was not answered.

    Attributes:
        status: HTTP status.
        kind: machine-readable kind of the problem.
        message: human-readable message: what is wrong, where, and what to do.
        field: the field of the body that is wrong, as in "passages.0.text".
        request_id: id of the request in the logs.
        retry_after: seconds to wait, if a later retry can succeed.
        headers: headers of the response, in addition to those that follow from the other attributes.
        reason: pydantic's error type for the field, as in "missing"; None if the body was not refused by pydantic.
    """

    status: int
    kind: ProblemKind
    message: str
    field: str | None = None
    request_id: str = ""
    retry_after: float | None = None
    headers: Mapping[str, str] | None = None
    reason: str | None = None


Shape = Callable[[Problem], tuple[int, dict[str, Any]]]
"""Turns a problem into the status and body that an interface returns."""


class ServingError(D2LLMError):
    """A request cannot be answered; carries the ``Problem``."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        super().__init__(problem.message)


class OverloadedError(ServingError):
    """The queue is full."""

    def __init__(self, retry_after: float) -> None:
        message = f"the server is at its limit; try again in {math.ceil(retry_after)} s"
        super().__init__(Problem(429, "overloaded", message, retry_after=retry_after))


class NotReadyError(ServingError):
    """The server is starting, stopping or broken."""

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(Problem(503, "not_ready", message, retry_after=retry_after))


class NotFoundError(ServingError):
    """The requested resource does not exist."""

    def __init__(self, message: str) -> None:
        super().__init__(Problem(404, "not_found", message))


def shortened(text: str, most: int = _QUOTED) -> str:
    """A text that is perhaps a client's, for a message: of more than ``most`` characters, the middle is left out."""
    if len(text) <= most:
        return text
    return f"{text[: most // 2]}... ({len(text):,} characters) ...{text[-most // 4 :]}"


def invalid(message: str, field: str | None = None) -> ServingError:
    """An error for a request with invalid content (400)."""
    return ServingError(Problem(400, "invalid_request", message, field))


@contextmanager
def naming_index(name: str, indexes: Sized) -> Generator[None]:
    """Context in which every error says which of several indexes it is about.

    Raises:
        D2LLMError: with the name before the message, if there are several.
    """
    try:
        yield
    except D2LLMError as error:
        if len(indexes) < 2:
            raise
        raise D2LLMError(f"index '{name}': {error}") from error


def require_indexes(indexes: Mapping[str, Path]) -> None:
    """Make sure that each folder holds an index, before anything is loaded.

    Raises:
        D2LLMError: one does not.
    """
    for name, folder in indexes.items():
        with naming_index(name, indexes):
            require_index(folder)


_shapes: dict[str, Shape] = {}


def register_error_shape(paths: tuple[str, ...], shape: Shape) -> None:
    """Use this shape for problems of these paths and of paths below them."""
    _shapes.update(dict.fromkeys(paths, shape))


def plain_shape(problem: Problem) -> tuple[int, dict[str, Any]]:
    """The shape of d2llm's own interface."""
    error = {
        "kind": problem.kind,
        "message": problem.message,
        "field": problem.field,
        "request_id": problem.request_id,
    }
    return problem.status, {"error": error}


def json_rpc_shape(problem: Problem) -> tuple[int, dict[str, Any]]:
    """The shape of the Model Context Protocol, for requests that do not reach it."""
    code = _JSON_RPC_INTERNAL if problem.status >= 500 else _JSON_RPC_INVALID
    data = {"kind": problem.kind, "request_id": problem.request_id}
    return problem.status, {
        "jsonrpc": "2.0",
        "id": None,
        "error": {"code": code, "message": problem.message, "data": data},
    }


def problem_response(path: str, problem: Problem) -> Response:
    """The response to a request for ``path``, in the shape of its interface."""
    field = None if problem.field is None else shortened(problem.field)
    problem = replace(problem, message=shortened(problem.message, MAX_SHOWN), field=field)
    matching = [prefix for prefix in _shapes if path == prefix or path.startswith(prefix.rstrip("/") + "/")]
    status, body = (_shapes[max(matching, key=len)] if matching else plain_shape)(problem)
    headers = dict(problem.headers or {})
    if problem.retry_after is not None:
        headers["Retry-After"] = str(max(1, math.ceil(problem.retry_after)))
    return JSONResponse(body, status, headers)


def problem_for_client(error: Exception) -> Problem:
    """The ``Problem`` that a client sees for an exception; messages not meant for clients are left out."""
    if isinstance(error, ServingError):
        return error.problem
    if (lacking := _what_lacks(error)) is not None:
        return lacking
    if isinstance(error, RequestValidationError):
        return _problem_of_validation(error)
    if isinstance(error, HTTPException):
        kind = _KINDS.get(error.status_code, "invalid_request" if error.status_code < 500 else "internal")
        return Problem(error.status_code, kind, str(error.detail), headers=error.headers)
    if isinstance(error, IndexLockedError | ShardAwayError):
        return Problem(503, "not_ready", str(error), retry_after=1.0)
    if is_clients(error):
        return Problem(400, "invalid_request", str(error))
    if isinstance(error, MissingExtraError):
        return Problem(501, "internal", str(error))
    if isinstance(error, StorageError):
        return Problem(507, "internal", str(error))
    if isinstance(error, DamagedFileError):
        remedy = "on the server, `d2llm index INDEX verify --repair` mends what it can"
        return Problem(500, "internal", f"a file of the index is damaged or missing; {remedy}")
    return Problem(500, "internal", "internal error; the server's log has the reason under this request's id")


def _what_lacks(error: Exception) -> Problem | None:
    """What a machine with too little memory, disk or open files says; None if it is not why there is an error."""
    if out_of_memory(error) is not None:
        return Problem(503, "overloaded", _NO_MEMORY, retry_after=_PAUSE)
    if isinstance(error, StorageError):  # says itself what it could not do, and why
        return None
    codes = {cause.errno for cause in causes(error) if isinstance(cause, OSError)}
    if codes & {errno.EMFILE, errno.ENFILE}:
        return Problem(503, "overloaded", "the server has too many files open; try again", retry_after=_PAUSE)
    return Problem(507, "internal", "the server's disk is full") if codes & TOO_LITTLE else None


def log_failure(what: str, error: Exception, status: int) -> None:
    """Log why the server could not answer; with a traceback, unless the error says itself what to do.

    Args:
        what: the request, as in "request 17".
        error: what was raised.
        status: of the answer; nothing is logged of what is the client's fault, or only takes time.
    """
    if (ran_out := out_of_memory(error)) is not None:
        _log.error("%s failed: %s", what, ran_out)
    elif status >= 500 and status != 503:
        if isinstance(error, D2LLMError):
            _log.error("%s failed: %s", what, error)
        else:  # whose text may quote a query
            _log.error("%s failed", what, exc_info=error)


def is_clients(error: Exception) -> bool:
    """Whether the request itself is wrong. A file that cannot be read is the server's fault."""
    if isinstance(error, DataFormatError):
        return isinstance(error, DuplicateIdError)
    return isinstance(error, InputError)


def install_error_handlers(app: FastAPI, private: Sequence[Path] = ()) -> None:
    """Turn every error of a request into a response in its interface's shape.

    A client sees the names of ``private`` folders and files, but not their full paths.
    """

    async def answer(request: Request, error: Exception) -> Response:
        problem = problem_for_client(error)
        message = without_paths(problem.message, private)
        problem = replace(problem, message=message, request_id=request_id_of(request))
        if problem.status == 405:
            allowed = ", ".join(_methods(app, request.url.path)) or (problem.headers or {}).get("Allow", "")
            problem = replace(problem, headers={"Allow": allowed})
        log_failure(f"request {problem.request_id}", error, problem.status)
        return problem_response(request.url.path, problem)

    for kind in (RequestValidationError, HTTPException, D2LLMError, Exception):
        app.add_exception_handler(kind, answer)


def without_paths(text: str, private: Sequence[Path]) -> str:
    """The text, with private paths shortened to their last component."""
    for path in private:
        for variant in (str(path.resolve()), str(path.absolute()), str(path)):
            text = text.replace(variant, path.name)
    return text


def request_id_of(request: Request) -> str:
    """The id that the middleware assigned to a request."""
    return str(getattr(request.state, "request_id", ""))


def _methods(app: FastAPI, path: str) -> list[str]:
    """All methods that the OpenAPI document has for a path; Starlette only knows those of a single route."""
    paths = cast("dict[str, dict[str, Any]]", app.openapi()["paths"])
    matching = [known for known in paths if re.fullmatch(re.sub(r"\\\{[^}]*\}", ".+", re.escape(known)), path)]
    # Parameters may contain slashes, so ".../{name}" also matches ".../x/restore"; prefer the more specific template.
    matching.sort(key=lambda template: len(re.sub(r"\{[^}]*\}", "", template)))
    methods = {method.upper() for method in paths[matching[-1]]} if matching else set[str]()
    return sorted(methods | ({"HEAD"} if "GET" in methods else set[str]()))


def _problem_of_validation(error: RequestValidationError) -> Problem:
    """Describe the first invalid field in full, and count the others."""
    problems = cast("list[ErrorDetails]", error.errors())
    first = problems[0]
    where = ".".join(shortened(str(part)) for part in first["loc"] if part != "body") or None
    needed = requirement([first])
    message = first["msg"].removeprefix("Value error, ")
    if needed is not None:
        subject = "" if where else "the body "
        message = f"{subject}must {needed.replace('a dictionary', 'a JSON object')}"
    if where is None and first["type"] == "missing":
        message = "the body is empty; send a JSON object"
    if first["type"] == "json_invalid":
        reason = first.get("ctx", {}).get("error", "")
        return Problem(400, "invalid_request", f"the body is not valid JSON ({reason})", reason="json_invalid")
    text = f"{where}: {message}" if where else message
    if len(problems) > 1:
        text += f" (and {'at least ' if len(problems) > MAX_PROBLEMS else ''}{len(problems) - 1} more)"
    return Problem(422, "invalid_request", text, where, reason=str(first["type"]))


async def send_problem(scope: Scope, receive: Receive, send: Send, problem: Problem) -> None:
    """Send ``problem`` in the shape of the path's interface, with the request's id."""
    response = problem_response(scope["path"], replace(problem, request_id=current_facts().request_id))
    await response(scope, receive, send)
