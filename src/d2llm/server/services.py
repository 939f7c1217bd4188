"""What the routes work with, what d2llm's own ask of every request, and how they describe their errors."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, cast

from fastapi import Depends, Request

from d2llm.core.types import Task
from d2llm.server.errors import ForbiddenError, NotFoundError, invalid
from d2llm.server.index_service import IndexService
from d2llm.server.model_service import ModelService
from d2llm.server.schemas import ErrorAnswer
from d2llm.server.settings import ServeSettings


@dataclass(frozen=True, slots=True)
class Services:
    """What a request works with, from its beginning to its end, also when another index takes its place meanwhile.

    ``index`` is None where a student alone is served; ``task`` is what the index is made for.
    """

    settings: ServeSettings
    models: ModelService
    index: IndexService | None
    task: Task


@dataclass(frozen=True, slots=True)
class Serving:
    """What a server that is ready has: an index, or a student alone."""

    settings: ServeSettings
    index: IndexService | None
    alone: ModelService | None = None

    def now(self) -> Services:
        """What a request that begins now works with."""
        if self.index is None:
            assert self.alone is not None
            return Services(self.settings, self.alone, None, "asymmetric")
        version = self.index.current
        return Services(self.settings, version.models, self.index, version.view.task)


# Both are coroutines as FastAPI runs plain functions in a thread, which costs a request more than they do.


async def services_of(request: Request) -> AsyncGenerator[Services]:
    """What a request works with."""
    services = cast(Serving, request.app.state.serving).now()
    with services.models.in_use():
        yield services


TheServices = Annotated[Services, Depends(services_of)]


async def index_of(services: TheServices) -> IndexService:
    """The index.

    Raises:
        NotFoundError: a student alone is served.
    """
    if services.index is None:
        raise NotFoundError("this server has no index; start it with `d2llm serve INDEX`")
    return services.index


TheIndex = Annotated[IndexService, Depends(index_of)]


ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorAnswer, "description": description}
    for status, description in {
        400: "The request is wrong",
        401: "No key, or an unknown one",
        403: "Not allowed",
        404: "There is no such thing",
        408: "Its body took too long",
        409: "In the way of something else",
        413: "Too large",
        415: "Of a type that is not read",
        422: "The body does not fit the schema",
        429: "Too many requests",
        500: "The server failed",
        503: "Not ready",
        507: "It cannot be stored",
    }.items()
}


def writable(services: Services) -> None:
    """Refuse to change the index where the server is not to.

    Raises:
        ForbiddenError: it is not.
    """
    if not services.settings.writable:
        raise ForbiddenError("this server does not change its index (writable = false)")


def at_most(number: int, limit: int, name: str) -> None:
    """Hold a number to the server's limit.

    Raises:
        ServingError: 400, it is beyond.
    """
    if number > limit:
        raise invalid(f"{name}: {number:,} is more than this server allows ({limit:,})", name)


def short_enough(texts: Sequence[str], limits: ServeSettings, name: str) -> None:
    """Hold texts to the server's limit.

    Raises:
        ServingError: 400, one has more characters.
    """
    for place, text in enumerate(texts):
        if len(text) > limits.max_text_chars:
            where = name if len(texts) == 1 else f"{name}.{place}"
            raise invalid(f"{where}: {len(text):,} characters; this server takes {limits.max_text_chars:,}", where)
