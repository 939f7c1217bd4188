"""`d2llm serve` in a separate process, queried over HTTP."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import pytest

pytest.importorskip("fastapi", reason="needs FastAPI: pip install 'd2llm[serve]'")

from fastapi import FastAPI
from prometheus_client.parser import text_string_to_metric_families

from d2llm.server import app, running
from d2llm.server.keys import add_key
from d2llm.server.running import listen
from d2llm.server.settings import ServeSettings
from e2e.command_line import d2llm, fail, succeed
from tiny_server import tiny_passages, write_tiny_index, write_tiny_student


def start(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "d2llm", "serve", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "COLUMNS": "200"},
    )


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_index(tmp_path_factory.mktemp("serve"))


class Server:
    def __init__(self, index: Path, folder: Path) -> None:
        self.keys_file, self.report = folder / "keys.json", folder / "report.json"
        self.key = add_key(self.keys_file, "writer", "write")
        arguments = ("--port", 0, "--keys-file", self.keys_file, "--json", self.report, "--set", "log_format=json")
        self.process = start(index, *arguments)
        assert self.process.stdout is not None
        self.line = self.process.stdout.readline()
        self.url = json.loads(self.report.read_text())["result"]["url"]

    def ask(self, path: str, body: object = None) -> httpx2.Response:
        headers = {"Authorization": f"Bearer {self.key}"}
        if body is None:
            return httpx2.get(self.url + path, headers=headers)
        return httpx2.post(self.url + path, json=body, headers=headers)


@pytest.fixture(scope="module")
def server(index: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for all tests of this file; the last test stops it."""
    started = Server(index, tmp_path_factory.mktemp("server"))
    yield started
    started.process.kill()
    started.process.communicate()


def test_a_port_in_use_is_reported_before_loading():
    with listen("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        fail("serve", "no-such-index", "--port", port, containing=[f"port {port} of 127.0.0.1 is in use"])


@pytest.mark.parametrize("option", ["--teacher", "--writer"])
def test_a_model_that_only_searches_use_needs_an_index(option: str, index: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(app, "make_app", lambda settings: pytest.fail("an app was made"))
    arguments = ("serve", "--student", index.parent / "student-0", option, "smollm2", "--port", 0)
    fail(*arguments, containing=[f"a {option[2:]} works on searches, and there is no index", "leave"])


@pytest.mark.parametrize("content", [None, "folder", "student"])
def test_a_folder_without_an_index_is_reported_before_loading(content: str | None, tmp_path, monkeypatch):
    folder = tmp_path / "some.index"
    if content == "folder":
        folder.mkdir()
    elif content == "student":
        write_tiny_student(tmp_path).rename(folder)
    monkeypatch.setattr(app, "make_app", lambda settings: pytest.fail("an app was made"))
    fail("serve", folder, "--port", 0, containing=["some.index"])
    (line,) = d2llm("serve", folder, "--port", 0).stderr.splitlines()  # nothing is printed before it
    assert ("a 'index' is needed" if content == "student" else "is not a d2llm index folder") in line


def test_several_indexes_are_served_by_their_names(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    served: list[object] = []

    def run_app(app: FastAPI, settings: ServeSettings, *_: object, on_ready: Callable[[], None], **__: object) -> None:
        served.append(settings.index)
        on_ready()

    monkeypatch.setattr(running, "run_app", run_app)
    report = tmp_path / "report.json"
    line = succeed("serve", index, f"faq={index}", "--port", 0, "--json", report).stdout
    assert served == [{"index": index, "faq": index}]
    assert line.startswith(f"d2llm serves {index}, faq={index} on http://127.0.0.1:")
    assert json.loads(report.read_text())["result"]["settings"]["index"] == {"index": str(index), "faq": str(index)}


def test_without_a_key_only_health_and_static_pages_are_open(server: Server):
    """Every other route of the real server needs a key; a new route without one has to be listed here."""
    schema = httpx2.get(server.url + "/openapi.json").json()
    open_routes = set()
    for path, methods in schema["paths"].items():
        for method in methods:
            address = server.url + path.replace("{", "").replace("}", "")
            answer = httpx2.request(method.upper(), address, json={} if method == "post" else None)
            if answer.status_code != 401:
                open_routes.add((method, path))
    assert open_routes == {("get", "/health")}
    for path in ("/", "/docs", "/page/main.js"):
        assert httpx2.get(server.url + path).status_code == 200
    assert httpx2.get(server.url + "/evaluation").status_code == 401


def test_it_serves_from_its_first_line_until_sigterm(server: Server, index: Path):
    assert re.fullmatch(
        rf"d2llm serves {re.escape(str(index))} on {server.url} \(page {server.url}/, API {server.url}/docs\)\n",
        server.line,
    )
    assert httpx2.get(server.url + "/health").json()["status"] == "ready"
    assert httpx2.post(server.url + "/v1/search", json={"query": "the cat"}).status_code == 401
    response = server.ask("/v1/search", {"query": "the cat by the sea", "top_k": 3})
    assert len(response.json()["passages"]) == 3
    upserted = server.ask("/v1/passages", {"passages": [{"id": "new", "text": "the dog by the house"}]})
    assert upserted.json()["num_added"] == 1
    assert server.ask("/v1/index/reload", {}).status_code == 403

    families = text_string_to_metric_families(server.ask("/metrics").text)
    samples = {
        (sample.name, *(sample.labels[name] for name in sorted(sample.labels))): sample.value
        for family in families
        for sample in family.samples
    }
    assert samples["d2llm_index_passages", "index"] == len(tiny_passages()) + 1
    assert samples["d2llm_http_requests_total", "index", "POST", "/v1/search", "200"] == 1
    assert samples["d2llm_stage_seconds_count", "encode"] >= 1

    server.process.send_signal(signal.SIGHUP)
    server.process.send_signal(signal.SIGTERM)
    _, errors = server.process.communicate(timeout=60)
    assert server.process.returncode == 0
    records = [json.loads(line) for line in errors.splitlines()]
    requests = {
        record["route"]: record for record in records if record["event"] == "request" if record["status"] == 200
    }
    assert (requests["/v1/search"]["key"], requests["/v1/search"]["num_items"]) == ("writer", 1)
    assert requests["/v1/passages"]["num_items"] == 1
    assert "ready" in [record["event"] for record in records]
    for secret in ("the cat", "the dog", server.key):
        assert secret not in errors
