"""Metrics and logs of the server, and the private data they must not contain."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="needs the extra 'serve'")

from prometheus_client.parser import text_string_to_metric_families
from starlette.responses import Response

from d2llm.server.logs import start_logs
from d2llm.server.settings import ServeSettings
from d2llm.server.telemetry import STAGES, Telemetry
from tiny_app import app_of, telemetry_of, tiny_client

SECRET = "how do I tell my sister"


def samples(telemetry: Telemetry) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    content, kind = telemetry.exposition()
    assert kind.startswith("text/plain")
    families = text_string_to_metric_families(content.decode())
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


class Logs:
    def __init__(self, **settings: Any) -> None:
        self.stream = io.StringIO()
        self.client = tiny_client(**settings)
        self.stop = start_logs(ServeSettings(**settings), self.stream)

    @property
    def text(self) -> str:
        return self.stream.getvalue()

    @property
    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.text.splitlines()]


@pytest.fixture
def json_logs() -> Iterator[Logs]:
    logs = Logs(log_format="json")
    yield logs
    logs.stop()


# Metrics


def test_requests_are_counted_by_route_method_and_status():
    client = tiny_client()
    for passage in ("p1", "p2", SECRET):
        client.get(f"/v1/passages/{passage}")
    client.post("/v1/search", json={"texts": [SECRET]})
    client.post("/v1/search", json={"texts": 3})
    client.get("/v1/search")
    metrics = samples(telemetry_of(client))
    counts = {labels: value for (name, labels), value in metrics.items() if name == "d2llm_http_requests_total"}
    assert {tuple(dict(labels)[key] for key in ("method", "route", "status")): n for labels, n in counts.items()} == {
        ("GET", "/v1/passages/{passage_id}", "200"): 3,
        ("POST", "/v1/search", "200"): 1,
        ("POST", "/v1/search", "422"): 1,
        ("GET", "/v1/search", "405"): 1,
    }
    assert metrics["d2llm_http_request_seconds_count", (("index", ""), ("route", "/v1/search"))] == 3
    assert metrics["d2llm_http_requests_in_flight", ()] == 0
    assert not [name for name, _ in metrics if name.endswith("_created")]


def test_labels_never_contain_client_input():
    client = tiny_client(allowed_hosts=("*",))
    client.get(f"/{SECRET}")
    client.get("/v1/passages/a/b/c/" + SECRET)
    client.request("BREW", "/health")
    client.get("/v1/passages/x", headers={"Host": SECRET.replace(" ", "-")})
    text = telemetry_of(client).exposition()[0].decode()
    assert "sister" not in text
    assert "BREW" not in text
    assert 'route="(none)"' in text
    assert 'method="OTHER"' in text


def test_prometheus_can_parse_the_metrics_endpoint():
    client = tiny_client()
    client.get("/health")
    response = client.get("/metrics")
    assert response.headers["Content-Type"].startswith("text/plain; version=")
    families = {family.name: family for family in text_string_to_metric_families(response.text)}
    (sample,) = [sample for sample in families["d2llm_http_requests"].samples if sample.name.endswith("_total")]
    assert (sample.labels["route"], sample.value) == ("/health", 1)
    assert families["d2llm_http_requests_in_flight"].samples[0].value == 1  # this request


@pytest.mark.parametrize(
    ("route", "limits", "status"), [("search", {"max_body_bytes": 10}, "413"), ("fail", {}, "500")]
)
def test_refused_and_failed_requests_are_counted_for_their_route(route, limits, status):
    client = tiny_client(**limits)
    client.post(f"/v1/{route}", json={"texts": [SECRET]})
    labels = (("index", ""), ("method", "POST"), ("route", f"/v1/{route}"), ("status", status))
    assert samples(telemetry_of(client))["d2llm_http_requests_total", labels] == 1


def test_stages_are_exported_from_the_start_and_timed():
    telemetry = Telemetry()
    metrics = samples(telemetry)
    assert [metrics["d2llm_stage_seconds_count", (("stage", stage),)] for stage in STAGES] == [0] * len(STAGES)
    telemetry.observe("score", 0.003)
    telemetry.observe("score", 0.3)
    metrics = samples(telemetry)
    assert metrics["d2llm_stage_seconds_count", (("stage", "score"),)] == 2
    assert metrics["d2llm_stage_seconds_sum", (("stage", "score"),)] == pytest.approx(0.303)
    assert metrics["d2llm_stage_seconds_bucket", (("le", "0.005"), ("stage", "score"))] == 1


def test_an_unknown_stage_is_a_value_error():
    with pytest.raises(ValueError, match="'scoring' is not a stage"):
        Telemetry().observe("scoring", 1.0)


@dataclass
class ServedView:
    version: int
    num_passages: int
    missing: tuple[str, ...] = ()

    def __len__(self) -> int:
        return self.num_passages


def test_queue_batch_and_index_metrics():
    telemetry = Telemetry()
    num_waiting = [3]
    telemetry.watch_queue(lambda: num_waiting[0])
    telemetry.observe_batch(32, 0.5)
    telemetry.observe_batch(2, 0.25)
    telemetry.watch_index("docs", lambda: ServedView(12, 6_883), lambda: "")
    telemetry.watch_index("faq", lambda: ServedView(3, 40, missing=("shard 1",)), lambda: "damaged")
    metrics = samples(telemetry)
    assert metrics["d2llm_queue_texts", ()] == 3
    assert metrics["d2llm_batch_texts_sum", ()] == 34
    assert metrics["d2llm_batch_texts_bucket", (("le", "2.0"),)] == 1
    assert metrics["d2llm_batch_seconds_total", ()] == 0.75
    assert metrics["d2llm_index_version", (("index", "docs"),)] == 12
    assert metrics["d2llm_index_passages", (("index", "docs"),)] == 6_883
    assert metrics["d2llm_index_passages", (("index", "faq"),)] == 40
    for gauge in ("d2llm_index_missing_shards", "d2llm_index_unreadable"):
        assert [metrics[gauge, (("index", name),)] for name in ("docs", "faq")] == [0, 1]


def test_servers_in_one_process_have_separate_metrics():
    first, second = Telemetry(), Telemetry()
    first.observe("encode", 1.0)
    assert samples(second)["d2llm_stage_seconds_count", (("stage", "encode"),)] == 0


# Logs


def test_a_request_is_one_log_line(json_logs: Logs):
    json_logs.client.post("/v1/search", json={"texts": [SECRET, "b"]}, headers={"X-Request-ID": "r1"})
    (record,) = json_logs.records
    assert record.pop("timestamp").endswith("Z")
    assert 0 < record.pop("milliseconds") < 5_000
    assert record == {
        "event": "request",
        "level": "info",
        "request_id": "r1",
        "method": "POST",
        "route": "/v1/search",
        "status": 200,
        "key": None,
        "index": None,
        "num_items": 2,
    }


def test_a_successful_health_check_is_not_logged(json_logs: Logs):
    assert json_logs.client.get("/health").status_code == 200
    assert json_logs.client.post("/health").status_code == 405
    (record,) = json_logs.records
    assert (record["route"], record["status"]) == ("/health", 405)


def test_logs_contain_no_text_path_query_or_key(json_logs: Logs):
    client = json_logs.client
    client.post("/v1/search", json={"texts": [SECRET]})
    client.post("/v1/search", json={"texts": {"sister": SECRET}})
    client.post("/v1/fail", json={"texts": [SECRET]})
    client.get(f"/v1/passages/{SECRET}?sister={SECRET}")
    client.get(f"/{SECRET}")
    client.request("SISTER-METHOD", "/health")
    client.post("/v1/search", content=SECRET.encode(), headers={"Authorization": f"Bearer {SECRET}"})
    assert len(json_logs.records) == 8  # seven requests and one failure
    assert "sister" not in json_logs.text.lower()


def test_a_failure_is_logged_with_its_traceback(json_logs: Logs):
    json_logs.client.post("/v1/fail", json={"texts": [SECRET]}, headers={"X-Request-ID": "r1"})
    failure, request = json_logs.records
    assert (failure["level"], failure["request_id"]) == ("error", "r1")
    assert request["status"] == 500
    lines = failure["exception"].splitlines()
    assert lines[-1] == "ValueError"
    assert "KeyError" in lines  # the exception that caused it
    assert any("tiny_app.py" in line for line in lines)


def test_texts_are_logged_when_enabled():
    logs = Logs(log_format="json", log_texts=True)
    logs.client.post("/v1/search", json={"texts": [SECRET]})
    logs.client.post("/v1/fail", json={"texts": [SECRET]})
    logs.stop()
    search, failure, _ = logs.records
    assert search["texts"] == [SECRET]
    assert failure["exception"].splitlines()[-1] == f"ValueError: cannot read ['{SECRET}']"


def test_operating_system_errors_keep_their_message(json_logs: Logs):
    try:
        open("/nonexistent/" + SECRET)  # noqa: PTH123, SIM115
    except OSError:
        logging.getLogger("d2llm.store").exception("cannot read")
    (record,) = json_logs.records
    assert record["exception"].splitlines()[-1] == "FileNotFoundError: No such file or directory"
    assert record["event"] == "cannot read"


def test_text_log_format(capsys: pytest.CaptureFixture[str]):
    stop = start_logs(ServeSettings())
    client = tiny_client()
    app_of(client).add_route("/named", lambda _: Response(status_code=HTTPStatus.OK))  # as the agent protocol does
    client.get("/v1/passages/p1")
    client.get("/named")
    logging.getLogger("uvicorn.error").info("Started")
    stop()
    first, named, last = capsys.readouterr().err.splitlines()
    assert "route=/v1/passages/{passage_id}" in first
    assert all("status=200" in line for line in (first, named))
    assert "Started" in last


def test_stopping_restores_the_loggers():
    logger = logging.getLogger("d2llm")
    before = (logger.handlers[:], logger.level, logger.propagate)
    start_logs(ServeSettings(), io.StringIO())()
    assert (logger.handlers, logger.level, logger.propagate) == before


def test_the_student_metric_shows_the_current_student():
    telemetry, students = Telemetry(), [{"name": "first", "fingerprint": "f1"}]
    assert not any(name.startswith("d2llm_student") for name, _ in samples(telemetry))
    for _ in range(2):  # the application may start twice
        telemetry.watch_student("docs", lambda: students[-1])
    students.append({"name": "second", "fingerprint": "f2"})
    metrics = {labels for name, labels in samples(telemetry) if name == "d2llm_student_info"}
    assert metrics == {(("fingerprint", "f2"), ("index", "docs"), ("name", "second"))}
