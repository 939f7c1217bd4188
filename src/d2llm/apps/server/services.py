"""What the routes work with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from fastapi import Request

from d2llm.apps.server.errors import NotFoundError
from d2llm.apps.server.index_service import IndexService
from d2llm.apps.server.model_service import ModelService
from d2llm.apps.server.settings import ServeSettings
from d2llm.apps.server.telemetry import Telemetry


@dataclass(frozen=True, slots=True)
class Services:
    """The parts of a server that is ready; ``index`` is None where a student alone is served."""

    settings: ServeSettings
    models: ModelService
    index: IndexService | None
    telemetry: Telemetry


# Both are coroutines as FastAPI runs plain functions in a thread, which costs a request more than they do.


async def services_of(request: Request) -> Services:
    """The services of the server that a request came to."""
    return cast(Services, request.app.state.services)


async def index_of(request: Request) -> IndexService:
    """The index.

    Raises:
        NotFoundError: a student alone is served.
    """
    index = (await services_of(request)).index
    if index is None:
        raise NotFoundError("this server has no index; start it with `d2llm serve INDEX`")
    return index
