"""``/metrics``, which Prometheus reads."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import PlainTextResponse, Response

from d2llm.server.telemetry import Telemetry

router = APIRouter(tags=["operations"])


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(request: Request) -> Response:
    """Counts and times of the server, as Prometheus reads them."""
    telemetry: Telemetry = request.app.state.telemetry
    content, media_type = telemetry.exposition()
    return Response(content, headers={"Content-Type": media_type})
