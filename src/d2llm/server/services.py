"""What the routes work with."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Annotated, cast

from fastapi import Depends, Request

from d2llm.core.types import Task
from d2llm.server.errors import NotFoundError
from d2llm.server.index_service import IndexService
from d2llm.server.model_service import ModelService
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
