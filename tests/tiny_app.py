"""An application that consists only of middleware: its routes need no models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, cast

from fastapi import APIRouter, Body, FastAPI, Request
from starlette.testclient import TestClient

from d2llm.server.errors import install_error_handlers
from d2llm.server.logs import note_items
from d2llm.server.middleware import install_middleware
from d2llm.server.running import Lifecycle
from d2llm.server.settings import ServeSettings
from d2llm.server.telemetry import Telemetry, metrics_router

Texts = Annotated[list[str], Body(embed=True)]


def tiny_router() -> APIRouter:
    router = APIRouter(prefix="/v1")

    @router.post("/search")
    async def search(request: Request, texts: Texts) -> dict[str, int]:
        note_items(texts)
        request.app.state.telemetry.observe("encode", 0.002)
        return {"num_texts": len(texts)}

    @router.post("/fail")
    async def fail(texts: Texts) -> None:
        try:
            raise KeyError(texts[0])
        except KeyError as error:
            raise ValueError(f"cannot read {texts}") from error

    @router.post("/passages")
    async def write() -> dict[str, str]:
        return {"wrote": "one"}

    @router.get("/passages/{passage_id}")
    async def read(passage_id: str) -> dict[str, str]:
        return {"id": passage_id}

    @router.delete("/passages/{passage_id}")
    async def delete(passage_id: str) -> dict[str, str]:
        return {"deleted": passage_id}

    @router.post("/index/reload")
    async def reload() -> dict[str, bool]:
        return {"changed": False}

    return router


def tiny_app(settings: ServeSettings, lifecycle: Lifecycle | None = None) -> FastAPI:
    app = FastAPI()
    app.state.telemetry = Telemetry()
    app.include_router(tiny_router())
    app.include_router(metrics_router)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ready"}

    install_error_handlers(app)
    if lifecycle is None:
        lifecycle = Lifecycle()
        lifecycle.state = "ready"
    install_middleware(app, settings, app.state.telemetry, lifecycle)
    return app


def tiny_client(keys_file: Path | None = None, lifecycle: Lifecycle | None = None, **settings: object) -> TestClient:
    app = tiny_app(ServeSettings(keys_file=keys_file, **settings), lifecycle)  # pyright: ignore[reportArgumentType]
    return TestClient(app, base_url="http://127.0.0.1:8000", raise_server_exceptions=True)


def app_of(client: TestClient) -> FastAPI:
    return cast(FastAPI, client.app)


def telemetry_of(client: TestClient) -> Telemetry:
    return app_of(client).state.telemetry
