"""Services for the routes, checks shared by d2llm's own routes, and descriptions of their errors."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, cast

from fastapi import Depends, Request

from d2llm.core.types import Task
from d2llm.server.errors import NotFoundError, Problem, ServingError, invalid
from d2llm.server.index_service import IndexService
from d2llm.server.model_service import ModelService
from d2llm.server.schemas import ErrorAnswer
from d2llm.server.settings import ServeSettings


@dataclass(frozen=True, slots=True)
class Services:
    """The services that a request uses from start to end, even if another index is loaded meanwhile.

    ``index`` is None if only a student is served. ``task`` is the index's, or else asymmetric: whether a passage
    answers the query.
    """

    settings: ServeSettings
    models: ModelService
    index: IndexService | None
    task: Task


@dataclass(frozen=True, slots=True)
class Serving:
    """What a ready server serves: an index, or only a student."""

    settings: ServeSettings
    index: IndexService | None
    alone: ModelService | None = None

    def now(self) -> Services:
        """The services for a new request."""
        if self.index is None:
            assert self.alone is not None
            return Services(self.settings, self.alone, None, "asymmetric")
        version = self.index.current
        return Services(self.settings, version.models, self.index, version.view.task)


# Both are coroutines because FastAPI runs plain functions in a thread, which costs more than the functions themselves.


async def services_of(request: Request) -> AsyncGenerator[Services]:
    """The services of a request, marked as in use until it ends."""
    services = cast(Serving, request.app.state.serving).now()
    with services.models.in_use():
        yield services


TheServices = Annotated[Services, Depends(services_of)]


async def index_of(services: TheServices) -> IndexService:
    """The index.

    Raises:
        NotFoundError: only a student is served.
    """
    if services.index is None:
        raise NotFoundError("this server has no index; start it with `d2llm serve INDEX`")
    return services.index


TheIndex = Annotated[IndexService, Depends(index_of)]


ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorAnswer, "description": description}
    for status, description in {
        400: "The request is invalid",
        401: "The key is missing or unknown",
        403: "Not allowed",
        404: "Not found",
        408: "The body took too long to arrive",
        409: "Conflict",
        413: "Too large",
        415: "The type of the body is not supported",
        422: "The body does not fit the schema",
        429: "Too many requests",
        500: "The server failed",
        503: "Not ready",
        507: "The index cannot be written",
    }.items()
}


def writable(services: Services) -> None:
    """Refuse writes if the server is read-only.

    Raises:
        ServingError: 403, the server is read-only.
    """
    if not services.settings.writable:
        raise ServingError(Problem(403, "forbidden", "this server does not change its index (writable = false)"))


def at_most(number: int, limit: int, name: str) -> None:
    """Check a number against the server's limit.

    Raises:
        ServingError: 400, the number is too large.
    """
    if number > limit:
        raise invalid(f"{name}: {number:,} is more than this server allows ({limit:,})", name)


def short_enough(texts: Sequence[str], limits: ServeSettings, name: str) -> None:
    """Check the lengths of texts against the server's limit.

    Raises:
        ServingError: 400, a text has too many characters.
    """
    for place, text in enumerate(texts):
        if len(text) > limits.max_text_chars:
            where = name if len(texts) == 1 else f"{name}.{place}"
            raise invalid(f"{where}: {len(text):,} characters; this server accepts {limits.max_text_chars:,}", where)
