"""The application: what is loaded, which routes and middlewares there are, and how it starts and stops."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import Depends, FastAPI
from fastapi.security import HTTPBearer

from d2llm import __version__
from d2llm.apps.server import metrics_route, native, page_routes
from d2llm.apps.server.dialects import DIALECTS
from d2llm.apps.server.disconnects import CancelWhenGone
from d2llm.apps.server.errors import install_error_handlers, register_error_shape, without_places
from d2llm.apps.server.index_service import IndexService
from d2llm.apps.server.lifecycle import Lifecycle, ReadyGate
from d2llm.apps.server.middleware import install_middleware
from d2llm.apps.server.model_service import ModelService
from d2llm.apps.server.open_version import OpenVersion
from d2llm.apps.server.services import Services
from d2llm.apps.server.settings import ServeSettings
from d2llm.apps.server.telemetry import Telemetry
from d2llm.core.errors import D2LLMError, InputError
from d2llm.index.store import IndexStore
from d2llm.models.student import Student
from d2llm.pipeline.student_source import find_source

_log = logging.getLogger(__name__)
_KEYS = "A key that `d2llm keys` made. The middleware checks it; this tells clients that there is one to send."


def make_app(settings: ServeSettings) -> FastAPI:
    """The server as an ASGI application; it loads what it serves when it starts, and says so meanwhile."""
    lifecycle, telemetry = Lifecycle(), Telemetry()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
        async with running(app, settings, lifecycle, telemetry):
            yield

    app = FastAPI(
        title="d2llm",
        version=__version__,
        summary="Semantic search with a distilled interaction head",
        lifespan=lifespan,
        docs_url=None,  # FastAPI's own page loads its scripts from elsewhere
        redoc_url=None,
        dependencies=[Depends(HTTPBearer(auto_error=False, description=_KEYS))] if settings.keys_file else [],
    )
    app.state.lifecycle, app.state.settings, app.state.telemetry = lifecycle, settings, telemetry
    install_error_handlers(app, _private_paths(settings))
    app.include_router(native.router)
    app.include_router(native.health_router)
    app.include_router(metrics_route.router)
    for dialect in DIALECTS:
        app.include_router(dialect.router)
        register_error_shape(dialect.PATHS, dialect.shape)
    app.include_router(page_routes.router)
    app.add_middleware(ReadyGate, lifecycle=lifecycle)
    app.add_middleware(CancelWhenGone)
    install_middleware(app, settings, telemetry)
    return app


@asynccontextmanager
async def running(
    app: FastAPI, settings: ServeSettings, lifecycle: Lifecycle, telemetry: Telemetry
) -> AsyncGenerator[None]:
    """Load in the background, serve, and stop when what was accepted is answered."""
    private = _private_paths(settings)

    def note(problem: str | None) -> None:  # the version in memory goes on answering
        told = without_places(problem or "", private)
        lifecycle.become("ready", told and f"a new version cannot be read: {told}")

    async def start() -> None:
        try:
            services = await asyncio.to_thread(load_services, settings, telemetry)
            services.models.start()
            if services.index is not None:
                services.index.start()
                watch_index(telemetry, services.index)
            telemetry.watch_queue(lambda: services.models.num_queued)
            app.state.services = services
            lifecycle.become("ready")
        except D2LLMError as error:
            lifecycle.become("broken", without_places(str(error), private))
            return
        except Exception:  # noqa: BLE001 - whatever it is, the server must say that it is broken
            lifecycle.become("broken", "it could not be started; its log says why")
            _log.exception("the server could not be started")
            return
        if services.index is not None:
            await services.index.watch(settings.reload_seconds, note)

    starting = asyncio.create_task(start(), name="start")
    try:
        yield
    finally:
        lifecycle.become("stopping")
        starting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await starting
        services: Services | None = getattr(app.state, "services", None)
        if services is not None:
            if services.index is not None:
                await services.index.stop(settings.shutdown_seconds)
            await services.models.stop(settings.shutdown_seconds)


def watch_index(telemetry: Telemetry, index: IndexService) -> None:
    """Let the metrics tell which version is served."""
    telemetry.watch_index(lambda: index.current.view.version, lambda: len(index.current.view))


def load_services(settings: ServeSettings, telemetry: Telemetry) -> Services:
    """Load student, teacher and index.

    Raises:
        InputError: there is neither a student nor an index.
        D2LLMError: one of them cannot be loaded, or they do not belong together.
    """
    name = settings.student
    if settings.index is not None and name is None:
        name = find_source(IndexStore.open(settings.index).manifest.get("student_source"), settings.index)
    if name is None:
        raise InputError("there is nothing to serve; give an index, or a student")
    student = Student.load(name, device=settings.device, dtype=settings.dtype, engine=settings.engine)
    models = ModelService(
        student,
        settings.model_name or Path(name).name,
        queue_texts=settings.queue_texts,
        batch_tokens=settings.batch_tokens,
        batch_wait_seconds=settings.batch_wait_ms / 1e3,
        observe=telemetry.observe,
        observe_batch=telemetry.observe_batch,
    )
    return Services(settings, models, _load_index(settings, models, telemetry), telemetry)


def _load_index(settings: ServeSettings, models: ModelService, telemetry: Telemetry) -> IndexService | None:
    if settings.index is None:
        return None
    judge = None
    if settings.teacher is not None:
        from d2llm.apps.commands_teach import named_teacher
        from d2llm.apps.options import teacher_config
        from d2llm.models.judge import load_judge

        config = named_teacher(settings.teacher, teacher_config("", settings.prompt))
        judge = load_judge(config, device=settings.device, dtype=settings.dtype)
    return IndexService(
        OpenVersion(settings.index, models),
        judge=judge,
        teacher_name=settings.teacher,
        queue=settings.queue_texts,
        observe=telemetry.observe,
    )


def _private_paths(settings: ServeSettings) -> list[Path]:
    given = (
        settings.index,
        settings.keys_file,
        settings.report,
        *map(Path, filter(None, (settings.student, settings.teacher))),
    )
    return [path for path in given if path is not None and path.name]
