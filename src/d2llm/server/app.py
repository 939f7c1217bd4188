"""The application: loading, routes and middleware, startup and shutdown."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator
from contextlib import ExitStack, asynccontextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType

from fastapi import Depends, FastAPI
from fastapi.security import HTTPBearer
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from d2llm import __version__
from d2llm.core.errors import D2LLMError, InputError
from d2llm.core.extras import require
from d2llm.core.memory import out_of_memory
from d2llm.data.ocr import languages_of
from d2llm.models.hub import find_student
from d2llm.models.protocols import task_for
from d2llm.models.student import Student
from d2llm.models.student_files import read_student_manifest
from d2llm.retrieval.open_index import find_source
from d2llm.retrieval.segments import IndexView
from d2llm.retrieval.upserting import check_projection
from d2llm.runners.placement import find_runner
from d2llm.server import corpus_routes, native, page_routes
from d2llm.server.dialects import DIALECTS
from d2llm.server.errors import (
    install_error_handlers,
    json_rpc_shape,
    naming_index,
    register_error_shape,
    without_paths,
)
from d2llm.server.middleware import AGENTS_PATH, install_middleware
from d2llm.server.model_service import ModelService
from d2llm.server.ray_students import StudentReplicas
from d2llm.server.running import Lifecycle
from d2llm.server.served_index import ServedIndex
from d2llm.server.serving import Serving
from d2llm.server.settings import ServeSettings
from d2llm.server.slow_models import SlowModels
from d2llm.server.student_pool import StudentPool
from d2llm.server.telemetry import Telemetry, metrics_router
from d2llm.store.shards import Storage

_log = logging.getLogger(__name__)
_LEAST_SECONDS = 0.2  # for work to end by itself that has been told to stop
_KEYS = "A key made by `d2llm keys`. The middleware checks it; this scheme tells clients to send one."


def make_app(settings: ServeSettings) -> FastAPI:
    """The server as an ASGI application. It loads models and indexes on startup and reports that it is starting.

    Raises:
        InputError: the file of keys, the report or the languages of ``ocr`` named in the settings cannot be used.
    """
    if settings.report is not None:
        page_routes.check_report(settings.report)
    languages_of(settings.ocr)
    lifecycle, telemetry, private = Lifecycle(), Telemetry(), _private_paths(settings)

    app = FastAPI(
        title="d2llm",
        version=__version__,
        summary="Semantic search with a distilled interaction head",
        lifespan=partial(running, settings=settings, lifecycle=lifecycle, telemetry=telemetry, private=private),
        docs_url=None,  # FastAPI's own page loads scripts from other hosts
        redoc_url=None,
        dependencies=[Depends(HTTPBearer(auto_error=False, description=_KEYS))] if settings.keys_file else [],
    )
    app.state.lifecycle, app.state.settings, app.state.telemetry = lifecycle, settings, telemetry
    install_error_handlers(app, private)
    app.include_router(native.router)
    app.include_router(corpus_routes.router)
    app.include_router(native.health_router)
    app.include_router(metrics_router)
    for dialect in DIALECTS:
        app.include_router(dialect.router)
        register_error_shape(dialect.PATHS, dialect.shape)
    app.include_router(page_routes.router)
    app.router.routes.append(Route(AGENTS_PATH, _AgentRoute(settings, private), methods=["POST"]))
    register_error_shape((AGENTS_PATH,), json_rpc_shape)
    install_middleware(app, settings, telemetry, lifecycle)
    return app


class _AgentRoute:
    """The Model Context Protocol; what it needs is imported with the first request.

    Raises:
        MissingExtraError: its package is not installed.
    """

    def __init__(self, settings: ServeSettings, private: list[Path]) -> None:
        self._settings, self._private = settings, private

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        protocol = await asyncio.to_thread(self._import)
        await protocol.answer(scope, receive, send, self._settings, self._private)

    @staticmethod
    def _import() -> ModuleType:
        require("mcp", extra="mcp", purpose="the Model Context Protocol")
        return import_module("d2llm.server.mcp")


@asynccontextmanager
async def running(
    app: FastAPI, settings: ServeSettings, lifecycle: Lifecycle, telemetry: Telemetry, private: list[Path]
) -> AsyncGenerator[None]:
    """Load in the background, serve, and stop once accepted requests are answered."""
    connection = ExitStack()

    def note(serving: Serving, name: str, problem: str | None) -> None:  # the version in memory still answers
        serving.problems[name] = without_paths(problem or "", private)
        lifecycle.become("ready", serving.problem)

    async def start() -> None:
        try:
            await asyncio.to_thread(connection.enter_context, find_runner(settings.runner).connected())
            serving = await asyncio.to_thread(load, settings, telemetry, private)
            serving.start()
            _watch(serving, telemetry)
            app.state.serving = serving
            lifecycle.become("ready")
        except Exception as error:  # noqa: BLE001 - whatever happened, the server must report that it is broken
            told = out_of_memory(error) or (str(error) if isinstance(error, D2LLMError) else None)
            lifecycle.become("broken", without_paths(told or "it could not be started; see its log", private))
            if told is None:
                _log.exception("the server could not be started")
            return
        await asyncio.gather(*(index.watch(partial(note, serving, name)) for name, index in serving.indexes.items()))

    starting = asyncio.create_task(start(), name="start")
    try:
        yield
    finally:
        lifecycle.become("stopping")
        starting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await starting
        serving: Serving | None = getattr(app.state, "serving", None)
        if serving is not None:
            await serving.stop(_seconds_left(lifecycle, settings))
        await asyncio.to_thread(connection.close)


def _seconds_left(lifecycle: Lifecycle, settings: ServeSettings) -> float:
    """How long accepted work may take: waiting for requests has taken some of the time."""
    if lifecycle.stop_by is None:
        return settings.shutdown_seconds
    return max(_LEAST_SECONDS, lifecycle.stop_by - time.monotonic())


def load(settings: ServeSettings, telemetry: Telemetry, private: list[Path]) -> Serving:
    """Load students, teacher, writer and indexes; folders that clients must not see are added to ``private``.

    Raises:
        InputError: there is neither a student nor an index.
        D2LLMError: one of them cannot be loaded, or they do not match.
    """
    load_student = partial(load_models, settings, telemetry, private)
    students, slow = StudentPool(load_student), SlowModels(settings)
    if not settings.index:
        return Serving(settings, {}, students, slow, alone=load_student(None))
    indexes: dict[str, ServedIndex] = {}
    with ExitStack() as undo:
        undo.callback(lambda: [student.close() for student in students.students])
        for name, folder in settings.index.items():
            with naming_index(name, settings.index):
                indexes[name] = ServedIndex(name, folder, students, slow, settings, telemetry.observe)
            undo.callback(indexes[name].close)
        slow.load()
        undo.pop_all()
    return Serving(settings, indexes, students, slow)


def load_models(
    settings: ServeSettings, telemetry: Telemetry, private: list[Path], store: Storage | None
) -> ModelService:
    """Load the student named in the settings, or else the one that made the index.

    Raises:
        InputError: no student is named, or the index does not say where its student is.
        IndexMismatchError: the named student did not make the index, or not its token embeddings.
        D2LLMError: the student cannot be loaded.
    """
    name = settings.student
    if name is None:
        if store is None:
            raise InputError("there is nothing to serve; give an index, or a student")
        source = store.manifest["student_source"]
        _hide(private, str(source))
        name = find_source(source, store.folder)
    folder = find_student(name)
    manifest, config = read_student_manifest(folder)
    _hide(private, str(folder), config.backbone.model)
    if store is not None:
        store.check_student(manifest["fingerprint"])  # before the weights are loaded
    student = Student.load(folder, device=settings.device, dtype=settings.dtype, engine=settings.engine)
    if store is not None:
        if store.manifest["token_projection"] is not None:
            check_projection(store, student)
        task_for(student, store.manifest["task"])  # warns
    calibrated = ", ".join(sorted(student.calibration.tasks)) or "no task (they are sigmoids of the score)"
    _log.info("relevance scores are calibrated probabilities for %s", calibrated)
    encoder = None
    # The vectors of a remote backbone are in the cache of this process's machine.
    if settings.runner != "local" and settings.student_replicas and student.backbone.reads_tokens:
        encoder = StudentReplicas(student, str(folder), settings)
    return ModelService(
        student,
        settings.model_name or Path(name).name,
        queue_texts=settings.queue_texts,
        batch_tokens=settings.batch_tokens,
        batch_wait_seconds=settings.batch_wait_ms / 1e3,
        encoder=encoder,
        observe=telemetry.observe,
        observe_batch=telemetry.observe_batch,
    )


def _watch(serving: Serving, telemetry: Telemetry) -> None:
    """Show what is served in the metrics."""

    def student_of(name: str | None) -> dict[str, str]:
        models = serving.now(name).models
        return {"name": models.name, "fingerprint": models.fingerprint}

    telemetry.watch_queue(lambda: sum(student.num_queued for student in serving.loaded))
    for name, index in serving.indexes.items():
        telemetry.watch_index(name, partial(_view_of, index), partial(serving.problems.get, name, ""))
        telemetry.watch_student(name, partial(student_of, name))
    if serving.alone is not None:
        telemetry.watch_student("", partial(student_of, None))


def _view_of(index: ServedIndex) -> IndexView:
    return index.version.view


def _hide(private: list[Path], *paths: str) -> None:
    private += [path for path in map(Path, paths) if path.is_absolute() and path not in private]


def _private_paths(settings: ServeSettings) -> list[Path]:
    paths = (
        *settings.index.values(),
        settings.keys_file,
        settings.report,
        *map(Path, filter(None, (settings.student, settings.teacher, settings.reranker, settings.writer))),
    )
    return [path for path in paths if path is not None and path.name]
