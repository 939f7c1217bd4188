"""Traces as a collector receives them: OTLP over HTTP, from a separate `d2llm serve` process."""

from __future__ import annotations

import gzip
import json
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx2
import pytest

pytest.importorskip("fastapi", reason="needs the extra 'serve'")
pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="needs the extra 'otel'")

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from prepared_process import PreparedProcess, program
from tiny_server import write_tiny_index

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


class Collector:
    """An OTLP collector that keeps the requests it receives."""

    def __init__(self) -> None:
        self.paths: set[str] = set()
        self.bodies: list[bytes] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                assert self.headers["Content-Type"] == "application/x-protobuf"
                collector.paths.add(self.path)
                collector.bodies.append(gzip.decompress(body) if self.headers["Content-Encoding"] == "gzip" else body)
                response = ExportTraceServiceResponse().SerializeToString()
                self.send_response(200)
                self.send_header("Content-Type", "application/x-protobuf")
                self.send_header("Content-Length", str(len(response)))
                self.end_headers()
                self.wfile.write(response)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> Collector:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def spans(self) -> Iterator[tuple[dict[str, Any], Span]]:
        """All received spans, each with the attributes of its resource."""
        for body in self.bodies:
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                for scope in resource.scope_spans:
                    for span in scope.spans:
                        yield values(resource.resource), span


def values(holder: Any) -> dict[str, Any]:
    return {
        attribute.key: getattr(attribute.value, attribute.value.WhichOneof("value")) for attribute in holder.attributes
    }


@contextmanager
def serving(index: Path, endpoint: str) -> Iterator[tuple[str, PreparedProcess]]:
    environment = {
        "D2LLM_SERVE_OTEL": "true",
        "D2LLM_SERVE_LOG_FORMAT": "json",
        "OTEL_EXPORTER_OTLP_ENDPOINT": endpoint,
        "OTEL_EXPORTER_OTLP_TIMEOUT": "2",  # seconds until an export gives up; the default is 10
        "OTEL_SERVICE_NAME": "search-eu",
    }
    with PreparedProcess(program, "serve", str(index), "--port", "0", environment=environment) as process:
        process.until(lambda: "\n" in process.output, "it serves")
        yield process.output.split(" on ")[1].split()[0], process


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_index(tmp_path_factory.mktemp("traces"))


def test_traces_have_the_stages_of_requests_but_no_texts(index: Path):
    with Collector() as collector, serving(index, collector.address) as (address, process):
        headers = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
        body = {"query": "the sly confidential cat", "top_k": 2}
        assert httpx2.post(f"{address}/v1/search", json=body, headers=headers).status_code == 200
        passages = {"passages": [{"id": f"n{n}", "text": "a covert operation"} for n in range(3)]}
        assert httpx2.post(f"{address}/v1/passages", json=passages).status_code == 200
        bad_search = {"query": "unseen", "filter": "yeer = 1"}
        assert httpx2.post(f"{address}/v1/search", json=bad_search).status_code == 400
        assert httpx2.get(f"{address}/health").status_code == 200
        process.send(signal.SIGTERM)  # on exit it sends the remaining spans
        assert process.wait() == 0, process.errors
    assert collector.paths == {"/v1/traces"}
    spans = list(collector.spans())
    assert {resource["service.name"] for resource, _ in spans} == {"search-eu"}
    client_spans = {span.name: span for _, span in spans if span.trace_id.hex() == TRACE}
    assert client_spans.keys() == {"POST /v1/search", "queue", "encode", "candidates", "score"}
    request = client_spans["POST /v1/search"]
    assert request.parent_span_id.hex() == PARENT
    assert request.kind == Span.SPAN_KIND_SERVER
    attributes = values(request)
    assert attributes["http.route"] == "/v1/search"
    assert attributes["http.status_code"] == 200
    for name in ("queue", "encode", "candidates", "score"):
        stage = client_spans[name]
        assert stage.parent_span_id == request.span_id
        assert request.start_time_unix_nano <= stage.end_time_unix_nano <= request.end_time_unix_nano
    (other,) = [span for _, span in spans if span.trace_id.hex() != TRACE and span.name == "POST /v1/search"]
    assert not other.parent_span_id
    assert values(other)["http.status_code"] == 400
    (upsert,) = [span for _, span in spans if span.name == "POST /v1/passages"]
    child_names = {span.name for _, span in spans if span.parent_span_id == upsert.span_id}
    assert child_names == {"queue", "encode"}
    assert {span.name for _, span in spans if not span.parent_span_id} == {"POST /v1/search", "POST /v1/passages"}
    assert {span.name for _, span in spans} == {*client_spans, "POST /v1/passages"}  # no spans for /health
    for text in (b"sly", b"covert", b"confidential", b"unseen", b"yeer"):
        assert all(text not in received for received in collector.bodies)


def test_an_unreachable_collector_is_logged_and_delays_nobody(index: Path):
    with Collector() as collector:
        closed_address = collector.address
    with serving(index, closed_address) as (address, process):
        for _ in range(3):
            assert httpx2.post(f"{address}/v1/search", json={"query": "the cat"}, timeout=20).status_code == 200
        process.send(signal.SIGTERM)
        assert process.wait() == 0, process.errors
        records = [json.loads(line) for line in process.errors.splitlines()]
    assert any(record["level"] == "error" and "export" in record["event"] for record in records)
