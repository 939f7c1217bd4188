"""OpenTelemetry traces: a span for each request, with a child span for each of its stages.

Export is configured by OpenTelemetry's usual variables: ``OTEL_EXPORTER_OTLP_ENDPOINT``, ``OTEL_SERVICE_NAME``,
``OTEL_TRACES_SAMPLER`` and so on. Spans contain no exception messages, which may quote a query or passage, because
``RequestMiddleware`` turns every exception into a response before the instrumentation sees it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI

from d2llm import __version__
from d2llm.core.extras import require
from d2llm.server.middleware import RouteTable, split_address
from d2llm.server.telemetry import Telemetry

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span

_UNTRACED = "/health$,/metrics$"


def start_tracing(app: FastAPI, telemetry: Telemetry, exporter: SpanExporter | None = None) -> Callable[[], None]:
    """Trace the requests of ``app``; returns a function that sends the remaining spans and stops tracing.

    Args:
        app: the application, before its first request.
        telemetry: reports the stages.
        exporter: by default OTLP over HTTP.

    Raises:
        MissingExtraError: the extra ``otel`` is not installed.
    """
    for module in (
        "opentelemetry.sdk",
        "opentelemetry.instrumentation.fastapi",
        "opentelemetry.exporter.otlp.proto.http",
    ):
        require(module, extra="otel", purpose="tracing")
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor
    from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    routes = RouteTable(app)

    def name_route(span: Span, scope: dict[str, Any]) -> None:
        """Name the route of a request whose address names an index, which the instrumentation does not know."""
        index, path = split_address(scope["path"])
        if index is not None:
            span.update_name(f"{scope['method']} {routes.find({**scope, 'path': path})}")

    name = {SERVICE_NAME: os.environ.get("OTEL_SERVICE_NAME") or "d2llm"}
    provider = TracerProvider(resource=Resource.create({**name, SERVICE_VERSION: __version__}))
    provider.add_span_processor(BatchSpanProcessor(exporter or OTLPSpanExporter()))
    FastAPIInstrumentor.instrument_app(
        app,
        tracer_provider=provider,
        excluded_urls=_UNTRACED,
        exclude_spans=["receive", "send"],
        server_request_hook=name_route,
    )
    tracer = provider.get_tracer("d2llm", __version__)

    def add_stage(stage: str, seconds: float) -> None:
        ended = time.time_ns()
        tracer.start_span(stage, start_time=ended - int(1e9 * seconds)).end(ended)

    telemetry.on_stage(add_stage)
    return provider.shutdown
