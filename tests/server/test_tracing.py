from __future__ import annotations

import json
import sys

import pytest

pytest.importorskip("fastapi", reason="needs the extra 'serve'")
pytest.importorskip("opentelemetry.instrumentation.fastapi", reason="needs the extra 'otel'")

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from d2llm.core.errors import MissingExtraError
from d2llm.server.telemetry import Telemetry
from d2llm.server.tracing import start_tracing
from tiny_app import app_of, telemetry_of, tiny_client


class Spans:
    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        self.client = tiny_client()
        self._stop = start_tracing(app_of(self.client), telemetry_of(self.client), self._exporter)

    def after(self, *paths: str, headers: dict[str, str] | None = None) -> dict[str, ReadableSpan]:
        for path in paths:
            if "/v1/" in path:
                self.client.post(path, json={"texts": ["my secret"]}, headers=headers)
            else:
                self.client.get(path)
        self._stop()
        return {span.name: span for span in self._exporter.get_finished_spans()}


def test_a_request_is_a_span_with_its_stages_as_children():
    spans = Spans().after("/v1/search")
    assert set(spans) == {"POST /v1/search", "encode"}
    request, stage = spans["POST /v1/search"], spans["encode"]
    assert stage.parent == request.get_span_context()
    assert (stage.end_time or 0) - (stage.start_time or 0) == 2_000_000  # nanoseconds
    assert request.resource.attributes["service.name"] == "d2llm"


def test_a_clients_trace_is_continued():
    trace = "4bf92f3577b34da6a3ce929d0e0e4736"
    spans = Spans().after("/v1/search", headers={"traceparent": f"00-{trace}-00f067aa0ba902b7-01"})
    assert {json.loads(span.to_json())["context"]["trace_id"] for span in spans.values()} == {f"0x{trace}"}


def test_probes_and_scrapes_are_not_traced():
    assert set(Spans().after("/health", "/metrics", "/v1/search")) == {"POST /v1/search", "encode"}


def test_a_span_is_named_after_its_route_whatever_index_the_address_names():
    assert set(Spans().after("/indexes/faq/v1/search")) == {"POST /v1/search", "encode"}


def test_a_failed_span_does_not_contain_the_error_message():
    span = Spans().after("/v1/fail")["POST /v1/fail"]
    assert span.status.status_code == StatusCode.ERROR
    assert "secret" not in span.to_json()


def test_the_service_name_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OTEL_SERVICE_NAME", "search-eu")
    assert Spans().after("/v1/search")["encode"].resource.attributes["service.name"] == "search-eu"


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "opentelemetry.instrumentation.fastapi", None)
    with pytest.raises(MissingExtraError, match=r"d2llm\[otel\]"):
        start_tracing(app_of(tiny_client()), Telemetry())
