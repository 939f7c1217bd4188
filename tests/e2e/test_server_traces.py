"""Traces as a collector receives them: OTLP over HTTP, from a `d2llm serve` of its own process."""

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
    """What was sent to it."""

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
                answer = ExportTraceServiceResponse().SerializeToString()
                self.send_response(200)
                self.send_header("Content-Type", "application/x-protobuf")
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

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
        """Each with the attributes of what sent it."""
        for body in self.bodies:
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                for scope in resource.scope_spans:
                    for span in scope.spans:
                        yield values(resource.resource), span


def values(holder: Any) -> dict[str, Any]:
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in holder.attributes}


@contextmanager
def serving(index: Path, endpoint: str) -> Iterator[tuple[str, PreparedProcess]]:
    environment = {
        "D2LLM_SERVE_OTEL": "true",
        "D2LLM_SERVE_LOG_FORMAT": "json",
        "OTEL_EXPORTER_OTLP_ENDPOINT": endpoint,
        "OTEL_EXPORTER_OTLP_TIMEOUT": "2",  # seconds for which it tries to send; 10 without this
        "OTEL_SERVICE_NAME": "search-eu",
    }
    with PreparedProcess(program, "serve", str(index), "--port", "0", environment=environment) as process:
        process.until(lambda: "\n" in process.output, "it serves")
        yield process.output.split(" on ")[1].split()[0], process


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_index(tmp_path_factory.mktemp("traces"))


def test_a_collector_receives_requests_with_their_stages_and_without_their_texts(index: Path):
    with Collector() as collector, serving(index, collector.address) as (address, process):
        headers = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
        body = {"query": "the sly confidential cat", "top_k": 2}
        assert httpx2.post(f"{address}/v1/search", json=body, headers=headers).status_code == 200
        new = {"passages": [{"id": f"n{n}", "text": "a covert operation"} for n in range(3)]}
        assert httpx2.post(f"{address}/v1/passages", json=new).status_code == 200
        wrong = {"query": "unseen", "filter": "yeer = 1"}
        assert httpx2.post(f"{address}/v1/search", json=wrong).status_code == 400
        assert httpx2.get(f"{address}/health").status_code == 200
        process.send(signal.SIGTERM)  # what has not been sent yet is sent then
        assert process.wait() == 0, process.errors
    assert collector.paths == {"/v1/traces"}
    found = list(collector.spans())
    assert {resource["service.name"] for resource, _ in found} == {"search-eu"}
    of_client = {span.name: span for _, span in found if span.trace_id.hex() == TRACE}
    assert of_client.keys() == {"POST /v1/search", "queue", "encode", "candidates", "score"}
    request = of_client["POST /v1/search"]
    assert request.parent_span_id.hex() == PARENT
    assert request.kind == Span.SPAN_KIND_SERVER
    told = values(request)
    assert told["http.route"] == "/v1/search"
    assert told["http.status_code"] == 200
    for name in ("queue", "encode", "candidates", "score"):
        stage = of_client[name]
        assert stage.parent_span_id == request.span_id
        assert request.start_time_unix_nano <= stage.end_time_unix_nano <= request.end_time_unix_nano
    (other,) = [span for _, span in found if span.trace_id.hex() != TRACE and span.name == "POST /v1/search"]
    assert not other.parent_span_id
    assert values(other)["http.status_code"] == 400
    (written,) = [span for _, span in found if span.name == "POST /v1/passages"]
    below = {span.name for _, span in found if span.parent_span_id == written.span_id}
    assert below == {"queue", "encode"}
    assert {span.name for _, span in found if not span.parent_span_id} == {"POST /v1/search", "POST /v1/passages"}
    assert {span.name for _, span in found} == {*of_client, "POST /v1/passages"}  # none of /health
    for text in (b"sly", b"covert", b"confidential", b"unseen", b"yeer"):
        assert all(text not in sent for sent in collector.bodies)


def test_a_collector_that_is_not_there_holds_nobody_up_and_is_told_in_the_log(index: Path):
    with Collector() as collector:
        closed = collector.address
    with serving(index, closed) as (address, process):
        for _ in range(3):
            assert httpx2.post(f"{address}/v1/search", json={"query": "the cat"}, timeout=20).status_code == 200
        process.send(signal.SIGTERM)
        assert process.wait() == 0, process.errors
        records = [json.loads(line) for line in process.errors.splitlines()]
    assert any(record["level"] == "error" and "export" in record["event"] for record in records)
